"""What the compilers made of the kernels, without a GPU: registers, spills, shared memory, machine instructions.

    python -m benchmarks.compiled_facts [--architectures sm_80,sm_90] [--dtypes float32,bfloat16] [--classes 19,150] [--jobs 2]

Each provider yields rows; ``PROVIDERS`` names them, so that another compiler's kernels are one more entry.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

#: the most shared memory of a block, bytes
SHARED_LIMIT = {
    "sm_75": 64 << 10,
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
}
ARCHITECTURES = tuple(SHARED_LIMIT)


class Row(NamedTuple):
    """One kernel as compiled for one architecture."""

    compiler: str
    kernel: str
    architecture: str  #: this and the next five are of the Cell
    dtype: str
    classes: int
    channels: int
    everything: bool
    channels_last: bool
    registers: int
    spilled: int  #: bytes of stack and local memory of a thread
    shared: int  #: bytes, static and dynamic
    warps: int
    tensor_core: int  #: instructions
    wide_loads: int  #: global loads of 16 bytes, asynchronous ones included
    local_accesses: int


SASS = {
    "tensor_core": re.compile(r"\b(?:HMMA|DMMA|HGMMA|UTCHMMA|UTCQMMA|OMMA)\b"),
    "wide_loads": re.compile(r"\b(?:LDG|LDGSTS)\.\S*128"),
    "local_accesses": re.compile(r"\b(?:LDL|STL)\b"),
}


class Cell(NamedTuple):
    """What a step is compiled for."""

    architecture: str
    dtype: str
    classes: int
    channels: int = 256
    everything: bool = False  #: weights, sampled sets, the twin and diagnostics
    channels_last: bool = False


def stage_launches(
    compiler: object, cell: Cell, size: tuple[int, int, int] = (2, 32, 64), label_size: tuple[int, int] = (32, 64)
) -> None:
    """A step with learnable prototypes, and the stages that ranks run one by one; ``size`` is (B, h, w) of the features."""
    from triton_offline import instead_of_launching

    from proac_cuda.backends.triton import launch

    dtype, classes = getattr(torch, cell.dtype), cell.classes
    real = torch.float64 if dtype == torch.float64 else torch.float32
    memory_format = torch.channels_last if cell.channels_last else torch.contiguous_format
    features = torch.empty(size[0], cell.channels, *size[1:], dtype=dtype).to(memory_format=memory_format)
    labels = torch.empty(size[0], *label_size, dtype=torch.int64)
    prototypes = torch.zeros(classes, cell.channels, dtype=real)
    statistics, sums = torch.zeros(6, classes, dtype=real), torch.zeros(2, classes, dtype=real)
    positive, one = torch.empty(size, dtype=real), torch.ones((), dtype=real)
    rng_state = torch.zeros(2, dtype=torch.int64)
    weight, class_weight, sets, alpha = None, None, (None, None), 0.0
    if cell.everything:
        weight, class_weight, alpha = torch.ones(labels.shape, dtype=real), torch.ones(classes, dtype=real), 0.5
        sets = torch.zeros(classes, 2, dtype=torch.int64), rng_state
    pixels, more = (features, labels, weight), cell.everything
    with instead_of_launching(compiler):
        launch.select_negatives(*pixels, rng_state, 100, classes, 255)
        launch.loss_forward(*pixels, prototypes, class_weight, *sets, 0.1, 255, more, alpha, 1, more)
        launch.class_statistics(*pixels, prototypes, *sets, 0.1, 255, more, more)
        launch.positive_sums(positive, labels, weight, statistics, 255, more)
        launch.reduce_loss(statistics, sums, class_weight, alpha, 1)
        launch.loss_gradients(
            *pixels, prototypes, *sets, statistics, sums, class_weight, one, 0.1, 255, more, alpha, 1, True, True
        )  # fmt: skip


def triton_rows(cells: Iterable[Cell], jobs: int = 1, kernels: Container[str] | None = None) -> Iterator[Row]:
    """Triton's kernels, or some; what several cells launch alike gives one row, with the first of them."""
    from triton_offline import Variants

    found: dict[tuple[str, str, str], Cell] = {}
    for cell in cells:
        variants = Variants(cell.architecture)
        stage_launches(variants, cell)
        for name, keys in variants.found.items():
            for key in sorted(keys):
                found.setdefault((cell.architecture, name, key), cell)
    tasks = [(cell, name, key) for (_, name, key), cell in found.items() if kernels is None or name in kernels]
    if jobs == 1:
        yield from map(triton_row, tasks)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), os.nice, (10,)) as pool:
        yield from pool.map(triton_row, tasks)


def triton_row(task: tuple[Cell, str, str]) -> Row:
    """Compile the launch of a cell that has this kernel's name and is specialised like this."""
    from triton_offline import Compiler

    cell, name, key = task
    compiler = Compiler(cell.architecture, (name, key))
    stage_launches(compiler, cell)
    compiled = compiler.launches[0].compiled
    registers, spilled, sass = cubin_facts(compiled.asm["cubin"])
    metadata = compiled.metadata
    return Row("triton", name, *cell, registers, spilled, metadata.shared, metadata.num_warps, **sass)


def cells_of(architectures: Iterable[str], dtypes: Iterable[str], classes: Iterable[int]) -> list[Cell]:
    """The grid of the table: both layouts, and every option at once."""
    cells = []
    for architecture, dtype, count in itertools.product(architectures, dtypes, classes):
        cells.append(Cell(architecture, dtype, count))
        if dtype != "float64":
            cells.append(Cell(architecture, dtype, count, everything=True))
            cells.append(Cell(architecture, dtype, count, channels_last=True))
    return cells


PROVIDERS: dict[str, Callable[[Iterable[Cell], int], Iterator[Row]]] = {"triton": triton_rows}


def cubin_facts(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """(registers, bytes of stack and local memory, counts of SASS) of a cubin with one kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, {name: len(pattern.findall(code)) for name, pattern in SASS.items()}


def main() -> None:
    """Print the table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compilers", default=",".join(PROVIDERS))
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--dtypes", default="float32,bfloat16,float16,float64")
    parser.add_argument("--classes", default="19,150")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    options = parser.parse_args()
    print("| " + " | ".join(name.replace("_", " ") for name in Row._fields) + " |")
    print("|" + "---|" * len(Row._fields))
    classes = [int(count) for count in options.classes.split(",")]
    cells = cells_of(options.architectures.split(","), options.dtypes.split(","), classes)
    for compiler in options.compilers.split(","):
        for row in PROVIDERS[compiler](cells, options.jobs):
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
