"""The compiler's word on the CUDA kernels: no spills, tensor cores, and accesses of 16 bytes where they are claimed."""

from __future__ import annotations

import pytest

from benchmarks import nvcc_facts

PATH = nvcc_facts.library()
if PATH is None or None in map(nvcc_facts.find_tool, ("cuobjdump", "nvdisasm")) or not nvcc_facts.architectures(PATH):
    pytest.skip(
        "no extension with CUDA kernels in the source tree, or no cuobjdump or nvdisasm", allow_module_level=True
    )
pytestmark = pytest.mark.slow  # every kernel is disassembled


@pytest.fixture(scope="module")
def rows() -> list[nvcc_facts.Row]:
    return list(nvcc_facts.rows(PATH))


def test_architectures(rows: list[nvcc_facts.Row]) -> None:
    per_architecture = {a: sum(row.architecture == a for row in rows) for a in nvcc_facts.architectures(PATH)}
    assert len(set(per_architecture.values())) == 1 and min(per_architecture.values()) >= 36


def test_no_spills(rows: list[nvcc_facts.Row]) -> None:
    assert [row for row in rows if row.local or row.local_accesses] == []


def test_fast_path(rows: list[nvcc_facts.Row]) -> None:
    fast = [row for row in rows if row.kernel.startswith("fast_")]
    for row in fast:
        assert row.tensor_core and row.wide_copies, row
        assert row.wide_stores or "gradients" not in row.kernel, row
        assert row.warps >= 4, row
