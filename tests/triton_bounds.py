"""Triton launches in the interpreter with the bounds of every access checked.

An access is wrong where it lies in no array of its launch; within one, the values are for other tests to compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

MARGIN = 1 << 16  #: bytes around each array: an access beside one never falls into another


class OutOfBounds(Exception):
    """An access outside every array of the launch."""


class Bounds:
    """Runs launches as ``launch.run`` does, each array in a buffer of its own between margins. ``kernels`` has their names."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self._ranges = np.empty((0, 2), dtype=np.int64)

    def run(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        self.kernels.add(kernel.__name__)
        copies: list[tuple[Tensor, Tensor]] = []
        arguments = {name: _copied(value, copies) for name, value in arguments.items()}
        self._ranges = np.array([(c.data_ptr(), c.data_ptr() + _extent(c)) for _, c in copies])
        with self._checked():
            kernel[grid](**arguments)
        for tensor, copy in copies:
            tensor.copy_(copy)

    def _check(self, pointers: Any, mask: np.ndarray) -> None:
        """``pointers`` is the interpreter's tensor of them."""
        first = pointers.data[mask].astype(np.int64).reshape(-1, 1)
        size = max(1, pointers.dtype.scalar.element_ty.primitive_bitwidth // 8)
        inside = (first >= self._ranges[:, 0]) & (first + size <= self._ranges[:, 1])
        outside = int((~inside.any(axis=1)).sum())
        if outside:
            raise OutOfBounds(f"{outside} of {len(first)} accesses lie in no array of the launch")

    @contextmanager
    def _checked(self) -> Iterator[None]:
        builder = interpreter.InterpreterBuilder
        masks = {"create_masked_load": (0, 1), "create_masked_store": (0, 2), "create_atomic_rmw": (1, 3)}
        saved = {name: getattr(builder, name) for name in masks}
        for name, (pointers, mask) in masks.items():
            setattr(builder, name, self._checking(saved[name], pointers, mask))
        try:
            yield
        finally:
            for name, function in saved.items():
                setattr(builder, name, function)

    def _checking(self, function: Any, pointers: int, mask: int) -> Any:
        def call(builder: Any, *arguments: Any) -> Any:
            self._check(arguments[pointers], arguments[mask].data)
            return function(builder, *arguments)

        return call


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if not tensor.numel():
        return 0
    elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return elements * tensor.element_size()


def _copied(value: Any, copies: list[tuple[Tensor, Tensor]]) -> Any:
    """``value`` with a copy of each tensor, and of each in a named tuple, in its place; ``copies`` gets the pairs."""
    if isinstance(value, Tensor):
        copies.append((value, _between_margins(value)))
        return copies[-1][1]
    if hasattr(value, "_fields"):
        return type(value)(*(_copied(part, copies) for part in value))
    return value


def _between_margins(tensor: Tensor) -> Tensor:
    """A copy with the same strides in a buffer of its own."""
    size = tensor.element_size()
    buffer = torch.zeros((2 * MARGIN + _extent(tensor)) // size, dtype=tensor.dtype)
    copy = torch.as_strided(buffer, tensor.shape, tensor.stride(), MARGIN // size)
    return copy.copy_(tensor.detach())
