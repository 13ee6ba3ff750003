"""Runs a plan: time and accuracy of every contestant in this process, then the memory of each in a process of its own."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import proac_cuda

from .losses import CONTESTANTS, FLOOR, Contestant, Loss
from .machine import describe, last_level_cache
from .memory import in_fresh_process, peak_extra_bytes
from .problems import IGNORED, TEMPERATURE, Arguments, Inputs, Problem
from .results import Results
from .roof import PASSES, Rates, least_bytes, measure_rates
from .sweeps import Plan, Sweep
from .timing import Call, Clock, CpuClock, CudaClock, GraphCall, Spread, alternate, by_speed

Report = Callable[[str], None]


class Runner:
    """One run. ``results`` grows as it goes, and is given to ``keep`` after each problem."""

    def __init__(
        self,
        plan: Plan,
        device: str,
        threads: int,
        memory_cap: int,
        process_time: bool,
        report: Report,
        keep: Callable[[Results], None] = lambda results: None,
    ) -> None:
        torch.set_num_threads(threads)
        self.plan, self.device, self.threads, self.memory_cap, self.report = plan, device, threads, memory_cap, report
        self.process_time, self.keep = process_time, keep
        self.clock: Clock = CudaClock(device) if device.startswith("cuda") else CpuClock(process_time)
        # Inputs that exceed the cache, unless that takes too much of the memory.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.rotated_bytes = plan.rotated_bytes or min(int(1.25 * last_level_cache(device)), memory // 8)
        self.speed: dict[str, float] = {}  # of each contestant: seconds for its unit of work, on the last problem
        self.results = Results(machine=describe(device, threads))

    def run(self) -> None:
        """Measure everything; an interrupted run leaves what it has in ``results``."""
        dtypes = {problem.dtype for sweep in self.plan.sweeps for problem in sweep.problems}
        self.report("measuring the machine's copy bandwidth and matrix products")
        repeats = 9 if self.plan.fast.least > 3 else 3
        copied = self.plan.rotated_bytes or max(self.rotated_bytes, 1 << 28)
        self.rates = measure_rates(dtypes, self.clock, copied, repeats)
        self.results.rates = dataclasses.asdict(self.rates)
        clock_name = "events" if isinstance(self.clock, CudaClock) else "process" if self.process_time else "wall"
        self.results.method = {
            "memory_cap_bytes": self.memory_cap,
            "rotated_bytes": self.rotated_bytes,
            "slowest_call_seconds": self.plan.slowest,
            "clock": clock_name,
        }
        for sweep in self.plan.sweeps:
            for problem in sweep.problems:
                self.report(f"{sweep.name}: {problem.name}")
                self.time_problem(sweep, problem)
                self.keep(self.results)
        self.measure_memory()

    def time_problem(self, sweep: Sweep, problem: Problem) -> None:
        """Every contestant's rows on one problem, or the reason why there are none."""
        inputs = Inputs(problem, self.device, self.rotated_bytes)
        truth: dict[str, Any] = {}
        calls: dict[str, Call] = {}
        seconds: dict[str, float] = {}
        times: dict[str, list[list[float]]] = {}
        errors: dict[str, dict[str, float | None]] = {}
        for name in sweep.contestants:
            contestant = CONTESTANTS[name]
            reason = contestant.why_not(problem, self.device) or self._too_large(contestant, problem)
            if reason is None:
                try:
                    call = Call(contestant.make(problem), inputs, self.clock)
                    first, errors[name] = self._first_call(contestant, problem, call, truth)
                    counts = first_call_counts(contestant, self.device, sum(first), self.plan.SLOW_CALL)
                    times[name] = [first] if counts else []
                    seconds[name] = sum(first if counts else call.measure())
                    self.speed[name] = seconds[name] / contestant.work(problem)
                    calls[name] = call
                except (RuntimeError, MemoryError, ImportError, ValueError, TypeError) as error:
                    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if reason is not None:
                self.results.leave_out(sweep.name, problem.name, name, reason)
        truth.clear()
        before = len(self.results.rows)
        for group in by_speed(seconds):
            runs = {name: self.plan.effort(seconds[name]).runs(seconds[name]) - len(times[name]) for name in group}
            for name, measured in alternate({name: calls[name].measure for name in group}, runs).items():
                self._add_row(sweep, problem, name, "call", times[name] + measured, errors[name])
                if isinstance(self.clock, CudaClock):  # whose allocator counts exactly, whatever ran before
                    extra = peak_extra_bytes(calls[name].measure, self.device)
                    self.results.rows[-1] |= {"peak_extra_bytes": extra, "resident_extra_bytes": None}
        order = list(CONTESTANTS)
        self.results.rows[before:] = sorted(self.results.rows[before:], key=lambda row: order.index(row["contestant"]))
        if isinstance(self.clock, CudaClock):
            self._time_graphs(sweep, problem, calls, inputs, errors)
        del inputs, calls
        gc.collect()

    def _time_graphs(
        self, sweep: Sweep, problem: Problem, calls: dict[str, Call], inputs: Inputs, errors: dict[str, Any]
    ) -> None:
        """The contestants that can be captured, once more out of CUDA graphs."""
        graphs = {}
        for name, call in calls.items():
            reason = "it synchronises with the host" if CONTESTANTS[name].synchronises else None
            if reason is None:
                try:
                    graphs[name] = GraphCall(call.loss, inputs, self.clock)
                except RuntimeError as error:
                    reason = str(error).splitlines()[0]
            if reason is not None:
                self.results.leave_out(sweep.name, problem.name, name, f"no CUDA graph: {reason}")
        runs = {name: self.plan.fast.runs(sum(graph.measure())) for name, graph in graphs.items()}
        times = alternate({name: graph.measure for name, graph in graphs.items()}, runs)
        for name, measured in times.items():
            self._add_row(sweep, problem, name, "graph", measured, errors[name])

    def _too_large(self, contestant: Contestant, problem: Problem) -> str | None:
        """Why a call would take too much memory or time, as foretold from its size and from its speed elsewhere."""
        needed = contestant.estimated_bytes(problem)
        if needed > self.memory_cap:
            return f"needs about {needed / 2**30:.1f} GiB, above the cap of {self.memory_cap / 2**30:g} GiB"
        seconds = self.speed.get(contestant.name, 0) * contestant.work(problem)
        if seconds > self.plan.slowest:
            return f"about {seconds:.0f} s a call, above the limit of {self.plan.slowest:g} s"
        return None

    def _first_call(
        self, contestant: Contestant, problem: Problem, call: Call, truth: dict[str, Any]
    ) -> tuple[list[float], dict[str, float | None]]:
        """Seconds, and relative errors of the loss and (L2) of its gradient, on the first input.

        Against the float64 reference for those that compute ProAC, against themselves in float64 for others, where
        that fits into memory.
        """
        arguments = call.inputs.arguments[0]
        expected = None
        if contestant.is_proac:
            if "value" not in truth:
                truth["value"] = self._double(arguments, reference(problem))
            expected = truth["value"]
        elif contestant.name != FLOOR and 2 * contestant.estimated_bytes(problem) <= self.memory_cap:
            expected = self._double(arguments, contestant.make(problem))
        torch.manual_seed(0)
        seconds, *found = call.measure_results(arguments)
        errors = relative_errors(found, expected) if expected else {"loss_error": None, "gradient_error": None}
        arguments.features.grad = None
        return seconds, errors

    def _double(self, arguments: Arguments, loss: Loss) -> tuple[Tensor, Tensor]:
        features, labels, prototypes = arguments
        features = features.detach().double().requires_grad_()
        torch.manual_seed(0)
        value = loss(features, labels, prototypes.double())
        value.backward()
        return value.detach(), features.grad

    def _add_row(
        self, sweep: Sweep, problem: Problem, name: str, mode: str, times: list[list[float]], errors: dict
    ) -> None:
        seconds = {
            "forward": [forward for forward, _ in times],
            "backward": [backward for _, backward in times],
            "both": [sum(both) for both in times],
        }
        row = {"sweep": sweep.name, **dataclasses.asdict(problem), "pixels": problem.pixels}
        row |= {"contestant": name, "mode": mode, **errors}
        row |= {which: rates_of(Spread.of(seconds[which]), problem, which, self.rates, self.device) for which in PASSES}
        if not CONTESTANTS[name].is_proac:
            for which in PASSES:
                row[which]["share_of_roof"] = None  # its flops are others
        self.results.rows.append(row)

    def measure_memory(self) -> None:
        """Peak memory of the rows that have a time and lack it, each contestant in a fresh process."""
        everyone = {sweep.name for sweep in self.plan.sweeps if sweep.memory}
        for name, contestant in CONTESTANTS.items():
            rows = [
                row
                for row in self.results.rows
                if row["contestant"] == name
                and row["mode"] == "call"
                and "peak_extra_bytes" not in row
                and (contestant.backend or row["sweep"] in everyone)
            ]
            if not rows:
                continue
            self.report(f"memory: {name}")
            keys = [field.name for field in dataclasses.fields(Problem)]
            problems = [{**{k: row[k] for k in keys}, "seconds": row["both"]["median_ms"] / 1e3} for row in rows]
            try:
                measured = in_fresh_process(name, problems, self.device, self.threads)
            except RuntimeError as error:
                for row in rows:
                    self.results.leave_out(row["sweep"], row["name"], name, f"no memory figure: {error}")
                continue
            for row, memory in zip(rows, measured, strict=True):
                row |= memory


def first_call_counts(contestant: Contestant, device: str, seconds: float, slow: float) -> bool:
    """Whether a contestant's first call is one of its measurements: only where it is so slow that nothing else counts.

    The first call of a fast one fetches memory, that of a compiled one compiles, and on a GPU anyone's may do so: Triton
    compiles its kernels, others load theirs, and libraries choose.
    """
    return seconds > slow and not contestant.compiled and not device.startswith("cuda")


def reference(problem: Problem) -> Loss:
    """The reference's loss, without timing in mind."""

    def loss(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
        sampling = {} if problem.num_negatives is None else {"num_negatives": problem.num_negatives, "seed": 0}
        return proac_cuda.reference.proac_loss(
            features, labels, prototypes, temperature=TEMPERATURE, ignore_index=IGNORED, **sampling
        )

    return loss


def relative_errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float | None]:
    """Of (loss, gradient); None where the result is not finite."""

    def error(a: Tensor, b: Tensor) -> float | None:
        value = ((a.double() - b).norm() / b.norm()).item()
        return value if value == value and value != float("inf") else None

    return {"loss_error": error(found[0], expected[0]), "gradient_error": error(found[1], expected[1])}


def rates_of(spread: Spread, problem: Problem, which: str, rates: Rates, device: str) -> dict[str, float]:
    """A spread in seconds as the figures of a row: times in ms, and rates at the median."""
    moved = least_bytes(problem)[which] / spread.median
    return {
        "median_ms": spread.median * 1e3,
        "lower_ms": spread.lower * 1e3,
        "upper_ms": spread.upper * 1e3,
        "runs": spread.runs,
        "pixels_per_second": problem.pixels / spread.median,
        "gb_per_second": moved / 1e9,
        "share_of_copy": moved / rates.copy,
        "share_of_roof": rates.roof_seconds(problem, device)[which] / spread.median,
    }
