"""Models for the tests of the regularizer."""

from __future__ import annotations

import torch
from torch import nn


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.classifier = nn.Conv2d(12, 5, 1)

    def forward(self, images):
        return self.classifier(self.backbone(images))


def batch():
    return torch.randn(2, 3, 16, 20), torch.randint(0, 5, (2, 16, 20))


class Says(nn.Module):
    """Gives whatever it is told to make of a map (B, 6, H, W)."""

    def __init__(self, make):
        super().__init__()
        self.convolution, self.make = nn.Conv2d(3, 6, 1), make

    def forward(self, images):
        return self.make(self.convolution(images))


def tokens_of(x):
    return x.flatten(2).transpose(1, 2)


def with_prefix(x, count):
    return torch.cat([x.new_zeros(len(x), count, x.shape[1]), tokens_of(x)], 1)
