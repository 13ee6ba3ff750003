"""The loss over the pixels of all ranks of a process group, by exchanging vectors of one number per class.

Without sampling a call gathers twice in forward, (6, K) and (2, K) numbers a rank, and never in backward. Exact global
sets cost five more: one of two integers, then four of (K, 256), a radix selection of one byte of the key at a time.
Pixels are numbered rank after rank, so the sets are those of one process that holds the whole batch.

Every rank of the group has to make the call, also one without a single valid pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .pixels import philox_keys, read_pixels

_KEY_END = 2**32  #: beyond every key
_INDEX_END = 2**62  #: beyond every pixel index


def group_name(group: Any) -> str | None:
    """The name under which PyTorch knows a group; None without one."""
    return None if group is None else str(group.group_name)


def named_group(name: str) -> Any:
    """The group of that name in this process."""
    module: Any = dist.distributed_c10d
    return module._resolve_process_group(name)


def world_size(group: Any) -> int:
    """Ranks of the group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def _all_gather() -> Callable[..., Any]:
    """PyTorch 2.14 renamed it, and warns at the old name. Looked up at the call, where tools may have put their own."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather(values: Tensor, group: Any) -> Tensor:
    """The tensors of all ranks, stacked in rank order: (R, *shape)."""
    gathered = values.new_empty(world_size(group), *values.shape)
    _all_gather()(gathered.flatten(), values.contiguous().flatten(), group=group)
    return gathered


def merge(values: Tensor, merge_parts: Callable[[Tensor], Tensor], group: Any) -> Tensor:
    """What ``merge_parts`` makes of all ranks' ``values``."""
    return merge_parts(gather(values, group))


def share_rng_state(rng_state: Tensor, num_pixels: int, group: Any) -> Tensor:
    """(rank 0's seed, index of this rank's first pixel), int64."""
    count = torch.full_like(rng_state[:1], num_pixels)
    ranks = gather(torch.cat([rng_state[:1], count]), group)
    before = ranks[: dist.get_rank(group), 1].sum()
    return torch.stack([ranks[0, 0], before])


class _SortedPixels:
    """This rank's valid pixels in (key, index) order, and in that order those of each class."""

    def __init__(self, label: Tensor, key: Tensor, num_classes: int) -> None:
        self.size = label.numel()
        self.keys, self.order = torch.sort(key, stable=True)
        # Sorting label * stride + position keeps classes apart, the pixels of one in order; invalid ones come last.
        self.stride = self.size + 1
        self.starts = torch.arange(num_classes, device=label.device) * self.stride  # (K,)
        position = torch.arange(self.size, device=label.device)
        self.own = torch.sort(label[self.order] * self.stride + position).values
        first = torch.searchsorted(self.own, self.starts)
        lower = first.new_zeros(num_classes + 1)  # the last one is for the invalid pixels
        lower[:num_classes] = first
        rank_in_class = position - lower[self.own // self.stride]
        self.own_without_rank = self.own - rank_in_class

    def negatives_below(self, bounds: Tensor) -> Tensor:
        """Valid pixels of other classes with keys below ``bounds`` (K, n): (K, n)."""
        position = torch.searchsorted(self.keys, bounds)
        starts = self.starts[:, None]
        own = torch.searchsorted(self.own, starts + position) - torch.searchsorted(self.own, starts)
        return position - own

    def nth_negative(self, n: Tensor) -> Tensor:
        """Where in the unsorted pixels the n-th (from 0) valid pixel of another class stands: (K,) for n (K,).

        q_0 < q_1 < ... being the positions of the class's own pixels, it stands n + #{j : q_j - j <= n} places in.
        """
        own_before = torch.searchsorted(self.own_without_rank, self.starts + n, right=True)
        own_before = own_before - torch.searchsorted(self.own, self.starts)
        position = (n + own_before).clamp(min=0, max=max(self.size - 1, 0))
        return self.order[position] if self.size else position


def select_negatives(
    features: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    rng_state: Tensor,
    num_negatives: int,
    num_classes: int,
    ignore_index: int,
    nearest_exact: bool,
    group: Any,
) -> Tensor:
    """As the stage of the same name, over all ranks: thresholds (K, 2) int64 that hold for this rank's pixels.

    Each round narrows every class's last key by one byte, from all ranks' counts. Of the pixels with exactly that key
    the first ones in rank order are taken: the counts of the last round tell each rank how many of those are its own.
    """
    spatial = features.shape[2:]
    dtype = torch.float32 if pixel_weight is None else pixel_weight.dtype
    pixels = read_pixels(labels, pixel_weight, spatial, num_classes, ignore_index, dtype, nearest_exact)
    label = pixels.label.flatten()
    index = torch.arange(label.numel(), device=label.device) + rng_state[1]
    key = torch.where(label >= 0, philox_keys(rng_state[0], index), _KEY_END)
    pixels_in_order = _SortedPixels(torch.where(label >= 0, label, num_classes), key, num_classes)

    last_key = torch.zeros(num_classes, 1, dtype=torch.int64, device=label.device)
    missing = torch.full_like(last_key, num_negatives)
    steps = torch.arange(257, device=label.device)
    takes_all = missing < 0
    for shift in (24, 16, 8, 0):
        counts = pixels_in_order.negatives_below(last_key + (steps << shift)).diff(dim=1)
        counts = gather(counts, group)  # (R, K, 256)
        below = counts.sum(0).cumsum(1)
        if shift == 24:
            takes_all = below[:, -1:] <= num_negatives
        byte = (below < missing).sum(1, keepdim=True).clamp(max=255)
        missing = missing - torch.where(byte > 0, below.gather(1, (byte - 1).clamp(min=0)), 0)
        last_key = last_key + (byte << shift)

    rank = dist.get_rank(group)
    tied = counts.gather(2, byte.expand(counts.shape[0], -1, -1))  # (R, K, 1): pixels with exactly the last key
    left = missing - tied[:rank].sum(0)  # of those, what earlier ranks leave for this one
    last = pixels_in_order.nth_negative((pixels_in_order.negatives_below(last_key) + left - 1).squeeze(1))
    last_index = index[last][:, None] if label.numel() else torch.zeros_like(last_key)
    last_index = torch.where(left >= tied[rank], _INDEX_END, torch.where(left <= 0, -1, last_index))
    return torch.cat([torch.where(takes_all, _KEY_END, last_key), torch.where(takes_all, 0, last_index)], 1)
