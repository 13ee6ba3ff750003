"""What tests of the CUDA kernels on the CPU leave behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def default_options() -> Iterator[None]:
    """The machine that the CUDA kernels' stand-in plays, and the order of its threads, are the usual ones for each test."""
    yield
    stand_in = sys.modules.get("cuda_on_cpu.stages")
    if stand_in is not None:
        stand_in.module.set_options()
