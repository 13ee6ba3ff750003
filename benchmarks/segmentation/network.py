"""A compact segmentation network: a residual encoder and a feature pyramid, about one million parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    Both heads are one 1x1 convolution on the same feature map, as in the paper: the embedding head has neither
    normalisation nor activation. It serves the loss alone, and prediction can leave it out.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int = 128,
        widths: tuple[int, ...] = (32, 64, 128, 192),
        pyramid_width: int = 96,
    ):
        super().__init__()
        self.stem = conv(3, widths[0], stride=2)
        # Each stage halves the resolution: strides 4, 8, 16, 32 of the image.
        self.stages = nn.ModuleList(
            ResidualBlock(before, after, stride=2) for before, after in zip((widths[0], *widths), widths, strict=False)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, pyramid_width, 1) for width in widths)
        self.smooth = conv(pyramid_width, pyramid_width)
        self.classifier = nn.Conv2d(pyramid_width, num_classes, 1)
        self.embedding = nn.Conv2d(pyramid_width, embedding_dim, 1)

    def forward(self, images: Tensor, embed: bool = True) -> tuple[Tensor, Tensor | None]:
        """Logits, and the embeddings that the contrastive loss reads (None without `embed`)."""
        x = F.relu(self.stem(images))
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        # From the coarsest level to the finest, each adds its detail to the context from above.
        x = self.lateral[-1](levels[-1])
        for level, lateral in zip(levels[-2::-1], list(self.lateral)[-2::-1], strict=True):
            x = lateral(level) + F.interpolate(x, size=level.shape[-2:], mode="bilinear", align_corners=False)
        x = F.relu(self.smooth(x))
        return self.classifier(x), self.embedding(x) if embed else None


def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Logits at the labels' resolution."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
