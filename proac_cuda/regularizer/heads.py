"""Projection heads: from a backbone's channels to embedding dimensions, pixel by pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..stages.validation import as_int, where_channels_are

HEAD_KINDS = ("linear", "mlp")
_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class _PixelConvolution(nn.Conv2d):
    r"""A 1x1 convolution of maps (B, C, \*spatial) with one, two or three spatial axes; its weight is (D, C, 1, 1)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim not in _CONVOLUTIONS:
            raise ValueError(
                f"head: expected a map (B, C, *spatial) of 1 to 3 spatial axes, got {tuple(features.shape)}"
            )
        if features.shape[1] != self.in_channels:
            remedy = where_channels_are(features, self.in_channels)
            raise ValueError(
                f"head: expected {self.in_channels} channels (axis 1), got a map {tuple(features.shape)}; "
                + (remedy or f"make the head with in_channels={features.shape[1]}")
            )
        weight = self.weight.view(self.out_channels, self.in_channels, *[1] * (features.ndim - 2))
        return _CONVOLUTIONS[features.ndim](features, weight, self.bias)


class _LazyPixelConvolution(nn.LazyConv2d):
    """The same, whose channels are those of the first map. Its parameters are there, and in the optimizer, before that."""

    cls_to_become = _PixelConvolution  # type: ignore[assignment]

    forward = _PixelConvolution.forward  # type: ignore[assignment]  # of the first call, which begins before it becomes one

    def __init__(self, out_channels: int | None) -> None:
        super().__init__(out_channels or 0, 1)

    def initialize_parameters(self, features: Tensor, *others: Any) -> None:
        if self.has_uninitialized_params():
            with torch.inference_mode(False):  # else they could not be trained later
                self.in_channels = features.shape[1]
                self.out_channels = self.out_channels or self.in_channels
                self.weight.materialize((self.out_channels, self.in_channels, 1, 1))
                if self.bias is not None:
                    self.bias.materialize((self.out_channels,))
                self.reset_parameters()
        else:  # by a checkpoint
            self.out_channels, self.in_channels = self.weight.shape[:2]


class ProjectionHead(nn.Sequential):
    r"""From backbone channels to embedding dimensions, pixel by pixel: (B, in_channels, \*spatial) to (B, D, \*spatial).

    Maps may have one, two or three spatial axes; the parameters are the same for all.

    Args:
        in_channels: channels of the feature map. None: those of the first map that comes; until then its parameters are
            PyTorch's ``UninitializedParameter``, which an optimizer takes (of torch.optim's Adagrad alone raises) and trains
            once they are there.
        embedding_dim: D.
        kind: "linear", the authors' one 1x1 convolution without normalisation or activation; or "mlp", two of them with a
            ReLU between.

    Raises:
        TypeError: numbers that are no int. ValueError: numbers below 1; an unknown kind; a map of other channels.
    """

    def __init__(self, in_channels: int | None, embedding_dim: int, kind: str = "linear") -> None:
        if kind not in HEAD_KINDS:
            raise ValueError(f'kind: expected "linear" or "mlp", got {kind!r}')
        embedding_dim = as_int("embedding_dim", embedding_dim, 1)
        if in_channels is not None:
            in_channels = as_int("in_channels", in_channels, 1, remedy="; None takes those of the first map")

        def convolution(out_channels: int | None) -> nn.Module:
            if in_channels is None:
                return _LazyPixelConvolution(out_channels)
            return _PixelConvolution(in_channels, out_channels or in_channels)

        first = [] if kind == "linear" else [convolution(None), nn.ReLU()]
        super().__init__(*first, convolution(embedding_dim))
