"""Builds csrc/cuda/*.cu for the CPU as a Python module, with the stand-in headers of this folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from build_once import cache_folder, make_once

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "csrc" / "cuda"
FLAGS = [
    "-std=c++17",
    "-fno-strict-aliasing",
    "-fPIC",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Wno-class-memaccess",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"]


def build(*defines: str, sanitize: bool = False) -> Path:
    """The module's path; compiled anew only where a source, a header, a flag or Python changed."""
    import pybind11

    flags = [*FLAGS, *(["-O1", "-g1", *SANITIZE] if sanitize else ["-O2"]), *defines]
    include = [
        f"-I{path}" for path in (HERE / "include", KERNELS, pybind11.get_include(), sysconfig.get_path("include"))
    ]
    headers = sorted([*KERNELS.glob("*.cuh"), *KERNELS.glob("*.h"), *(HERE / "include").glob("*.h")])
    settings = "".join([*flags, sys.version, pybind11.__version__])
    common = hashlib.sha256(settings.encode() + b"".join(h.read_bytes() for h in headers))
    cache = cache_folder("proac_cuda_on_cpu")
    objects, commands = [], []
    for source in [*sorted(KERNELS.glob("*.cu")), *sorted(HERE.glob("*.cc"))]:
        digest = common.copy()
        beside = sorted(HERE.glob("*.h")) if source.parent == HERE else []
        digest.update(b"".join(path.read_bytes() for path in [source, *beside]))
        target = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        objects.append(target)
        commands.append((target, "g++", *flags, *include, "-x", "c++", "-c", source))

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(lambda command: make_once(*command), commands))
    digest = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    folder = cache / digest
    folder.mkdir(exist_ok=True)
    module = folder / "cuda_on_cpu.so"
    return make_once(module, "g++", *(SANITIZE if sanitize else []), "-shared", *objects, "-ldl")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
