"""What only a GPU shows: graphs, streams, devices, synchronisation, reproducibility, and tensors of more than 2^31 elements.

The comparison suite, gradcheck and opcheck run on CUDA tensors in the other files: `pytest -m gpu` takes all of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import proac_cuda
from compare import assert_gradient_close, assert_loss_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all of them": {"num_negatives": 500, "seed": 3, "pixel_anchor_weight": 0.3, "negative_reduction": "mean"},
}


def make(
    dtype: torch.dtype = torch.bfloat16, num_classes: int = 19, channels: int = 256, device: str = "cuda"
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 48, 64, generator=g).to(device, dtype).requires_grad_()
    labels = torch.randint(0, num_classes, (2, 96, 128), generator=g).to(device)
    labels[labels == 0] = 255
    return x, labels, torch.randn(num_classes, channels, generator=g).to(device)


def step(x: Tensor, labels: Tensor, p: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    loss = proac_cuda.proac_loss(x, labels, p, backend="cuda", **options)
    return loss, torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [19, 60, 150, 300])
def test_against_the_reference_at_size(dtype: torch.dtype, num_classes: int, name: str) -> None:
    x, labels, p = make(dtype, num_classes)
    loss, grad = step(x, labels, p, **OPTIONS[name])
    exact = x.detach().double().requires_grad_()
    truth = proac_cuda.proac_loss(exact, labels, p.double(), backend="reference", **OPTIONS[name])
    (true_grad,) = torch.autograd.grad(truth, exact)
    assert_loss_close(loss, truth.cpu(), dtype, 0.1, x.shape[1])
    assert_gradient_close(grad, true_grad.cpu(), 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_to_the_bit_from_run_to_run(dtype: torch.dtype) -> None:
    x, labels, p = make(dtype)
    p.requires_grad_()
    runs = []
    for _ in range(5):
        loss = proac_cuda.proac_loss(x, labels, p, backend="cuda", **OPTIONS["all of them"])
        runs.append((loss, *torch.autograd.grad(loss, (x, p))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_no_synchronisation(name: str) -> None:
    x, labels, p = make()
    step(x, labels, p, **OPTIONS[name])
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, labels, p, **OPTIONS[name])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPTIONS)
def test_cuda_graph(name: str) -> None:
    x, labels, p = make()
    expected = step(x, labels, p, **OPTIONS[name])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x, labels, p, **OPTIONS[name])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, labels, p, **OPTIONS[name])
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    with torch.no_grad():
        x.mul_(-1)
    graph.replay()
    again = step(x, labels, p, **OPTIONS[name])
    assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True))


def test_current_stream() -> None:
    x, labels, p = make()
    expected = step(x, labels, p)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work on another stream would run ahead of this
        late = x.detach().clone().requires_grad_()
        got = step(late, labels, p)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_host_threads() -> None:
    """Launches of one kernel from several threads, with more shared memory and with less."""
    cases = [make(channels=channels) for channels in (256, 64, 192, 32)]
    expected = [step(*case) for case in cases]

    def run(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                got = step(*cases[number])
                assert all(torch.equal(a, b) for a, b in zip(got, expected[number], strict=True))

    torch.cuda.synchronize()
    with ThreadPoolExecutor(len(cases)) as threads:
        list(threads.map(run, range(len(cases))))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device() -> None:
    expected = step(*make())
    got = step(*make(device="cuda:1"))
    assert torch.cuda.current_device() == 0 and got[0].device.index == 1
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_more_than_two_billion_elements(layout: str) -> None:
    """The last pixels lie beyond 2^31 elements: their loss and gradient are those of the same pixels alone."""
    channels, pixels, tail = 256, 2**23 + 4096, 4096
    need = channels * pixels * 2 * 3
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of GPU memory")
    shape = (1, channels, pixels) if layout == "planes" else (1, pixels, channels)
    memory = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
    x = memory if layout == "planes" else memory.transpose(1, 2)
    g = torch.Generator("cuda").manual_seed(0)
    x[:, :, -tail:] = torch.randn(1, channels, tail, generator=g, device="cuda").bfloat16()
    labels = torch.full((1, pixels), 255, device="cuda", dtype=torch.uint8)
    labels[:, -tail:] = torch.randint(0, 19, (1, tail), generator=g, device="cuda", dtype=torch.uint8)
    p = torch.randn(19, channels, generator=g, device="cuda")
    loss, grad = step(x.requires_grad_(), labels, p)
    alone = x.detach()[:, :, -tail:].double().requires_grad_()
    truth = proac_cuda.proac_loss(alone, labels[:, -tail:], p.double(), backend="reference")
    (true_grad,) = torch.autograd.grad(truth, alone)
    assert_loss_close(loss, truth.cpu(), torch.bfloat16, 0.1, channels)
    assert_gradient_close(grad[:, :, -tail:], true_grad.cpu(), 0.1)
    assert not grad[:, :, :-tail].any()
