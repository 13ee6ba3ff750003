"""What is computed: shapes, classes, dtype and layout of one measurement, and its inputs, rotated beyond the caches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -1  # not 255, which is a class where there are 1000
IGNORED_SHARE = 0.05  # of the pixels
MOST_INPUTS = 2048
TEMPERATURE = 0.1
LAYOUTS = ("contiguous", "channels_last", "channel_slice")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Problem:
    """One setting of the loss. Labels are random, int64, at the features' resolution; a twentieth is ignored."""

    name: str
    shape: tuple[int, ...]  #: (B, D, *spatial) or (N, D)
    classes: int
    dtype: str = "float32"
    layout: str = "contiguous"  #: one of LAYOUTS; rows (N, D) are contiguous
    num_negatives: int | None = None

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def pixels(self) -> int:
        return self.shape[0] * math.prod(self.shape[2:])

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def feature_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def label_shape(self) -> tuple[int, ...]:
        return (self.shape[0], *self.shape[2:])


class Arguments(NamedTuple):
    """The tensors of one call; the features are a leaf that requires a gradient."""

    features: Tensor
    labels: Tensor
    prototypes: Tensor


class Inputs:
    """As many inputs of one problem as it takes to make up ``rotated_bytes``, used in turn; 2 to MOST_INPUTS.

    All are views of one pool of normal numbers, so that a call does not find its features in a cache smaller than that.
    """

    def __init__(self, problem: Problem, device: str = "cpu", rotated_bytes: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(0)
        elements = math.prod(problem.shape) * (2 if problem.layout == "channel_slice" else 1)
        self.count = min(max(2, math.ceil(rotated_bytes / problem.feature_bytes)), MOST_INPUTS)
        pool = _pool(elements * self.count, problem.torch_dtype, device)
        labels = torch.randint(
            0, problem.classes, (self.count, *problem.label_shape), generator=generator, device=device
        )
        labels[torch.rand(labels.shape, generator=generator, device=device) < IGNORED_SHARE] = IGNORED
        prototypes = torch.randn(problem.classes, problem.channels, generator=generator, device=device)
        prototypes = prototypes.to(torch.promote_types(problem.torch_dtype, torch.float32))
        self.arguments = [
            Arguments(
                _with_layout(pool[i * elements : (i + 1) * elements], problem).requires_grad_(), labels[i], prototypes
            )
            for i in range(self.count)
        ]
        self.turn = 0

    def next(self) -> Arguments:
        """The input whose turn it is, without the gradient of its last one."""
        arguments = self.arguments[self.turn % self.count]
        self.turn += 1
        arguments.features.grad = None
        return arguments

    def drop_gradients(self) -> None:
        for arguments in self.arguments:
            arguments.features.grad = None


_pools: dict[tuple[torch.dtype, str], Tensor] = {}


def _pool(elements: int, dtype: torch.dtype, device: str) -> Tensor:
    """At least that many normal numbers; the last pool is used again where it is large enough, else it is given up."""
    pool = _pools.get((dtype, device))
    if pool is None or pool.numel() < elements:
        _pools.clear()
        pool = None
        generator = torch.Generator(device).manual_seed(1)
        pool = torch.empty(elements, dtype=dtype, device=device).normal_(generator=generator)
        _pools[dtype, device] = pool
    return pool


def _with_layout(values: Tensor, problem: Problem) -> Tensor:
    """A view of ``values`` with the problem's shape and strides."""
    batch, channels, *spatial = problem.shape
    if problem.layout == "channels_last":
        return values.view(batch, *spatial, channels).movedim(-1, 1)
    if problem.layout == "channel_slice":
        return values.view(batch, 2 * channels, *spatial)[:, channels:]
    return values.view(problem.shape)
