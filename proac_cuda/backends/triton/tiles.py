"""Tile sizes by dtype, number of channels and classes, and architecture.

KB classes, BM pixels and BD channels make the blocks of the products. DO is the number of channels whose gradient a program
makes over blocks of classes, or over pixels, HELD of those whose prototypes stay in registers from one product to the other;
KEPT, where all classes are dealt with at once, the number of channels whose features do. What limits them is written beside
each choice; the compiled facts (registers, spills, shared memory) of every row stand in the table that
``benchmarks/compiled_facts.py`` prints.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

K_MULTIPLE = 32  #: to which classes are padded in memory; loads of blocks beyond that are masked
MAX_CHUNKS = 512  #: programs that share the pixels of a sum over classes
PROTOTYPE_PROGRAMS = 256  #: of the prototypes' gradient: one fits on a multiprocessor, of which there are 108 and more
FMA = ("sm_75",)  #: where Triton uses no tensor cores: products are made of multiply-adds in float32
AMPERE = "sm_80", "sm_86", "sm_89"  #: and Ada
INTERPRETER_BM = 256  #: the interpreter's time goes by the number of operations, hardly by their size


def round_up(value: int, multiple: int) -> int:
    """The next multiple, or the value itself."""
    return -(-value // multiple) * multiple


class Tiles(NamedTuple):
    """Block sizes of one kernel, and how it is compiled."""

    KB: int
    BM: int
    BD: int
    num_warps: int
    num_stages: int
    DO: int = 0
    KEPT: int = 0
    HELD: int = 0
    BLOCKS: int = 1  #: of KB classes, of which a program deals with that many
    LOOPED: bool = False  #: each float32 product stands in a loop of its own
    PIXEL_ROWS: bool = False  #: products are (BM, n): a matrix unit that takes 64 rows at a time gets pixels
    HOISTED: bool = True  #: what is the same for all tiles of a program is made once, and stays in registers
    max_registers: int = 0  #: of a thread; 0: the assembler's choice, which may spill some to hold more programs


def parts(dtype: torch.dtype, architecture: str) -> int:
    """In how many numbers of the features' dtype a prototype's is split; 1: it is float32, or float64."""
    return 2 if dtype in (torch.float16, torch.bfloat16) and architecture not in FMA else 1


def _power_of_two(value: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << (value - 1).bit_length()))


def forward_tiles(
    dtype: torch.dtype, channels: int, classes: int, architecture: str, more_options: bool = False
) -> Tiles:
    """Of `class_statistics`: all classes in one program up to 256, so that the features are read once.

    ``more_options``, here and below: weights, sampled sets, the twin or diagnostics, which take registers of their own.
    """
    channel_block = _power_of_two(channels, 16, 32)
    nvidia = architecture.startswith("sm_")
    if dtype == torch.float64:  # left to itself ptxas spills 16 bytes on sm_100
        return Tiles(_power_of_two(classes, 16, 32), 32, 16, 4, 2, max_registers=255 if nvidia else 0)
    if architecture == "interpreter":
        return Tiles(_power_of_two(classes, 16, 256), INTERPRETER_BM, channel_block, 4, 2)
    if architecture in FMA:  # a thread holds 4 to 8 sums of a block of classes
        blocks = min(8, -(-classes // 32))
        pixel_block, warps = (64, 4 if classes <= 32 else 8) if blocks <= 3 else (32, 8)
        return Tiles(_power_of_two(classes, 16, 32), pixel_block, 16, warps, 2, BLOCKS=blocks)
    if classes > 32:
        return _many_classes(dtype, classes, architecture, more_options)
    warps, registers = 4, 0
    three_programs = (classes <= 16 or architecture in AMPERE) if more_options else architecture == "sm_120"
    if dtype != torch.float32 and three_programs:
        # As many on a multiprocessor. Left to itself ptxas takes 128 to 220, or spills 8 bytes, by Triton's version.
        registers = 168 if nvidia else 0
    elif more_options or (dtype == torch.float32 and architecture not in (*AMPERE, "sm_90")):
        warps = 8
    return Tiles(_power_of_two(classes, 16, 32), 64, channel_block, warps, 2, max_registers=registers)


def _many_classes(dtype: torch.dtype, classes: int, architecture: str, more_options: bool) -> Tiles:
    """Of `class_statistics` for more than 32 classes: blocks of 32, which take turns in registers after the products.

    Each tile of pixels reads all prototypes, from the cache: the more pixels, the better, until registers spill.
    """
    blocks = min(8, -(-classes // 32))
    # S takes up to 80 registers of a thread. With more options 128 pixels spill 16 bytes on sm_100.
    wide = architecture != "sm_120" and not (architecture == "sm_100" and more_options)
    pixel_block = 128 if dtype != torch.float32 and blocks <= 5 and wide else 64
    # On sm_100 else up to 24 bytes are spilled; on other GPUs this costs 8 to 24.
    anew = architecture == "sm_100" and pixel_block == 128 and blocks == 5
    return Tiles(32, pixel_block, 16, 8, 2, BLOCKS=blocks, HOISTED=not anew)


def backward_tiles(
    dtype: torch.dtype, channels: int, classes: int, architecture: str, more_options: bool = False
) -> Tiles:
    """Of the feature gradient: DO = 0 for all classes at once, DO > 0 for blocks of classes one after the other.

    KB < BM, so that Triton lays the warps along the pixels, and not along the classes. KEPT and DO are the largest under
    which no register spills; a thread holds that many x BM / 256 features, and with DO as many sums. With DO 16-bit features
    lie in shared memory, 32 to 64 KB, and sums alone in registers.
    """
    if architecture in FMA and dtype != torch.float64:
        return _gradient_without_tensor_cores(dtype, channels, classes)
    channel_block = _power_of_two(channels, 16, 32)
    warps, pixel_block = 8, 64
    one_block, held, stages = 32, 256, 1
    if dtype == torch.float64:
        channel_block, warps, pixel_block = 16, 4, 32
        one_block, held = 16, 64
        stages = 2 if architecture in ("sm_86", "sm_89", "sm_90") else 1  # the other spills 8 to 32 bytes
    if architecture == "interpreter":
        pixel_block = INTERPRETER_BM
    own = _power_of_two(channels, channel_block, held)
    sizes: dict[str, Any] = {"BM": pixel_block, "BD": channel_block, "num_warps": warps, "num_stages": stages}
    sizes["LOOPED"] = dtype == torch.float32  # else 8 to 184 bytes are spilled
    if classes <= one_block:
        return Tiles(KB=_power_of_two(classes, 16, one_block), KEPT=own, **sizes)
    if channels > held and classes <= 256 and dtype != torch.float64:
        if dtype == torch.float32 and architecture in ("sm_100", "sm_120") and classes <= 64:
            sizes["BD"] = 16  # 16 to 24 bytes are spilled with 32, at 40 classes
        return Tiles(KB=16 if dtype == torch.float32 else 32, KEPT=0, **sizes)
    held_prototypes = own  # or as much less as it takes that no register spills
    if dtype in (torch.float16, torch.bfloat16) and architecture in ("sm_86", "sm_89", "sm_90") and not more_options:
        sizes["max_registers"] = 255  # spares 8 to 16 bytes under Triton 3.6 and 3.8; with options it costs 8
    if dtype in (torch.float16, torch.bfloat16) and architecture == "sm_90" and channels <= held:
        # Both factors come from shared memory, so that registers are for sums alone. On sm_100, whose products are made in
        # tensor memory, Triton 3.6 asks for more of it than there is, and 3.9 spills 72 bytes.
        sizes |= {"BM": 128, "BD": min(own, 64), "PIXEL_ROWS": True}
        held_prototypes = 192 if own == 256 and more_options else own  # Triton 3.9 spills 8 bytes with all of them
        return Tiles(KB=16, DO=own, HELD=held_prototypes, **sizes)
    if dtype == torch.float32:
        held_prototypes = own * 5 // 8 if architecture == "sm_120" else own // 2
        if architecture == "sm_120" and own == 256 and more_options:  # else 8 to 24 bytes are spilled
            sizes["BD"], held_prototypes = 16, 32
        if architecture == "sm_100" and not more_options:
            sizes["BD"] = 16  # else 8 bytes are spilled where channels are last, under Triton 3.8
    elif (
        dtype != torch.float64 and architecture == "sm_80" and channels <= held
    ):  # elsewhere 16 to 64 bytes are spilled
        sizes["BM"], held_prototypes = 128, min(own, 128)
    return Tiles(KB=16, DO=own, HELD=held_prototypes, **sizes)


def _gradient_without_tensor_cores(dtype: torch.dtype, channels: int, classes: int) -> Tiles:
    """Of the feature gradient where products are multiply-adds, which fill pages of code.

    No loop over channels is unrolled, else a kernel takes 17 to 85 seconds to compile. Features are read a second time, by
    the same program.
    """
    if classes > 256:
        own = _power_of_two(channels, 16, 32)
        return Tiles(16, 64, 16, 8, 1, DO=own)
    pixel_block = 64 if classes <= 96 else 32 if classes <= 192 else 16  # more, and registers spill
    # 16 channels of float32 spill 8 bytes where all options are on, 32 of float16 16 bytes
    channel_block = _power_of_two(channels, 16, 32) if dtype == torch.float32 and classes <= 32 else 16
    return Tiles(_power_of_two(classes, 16, 32), pixel_block, channel_block, 8, 1)


def positive_sums_registers(dtype: torch.dtype, architecture: str) -> int:
    """As :attr:`Tiles.max_registers`: Triton 3.6 spills 8 bytes at 72 to hold a seventh program on a multiprocessor."""
    return 80 if architecture == "sm_80" and dtype == torch.float32 else 0


def prototype_tiles(
    dtype: torch.dtype,
    channels: int,
    classes: int,
    architecture: str,
    more_options: bool = False,
    channels_last: bool = False,
) -> Tiles:
    """Of the prototypes' gradient: BLOCKS blocks (KB, DO) of it are summed in registers over a chunk.

    KB < BM and KB < BD, so that Triton lays the warps along pixels and channels: else each makes all of the products. Where
    channels are last the addresses of a tile are few, and making them anew for each costs up to 60 registers; of planes,
    keeping them does.
    """
    kb, own = _power_of_two(classes, 16, 32), _power_of_two(channels, 16, 256)
    if architecture in FMA and dtype != torch.float64:
        return Tiles(kb, 32, 16, 4, 1, DO=min(own, 64), HOISTED=False)
    if architecture == "interpreter":
        return Tiles(kb, INTERPRETER_BM, min(own, 64), 4, 1, DO=own)
    if dtype == torch.float64:
        # BD=16 spills 8 bytes on sm_90 under Triton 3.6.
        return Tiles(16, 16, min(own, 32), 4, 1, DO=min(own, 64), HOISTED=False)
    blocks = 1 if classes <= 16 else 2  # more, and registers spill
    if dtype == torch.float32:  # twice the registers for features and operands: not all 256 channels fit
        if more_options or architecture == "sm_100":
            blocks = 1
        # Triton 3.9 spills 8 to 32 bytes to hold more programs at a time; of PROTOTYPE_PROGRAMS a multiprocessor has 2 or 3.
        registers = 255 if architecture.startswith("sm_") else 0
        sizes: dict[str, Any] = {"DO": min(own, 128), "BLOCKS": blocks, "HOISTED": channels_last}
        return Tiles(16, 32, min(own, 32), 4, 1, max_registers=registers, **sizes)
    if architecture in ("sm_100", "sm_120") and channels_last and own == 256 and classes > 16 and not more_options:
        # Two blocks of 16 spill 8 to 32 bytes here, one of 32 does so elsewhere.
        return Tiles(32, 64, 64, 8, 1, own, HOISTED=False)
    return Tiles(16, 64, min(own, 64), 8, 1, own, BLOCKS=blocks, HOISTED=channels_last)
