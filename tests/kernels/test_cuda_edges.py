"""Edges of the CUDA kernels, run from their source on the CPU: the prototypes' gradient, shared memory, the largest norms."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from proac_cuda import stages

if shutil.which("g++") is None:
    pytest.skip("g++ is not installed: the kernels' source cannot be compiled", allow_module_level=True)
pytest.importorskip("pybind11")
from cuda_comparison import compare  # noqa: E402
from cuda_on_cpu import stages as kernels  # noqa: E402
from stage_comparison import close, make_case  # noqa: E402


def backward(case: dict[str, Any], features: bool = True, prototypes: bool = True) -> tuple[Tensor, Tensor]:
    """The two gradients at temperature 0.1, with the twin."""
    x, labels, p, w = (case[name] for name in ("features", "labels", "prototypes", "pixel_weight"))
    statistics, positive, _ = kernels.class_statistics(x, labels, w, p, None, None, 0.1, 255, True, False)
    sums = kernels.positive_sums(positive, labels, w, statistics, 255, False)
    arguments = (x, labels, w, p, None, None, statistics, sums, None, torch.ones((), dtype=positive.dtype))
    return kernels.loss_gradients(*arguments, 0.1, 255, False, 0.5, stages.MEAN, features, prototypes)


@pytest.mark.parametrize("layout", ["planes", "channels_last", "slice"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "channels,num_classes,shared_kb",
    [(72, 19, 99), (33, 50, 227), pytest.param(256, 150, 163, marks=pytest.mark.slow), (7, 3, 227)],
)
def test_prototypes_gradient(dtype: torch.dtype, layout: str, channels: int, num_classes: int, shared_kb: int) -> None:
    """Several tiles to a block, prototypes that stay in shared memory and that pass through it, NaN where nobody looks."""
    kernels.module.set_options(shared_limit=shared_kb << 10, multiprocessors=1)
    case = make_case(dtype, channels, num_classes, spatial=(170,), layout=layout, weights=True)
    case["features"][0, :, 3:40:7] = torch.nan
    case["labels"][0, 3:40:7] = 255
    compare(case, alpha=0.3, learnable=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_prototypes_gradient_does_not_depend_on_the_blocks(dtype: torch.dtype) -> None:
    case = make_case(dtype, 40, 19, spatial=(3000,), weights=True)
    found = []
    for multiprocessors in (1, 132):
        kernels.module.set_options(multiprocessors=multiprocessors)
        x, labels, p, w = (case[name] for name in ("features", "labels", "prototypes", "pixel_weight"))
        if not found:
            statistics, positive, _ = kernels.class_statistics(x, labels, w, p, None, None, 0.1, 255, False, False)
            sums = kernels.positive_sums(positive, labels, w, statistics, 255, False)
        arguments = (x, labels, w, p, None, None, statistics, sums, None, torch.ones((), dtype=positive.dtype))
        found.append(kernels.loss_gradients(*arguments, 0.1, 255, False, 0.0, stages.MEAN, True, True)[1])
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("channels", [24, 1030])
def test_either_gradient_alone(channels: int) -> None:
    case = make_case(torch.float32, channels, 5)
    both, features, prototypes = backward(case), backward(case, prototypes=False), backward(case, features=False)
    assert torch.equal(both[0], features[0]) and features[1].numel() == 0
    assert torch.equal(both[1], prototypes[1]) and prototypes[0].numel() == 0


def test_a_bad_pixel_makes_the_prototypes_gradient_nan() -> None:
    for dtype, channels in ((torch.bfloat16, 24), (torch.float32, 24), (torch.float32, 1030)):
        case = make_case(dtype, channels, 3)
        case["labels"][0, 0, 0], case["features"][0, 3, 0, 0] = 1, torch.nan
        assert backward(case)[1].isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_prototypes_gradient_of_any_size(scale: float) -> None:
    """Sums in integers have the gradient's own scale, whatever the upstream gradient is."""
    case = make_case(torch.float32, 24, 5)
    x, labels, p = case["features"], case["labels"], case["prototypes"]
    statistics, positive, _ = kernels.class_statistics(x, labels, None, p, None, None, 0.1, 255, False, False)
    sums = kernels.positive_sums(positive, labels, None, statistics, 255, False)
    found = []
    for upstream in (1.0, scale):
        arguments = (x, labels, None, p, None, None, statistics, sums, None, torch.tensor(upstream))
        found.append(kernels.loss_gradients(*arguments, 0.1, 255, False, 0.0, stages.MEAN, False, True)[1].double())
    assert float((found[1] / scale - found[0]).norm()) <= 2e-6 * float(found[0].norm())


def test_shared_memory_beyond_what_needs_no_permission() -> None:
    """A launch sets the same limit whatever it needs itself: another thread's may need more. The stand-in refuses less."""
    kernels.module.set_options()
    for channels in range(256, 16, -40):
        for layout in ("planes", "channels_last"):
            compare(make_case(torch.float32, channels, 19, spatial=(33,), batch=1, layout=layout))


@pytest.mark.parametrize("channels", [24, 1030])
def test_largest_norms_at_the_highest_temperature(channels: int) -> None:
    """1 / (|x| tau) is too small for a float32."""
    case = make_case(torch.float32, channels, 3, spatial=(40,), batch=1)
    plain = kernels.class_statistics(
        case["features"], case["labels"], None, case["prototypes"], None, None, 1e3, 255, False, False
    )
    grown = kernels.class_statistics(
        case["features"] * 2.0**122, case["labels"], None, case["prototypes"], None, None, 1e3, 255, False, False
    )
    close("positive", grown[1], plain[1].double(), 1e-9)
