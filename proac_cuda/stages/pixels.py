"""What every pure-PyTorch stage needs to know of a pixel: its label, its weight, its random key.

Nothing here knows of prototypes or of the loss. The C++, CUDA and Triton kernels hold the same rules once each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def collapses(tensor: Tensor) -> bool:
    r"""Whether the spatial axes of (B, D, \*spatial) are one axis of one stride; those of size 1 have none."""
    sizes, strides = tensor.shape, tensor.stride()
    axes = [axis for axis in range(2, tensor.ndim) if sizes[axis] != 1]
    return all(strides[a] == strides[b] * sizes[b] for a, b in zip(axes, axes[1:], strict=False))


def gradient_buffers(features: Tensor) -> tuple[Tensor, Tensor]:
    """Empty, for the features' gradient: what is returned, and what is written, where the two differ to be copied there.

    ``empty_like`` may order the axes of overlapping features so that the spatial ones do not collapse.
    """
    wanted = torch.empty_like(features)
    return wanted, wanted if collapses(wanted) else features.new_empty(features.shape)


def nearest_index(label_size: int, feature_size: int, device: torch.device, nearest_exact: bool) -> Tensor:
    """Where each index of a feature axis reads an axis of the labels, (h,) int64.

    The rule of ``interpolate(mode="nearest")``, or of ``"nearest-exact"``, for a float32 tensor.
    """
    index = torch.arange(feature_size, device=device)
    if label_size == feature_size:
        return index
    # A 0-dim CPU tensor goes into a kernel as a number: nothing is copied to the device.
    labels = torch.tensor(label_size, dtype=torch.float32, device="cpu")
    features = torch.tensor(feature_size, dtype=torch.float32, device="cpu")
    place = index.float() + 0.5 if nearest_exact else index.float()
    return (place * (labels / features)).floor().long().clamp_(max=label_size - 1)


def read_nearest(values: Tensor, spatial: Sequence[int], nearest_exact: bool) -> Tensor:
    """``values`` (B, *any size) read at the feature resolution ``spatial``, flattened to (B, P)."""
    for axis, size in enumerate(spatial, start=1):
        if values.shape[axis] != size:
            index = nearest_index(values.shape[axis], size, values.device, nearest_exact)
            values = values.index_select(axis, index)
    return values.reshape(values.shape[0], values.shape[1:].numel())


class Pixels(NamedTuple):
    """The pixels of one call, each of shape (B, P)."""

    label: Tensor  #: int64, the class; -1 outside V
    weight: Tensor  #: compute dtype, w; 0 outside V
    bad_label: Tensor  #: bool, a label outside [0, K) which is not ``ignore_index``
    bad_weight: Tensor  #: bool, a weight that is negative, infinite or NaN, where the label counts


def read_pixels(
    labels: Tensor,
    pixel_weight: Tensor | None,
    spatial: Sequence[int],
    num_classes: int,
    ignore_index: int,
    dtype: torch.dtype,
    nearest_exact: bool,
) -> Pixels:
    """Section 3's set V: the label rule and the weight rule, at the features' resolution."""
    label = read_nearest(labels, spatial, nearest_exact).long()
    in_range = (label >= 0) & (label < num_classes)
    ignored = label == ignore_index
    kept = in_range & ~ignored
    bad_weight = torch.zeros_like(kept)
    weight = kept.to(dtype)
    if pixel_weight is not None:
        weight = read_nearest(pixel_weight, spatial, nearest_exact).to(dtype)
        bad_weight = kept & ~((weight >= 0) & torch.isfinite(weight))
        kept = kept & (weight >= torch.finfo(dtype).smallest_normal) & ~bad_weight  # whose inverse is finite
        weight = torch.where(kept, weight, 0)
    return Pixels(torch.where(kept, label, -1), weight, ~(in_range | ignored), bad_weight)


def first_values(
    labels: Tensor, pixel_weight: Tensor | None, spatial: Sequence[int], pixels: Pixels, nearest_exact: bool
) -> Tensor:
    """The diagnostics of a call, int64 (4,).

    (number of invalid labels, the first of them, number of invalid weights, the float64 bits of the first of them),
    first in pixel order; a first one that does not exist is 0.
    """
    diagnostics = torch.zeros(4, dtype=torch.int64, device=labels.device)
    diagnostics[0] = pixels.bad_label.sum()
    diagnostics[2] = pixels.bad_weight.sum()
    if pixels.bad_label.numel():
        label = read_nearest(labels, spatial, nearest_exact).long().flatten()
        diagnostics[1] = _first(label, pixels.bad_label)
        if pixel_weight is not None:
            weight = read_nearest(pixel_weight, spatial, nearest_exact).flatten()
            if weight.device.type != "mps":  # which knows no float64
                diagnostics[3] = _first(weight.double().view(torch.int64), pixels.bad_weight)
    return diagnostics


def _first(values: Tensor, chosen: Tensor) -> Tensor:
    chosen = chosen.flatten()
    first = chosen.to(torch.uint8).argmax().reshape(1)
    return torch.where(chosen.any(), values.gather(0, first), 0).squeeze(0)


def philox_keys(seed: Tensor, index: Tensor) -> Tensor:
    """First output word of Philox4x32-10 (Salmon et al., SC 2011), int64 in [0, 2^32).

    Key words (seed mod 2^32, seed div 2^32), counter words (index mod 2^32, index div 2^32, 0, 0).

    Args:
        seed: int64 tensor of one element, read as 64 unsigned bits.
        index: int64, any shape.
    """
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    counter = (index & _MASK32, (index >> 32) & _MASK32, torch.zeros_like(index), torch.zeros_like(index))
    return philox4x32(counter, (k0, k1))[0]


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four output words for four counter words and two key words, all int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high2, low2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers; halves, since int64 has no unsigned 64-bit product."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
