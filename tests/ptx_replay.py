"""Runs the launches of a call again, in nvcc's PTX: the CPU build of the kernels' source makes them, ptxsim runs them.

The launchers of csrc/cuda run in the CPU build (tests/cuda_on_cpu), which writes down each launch: kernel, grid, dynamic
shared memory, and the bytes of the one struct that every kernel takes. Here those launches run in the PTX interpreter on
copies of the call's arrays, with each pointer in the struct moved to its copy.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import ptxsim
from build_once import cache_folder, make_once

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"


def why_not() -> str | None:
    """Why the PTX cannot be run here, or None."""
    return None if shutil.which("nvcc") else "nvcc is not installed"


def compile_ptx(source: str, *flags: str) -> Path:
    """The PTX for sm_80 of one source file; compiled anew only where a source changed."""
    sources = sorted([*KERNELS.glob("*.cuh"), *KERNELS.glob("*.h"), KERNELS / source])
    digest = hashlib.sha256(" ".join(flags).encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    target = cache_folder("proac_cuda_ptx") / f"{Path(source).stem}-{digest}.ptx"
    return make_once(target, "nvcc", "-std=c++17", "-arch=sm_80", "-ptx", *flags, KERNELS / source)


def source_of(kernel: str) -> str:
    """The file whose PTX has the kernel of this mangled name."""
    match = re.match(r"_ZN5proac4cuda\d+([a-z_]+_kernel)(.*)", kernel)
    if match is None:
        raise LookupError(kernel)
    if match[1].startswith("fast_"):
        types = {"I6__half": "half", "I13__nv_bfloat16": "bfloat16", "If": "float"}
        name = next(name for type_, name in types.items() if match[2].startswith(type_))
        return f"{match[1].removesuffix('_kernel')}_{name}.cu"
    return next(path.name for path in KERNELS.glob("*.cu") if match[1] in path.read_text())


@functools.lru_cache(maxsize=16)  # however many calls launch a kernel, it is read once
def _module(source: str, *flags: str) -> Any:
    return ptxsim.load(str(compile_ptx(source, *flags)))


class Replay:
    """Device copies of a call's arrays, and its launches. ``counters`` and ``traffic``: per launch, by kernel name."""

    def __init__(
        self, module: Any, flags: tuple[str, ...] = (), seed: int = 0, tensor_core: str = "exact", nbytes: int = 1 << 28
    ) -> None:
        self.on_cpu, self.flags = module, flags
        self.device = ptxsim.Device(seed=seed, tensor_core=tensor_core, nbytes=nbytes)
        self.copies: list[tuple[int, int, Any]] = []
        self.counters: list[tuple[str, Any, dict[str, dict[str, int]]]] = []
        self.names: dict[str, Any] = {}
        module.take_launches(), module.take_workspaces()

    def add(self, name: str, array: np.ndarray, out: bool = False) -> None:
        """An input, or an output, which is empty on the device."""
        low, high = np.lib.array_utils.byte_bounds(array) if array.size else (array.ctypes.data, array.ctypes.data)
        raw = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * max(1, high - low)).from_address(low))
        copy = self.device.empty(raw.shape, np.uint8) if out else self.device.array(raw)
        self.copies.append((low, raw.nbytes, copy))
        self.names[name] = copy

    def get(self, name: str, like: np.ndarray) -> np.ndarray:
        """An output, in the form of the host's array."""
        base = self.names[name].get()
        low = np.lib.array_utils.byte_bounds(like)[0]
        offset = like.ctypes.data - low
        return np.ndarray(like.shape, like.dtype, base.tobytes(), offset, like.strides)

    def run(self) -> None:
        """The launches since the last one."""
        lasting = len(self.copies)  # a workspace is freed after its stage: its addresses may be an array's afterwards
        for address, size in self.on_cpu.take_workspaces():
            self.copies.append((address, size, self.device.empty(max(size, 1), np.uint8)))
        for kernel, blocks, threads, shared, arguments in self.on_cpu.take_launches():
            words = np.frombuffer(arguments, np.uint8).copy()
            for at in range(0, len(words) - 7, 8):
                value = int(words[at : at + 8].view(np.uint64)[0])
                for low, size, copy in self.copies:
                    if low <= value < low + max(size, 1):
                        words[at : at + 8] = np.frombuffer(np.uint64(copy.address + value - low).tobytes(), np.uint8)
                        break
            module = _module(source_of(kernel), *self.flags)
            counters = self.device.launch(module, kernel, blocks, threads, [words.tobytes()], shared=shared)
            self.counters.append((kernel, counters, {name: dict(copy.traffic) for name, copy in self.names.items()}))
        del self.copies[lasting:]
