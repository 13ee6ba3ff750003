"""The tests of the CPU kernels in a process whose instruction set is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = "baseline", "avx2", "avx512", "amx"
FILES = "kernels/test_cpp_kernels.py", "kernels/test_against_oracle.py", "api/test_behaviour.py"
#: Not these: memory is measured once, and the others call this.
NOT = "memory", "instruction_set", "sanitizers"


ROOT = Path(__file__).resolve().parents[1]


def python(
    isa: str, *arguments: str, folder: Path = ROOT, environment: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Python with ``arguments``, in ``folder``, with more ``environment``."""
    variables = {**os.environ, **environment, "PROAC_CPU_ISA": isa}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def has(isa: str, **where: Any) -> bool:
    """Whether this CPU has it."""
    probe = python(
        isa, "-c", "from proac_cuda.backends import extension; print(extension.build_info()['cpu'])", **where
    )
    if "has no kernels" in probe.stderr:
        return False
    if probe.returncode or probe.stdout.split() != [isa]:
        raise RuntimeError(f"{isa}: {probe.stdout}{probe.stderr}")
    return True


def suite(isa: str, *arguments: str, **where: Any) -> subprocess.CompletedProcess[str]:
    """The tests, with more ``arguments`` for pytest."""
    chosen = " and ".join(f"not {name}" for name in NOT)
    options = ["-q", "--slow", "--backend", "cpp", "-k", chosen, "-p", "no:cacheprovider", *arguments]
    return python(isa, "-m", "pytest", *options, *(f"tests/{name}" for name in FILES), **where)
