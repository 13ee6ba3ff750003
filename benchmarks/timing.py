"""Time: clocks for CPU and CUDA, contestants that take turns, and the spread of what was measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .problems import Arguments, Inputs

Step = Callable[[], object]


class Spread(NamedTuple):
    """Of repeated measurements: median, lower and upper quartile, and how many there were."""

    median: float
    lower: float
    upper: float
    runs: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return Spread(values[0], values[0], values[0], 1)
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(statistics.median(values), lower, upper, len(values))


class Clock(Protocol):
    """Times steps that follow each other."""

    device: str

    def time(self, steps: Sequence[Step]) -> list[float]:
        """Seconds of each step."""
        ...


class CpuClock:
    """Wall-clock time, or with ``process_time`` that of this process's threads together, of which others take nothing."""

    device = "cpu"

    def __init__(self, process_time: bool = False) -> None:
        self.now = time.process_time if process_time else time.perf_counter

    def time(self, steps: Sequence[Step]) -> list[float]:
        marks = [self.now()]
        for step in steps:
            step()
            marks.append(self.now())
        return [b - a for a, b in zip(marks, marks[1:], strict=False)]


class CudaClock:
    """CUDA events around each step, with an L2 cache that holds none of its inputs: before each, ``scratch`` is read.

    Written instead, it would leave lines behind that have to be written back while the step runs.
    """

    def __init__(self, device: str = "cuda", cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        self.scratch = torch.zeros(
            cuda.get_device_properties(device).L2_cache_size // 2, device=device
        )  # twice its size

    def time(self, steps: Sequence[Step]) -> list[float]:
        events = [[self.cuda.Event(enable_timing=True) for _ in range(2)] for _ in steps]
        for step, (begin, end) in zip(steps, events, strict=True):
            self.scratch.sum()
            begin.record()
            step()
            end.record()
        self.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) * 1e-3 for begin, end in events]


class Call:
    """One contestant on one problem."""

    def __init__(self, loss: Callable[..., Tensor], inputs: Inputs, clock: Clock) -> None:
        self.loss, self.inputs, self.clock = loss, inputs, clock
        self.value: Tensor | None = None

    def measure(self) -> list[float]:
        """Seconds of (forward, backward) on the next input."""
        arguments = self.inputs.next()
        seconds, _, _ = self.measure_results(arguments)
        arguments.features.grad = None
        return seconds

    def measure_results(self, arguments: Arguments) -> tuple[list[float], Tensor, Tensor]:
        """The same on a given input, with the loss and its gradient."""
        arguments.features.grad = None
        seconds = self.clock.time([lambda: self._forward(arguments), lambda: self.value.backward()])
        value, self.value = self.value.detach(), None
        return seconds, value, arguments.features.grad

    def _forward(self, arguments: Arguments) -> None:
        self.value = self.loss(*arguments)


class GraphCall:
    """The same out of CUDA graphs, one for each pass, without the launches' cost on the host.

    Raises:
        RuntimeError: the loss synchronises with the host, or cannot be captured for another reason.
    """

    def __init__(self, loss: Callable[..., Tensor], inputs: Inputs, clock: Clock, cuda: Any = torch.cuda) -> None:
        self.clock = clock
        arguments = inputs.next()
        warm_up = cuda.Stream()
        warm_up.wait_stream(cuda.current_stream())
        with cuda.stream(warm_up):
            for _ in range(3):
                torch.autograd.grad(loss(*arguments), arguments.features)
        cuda.current_stream().wait_stream(warm_up)
        self.forward, self.backward = cuda.CUDAGraph(), cuda.CUDAGraph()
        with cuda.graph(self.forward):
            self.value = loss(*arguments)
        with cuda.graph(self.backward, pool=self.forward.pool()):  # what forward saved stays where backward reads it
            self.gradient = torch.autograd.grad(self.value, arguments.features)

    def measure(self) -> list[float]:
        return self.clock.time([self.forward.replay, self.backward.replay])


class Effort(NamedTuple):
    """How long to measure one contestant on one problem."""

    seconds: float
    least: int  #: runs
    most: int

    def runs(self, seconds_a_call: float) -> int:
        return min(max(int(self.seconds / max(seconds_a_call, 1e-9)), self.least), self.most)


def alternate(calls: dict[str, Callable[[], list[float]]], runs: dict[str, int]) -> dict[str, list[list[float]]]:
    """Each contestant's measurements. They take turns, in an order that is reversed every other round.

    Those with fewer runs are spread over all rounds.
    """
    results: dict[str, list[list[float]]] = {name: [] for name in calls}
    rounds = max(runs.values(), default=0)
    for i in range(rounds):
        for name in list(calls) if i % 2 == 0 else reversed(calls):
            if -(-(i + 1) * runs[name] // rounds) > -(-i * runs[name] // rounds):
                results[name].append(calls[name]())
    return results


def by_speed(seconds: dict[str, float], factor: float = 10) -> list[list[str]]:
    """Contestants in groups, from fast to slow, each within ``factor`` of its fastest.

    A call of seconds drives others' freed memory out of the machine, which would count as theirs.
    """
    groups: list[list[str]] = []
    for name in sorted(seconds, key=seconds.__getitem__):
        if groups and seconds[name] <= factor * seconds[groups[-1][0]]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups
