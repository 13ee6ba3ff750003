"""Processes that play the ranks of a process group."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """``function(rank, *arguments)`` in ``count`` processes, forked from one that has imported PyTorch and used none of it."""
    multiprocessing.set_forkserver_preload(["torch.distributed", "proac_cuda"])
    mp.start_processes(function, arguments, nprocs=count, start_method="forkserver")
