"""CUDA graphs: captured by hand, drawing anew at every replay, and as torch.compile makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import proac_cuda
from gpu_problem import OPTIONS, make, same, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]


def capture(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``work``, and what it returned, which every replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("num_classes", [19, 150])
def test_replays_give_what_calls_give(gpu_kernels: Any, num_classes: int, name: str) -> None:
    x, labels, p = make(num_classes=num_classes)
    graph, captured = capture(lambda: step(gpu_kernels.name, x, labels, p, **OPTIONS[name]))
    for change in (1, -1, 0.5):
        with torch.no_grad():
            x.mul_(change)
        graph.replay()
        assert same(captured, step(gpu_kernels.name, x, labels, p, **OPTIONS[name]))


def test_a_replay_on_another_stream(gpu_kernels: Any) -> None:
    x, labels, p = make()
    graph, captured = capture(lambda: step(gpu_kernels.name, x, labels, p))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            x.mul_(-1)
        graph.replay()
    stream.synchronize()
    assert same(captured, step(gpu_kernels.name, x, labels, p))


def test_a_gradient_of_prototypes(gpu_kernels: Any) -> None:
    x, labels, p = make(torch.float32)
    p.requires_grad_()

    def work() -> Any:
        loss = proac_cuda.proac_loss(x, labels, p, backend=gpu_kernels.name)
        return (loss, *torch.autograd.grad(loss, (x, p)))

    graph, captured = capture(work)
    with torch.no_grad():
        x.mul_(-1)
        p.mul_(2)
    graph.replay()
    assert same(captured, work())


def test_without_a_seed_every_replay_draws_anew(gpu_kernels: Any) -> None:
    """And PyTorch's seed names the draws."""
    x, labels, p = make()
    graph, (loss, _) = capture(lambda: step(gpu_kernels.name, x, labels, p, num_negatives=100))

    def replays(count: int) -> list[float]:
        torch.cuda.manual_seed(5)
        found = []
        for _ in range(count):
            graph.replay()
            found.append(loss.item())
        return found

    first = replays(4)
    assert len(set(first)) == 4
    assert replays(4) == first


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_reduce_overhead(gpu_kernels: Any, name: str) -> None:
    """torch.compile's own CUDA graphs take the loss with its backward pass; a third call replays what the second recorded."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    x, labels, p = make()

    def loss_of(scaled: torch.Tensor) -> torch.Tensor:
        return proac_cuda.proac_loss(scaled * 2, labels, p, backend=gpu_kernels.name, **OPTIONS[name])

    compiled = torch.compile(loss_of, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            x.mul_(-1.5)
        value = compiled(x)
        (gradient,) = torch.autograd.grad(value, x)
        expected = loss_of(x)
        (true_gradient,) = torch.autograd.grad(expected, x)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-2, atol=1e-6)
    assert not counters["inductor"]["cudagraph_skips"], "a graph was to be recorded"
