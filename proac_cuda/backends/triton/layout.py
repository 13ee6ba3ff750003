"""What the kernels take: where the pixels and labels of a call lie, in tuples, and what they are compiled for."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .pixels import TUPLE_UNIT
from .tiles import FMA, Tiles


def ceil_div(value: int, divisor: int) -> int:
    """Rounded up; Triton's own takes ten times as long on the host."""
    return -(-value // divisor)


class Map(NamedTuple):
    """Features (B, D, *spatial) whose spatial axes collapse, or their gradient."""

    data: Tensor
    strides: tuple[int, int, int]  #: (image, channel, pixel)


class Tiling(NamedTuple):
    """Tiles of pixels in chunks of neighbours; all but the first times TUPLE_UNIT. No tile crosses an image's end."""

    per_image: int  #: pixels
    tiles_per_image: int
    tiles: int
    tiles_per_chunk: int


class Sampling(NamedTuple):
    """Where :func:`.pixels.read_pixels` finds the label and the weight of a pixel. Strides and sizes times TUPLE_UNIT."""

    label_strides: tuple[int, ...]  #: of the images, and of each spatial axis
    weight_strides: tuple[int, ...]
    size: tuple[int, ...]  #: the features' spatial axes
    label_size: tuple[int, ...]
    scale: tuple[float, ...]  #: of :func:`nearest_scales`
    ignore_index: int


class Sets(NamedTuple):
    """The sampled sets, equation (2)."""

    thresholds: Tensor
    rng_state: Tensor


def sets_of(thresholds: Tensor | None, rng_state: Tensor | None) -> Sets | None:
    """None where all pixels of other classes are taken."""
    return None if thresholds is None or rng_state is None else Sets(thresholds, rng_state)


class Case(NamedTuple):
    """What the large kernels are compiled for: sizes, the blocks of :class:`.tiles.Tiles`, types, the kind of GPU."""

    K: int
    D: int
    K_PAD: int  #: phat is (PARTS, K_PAD, D_PAD)
    D_PAD: int
    PIXEL_ANCHOR: bool
    KB: int
    BM: int
    BD: int
    BLOCKS: int
    DO: int
    KEPT: int
    HELD: int
    PIXEL_ROWS: bool
    LOOPED: bool
    HOISTED: bool
    REAL: Any  #: of sums
    PART: Any  #: of phat, and of what is multiplied with it
    PARTS: int
    TENSOR_CORES: bool  #: NVIDIA's
    PRECISION: str  #: of products in float32
    INDEX: Any  #: of a pixel
    INTERPRETED: bool
    REGISTERS: str | None  #: whose names :func:`.vectors.opaque` uses; the interpreter has none


_TYPES = {
    torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
}  # fmt: skip


@functools.lru_cache(maxsize=256)
def case_of(
    tile: Tiles,
    real: torch.dtype,
    part: torch.dtype,
    shape: torch.Size,
    padded: torch.Size,
    index_type: Any,
    pixel_anchor: bool,
    architecture: str,
    interpreted: bool,
) -> Case:
    """For prototypes of the type ``real`` and shape (K, D), and phat of the type ``part`` and shape (PARTS, K_PAD, D_PAD)."""
    tensor_cores = architecture not in FMA and not architecture.startswith("gfx") and part != torch.float64
    return Case(
        K=shape[0], D=shape[1], K_PAD=padded[1], D_PAD=padded[2],
        PIXEL_ANCHOR=pixel_anchor, KB=tile.KB, BM=tile.BM, BD=tile.BD, BLOCKS=tile.BLOCKS, DO=tile.DO, KEPT=tile.KEPT,
        HELD=tile.HELD, PIXEL_ROWS=tile.PIXEL_ROWS, LOOPED=tile.LOOPED, HOISTED=tile.HOISTED,
        REAL=_TYPES[real], PART=_TYPES[part], PARTS=padded[0],
        TENSOR_CORES=tensor_cores,
        PRECISION="tf32x3" if tensor_cores and part == torch.float32 else "ieee",
        INDEX=index_type, INTERPRETED=interpreted,
        REGISTERS=None if interpreted else {"sm": "nvidia", "gf": "amd"}.get(architecture[:2]),
    )  # fmt: skip


class Pixels(NamedTuple):
    """How a call's pixels are laid out: ``images`` runs of ``per_image`` pixels at constant strides."""

    images: int
    per_image: int
    maps: list[Map]  #: the tensors asked about

    def index_type(self, labels: Tensor) -> Any:
        """The type of a pixel's index, and of its label's along each axis: 64 bits where 32 are too few."""
        return tl.int64 if max(self.images * self.per_image, *labels.shape) >= 2**31 else tl.int32

    def tiles(self, block: int) -> int:
        """Tiles of ``block`` pixels, in all images."""
        return self.images * ceil_div(self.per_image, block)

    def chunks(self, block: int, most: int) -> tuple[Tiling, int]:
        """Tiles of ``block`` pixels in at most ``most`` chunks, and their number, at least one: a function of N and block."""
        per_image, total = max(1, ceil_div(self.per_image, block)), self.tiles(block)
        per_chunk = max(1, ceil_div(total, most))
        return Tiling(self.per_image, *_unspecialised(per_image, total, per_chunk)), max(1, ceil_div(total, per_chunk))


def lay_out(*tensors: Tensor) -> Pixels:
    """Tensors (B, D, *spatial) whose spatial axes collapse. Images merge where each follows the last at the pixel stride."""
    batch, channels, spatial = tensors[0].shape[0], tensors[0].shape[1], tensors[0].shape[2:]
    per_image = spatial.numel()
    strides = []
    for tensor in tensors:
        pixel = next((s for n, s in reversed(list(zip(spatial, tensor.stride()[2:], strict=True))) if n != 1), 1)
        channel = tensor.stride(1) if channels != 1 else 1
        image = tensor.stride(0) if batch != 1 else 0
        if per_image == 1 and batch != 1:
            pixel = image
        strides.append((image, channel, pixel))
    if batch > 1 and all(image == pixel * per_image for image, _, pixel in strides):
        strides = [(0, channel, pixel) for _, channel, pixel in strides]
        batch, per_image = 1, batch * per_image
    return Pixels(batch, per_image, list(map(Map, tensors, strides)))


@functools.lru_cache(maxsize=256)
def nearest_scales(label_size: tuple[int, ...], size: tuple[int, ...], nearest_exact: bool) -> tuple[float, ...]:
    """float32(H) / float32(h) of each axis, 0 for "the same size"; last the shift of indices, 0 or, nearest-exact, 0.5."""
    ratios = (torch.tensor(label_size, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)).tolist()
    scales = [0.0 if h == big else ratio for h, big, ratio in zip(size, label_size, ratios, strict=True)]
    return (*scales, 0.5 if nearest_exact else 0.0)


def _unspecialised(*values: int) -> tuple[int, ...]:
    return tuple(value * TUPLE_UNIT for value in values)


def sampling(
    labels: Tensor, pixel_weight: Tensor | None, spatial: torch.Size, ignore_index: int, nearest_exact: bool
) -> Sampling:
    """How labels and weights are read for features of the size ``spatial``."""
    return Sampling(
        _unspecialised(*labels.stride()),
        _unspecialised(*(labels if pixel_weight is None else pixel_weight).stride()),
        _unspecialised(*(max(1, h) for h in spatial)),
        _unspecialised(*labels.shape[1:]),
        nearest_scales(tuple(labels.shape[1:]), tuple(spatial), nearest_exact),
        ignore_index,
    )
