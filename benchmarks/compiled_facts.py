"""What the compilers made of the kernels, without a GPU: registers, spills, shared memory, machine instructions.

    python -m benchmarks.compiled_facts [--architectures sm_80,sm_90] [--dtypes float32,bfloat16] [--classes 19,150]

Each provider yields rows; ``PROVIDERS`` names them, so that another compiler's kernels are one more entry.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
#: the most shared memory of a block, bytes
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}


class Row(NamedTuple):
    """One kernel as compiled for one architecture."""

    compiler: str
    kernel: str
    dtype: str
    channels: int
    classes: int
    architecture: str
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


def stage_launches(
    compiler: object,
    dtype: torch.dtype,
    channels: int,
    classes: int,
    sampled: bool = False,
    size: tuple[int, int, int] = (2, 32, 64),
    label_size: tuple[int, int] = (32, 64),
    memory_format: torch.memory_format = torch.contiguous_format,
) -> None:
    """Every stage once, as a step with learnable prototypes would launch it; ``size`` is (B, h, w) of the features."""
    from triton_offline import instead_of_launching

    from proac_cuda.triton import launch

    real = torch.float64 if dtype == torch.float64 else torch.float32
    features = torch.empty(size[0], channels, *size[1:], dtype=dtype).to(memory_format=memory_format)
    labels = torch.empty(size[0], *label_size, dtype=torch.int64)
    prototypes = torch.zeros(classes, channels, dtype=real)
    statistics, sums = torch.zeros(6, classes, dtype=real), torch.zeros(2, classes, dtype=real)
    positive, one = torch.empty(size, dtype=real), torch.ones((), dtype=real)
    rng_state = torch.zeros(2, dtype=torch.int64)
    with instead_of_launching(compiler):
        if sampled:
            launch.select_negatives(features, labels, None, rng_state, 100, classes, 255)
        launch.class_statistics(features, labels, None, prototypes, None, None, 0.1, 255, False, False)
        launch.positive_sums(positive, labels, None, statistics, 255, False)
        launch.reduce_loss(statistics, sums, None, 0.0, 1)
        launch.loss_gradients(
            features, labels, None, prototypes, None, None, statistics, sums, None, one,
            0.1, 255, False, 0.0, 1, True, True,
        )  # fmt: skip


def triton_rows(architectures: Iterable[str], dtypes: Iterable[str], classes: Iterable[int]) -> Iterator[Row]:
    """Triton's kernels at D = 256. A kernel that is launched twice alike gives one row."""
    from triton_offline import Compiler

    for architecture in architectures:
        for dtype in dtypes:
            for count in classes:
                compiler = Compiler(architecture)
                stage_launches(compiler, getattr(torch, dtype), 256, count, sampled=True)
                seen = set()
                for launch in compiler.launches:
                    metadata = launch.compiled.metadata
                    registers, spilled, sass = cubin_facts(launch.compiled.asm["cubin"])
                    row = Row(
                        "triton", launch.name, dtype, 256, count, architecture, registers, spilled, metadata.shared,
                        metadata.num_warps, **sass,
                    )  # fmt: skip
                    if row not in seen:
                        seen.add(row)
                        yield row


PROVIDERS: dict[str, Callable[[Iterable[str], Iterable[str], Iterable[int]], Iterator[Row]]] = {"triton": triton_rows}


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
    options = parser.parse_args()
    print("| " + " | ".join(name.replace("_", " ") for name in Row._fields) + " |")
    print("|" + "---|" * len(Row._fields))
    classes = [int(count) for count in options.classes.split(",")]
    for compiler in options.compilers.split(","):
        for row in PROVIDERS[compiler](options.architectures.split(","), options.dtypes.split(","), classes):
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
