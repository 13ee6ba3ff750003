"""The suite of all backends, run for the Triton kernels by Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FILES = [
    "kernels/test_against_oracle.py",
    "api/test_behaviour.py",
    "api/test_bad_input.py",
    "kernels/test_properties.py",
    "kernels/test_triton_interpreter.py",
    "kernels/test_triton_bounds.py",
]


def _environment(**changes: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **changes}


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
@pytest.mark.parametrize("file", FILES)
def test_the_suite_in_the_interpreter(file):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--slow",
        "-p",
        "triton_interpreter",
        "--backend",
        "triton",
        "-W",
        "ignore::RuntimeWarning",  # NumPy's, at 1/0 and log 0
        "-W",
        "error::FutureWarning",
        "-W",
        "error::DeprecationWarning",
    ]
    done = subprocess.run(
        [*command, file], cwd=ROOT / "tests", env=_environment(TRITON_INTERPRET="1"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " failed" not in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="asks what happens without the interpreter")
def test_cpu_tensors_without_the_interpreter():
    import proac_cuda

    arguments = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.eye(2, 4)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        proac_cuda.proac_loss(*arguments, backend="triton")


@pytest.mark.slow
def test_imports_without_triton():
    """A machine without Triton: the package imports, and the backend says what is missing."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import proac_cuda; print(proac_cuda.available_backends()['triton'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=_environment(), capture_output=True, text=True, check=True
    )
    assert "Triton is not installed" in done.stdout


@pytest.mark.parametrize("capability, runs", [((7, 0), False), ((7, 2), False), ((7, 5), True), ((9, 0), True)])
def test_gpus_too_old(capability, runs):
    """Triton itself compiles for 7.5 in every version from 3.6 to 3.9."""
    from proac_cuda.backends.triton import why_not_capability

    reason = why_not_capability(capability)
    assert reason is None if runs else "7.5 or higher, not 7." in reason and 'backend="reference"' in reason


@pytest.mark.slow
def test_importing_the_package_imports_no_kernels():
    script = "import sys, proac_cuda; print(any(m.startswith('proac_cuda.backends.triton.') for m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_label_positions_beyond_2_31_pixels():
    """One image of 50,000 x 50,000 pixels: the labels' position comes out of 64-bit arithmetic throughout."""
    import position_kernel
    from proac_cuda.backends.triton.layout import Pixels, sampling

    size, label_size = (50_000, 50_000), (25_000, 100_000)
    labels = torch.empty(1, *label_size, dtype=torch.uint8, device="meta")
    where = sampling(labels, None, torch.Size(size), 255, False)
    index = torch.tensor([0, 2**31 - 1, 2**31, 2_400_049_999, 2_499_999_999])
    out = torch.zeros(3, 8, dtype=torch.int64)
    position_kernel.positions[(1,)](index, out, len(index), where, BM=8)
    assert str(Pixels(1, 50_000**2, []).index_type(labels[:, :1, :1])) == "int64"
    assert str(Pixels(1, 50, []).index_type(labels)) == "int32"
    assert str(Pixels(1, 50, []).index_type(torch.empty(1, 2**31, device="meta"))) == "int64"
    row, column = index // size[1], index % size[1]
    expected = torch.stack([torch.zeros_like(row), row // 2, column * 2])
    assert torch.equal(out[:, : len(index)], expected)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("backward", ["features held", "pixels as rows", "features streamed", "some kept", "none kept"])
@pytest.mark.parametrize(
    "dtype, channels, classes",
    [(torch.float32, 140, 37), (torch.float16, 72, 37), (torch.float64, 72, 5), (torch.bfloat16, 72, 5)],
    ids=str,
)
def test_every_loop_goes_round(monkeypatch, dtype, channels, classes, backward):
    """Tiles so small that pixels, classes, channels and chunks all come in several, the last of each ragged."""
    from proac_cuda.backends.triton import tiles

    sizes = {
        "features held": {"DO": 256 if channels > 128 else 128, "HELD": 64, "LOOPED": True},
        "pixels as rows": {"DO": 256 if channels > 128 else 128, "HELD": 128, "PIXEL_ROWS": True},
        "features streamed": {"DO": 64},
        "some kept": {"KEPT": 32, "LOOPED": True},
        "none kept": {"KEPT": 0},
    }[backward]
    monkeypatch.setattr(tiles, "MAX_CHUNKS", 3)
    monkeypatch.setattr(tiles, "PROTOTYPE_PROGRAMS", 20)
    monkeypatch.setattr(tiles, "forward_tiles", lambda *_: tiles.Tiles(16, 16, 16, 4, 1, BLOCKS=2))
    monkeypatch.setattr(tiles, "backward_tiles", lambda *_: tiles.Tiles(16, 32, 16, 4, 1, **sizes))
    monkeypatch.setattr(
        tiles, "prototype_tiles", lambda *_: tiles.Tiles(16, 16, 16, 4, 1, DO=sizes.get("DO", 32), BLOCKS=2)
    )
    _compare_every_option(dtype, channels, classes)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "dtype, classes",  # one block of classes; several; so many that the gradient is made block by block
    [(torch.float16, 37), (torch.bfloat16, 5), (torch.float32, 37), (torch.float16, 260)],
    ids=str,
)
def test_tiles_without_tensor_cores(monkeypatch, dtype, classes):
    """As on sm_75: products of 16-bit features with prototypes in float32."""
    from proac_cuda.backends.triton import launch

    monkeypatch.setattr(launch, "architecture", lambda device: "sm_75")
    _compare_every_option(dtype, 40, classes)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("pixel_rows", [False, True])
@pytest.mark.parametrize("powers", [(-9, 2, 0), (2, -9, 0), (-4, -4, -4)], ids=str)
def test_coefficients_beyond_the_range_of_float16(monkeypatch, powers, pixel_rows):
    """Blocks of classes whose coefficients differ by powers of ten, in any order: each pixel's gradient is right by itself."""
    import proac_cuda
    from proac_cuda.backends.triton import tiles

    tile = tiles.Tiles(16, 32, 16, 4, 1, DO=64, HELD=64, PIXEL_ROWS=pixel_rows)
    monkeypatch.setattr(tiles, "backward_tiles", lambda *_: tile)
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(48, 64, generator=generator)
    labels = torch.randint(0, 48, (1, 6, 10), generator=generator)
    features = torch.randn(1, 64, 6, 10, generator=generator) / 64  # short, so that no gradient is below float16
    features = features.half()
    upstream = 10.0 ** torch.tensor(powers).repeat_interleave(16) * torch.rand(48, generator=generator)
    answers = []
    for backend, x in (("triton", features), ("reference", features.double())):
        x.requires_grad_()
        p = prototypes.to(torch.promote_types(x.dtype, torch.float32))
        loss = proac_cuda.proac_loss(x, labels, p, temperature=0.5, reduction="none", backend=backend)
        (upstream.to(loss.dtype) * loss).sum().backward()
        answers.append(x.grad.double())
    error, size = ((answers[0] - answers[1]).norm(dim=1), answers[1].norm(dim=1))
    assert 1e-4 < size.min() < size.max() < 65504, "what float16 holds"
    assert (error <= 1e-3 * size + 2.0**-25 * 8).all(), (error / size).max()  # and what float16 rounds, 64 numbers each


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("classes", [5, 70])  # one block of classes; three
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_stage_by_stage_as_in_one_go(classes, reduction):
    """Ranks run the stages one by one: their sums, and so the loss, are those of a process by itself, to the bit."""
    from proac_cuda import stages
    from proac_cuda.stages import autograd

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 20, 9, 30, generator=generator)
    labels = torch.randint(0, classes, (2, 18, 60), generator=generator)
    prototypes, class_weight = torch.randn(classes, 20, generator=generator), torch.rand(classes, generator=generator)
    options = 0.1, 255, False, 0.3 if reduction == "mean" else 0.0, stages.REDUCTIONS[reduction], True, False
    arguments = features, labels, None, prototypes, class_weight, None, None, *options
    ops = torch.ops.proac_cuda_triton
    for one, other in zip(ops.loss_forward(*arguments), autograd.loss_forward(ops, *arguments), strict=True):
        assert torch.equal(one, other)


def _compare_every_option(dtype, channels, classes):
    """Loss, statistics and both gradients with every option, against the reference in float64."""
    import proac_cuda
    from compare import gradient_tolerance

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, channels, 3, 13, generator=generator).to(dtype)
    labels = torch.randint(0, classes, (2, 6, 11), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    real = torch.float64 if dtype == torch.float64 else torch.float32
    prototypes = torch.randn(classes, channels, generator=generator).to(real)
    options = {"pixel_anchor_weight": 0.5, "num_negatives": 20, "seed": 4, "return_stats": True}
    answers = []
    for backend, kind in (("triton", dtype), ("reference", torch.float64)):
        x = features.to(kind).detach().clone().requires_grad_()
        p = prototypes.to(torch.promote_types(kind, real)).detach().clone().requires_grad_()
        loss, stats = proac_cuda.proac_loss(x, labels, p, backend=backend, **options)
        loss.backward()
        answers.append((loss.detach().double(), stats, x.grad.double(), p.grad.double()))
    (loss, stats, dx, dp), (true_loss, true_stats, true_dx, true_dp) = answers
    tolerance = gradient_tolerance(dtype, 0.1)
    rounded = (true_dx.to(dtype).double() - true_dx).norm() if dtype in (torch.float16, torch.bfloat16) else 0
    assert abs(loss - true_loss) <= {torch.float64: 1e-12}.get(dtype, 5e-5) * true_loss
    assert (dx - true_dx).norm() <= tolerance * true_dx.norm() + rounded
    assert (dp - true_dp).norm() <= tolerance * true_dp.norm()
    torch.testing.assert_close(stats.log_z.double(), true_stats.log_z.double(), rtol=2e-6, atol=5e-5)
