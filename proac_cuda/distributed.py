"""Whether all ranks of a process group train with the same loss."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def check_ranks(module: torch.nn.Module, group: Any = None) -> None:
    """Raise where the ranks' losses are not the same one: options, prototypes or class weights that differ.

    To be called once, on every rank, before training: nothing else finds them, since all ranks print the same loss whatever
    they hold. Compares hashes and short texts, by ``all_gather_object``; under nccl set each rank's device first.

    Args:
        module: a loss, a regularizer, or a model that holds some; wrapped or not.
        group: whose ranks; by default all of them.

    Raises:
        ValueError: on every rank, naming the first thing that differs and what each rank has.
        RuntimeError: without an initialised process group; for a module without such a loss.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "check_ranks: no process group is initialised; call torch.distributed.init_process_group first"
        )
    mine = {
        f"{name}.{key}".lstrip("."): _told(value)
        for name, part in module.named_modules()
        if hasattr(part, "same_on_all_ranks")
        for key, value in part.same_on_all_ranks().items()
    }
    ranks: list[dict[str, str]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(ranks, mine, group=group)
    if not all(ranks):
        raise RuntimeError(f"check_ranks: {type(module).__name__} holds no ProACLoss and no ProACRegularizer")
    for key in dict.fromkeys(key for held in ranks for key in held):
        told = [held.get(key, "nothing") for held in ranks]
        if len(set(told)) > 1:
            listed = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(told))
            raise ValueError(f"check_ranks: {key} is not the same on all ranks ({listed}); give all of them one value")


def _told(value: Any) -> str:
    """A text that is the same where the value is."""
    if not isinstance(value, Tensor):
        return repr(value)
    held = value.detach().cpu().contiguous()
    digest = hashlib.sha256(held.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return f"{tuple(held.shape)} {held.dtype} with hash {digest[:12]}"
