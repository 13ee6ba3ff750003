"""One forward and backward of each backend, for a profiler to look at.

python scripts/profile_calls.py [--backend cuda triton]               the kernels' times, by PyTorch's profiler
ncu --profile-from-start off ... python scripts/profile_calls.py --ncu     nothing but these calls, for Nsight Compute
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.losses import CONTESTANTS  # noqa: E402
from benchmarks.problems import Arguments, Inputs, Problem  # noqa: E402
from benchmarks.roof import least_bytes  # noqa: E402

PROBLEMS = (
    Problem("Cityscapes, bfloat16", (8, 256, 128, 256), 19, dtype="bfloat16"),
    Problem("ADE20K, bfloat16", (16, 256, 128, 128), 150, dtype="bfloat16"),
    Problem("ADE20K, float32", (16, 256, 128, 128), 150),
)


def call(name: str, problem: Problem, arguments: Arguments) -> None:
    CONTESTANTS[name].make(problem)(*arguments).backward()
    arguments.features.grad = None


def by_time(name: str, problem: Problem, arguments: Arguments) -> str:
    """Every kernel of a call with its time, and how much of the bandwidth the least bytes would be."""
    calls = 5
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            call(name, problem, arguments)
        torch.cuda.synchronize()
    kernels = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    lines = [f"{e.self_device_time_total / calls:10.1f} us  {e.count / calls:4.1f} x  {e.key[:150]}" for e in kernels]
    total = sum(e.self_device_time_total for e in kernels) / calls
    rate = least_bytes(problem)["both"] / max(total, 1e-9) / 1e3
    return "\n".join(
        [f"== {name}, {problem.name}: {total:.1f} us of kernels, {rate:.0f} GB/s of the least bytes", *lines]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["cuda", "triton"], metavar="NAME")
    parser.add_argument(
        "--ncu", action="store_true", help="mark the calls for Nsight Compute, of the first problem alone"
    )
    options = parser.parse_args()
    failed = 0
    for problem in PROBLEMS[: 1 if options.ncu else None]:
        arguments = Inputs(problem, "cuda").next()
        for name in options.backend:
            try:
                for _ in range(3):
                    call(name, problem, arguments)
                torch.cuda.synchronize()
                if options.ncu:
                    torch.cuda.cudart().cudaProfilerStart()
                    call(name, problem, arguments)
                    torch.cuda.synchronize()
                    torch.cuda.cudart().cudaProfilerStop()
                else:
                    print(by_time(name, problem, arguments))
            except RuntimeError as error:  # the other backend's kernels are of interest all the same
                failed = 1
                print(f"== {name}, {problem.name}: {error}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
