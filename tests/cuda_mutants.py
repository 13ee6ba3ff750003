"""Removes one barrier or asynchronous wait of the CUDA kernels at a time: every mutant must be found out.

    python tests/cuda_mutants.py [first [last]]

Each runs cases on the CPU in ascending, descending and random thread orders: a wrong result, a result that
differs between orders, or a deadlock finds it out. One that survives goes to the PTX interpreter's race detector.
The numbers are those of SYNC_THREADS(n) and WAIT_PRIOR(n, ...) in csrc/cuda.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import ptx_replay
from cuda_on_cpu import build

ROOT = Path(__file__).resolve().parent.parent
# A wrong result or a race; a deadlock or a misuse that the CPU build sees; a fault in the PTX interpreter.
FINDINGS = ("AssertionError", "RuntimeError", "ptxsim.parser.Fault")


def marks() -> dict[int, str]:
    """Where each mark stands."""
    found: dict[int, str] = {}
    for path in sorted([*build.KERNELS.glob("*.cuh"), *build.KERNELS.glob("*.cu")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = re.search(r"(?:SYNC_THREADS|WAIT_PRIOR)\((\d+)", line)
            if match and "#define" not in line:
                assert int(match[1]) not in found, f"mark {match[1]} stands twice"
                found[int(match[1])] = f"{path.name}:{number}"
    return found


def run_orders() -> None:
    """In the mutant's process: cases that reach every kernel, in several orders. Raises where something is wrong."""
    import torch

    from cuda_on_cpu import stages as kernels
    from test_cuda_source import ORDERS, compare, make_case

    for order, seed in ORDERS:
        kernels.module.set_options(order=order, seed=seed, multiprocessors=1, mutant=int(os.environ["PROAC_MUTANT"]))
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            case = make_case(dtype, 72, 19, spatial=(1100,), batch=1, weights=True)
            case["labels"][0, 40::200], case["pixel_weight"][0, 41::200] = 77, -1.0  # invalid, in every block
            compare(case, num_negatives=20, alpha=0.2, learnable=dtype == torch.bfloat16)
        compare(make_case(torch.bfloat16, 240, 70, spatial=(150,), batch=1))  # an odd number of chunks
        compare(make_case(torch.float32, 9, 130, spatial=(1100,), batch=2, layout="channels_last"), learnable=True)


def run_races() -> None:
    """In the mutant's process: the same launches in PTX, under the race detector."""
    import torch

    from test_cuda_ptx import Call
    from test_cuda_source import make_case

    flags = (f"-DMUTANT={os.environ['PROAC_MUTANT']}",)
    for dtype in (torch.bfloat16, torch.float32):
        case = make_case(dtype, 72, 19, spatial=(300,), batch=1, weights=True)
        Call(case, num_negatives=20, alpha=0.2, learnable=True, flags=flags, multiprocessors=1).check()


def main() -> int:
    """Try the mutants, and say which survive."""
    where = marks()
    numbers = sorted(where)
    first = int(sys.argv[1]) if len(sys.argv) > 1 else numbers[0]
    last = int(sys.argv[2]) if len(sys.argv) > 2 else numbers[-1]
    survivors = 0
    for number in (n for n in numbers if first <= n <= last):
        environment = os.environ | {"PROAC_MUTANT": str(number), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        how = "thread orders"
        done = _try("run_orders", environment)
        if done.returncode == 0:
            how = "race detector"
            if ptx_replay.why_not() is None:
                done = _try("run_races", environment)
        caught = done.returncode != 0
        survivors += not caught
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:120]
        if caught and not reason.startswith(FINDINGS):
            raise SystemExit(f"mutant {number}: neither found out nor alive:\n{done.stderr[-2000:]}")
        print(
            f"{number:3d} {where[number]:28s} {'found by the ' + how + ': ' + reason if caught else 'SURVIVES'}",
            flush=True,
        )
    print(f"{survivors} survive")
    return survivors > 0


def _try(function: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import cuda_mutants; cuda_mutants.{function}()"]
    return subprocess.run(command, env=environment, cwd=ROOT / "tests", capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
