"""Removes one barrier or asynchronous wait of the CUDA kernels at a time: every mutant must be found out.

    python tests/cuda_mutants.py [first [last]]

Each runs cases on the CPU in ascending, descending and random thread orders: a wrong result, a result that
differs between orders, or a deadlock finds it out. One that survives goes to the PTX interpreter's race detector.
The numbers are those of the names in csrc/cuda/barriers.h, which SYNC_THREADS and WAIT_FOR_COPIES give.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import ptx_replay  # noqa: E402
from cuda_comparison import ORDERS, compare  # noqa: E402
from cuda_on_cpu import build  # noqa: E402
from cuda_on_cpu import stages as kernels  # noqa: E402
from stage_comparison import make_case  # noqa: E402

# A wrong result or a race; a deadlock or a misuse that the CPU build sees; a fault in the PTX interpreter.
FINDINGS = ("AssertionError", "RuntimeError", "Fault")


def marks() -> dict[int, str]:
    """The name of each barrier and wait."""
    text = re.sub(r"//.*", "", (build.KERNELS / "barriers.h").read_text())
    names = re.findall(r"\w+", text[text.index("{", text.index("enum class Barrier")) : text.index("}")])
    sources = "".join(path.read_text() for path in [*build.KERNELS.glob("*.cuh"), *build.KERNELS.glob("*.cu")])
    used = re.findall(r"(?:SYNC_THREADS|WAIT_FOR_COPIES|LEFT_OUT)\((\w+)", re.sub(r"#define.*", "", sources))
    assert sorted(used) == sorted(set(names) - {"none", "count"}), "each name stands at one place"
    return {number: name for number, name in enumerate(names) if name in used}


def run_orders(mutant: int) -> None:
    """Cases that reach every kernel, in several orders. Raises where something is wrong."""
    for order, seed in ORDERS:
        options = {"order": order, "seed": seed, "multiprocessors": 1, "mutant": mutant}
        # prototypes that pass through a ring of two, in an odd number of stages; several groups of classes
        kernels.module.set_options(shared_limit=77 << 10, **options)
        compare(make_case(torch.bfloat16, 240, 70, spatial=(150,), batch=1))
        compare(make_case(torch.bfloat16, 240, 70, spatial=(150,), batch=1), learnable=True)
        kernels.module.set_options(**options)
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            case = make_case(dtype, 72, 19, spatial=(1100,), batch=1, weights=True)
            case["labels"][0, 40::200], case["pixel_weight"][0, 41::200] = 77, -1.0  # invalid, in every block
            compare(case, num_negatives=20, alpha=0.2, learnable=dtype == torch.bfloat16)
        compare(case, learnable=True)
        compare(make_case(torch.float32, 9, 130, spatial=(1100,), batch=2, layout="channels_last"), learnable=True)


def run_races(mutant: int) -> None:
    """The same launches in PTX, under the race detector."""
    from ptx_call import Call

    for dtype in (torch.bfloat16, torch.float32):
        case = make_case(dtype, 72, 19, spatial=(300,), batch=1, weights=True)
        flags = (f"-DMUTANT={mutant}",)
        Call(case, num_negatives=20, alpha=0.2, learnable=True, flags=flags, multiprocessors=1).check()


def _finding(function: Callable[[int], None], mutant: int) -> str:
    """What the function raises in a process of its own; empty where it ends well."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        text = ""
        try:
            function(mutant)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}".strip() or repr(error)
        os.write(writer, text.encode()[:2000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return text if status == 0 else f"exit {status}"


def main() -> int:
    """Try the mutants, and say which survive."""
    torch.set_num_threads(1)  # threads do not survive a fork
    where = marks()
    numbers = sorted(where)
    first = int(sys.argv[1]) if len(sys.argv) > 1 else numbers[0]
    last = int(sys.argv[2]) if len(sys.argv) > 2 else numbers[-1]
    survivors = 0
    for number in (n for n in numbers if first <= n <= last):
        how, finding = "thread orders", _finding(run_orders, number)
        if not finding and ptx_replay.why_not() is None:
            how, finding = "race detector", _finding(run_races, number)
        survivors += not finding
        if finding and not finding.startswith(FINDINGS):
            raise SystemExit(f"mutant {number}: neither found out nor alive:\n{finding}")
        first_line = finding.splitlines()[0][:120] if finding else ""
        print(
            f"{number:3d} {where[number]:34s} {f'found by the {how}: {first_line}' if finding else 'SURVIVES'}",
            flush=True,
        )
    print(f"{survivors} survive")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
