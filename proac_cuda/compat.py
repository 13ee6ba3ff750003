"""A call-compatible stand-in for the published PixelContrastLoss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .functional import proac_loss

_TEMPERATURE = 0.1


class PixelContrastLoss(nn.Module):
    """The published class's call, ``loss(feats, labels, queue)``, on this package's kernels.

    Mean over the classes that are present, temperature 0.1, every pixel of another class a negative. As there, labels may
    be float, (B, H, W) or (B, 1, H, W), and those outside [0, K) are dropped without a word; ``queue`` holds the
    prototypes in any shape that ``view(-1, D)`` takes, and gets no gradient. Unlike there, K is the number of prototypes
    rather than 19, and an all-ignored batch gives 0 rather than a crash.

    Args:
        cfg: taken and not used, as the published class does with its own.
    """

    def __init__(self, cfg: Any = None) -> None:
        super().__init__()

    def forward(self, feats: Tensor, labels: Tensor, queue: Tensor) -> Tensor:
        """feats (B, D, H, W), labels (B, h, w), queue (..., D): a scalar. ValueError: a queue of other channels."""
        if queue.numel() % feats.shape[1]:
            raise ValueError(
                f"queue: expected prototypes of {feats.shape[1]} channels, the axis 1 of feats {tuple(feats.shape)}, got shape "
                f"{tuple(queue.shape)}"
            )
        prototypes = queue.detach().reshape(-1, feats.shape[1])
        if labels.ndim == feats.ndim and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        labels = labels.detach().to(torch.int64)
        labels = labels.masked_fill((labels < 0) | (labels >= prototypes.shape[0]), -1)
        return proac_loss(feats, labels, prototypes, temperature=_TEMPERATURE, ignore_index=-1)
