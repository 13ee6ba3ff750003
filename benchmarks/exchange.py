"""Bytes that ranks exchange for one call with process_group=, counted at the collectives of two gloo processes."""

from __future__ import annotations

import json
import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import proac_cuda

RANKS = 2
#: how each collective is called with what a rank contributes: the position of that argument
COLLECTIVES = {
    "all_gather_single": 1,
    "all_gather_into_tensor": 1,
    "all_gather": 1,
    "all_reduce": 0,
    "all_to_all_single": 1,
    "broadcast": 0,
    "gather": 0,
    "reduce": 0,
    "reduce_scatter_tensor": 1,
    "send": 0,
}
SETTINGS: dict[str, dict[str, Any]] = {"all negatives": {}, "4096 negatives": {"num_negatives": 4096, "seed": 0}}


def measure(shape: tuple[int, ...] = (1, 256, 64, 64), classes: int = 19) -> list[dict[str, Any]]:
    """For each setting and pass: collectives and the bytes that one rank contributes to them; and of its features."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (_free_port(), shape, classes, folder), nprocs=RANKS)
        ranks = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(RANKS)]
    assert ranks[0] == ranks[1], "ranks contribute equally"
    return ranks[0]


def _rank(rank: int, port: int, shape: tuple[int, ...], classes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    counter: Counter[str] = Counter()
    for name, position in COLLECTIVES.items():
        if not hasattr(dist, name):  # PyTorch before 2.14 has no all_gather_single
            continue
        setattr(dist, name, _counted(getattr(dist, name), position, counter))
    torch.manual_seed(rank)
    rows = []
    for setting, options in SETTINGS.items():
        features = torch.randn(shape, requires_grad=True)
        labels = torch.randint(0, classes, (shape[0], *shape[2:]))
        prototypes = proac_cuda.uniform_prototypes(classes, shape[1])
        for which in ("forward", "backward"):
            counter.clear()
            if which == "forward":
                loss = proac_cuda.proac_loss(
                    features, labels, prototypes, process_group=dist.group.WORLD, backend="auto", **options
                )
            else:
                loss.backward()
            rows.append(
                {
                    "setting": setting,
                    "pass": which,
                    "ranks": RANKS,
                    "classes": classes,
                    "collectives": counter["collectives"],
                    "bytes_contributed": counter["bytes"],
                    "bytes_of_features": features.nbytes,
                }
            )
    (Path(folder) / str(rank)).write_text(json.dumps(rows))
    dist.destroy_process_group()


def _counted(collective: Any, position: int, counter: Counter[str]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        contributed = arguments[position]
        assert isinstance(contributed, Tensor)
        counter["collectives"] += 1
        counter["bytes"] += contributed.nbytes
        return collective(*arguments, **options)

    return call


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
