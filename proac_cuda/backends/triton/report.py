"""What the tiles of a call mean on a GPU, by calculation: ``python -m proac_cuda tiles``.

Reads are counted as the kernels ask for them, from any cache or memory, over the bytes of the features. A tile of pixels reads
all prototypes, which lie in the L2 cache. What the twin reads beyond that, to normalise over
blocks of classes, is not counted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import tiles

#: names of GPUs as users know them, and what Triton calls their architecture; the start of a name is enough
GPUS = {
    "T4": "sm_75", "RTX 20": "sm_75", "A100": "sm_80", "A30": "sm_80", "A10": "sm_86", "A40": "sm_86", "RTX 30": "sm_86",
    "RTX A": "sm_86", "L4": "sm_89", "L40": "sm_89", "RTX 40": "sm_89", "H100": "sm_90", "H200": "sm_90", "GH200": "sm_90",
    "B200": "sm_100", "RTX 50": "sm_120", "RTX PRO": "sm_120", "MI200": "gfx90a", "MI210": "gfx90a", "MI250": "gfx90a",
    "MI300": "gfx942",
}  # fmt: skip


class Report(NamedTuple):
    """One kernel of a call."""

    kernel: str
    tile: tiles.Tiles
    features: float  #: read, over the features' bytes
    prototypes: float  #: read, over the features' bytes
    numbers: int  #: of S or of sums, and of features kept, that a thread holds


def architecture_of(gpu: str) -> str:
    """Of "A100", "NVIDIA A100-SXM4-80GB" or "sm_80" it is "sm_80". ValueError for an unknown name."""
    if gpu.startswith(("sm_", "gfx")):
        return gpu
    name = gpu.upper()
    for maker in ("NVIDIA ", "TESLA ", "GEFORCE ", "AMD ", "INSTINCT "):
        name = name.removeprefix(maker)
    for start in sorted(GPUS, key=len, reverse=True):
        if name.startswith(start):
            return GPUS[start]
    raise ValueError(f'GPU: expected "sm_80" and the like, or a name such as {", ".join(GPUS)}; got {gpu!r}')


def reports(architecture: str, dtype: torch.dtype, channels: int, classes: int, more_options: bool) -> list[Report]:
    """The three large kernels of a call, for features (N, channels) of ``dtype`` and prototypes (classes, channels)."""
    parts = tiles.parts(dtype, architecture)
    part_size = dtype.itemsize if parts == 2 else max(4, dtype.itemsize)
    arguments = dtype, channels, classes, architecture, more_options

    def prototype_reads(tile: tiles.Tiles, rows: int, wide: float) -> float:
        """``rows`` of ``wide`` channels, for each tile of BM pixels."""
        return rows * wide * parts * part_size / (tile.BM * channels * dtype.itemsize)

    forward = tiles.forward_tiles(*arguments)
    held = forward.BLOCKS * forward.KB
    programs = -(-classes // held)
    rows = min(programs * held, tiles.round_up(classes, tiles.K_MULTIPLE))
    result = [
        Report("class_statistics", forward, programs, prototype_reads(forward, rows, channels), _share(forward, held))
    ]

    backward = tiles.backward_tiles(*arguments)
    rows = tiles.round_up(classes, backward.KB)
    if backward.DO:
        programs = -(-channels // backward.DO)
        features, wide = 1.0, 2 * channels - min(channels, backward.HELD)
        if programs > 1:
            features = programs * (1 + (backward.DO + rows // backward.KB * channels) / channels)
            wide = programs * (channels + backward.DO)
        in_registers = parts == 1 or programs > 1  # the features; else they lie in shared memory
        numbers = _share(backward, backward.KB + (1 + in_registers) * backward.DO)
        result.append(Report("gradient_by_classes", backward, features, prototype_reads(backward, rows, wide), numbers))
    else:
        kept = min(channels, backward.KEPT)
        wide, numbers = 2 * channels, _share(backward, rows + backward.KEPT)
        features = 2 - kept / channels
        result.append(Report("feature_gradient", backward, features, prototype_reads(backward, rows, wide), numbers))

    own = tiles.prototype_tiles(*arguments)
    held = own.BLOCKS * own.KB
    programs = -(-classes // held) * -(-channels // own.DO)
    features = programs * (1 if channels <= own.DO else 1 + own.DO / channels)
    prototypes = prototype_reads(own, held, programs * channels)
    numbers = (held * own.DO + (held + min(channels, own.DO)) * own.BM) // (32 * own.num_warps)
    result.append(Report("prototype_gradient", own, features, prototypes, numbers))
    return result


def _share(tile: tiles.Tiles, rows: int) -> int:
    """Numbers of a matrix (rows, BM) that a thread holds."""
    return rows * tile.BM // (32 * tile.num_warps)
