"""Every test that takes ``backend`` runs once for each row below: a further backend is one more row.

``kernels``: those of them that are compiled. ``gpu_kernels``: those that are compiled for GPUs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from proac_cuda.backends import BACKENDS
from proac_cuda.stages import validation


class Target(NamedTuple):
    """A backend and the device that its tensors lie on."""

    name: str
    device: str


TARGETS = [
    Target("reference", "cpu"),
    Target("cpp", "cpu"),
    Target("triton", "cpu"),  # Triton's interpreter: only with TRITON_INTERPRET=1
    Target("reference", "cuda"),
    Target("triton", "cuda"),
    Target("cuda", "cuda"),
]

GPU_KERNELS = [target for target in TARGETS if target.device == "cuda" and target.name != "reference"]
FIXTURES = {
    "backend": TARGETS,
    "kernels": [Target("cpp", "cpu"), *GPU_KERNELS],
    "gpu_kernels": GPU_KERNELS,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", help="only these backends; default all")
    parser.addoption("--slow", action="store_true", help="also tests marked slow")
    parser.addoption("--exhaustive", action="store_true", help="also tests marked exhaustive, and slow ones: hours")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What --numprocesses auto means: a process a core, up to four; one where there is a GPU, whose memory they share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if torch.cuda.is_available() else min(4, cores)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    everything = config.getoption("--exhaustive")
    left_out = {"exhaustive": not everything, "slow": not (everything or config.getoption("--slow"))}
    for item in items:
        for mark in ("exhaustive", "slow"):
            if left_out[mark] and mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"{mark}: run with --{mark}"))
                break


def _parameter(target: Target) -> object:
    marks = [pytest.mark.gpu] if target.device == "cuda" else []
    if target.device == "cuda" and not torch.cuda.is_available():
        marks.append(pytest.mark.skip(reason="PyTorch sees no CUDA device"))
    else:
        reason = BACKENDS[target.name].why_not(torch.device(target.device))
        if reason is not None:
            marks.append(pytest.mark.skip(reason=reason))
    return pytest.param(target, id=f"{target.name}-{target.device}", marks=marks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = metafunc.config.getoption("--backend")
    for fixture, targets in FIXTURES.items():
        if fixture in metafunc.fixturenames:
            chosen = [target for target in targets if not wanted or target.name in wanted]
            metafunc.parametrize(fixture, [_parameter(target) for target in chosen])


@pytest.fixture(autouse=True)
def _fresh_warnings() -> None:
    validation._warned.clear()


@pytest.fixture(autouse=True)
def _usual_machine() -> Iterator[None]:
    """The machine that the CUDA kernels' stand-in plays, and the order of its threads, are the usual ones for each test."""
    yield
    stand_in = sys.modules.get("cuda_on_cpu.stages")
    if stand_in is not None:
        stand_in.module.set_options()
