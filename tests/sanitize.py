"""The CPU kernels' tests, or the fuzzer, under AddressSanitizer and UndefinedBehaviorSanitizer, with GCC on Linux.

    python tests/sanitize.py [--isa avx2] [ARGUMENT ...]                    # arguments go to pytest
    python tests/sanitize.py [--isa avx2] --fuzz SECONDS [ARGUMENT ...]     # so long on each instruction set

Without ``--isa``, on each instruction set that this CPU has. The build is a library of its own, kept for the next time.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import instruction_sets
from build_once import cache_folder, once

ROOT = Path(__file__).resolve().parents[1]


def _copy(folder: Path, *names: str) -> None:
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


def _build(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy(folder, "csrc", "proac_cuda", "setup.py", "pyproject.toml", "README.md", "LICENSE")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of ninja
        environment = os.environ | {"PATH": path, "PROAC_SANITIZE": "1", "PROAC_NO_CUDA": "1"}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the build with sanitizers failed:\n{(done.stdout + done.stderr)[-4000:]}")
        shutil.copy(folder / "proac_cuda" / "_C.abi3.so", target)


def library() -> Path:
    """The extension with sanitizers; compiled anew only where a source, the recipe, PyTorch or Python changed."""
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    versions = f"{torch.__version__} {sys.version}".encode()
    digest = hashlib.sha256(versions + b"".join(path.read_bytes() for path in [ROOT / "setup.py", *sources]))
    return once(cache_folder("proac_cuda_sanitized") / f"_C-{digest.hexdigest()[:16]}.so", _build)


def _gcc(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(isa: str, *arguments: str, fuzz: float = 0) -> subprocess.CompletedProcess[str] | None:
    """The tests, or ``fuzz`` seconds of the fuzzer, on one instruction set; None where this CPU lacks it."""
    built = library()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy(folder, "proac_cuda", "tests", "pyproject.toml")
        (folder / "proac_cuda" / "_C.abi3.so").symlink_to(built)
        environment = {
            "LD_PRELOAD": f"{_gcc('libasan.so')}:{_gcc('libubsan.so')}",
            "PYTHONPATH": name,
            # Python and PyTorch leak at exit by design; what is looked for is access out of bounds and undefined behaviour, in
            # tensors and in what the kernels allocate. Traces of allocations are short, which takes less time.
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:malloc_context_size=3",
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        }
        where = {"folder": folder, "environment": environment}
        if not instruction_sets.has(isa, **where):
            return None
        if fuzz:
            fuzzer = "tests/fuzz.py", "--backend", "cpp", "--seconds", str(fuzz)
            return instruction_sets.python(isa, *fuzzer, *arguments, **where)
        # A report ends the process, so that it would be lost with what pytest has captured.
        return instruction_sets.suite(isa, "--capture=sys", *arguments, **where)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=instruction_sets.NAMES, help="one instruction set (all)")
    parser.add_argument("--fuzz", type=float, default=0, metavar="SECONDS", help="run the fuzzer in place of the tests")
    options, arguments = parser.parse_known_args()
    failed = 0
    for isa in [options.isa] if options.isa else instruction_sets.NAMES:
        done = run(isa, *arguments, fuzz=options.fuzz)
        print(f"{isa}: not on this CPU" if done is None else f"{isa}\n{done.stdout}{done.stderr}", flush=True)
        failed |= done is not None and done.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
