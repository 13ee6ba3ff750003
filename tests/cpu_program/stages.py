"""The five stages on CPU tensors, computed by the program: compiled for this processor, or for Arm and run by qemu."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from build_once import cache_folder, make_once

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"
FLAGS = [
    *("-std=c++20", "-O2", "-fno-math-errno", "-fno-trapping-math", "-pthread"),
    *("-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]
FILES = ["cpu/stages.cpp", "cpu/gradient_stage.cpp", "cpu/select.cpp", "cpu/dispatch.cpp", "cpu/isa_baseline.cpp"]
TYPES = [
    *(torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float32, torch.float64, torch.bfloat16),
]
STAGES = ["select_negatives", "class_statistics", "positive_sums", "reduce_loss", "loss_gradients"]

#: For each processor, the compiler and what runs its programs here.
PROCESSORS = {
    "this one": (["g++"], []),
    "this one, and a tile unit in software": (["g++", '-DPROAC_SOFTWARE_TILES="software_tiles.h"'], []),
    "aarch64": (["aarch64-linux-gnu-g++"], ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]),
}


def missing(processor: str) -> list[str]:
    """The commands that are needed and not on the path."""
    compiler, runner = PROCESSORS[processor]
    return [command for command in (compiler[0], *runner[:1]) if shutil.which(command) is None]


def build(processor: str) -> Path:
    """The program's path; compiled anew only where a source changed. Vectors have 16 bytes, as those of SSE2 and NEON."""
    compiler, _ = PROCESSORS[processor]
    read = [*(SOURCES / "cpu").glob("*"), *HERE.rglob("*.h"), *HERE.glob("*.cc")]
    digest = hashlib.sha256("".join([*compiler, *FLAGS]).encode() + b"".join(p.read_bytes() for p in sorted(read)))
    program = cache_folder("proac_cuda_program") / f"stages-{digest.hexdigest()[:16]}"
    sources = [*(SOURCES / name for name in FILES), HERE / "program.cc"]
    include = [f"-I{HERE / 'include'}", f"-I{SOURCES}"]
    return make_once(program, *compiler, *FLAGS, *include, *sources)


def _number(value: int) -> bytes:
    return struct.pack("=q", value)


def _packed(argument: Any) -> bytes:
    """An argument as the program reads it: a letter, and its value; tensors with the memory that they span."""
    if argument is None:
        return _number(ord("N"))
    if isinstance(argument, bool):
        return _number(ord("b")) + _number(argument)
    if isinstance(argument, int):
        return _number(ord("i")) + _number(argument)
    if isinstance(argument, float):
        return _number(ord("d")) + struct.pack("=d", argument)
    tensor: Tensor = argument.detach()
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    span = span if tensor.numel() else 0
    memory = tensor.as_strided((span,), (1,)).contiguous().view(torch.uint8).numpy().tobytes()
    head = [ord("T"), TYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *tensor.stride(), span]
    return b"".join(map(_number, head)) + memory


class Program:
    """The program under way. Its attributes are the stages, with the arguments of the registered ops."""

    def __init__(self, processor: str):
        command = [*PROCESSORS[processor][1], str(build(processor))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._process.stderr is not None
        self.kernels = self._process.stderr.readline().decode().strip()

    def close(self) -> None:
        self._process.communicate()

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        found = self._process.stdout.read(count)
        assert len(found) == count, f"the program ended with {self._process.wait()}"
        return found

    def _int(self) -> int:
        (value,) = struct.unpack("=q", self._read(8))
        return int(value)

    def _tensor(self) -> Tensor:
        dtype, axes = TYPES[self._int()], self._int()
        shape, strides = ([self._int() for _ in range(axes)] for _ in range(2))
        memory = bytearray(self._read(self._int() * dtype.itemsize))
        flat = torch.frombuffer(memory, dtype=dtype) if memory else torch.empty(0, dtype=dtype)
        return flat.as_strided(shape, strides)

    def __getattr__(self, name: str) -> Any:
        if name not in STAGES:
            raise AttributeError(name)

        def stage(*arguments: Any) -> Any:
            assert self._process.stdin is not None
            call = _number(STAGES.index(name)) + b"".join(map(_packed, arguments))
            self._process.stdin.write(_number(len(call)) + call)
            self._process.stdin.flush()
            count = self._int()
            if count < 0:
                raise RuntimeError(self._read(self._int()).decode())
            tensors = tuple(self._tensor() for _ in range(count))
            return tensors if count > 1 else tensors[0]

        return stage
