"""Where the pixels and labels of a call lie, in the form that the kernels take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Pixels(NamedTuple):
    """How a call's pixels are laid out: ``images`` runs of ``per_image`` pixels at constant strides."""

    images: int
    per_image: int
    strides: list[tuple[int, int, int]]  #: (image, channel, pixel) of each tensor asked about

    @property
    def index(self) -> Any:
        """The type of a pixel's index: 64 bits where 32 are too few."""
        return tl.int64 if self.images * self.per_image >= 2**31 else tl.int32

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


def label_arguments(
    labels: Tensor, pixel_weight: Tensor | None, spatial: torch.Size, ignore_index: int
) -> dict[str, Any]:
    """The arguments of `read_pixels`: sizes and nearest scales of three spatial axes, leading ones of size 1."""
    missing = 3 - len(spatial)
    size = (1,) * missing + tuple(spatial)
    label_size = (1,) * missing + tuple(labels.shape[1:])
    # float32(H) / float32(h), as interpolate(mode="nearest") has it; 0 stands for "the same size"
    ratios = (torch.tensor(label_size, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)).tolist()
    scale = tuple(0.0 if h == big else ratio for h, big, ratio in zip(size, label_size, ratios, strict=True))

    def strides(values: Tensor) -> tuple[int, ...]:
        return (values.stride(0), *(0,) * missing, *values.stride()[1:])

    return {
        "labels": labels,
        "weights": pixel_weight,
        "label_strides": strides(labels),
        "weight_strides": strides(labels if pixel_weight is None else pixel_weight),
        "size": tuple(max(1, h) for h in size),
        "label_size": label_size,
        "scale": scale,
        "ignore_index": ignore_index,
    }
