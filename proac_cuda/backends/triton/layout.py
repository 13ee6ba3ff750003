"""Where the pixels and labels of a call lie, in the form that the kernels take."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pixels import TUPLE_UNIT


class Pixels(NamedTuple):
    """How a call's pixels are laid out: ``images`` runs of ``per_image`` pixels at constant strides."""

    images: int
    per_image: int
    strides: list[tuple[int, int, int]]  #: (image, channel, pixel) of each tensor asked about

    def index_type(self, labels: Tensor) -> Any:
        """The type of a pixel's index, and of its label's along each axis: 64 bits where 32 are too few."""
        return tl.int64 if max(self.images * self.per_image, *labels.shape) >= 2**31 else tl.int32

    def grid(self, block: int) -> tuple[int, int]:
        """Tiles of ``block`` pixels: in an image, in all. No tile crosses an image's end."""
        per_image = triton.cdiv(self.per_image, block)
        return per_image, self.images * per_image

    def chunks(self, block: int, most: int) -> dict[str, int]:
        """Tiles dealt out in at most ``most`` chunks of neighbours, at least one: a function of N and the tile size."""
        per_image, total = self.grid(block)
        per_chunk = max(1, triton.cdiv(total, most))
        return {"tiles_per_image": max(1, per_image), "tiles": total, "tiles_per_chunk": per_chunk}


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
        return Pixels(1, batch * per_image, [(0, channel, pixel) for _, channel, pixel in strides])
    return Pixels(batch, per_image, strides)


@functools.lru_cache(maxsize=256)
def nearest_scales(label_size: tuple[int, ...], size: tuple[int, ...], nearest_exact: bool) -> tuple[float, ...]:
    """float32(H) / float32(h) of each axis, 0 for "the same size"; last the shift of indices, 0 or, nearest-exact, 0.5."""
    ratios = (torch.tensor(label_size, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)).tolist()
    scales = [0.0 if h == big else ratio for h, big, ratio in zip(size, label_size, ratios, strict=True)]
    return (*scales, 0.5 if nearest_exact else 0.0)


def label_arguments(
    labels: Tensor, pixel_weight: Tensor | None, spatial: torch.Size, ignore_index: int, nearest_exact: bool
) -> dict[str, Any]:
    """The arguments of `read_pixels`, one number for each spatial axis.

    Strides have one for the images before those, ``scale`` one for the shift behind them.
    """

    def unspecialised(*values: int) -> tuple[int, ...]:
        return tuple(value * TUPLE_UNIT for value in values)

    return {
        "labels": labels,
        "weights": pixel_weight,
        "label_strides": unspecialised(*labels.stride()),
        "weight_strides": unspecialised(*(labels if pixel_weight is None else pixel_weight).stride()),
        "size": unspecialised(*(max(1, h) for h in spatial)),
        "label_size": unspecialised(*labels.shape[1:]),
        "scale": nearest_scales(tuple(labels.shape[1:]), tuple(spatial), nearest_exact),
        "ignore_index": ignore_index,
    }
