"""Memory: what PyTorch's allocator held, and what the process held; each contestant in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from .losses import CONTESTANTS
from .problems import Inputs, Problem

SLOW = 2.0  # seconds: a slower call is made once only


def peak_extra_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """The most memory that PyTorch's allocator held beyond what it held before, while ``work`` ran."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    # The trace lists every allocation and release in order; the averages that the profiler prints do not.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = np.cumsum([0, *(size for _, size in changes)])
    return int(held.max())


def resident_extra_bytes(work: Callable[[], object]) -> int | None:
    """How far the resident set grew while ``work`` ran, scratch memory outside the allocator included; Linux only."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def field(name: str) -> int:
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(name))

    reset.write_text("5")  # the peak starts anew
    before = field("VmRSS")
    work()
    return field("VmHWM") - before


def in_fresh_process(contestant: str, problems: list[dict], device: str, threads: int) -> list[dict]:
    """A contestant's memory on problems, given as dictionaries of their fields and the "seconds" of a call.

    The process starts as a copy of one that has imported PyTorch and done nothing else.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells when it starts and stops
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["benchmarks.losses", "torch.profiler"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, contestant, problems, device, threads))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that measures {contestant}'s memory ended with {process.exitcode}") from None
    finally:
        process.join()


def _measure(sender: Connection, contestant: str, problems: list[dict], device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    sender.send([_measure_problem(contestant, dict(problem), device) for problem in problems])


def _measure_problem(contestant: str, given: dict, device: str) -> dict[str, int | None]:
    quick = given.pop("seconds") < SLOW
    problem = Problem(**given)
    loss, inputs = CONTESTANTS[contestant].make(problem), Inputs(problem, device)

    def call() -> None:
        loss(*inputs.next()).backward()
        inputs.drop_gradients()

    if quick:
        call()
    return {
        "peak_extra_bytes": peak_extra_bytes(call, device),
        "resident_extra_bytes": resident_extra_bytes(call) if quick and device == "cpu" else None,
    }
