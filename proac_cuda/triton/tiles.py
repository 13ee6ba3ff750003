"""Tile sizes by dtype, number of channels and classes, and architecture.

KB classes, BM pixels and BD channels make the blocks of the products; DO is the number of channels whose features and
gradient a program of the backward pass deals with, DG the number whose gradient grows at once over several blocks of
classes. What limits them is written beside each choice; the compiled
facts (registers, spills, shared memory) of every row stand in the table that ``benchmarks/compiled_facts.py`` prints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_CHUNKS = 512  #: programs that share the pixels of a sum over classes
MAX_PROTOTYPE_CHUNKS = 64  #: the same for the prototypes' gradient, of which each chunk keeps K x D numbers
INTERPRETER_BM = 256  #: the interpreter's time goes by the number of operations, hardly by their size


class Tiles(NamedTuple):
    """Block sizes of one kernel, and how it is compiled."""

    KB: int
    BM: int
    BD: int
    DO: int
    DG: int
    num_warps: int
    num_stages: int


def _power_of_two(value: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << (value - 1).bit_length()))


def forward_tiles(dtype: torch.dtype, channels: int, classes: int, architecture: str) -> Tiles:
    """Of `class_statistics`: all classes in one block where that fits, so that the features are read once."""
    channel_block = _power_of_two(channels, 16, 32)
    if dtype == torch.float64:
        return Tiles(_power_of_two(classes, 16, 32), 32, 16, 0, 0, 4, 2)
    kb = _power_of_two(classes, 16, 256)
    pixel_block = 64 if kb < 256 else 32  # more, and registers spill
    if architecture == "interpreter":
        pixel_block = INTERPRETER_BM
    return Tiles(kb, pixel_block, channel_block, 0, 0, 8 if kb > 64 else 4, 2)


def backward_tiles(dtype: torch.dtype, channels: int, classes: int, architecture: str) -> Tiles:
    """Of the feature gradient. A thread holds DO x BM / 256 features and, of several blocks of classes, DG x BM / 256 sums.

    KB < BM, so that Triton lays the warps along the pixels, 8 to a warp, and not along the classes. The choices below are
    the largest under which no register spills; with DO < D the features are read once more for each DO channels.
    """
    channel_block = _power_of_two(channels, 16, 32)
    kb = _power_of_two(classes, 16, 32)
    several = classes > 32  # blocks of classes
    held, grown = 256, 128
    if dtype == torch.float64:
        kb, held, grown = 16, 64, 64
    elif architecture == "sm_90":
        held = 128 if several and dtype != torch.float32 else 256
    elif architecture not in ("sm_80", "interpreter"):
        held = 128 if several or dtype == torch.float32 else 256
    if dtype == torch.float32 and several:
        kb = 16
    if dtype == torch.float16 and several:
        grown = 64
    own = _power_of_two(channels, channel_block, held)
    if architecture == "interpreter":
        return Tiles(kb, INTERPRETER_BM, channel_block, own, min(own, grown), 4, 1)
    if dtype == torch.float64:
        return Tiles(kb, 32, 16, own, min(own, grown), 4, 1)
    return Tiles(kb, 64, channel_block, own, min(own, grown), 8, 1)


def prototype_tiles(dtype: torch.dtype, channels: int, classes: int, architecture: str) -> Tiles:
    """Of the prototypes' gradient: a block of it (KB, DO) is summed in registers over a chunk."""
    kb = _power_of_two(classes, 16, 32)
    if architecture == "interpreter":
        return Tiles(kb, INTERPRETER_BM, _power_of_two(channels, 16, 32), _power_of_two(channels, 16, 128), 0, 4, 1)
    if dtype == torch.float64:
        return Tiles(16, 16, 16, _power_of_two(channels, 16, 64), 0, 4, 1)
    widest = 64 if dtype == torch.float32 else 128  # more, and registers spill
    return Tiles(kb, 32, _power_of_two(channels, 16, 32), _power_of_two(channels, 16, widest), 0, 4, 1)
