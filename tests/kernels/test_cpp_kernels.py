"""The compiled CPU kernels where they differ from other backends: tiles, register blocks, layouts, threads, instruction sets.

The comparison suite runs every backend on small cases; here are the shapes at which the CPU kernels change their path.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import instruction_sets
import proac_cuda
import sanitize
from compare import assert_gradient_close, assert_loss_close
from proac_cuda.backends import extension
from stage_comparison import make_aligned_case

pytestmark = pytest.mark.skipif(
    not proac_cuda.available_backends()["cpp"].can_run, reason=proac_cuda.available_backends()["cpp"].reason
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def problem(shape: tuple[int, ...], classes: int, seed: int = 0, ignored: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """float64 features, labels and prototypes."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255 if classes < 256 else -100
    return features, labels, torch.randn(classes, shape[1], generator=generator, dtype=torch.float64)


def run(
    features: Tensor, labels: Tensor, prototypes: Tensor, backend: str = "cpp", learnable: bool = False, **options: Any
) -> tuple[Tensor, proac_cuda.ProACStats, Tensor, Tensor | None]:
    """Loss, statistics and gradients."""
    features = features.detach().requires_grad_()
    prototypes = prototypes.detach().requires_grad_(learnable)
    options.setdefault("ignore_index", 255 if prototypes.shape[0] < 256 else -100)
    loss, stats = proac_cuda.proac_loss(features, labels, prototypes, backend=backend, return_stats=True, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) if loss.ndim else 0.7
    scale = max(1.0, options.get("temperature", 0.1))  # or float16 would round all of a tiny gradient to zero
    (loss * upstream * scale).sum().backward()
    assert features.grad is not None
    return loss.detach(), stats, features.grad, prototypes.grad


def compare(features: Tensor, labels: Tensor, prototypes: Tensor, **options: Any) -> None:
    """cpp against the float64 reference of the same features."""
    dtype, tau = features.dtype, options.get("temperature", 0.1)
    loss, stats, grad, grad_p = run(features, labels, prototypes.to(dtype), **options)
    exact = prototypes.to(dtype if dtype == torch.float64 else torch.float32).double()
    if dtype in (torch.bfloat16, torch.float16):
        loss, stats, grad, grad_p = run(features, labels, exact.float(), **options)
    double = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    truth, true_stats, true_grad, true_grad_p = run(features.double(), labels, exact, "reference", **double)
    channels = features.shape[1]
    assert_loss_close(loss, truth, dtype, tau, channels)
    # The mean over negatives subtracts two logarithms, which leave about 0 where the temperature is high.
    some = torch.full_like(true_stats.log_z, 3.0) if "negative_reduction" in options else 0
    assert_loss_close(stats.log_z.double() + some, true_stats.log_z + some, dtype, tau, channels)
    assert_loss_close(stats.hardest_negative_cosine, true_stats.hardest_negative_cosine, dtype, 1, channels)
    torch.testing.assert_close(stats.weight, true_stats.weight.to(stats.weight.dtype), rtol=1e-6, atol=0)
    assert grad.dtype == dtype and grad.shape == features.shape
    if channels == 1:  # a vector of one channel can only turn around: the gradient is 0, but for rounding
        epsilon = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 1e-2
        assert (grad.double() * features.double()).abs().max() <= epsilon / tau
        return
    assert_gradient_close(grad, true_grad, tau)
    if grad_p is not None and true_grad_p is not None:
        assert_gradient_close(grad_p, true_grad_p, tau)


@pytest.mark.parametrize("channels", [1, 7, 33, 64, 256, 300])
@pytest.mark.parametrize("classes", [1, 2, 19, 150, 1000])
def test_grid_of_sizes(classes: int, channels: int) -> None:
    """Register blocks of classes and channels that come out even or not; no pixel, a part of a tile, many chunks."""
    for i, pixels in enumerate([1, 31, 4097]):
        dtype = DTYPES[(classes + channels + i) % 4]
        features, labels, prototypes = problem((1, channels, pixels), classes)
        compare(features.to(dtype), labels, prototypes, learnable=pixels == 31)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_features_on_their_prototypes(temperature: float, dtype: torch.dtype) -> None:
    """Cosine 0.99995: a pixel's own class, whose dS is the largest by far, leaves less of the gradient than the others."""
    case = make_aligned_case(dtype, 256, 150, pixels=1024, noise=0.01)
    compare(case["features"], case["labels"], case["prototypes"].double(), temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 0.02, 0.033, 0.034, 1.0, 1e3])
def test_grid_of_temperatures(temperature: float, dtype: torch.dtype) -> None:
    """On either side of 2 / tau = 60, where the running maximum begins; with the twin, weights and samples in between."""
    features, labels, prototypes = problem((2, 40, 13, 11), 37)
    features = features.to(dtype)
    weight = torch.rand(labels.shape, dtype=torch.float64)
    for options in (
        {},
        {"pixel_weight": weight, "class_weight": torch.rand(37, dtype=torch.float64), "learnable": True},
        {"pixel_anchor_weight": 0.5, "num_negatives": 50, "seed": 3, "reduction": "sum"},
        {"num_negatives": 20, "seed": 4, "negative_reduction": "mean", "reduction": "none"},
    ):
        compare(features, labels, prototypes, temperature=temperature, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.005, 0.1])
def test_extreme_weights(temperature: float, dtype: torch.dtype) -> None:
    """Weights whose sums would leave the exponent range; a chunk may meet the first of them late."""
    features, labels, prototypes = problem((1, 16, 3000), 7)
    for scale in (1e-30, 1e30):
        weight = torch.rand(labels.shape, dtype=torch.float64)
        weight[0, 1300:1700] *= scale
        compare(features.to(dtype), labels, prototypes, pixel_weight=weight.float(), temperature=temperature)
    compare(features.to(dtype), labels, prototypes, pixel_weight=torch.full_like(weight, 1e-10).float(), seed=0)


def layouts() -> dict[str, Tensor]:
    """Features of the same shape and values, (2, 48, 9, 16), stored in every way that is read in place."""
    base = torch.randn(2, 48, 9, 16, generator=torch.Generator().manual_seed(2))
    wide = torch.randn(3, 100, 9, 16)
    wide[1:, 7:55] = base
    last = torch.randn(3, 100, 9, 16).to(memory_format=torch.channels_last)
    last[1:, 7:55] = base
    return {
        "contiguous": base,
        "channels last": base.to(memory_format=torch.channels_last),
        "batch and channel slice": wide[1:, 7:55],
        "batch and channel slice of channels last": last[1:, 7:55],
        "batch reversed in memory": torch.stack([base[1], base[0]])[[1, 0]],
        "both images the same memory": base[:1].expand(2, -1, -1, -1),
        "every pixel the same memory": base[:, :, :1, :1].expand(-1, -1, 9, 16),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", layouts())
def test_layouts(name: str, dtype: torch.dtype) -> None:
    """Tiles inside one image and tiles that span two: 144 pixels an image."""
    features = layouts()[name]
    if dtype != torch.float32:
        features = torch.empty_like(features, dtype=dtype).copy_(features) if "same" not in name else features.to(dtype)
    _, labels, prototypes = problem(tuple(features.shape), 21)
    compare(features, labels, prototypes)
    compare(features, labels, prototypes, num_negatives=9, seed=0)


@pytest.mark.parametrize(
    "shape", [(70, 5), (70, 64), (1, 33, 1, 70), (70, 33, 1, 1), (5, 1, 6, 7), (3, 4, 2, 3, 5)], ids=str
)
def test_axes_of_size_one(shape: tuple[int, ...]) -> None:
    """Their strides mean nothing, and must not be used."""
    features, labels, prototypes = problem(shape, 7)
    strange = features.as_strided(
        shape, [s if n != 1 else 12345 for n, s in zip(shape, features.stride(), strict=True)]
    )
    compare(strange.float() if features.ndim == 2 else strange, labels, prototypes)
    assert torch.equal(run(strange, labels, prototypes)[2], run(features, labels, prototypes)[2])


@pytest.mark.parametrize("labels_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_stride(labels_dtype: torch.dtype) -> None:
    features, _, prototypes = problem((2, 8, 10, 12), 6)
    labels = torch.randint(0, 6, (50, 3, 40, 2), dtype=labels_dtype)[..., 0].permute(1, 2, 0)[:2]
    weight = torch.rand(50, 3, 40, 2)[..., 1].permute(1, 2, 0)[:2]
    compare(features, labels, prototypes, pixel_weight=weight)
    strided = run(features, labels, prototypes, pixel_weight=weight)[2]
    dense = run(features, labels.contiguous(), prototypes, pixel_weight=weight.contiguous())[2]
    assert torch.equal(strided, dense)


@pytest.mark.parametrize(("classes", "channels"), [(19, 16), (150, 16), (40, 300)])
@pytest.mark.parametrize("count", [1, 100, 3000, 10**6])
@pytest.mark.parametrize("channels_last", [False, True])
def test_sampled_sets(classes: int, channels: int, count: int, channels_last: bool) -> None:
    """Few members: they are gathered into tiles of their own. Many: whole tiles with masks. A class of almost all pixels."""
    features, labels, prototypes = problem((2, channels, 50, 61), classes, ignored=0.3)
    labels[0, :30] = 1
    features = features.float()
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    compare(features, labels, prototypes, num_negatives=count, seed=-5)
    arguments = (features, labels, None, torch.tensor([-5, 0]), count, classes, 255)
    ours, theirs = (getattr(torch.ops, n).select_negatives(*arguments) for n in ("proac_cuda", "proac_cuda_reference"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("first_index", [0, 7, 2**32 - 500, 2**40])
def test_thresholds_equal_the_reference(first_index: int) -> None:
    """Bit for bit, weights and offsets of other ranks included."""
    generator = torch.Generator().manual_seed(1)
    for trial in range(20):
        pixels = int(torch.randint(1, 3000, (1,), generator=generator))
        classes = int(torch.randint(1, 40, (1,), generator=generator))
        features = torch.zeros(1, 2, pixels)
        labels = (torch.rand(1, pixels, generator=generator) ** 3 * (classes + 1)).long()
        weight = torch.rand(1, pixels, generator=generator).sub(0.2).clamp(min=0) if trial % 2 else None
        state = torch.tensor([trial * 2**50 - 3, first_index])
        count = int(torch.randint(1, pixels + 10, (1,), generator=generator))
        arguments = (features, labels, weight, state, count, classes, classes)
        ours = torch.ops.proac_cuda.select_negatives(*arguments)
        assert torch.equal(ours, torch.ops.proac_cuda_reference.select_negatives(*arguments))


def test_threads_change_no_bit() -> None:
    features, labels, prototypes = problem((2, 33, 60, 70), 45)
    weight = torch.rand(labels.shape, dtype=torch.float64)
    settings: list[dict[str, Any]] = [
        {"learnable": True},
        {"num_negatives": 200, "seed": 1},
        {"num_negatives": 4000, "seed": 1, "pixel_anchor_weight": 1.0},
        {"pixel_weight": weight, "temperature": 0.01},
    ]
    before = torch.get_num_threads()
    try:
        for options, dtype in itertools.product(settings, DTYPES):
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                loss, stats, grad, grad_p = run(features.to(dtype), labels, prototypes, **options)
                results.append([loss, *stats, grad, *([] if grad_p is None else [grad_p])])
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    assert a.dtype == b.dtype
                    assert torch.equal(torch.nan_to_num(a, 77), torch.nan_to_num(b, 77))
    finally:
        torch.set_num_threads(before)


def test_ignored_pixels_get_exactly_zero_whatever_the_rest() -> None:
    """Also where NaN in a kept pixel has made every log Z a NaN."""
    features, labels, prototypes = problem((1, 12, 9, 31), 5)
    features = features.float()
    features[0, 3][labels[0] == 255] = torch.nan
    features[0, :, 0, 0] = torch.inf
    labels[0, 0, 0] = 2
    for options in ({}, {"num_negatives": 3, "seed": 0}, {"pixel_anchor_weight": 1.0}):
        loss, _, grad, _ = run(features, labels, prototypes.float(), **options)
        assert loss.isnan()
        assert grad.permute(0, 2, 3, 1)[labels == 255].eq(0).all()


@pytest.mark.slow
@pytest.mark.parametrize("isa", instruction_sets.NAMES)
def test_each_instruction_set(isa: str) -> None:
    if not instruction_sets.has(isa):
        pytest.skip(f"this CPU has no {isa}")
    if isa == extension.build_info()["cpu"]:
        pytest.skip("it is what every other test runs")
    tests = instruction_sets.suite(isa)
    assert tests.returncode == 0, tests.stdout[-3000:]


@pytest.mark.slow
def test_an_unknown_instruction_set_is_an_error() -> None:
    probe = instruction_sets.python("sse9", "-c", "from proac_cuda.backends import extension; extension.build_info()")
    assert "RuntimeError" in probe.stderr and 'no kernels for "sse9"' in probe.stderr


_MEMORY = """
import torch, proac_cuda
torch.manual_seed(0)
B, D, H, W, K = 2, 8, 1024, 1024, 150
x = torch.randn(B, D, H, W).requires_grad_()
labels = torch.randint(0, K, (B, H // 4, W // 4), dtype=torch.uint8)
prototypes = torch.randn(K, D)
small = torch.randn(1, D, 64, 64).requires_grad_()
proac_cuda.proac_loss(small, labels[:1, :64, :64], prototypes, backend="cpp", num_negatives=99).backward()
def peak():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024
before = peak()
proac_cuda.proac_loss(x, labels, prototypes, backend="cpp", OPTIONS).backward()
print((peak() - before - x.numel() * 4) / (B * H * W))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "options", ["", "num_negatives=1000, seed=1", "num_negatives=10**6, seed=1, pixel_anchor_weight=1."]
)
def test_memory_per_pixel(options: str) -> None:
    """At most 32 bytes a pixel beyond inputs and outputs, and what threads and chunks need: N x K would be 600 a pixel."""
    probe = instruction_sets.python("", "-c", _MEMORY.replace("OPTIONS", options))
    assert probe.returncode == 0, probe.stderr
    assert float(probe.stdout) < 32 + 4, probe.stdout  # 4 bytes a pixel are 8 MiB: tiles, partial sums, page tables


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizers' library is preloaded")
@pytest.mark.parametrize("isa", instruction_sets.NAMES)
def test_sanitizers_find_nothing(isa: str) -> None:
    tests = sanitize.run(isa)
    if tests is None:
        pytest.skip(f"this CPU has no {isa}")
    assert tests.returncode == 0, (tests.stdout + tests.stderr)[-4000:]
