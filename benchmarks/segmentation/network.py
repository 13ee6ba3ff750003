"""A compact segmentation network: a residual encoder and a feature pyramid, about one million parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proac_cuda import ProjectionHead


def conv(in_channels: int, out_channels: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.first = conv(in_channels, out_channels, stride=stride)
        self.second = conv(out_channels, out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv(in_channels, out_channels, size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class SegmentationNetwork(nn.Module):
    """Images (B, 3, H, W) to logits (B, K, H/4, W/4) and embeddings (B, D, H/4, W/4).

    Both heads read the same feature map. The embedding head serves the loss alone, and prediction can leave it out.
    It is one 1x1 convolution without normalisation or activation, as in the paper ("linear"), two of them with a ReLU
    between ("mlp"), or nothing at all ("none"): the embeddings are then the feature map, and D is its width.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int = 128,
        widths: tuple[int, ...] = (32, 64, 128, 192),
        pyramid_width: int = 96,
        head: str = "linear",
    ):
        super().__init__()
        self.embedding_dim = pyramid_width if head == "none" else embedding_dim
        self.stem = conv(3, widths[0], stride=2)
        # Each stage halves the resolution: strides 4, 8, 16, 32 of the image.
        self.stages = nn.ModuleList(
            ResidualBlock(before, after, stride=2) for before, after in zip((widths[0], *widths), widths, strict=False)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, pyramid_width, 1) for width in widths)
        self.smooth = conv(pyramid_width, pyramid_width)
        self.classifier = nn.Conv2d(pyramid_width, num_classes, 1)
        # Last, so that networks which differ in it alone start from the same weights elsewhere.
        self.embedding = nn.Identity() if head == "none" else ProjectionHead(pyramid_width, embedding_dim, head)

    def forward(self, images: Tensor, embed: bool = True) -> tuple[Tensor, Tensor | None]:
        """Logits, and the embeddings that the contrastive loss reads (None without `embed`)."""
        x = self.feature_map(images)
        return self.classifier(x), self.embedding(x) if embed else None

    def feature_map(self, images: Tensor) -> Tensor:
        """The last feature map, (B, pyramid_width, H/4, W/4), which both heads read."""
        x = F.relu(self.stem(images))
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        # From the coarsest level to the finest, each adds its detail to the context from above.
        x = self.lateral[-1](levels[-1])
        for level, lateral in zip(levels[-2::-1], list(self.lateral)[-2::-1], strict=True):
            x = lateral(level) + F.interpolate(x, size=level.shape[-2:], mode="bilinear", align_corners=False)
        return F.relu(self.smooth(x))


def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Logits at the labels' resolution."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
