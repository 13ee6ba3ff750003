"""What only a GPU shows: streams, devices, synchronisation, reproducibility, and tensors of more than 2^31 elements.

Graphs stand in test_gpu_graphs.py. The comparison suite, gradcheck and opcheck run on CUDA tensors in the other files:
`pytest -m gpu` takes all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import proac_cuda
from compare import assert_gradient_close, assert_loss_close
from gpu_problem import OPTIONS, make, same, step

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [19, 60, 150, 300])
def test_against_the_reference_at_size(gpu_kernels: Any, dtype: torch.dtype, num_classes: int, name: str) -> None:
    x, labels, p = make(dtype, num_classes)
    loss, grad = step(gpu_kernels.name, x, labels, p, **OPTIONS[name])
    exact = x.detach().double().requires_grad_()
    truth, true_grad = step("reference", exact, labels, p.double(), **OPTIONS[name])
    assert_loss_close(loss, truth.cpu(), dtype, 0.1, x.shape[1])
    assert_gradient_close(grad, true_grad.cpu(), 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_to_the_bit_from_run_to_run(gpu_kernels: Any, dtype: torch.dtype) -> None:
    x, labels, p = make(dtype)
    p.requires_grad_()
    runs = []
    for _ in range(5):
        loss = proac_cuda.proac_loss(x, labels, p, backend=gpu_kernels.name, **OPTIONS["all of them"])
        runs.append((loss, *torch.autograd.grad(loss, (x, p))))
    assert all(same(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("name", OPTIONS)
def test_no_synchronisation(gpu_kernels: Any, name: str) -> None:
    x, labels, p = make()
    step(gpu_kernels.name, x, labels, p, **OPTIONS[name])
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(gpu_kernels.name, x, labels, p, **OPTIONS[name])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_stream_that_is_not_the_default_one(gpu_kernels: Any, name: str) -> None:
    """Work on another stream than the current one would run ahead of the features, which come late."""
    x, labels, p = make()
    expected = step(gpu_kernels.name, x, labels, p, **OPTIONS[name])
    late = torch.zeros_like(x, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            late.copy_(x)
        got = step(gpu_kernels.name, late, labels, p, **OPTIONS[name])
    stream.synchronize()
    assert same(got, expected)


def test_two_streams_at_once(gpu_kernels: Any) -> None:
    """Nothing is shared between calls that overlap on the GPU."""
    cases = [make(num_classes=19), make(num_classes=150)]
    expected = [step(gpu_kernels.name, *case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    found: list[list[Any]] = [[], []]
    for _ in range(20):
        for stream, case, results in zip(streams, cases, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(gpu_kernels.name, *case))
    torch.cuda.synchronize()
    assert all(same(got, expected[i]) for i in range(2) for got in found[i])


def test_host_threads(gpu_kernels: Any) -> None:
    """Launches of one kernel from several threads, with more shared memory and with less."""
    cases = [make(channels=channels) for channels in (256, 64, 192, 32)]
    expected = [step(gpu_kernels.name, *case) for case in cases]

    def run(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                assert same(step(gpu_kernels.name, *cases[number]), expected[number])

    torch.cuda.synchronize()
    with ThreadPoolExecutor(len(cases)) as threads:
        list(threads.map(run, range(len(cases))))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("name", OPTIONS)
def test_second_device(gpu_kernels: Any, name: str) -> None:
    """The tensors' device counts, not the current one."""
    expected = step(gpu_kernels.name, *make(), **OPTIONS[name])
    got = step(gpu_kernels.name, *make(device="cuda:1"), **OPTIONS[name])
    assert torch.cuda.current_device() == 0 and got[0].device.index == 1
    assert same(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_more_than_two_billion_elements(gpu_kernels: Any, layout: str) -> None:
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
    loss, grad = step(gpu_kernels.name, x.requires_grad_(), labels, p)
    alone = x.detach()[:, :, -tail:].double().requires_grad_()
    truth, true_grad = step("reference", alone, labels[:, -tail:], p.double())
    assert_loss_close(loss, truth.cpu(), torch.bfloat16, 0.1, channels)
    assert_gradient_close(grad[:, :, -tail:], true_grad.cpu(), 0.1)
    assert not grad[:, :, :-tail].any()


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_the_ptx_alone() -> None:
    """A build for compute capability 8.0 has no machine code for a newer GPU: the driver compiles its PTX, at the first call.

    Built in build/ptx80, where a second run finds it. Takes minutes.
    """
    if torch.cuda.get_device_capability()[0] == 8:
        pytest.skip("a GPU of compute capability 8.x runs the machine code of 8.0")
    build = ROOT / "build" / "ptx80"
    environment = {**os.environ, "PROAC_CUDA_ARCHITECTURES": "80"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(build)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (library,) = {path.parent.parent for path in build.glob("lib*/proac_cuda/_C*.so")}
    code = (
        "import torch, proac_cuda; from proac_cuda.backends.extension import build_info; "
        f"assert proac_cuda.__file__.startswith({str(library)!r}), proac_cuda.__file__; "
        "assert build_info()['cuda'] == 'sm_80,compute_80', build_info(); "
        "import test_real_sizes as t; [t.compare(call, 'cuda', 'cuda') for call in t.PATHS]"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (library, ROOT / "tests", ROOT / "tests" / "kernels"))),
    }
    subprocess.run([sys.executable, "-c", code], cwd=library, env=environment, check=True)
