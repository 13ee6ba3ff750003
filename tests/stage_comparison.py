"""The stages of a call, one by one, against the reference in float64 (spec: the table of accuracy): cases and comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from proac_cuda import stages
from proac_cuda.backends import reference

#: What a case is made with, and the options of the comparison.
OPTIONS: dict[str, dict[str, Any]] = {
    "weights": {"weights": True},
    "sampled": {"num_negatives": 11},
    "sampled, weights, twin": {"num_negatives": 3, "weights": True, "alpha": 0.7},
    "more than there are": {"num_negatives": 1000},
    "twin": {"alpha": 0.3},
    "mean negatives, sum": {"negative_mean": True, "reduction": stages.SUM},
    "none": {"reduction": stages.NONE, "weights": True},
    "learnable": {"learnable": True, "alpha": 0.3, "weights": True},
    "coarse labels": {"label_spatial": (3, 29)},
    "labels from the middles of cells": {"label_spatial": (29, 43), "nearest_exact": True, "weights": True},
    "sampled from the middles of cells": {"label_spatial": (29, 43), "nearest_exact": True, "num_negatives": 11},
    "cold": {"temperature": 0.01, "weights": True, "alpha": 0.5},
    "hot": {"temperature": 1000.0},
}


def cosine_tolerance(dtype: torch.dtype, channels: int) -> float:
    if dtype == torch.float64:
        return 1e-14
    if dtype == torch.float32:
        return 1e-6
    return 2e-6 if channels >= 64 else 5e-6


def gradient_tolerance(dtype: torch.dtype, temperature: float) -> float:
    if dtype == torch.float64:
        return 1e-12
    return 1e-6 + 4e-6 / temperature if dtype == torch.float32 else 2e-4


def make_features(shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "slice":  # every other image and some channels of a larger tensor
        wide = torch.full((2 * shape[0], shape[1] + 3, *shape[2:]), torch.nan, dtype=dtype)
        wide[::2, 1:-2] = x
        return wide[::2, 1:-2]
    return x


def make_case(
    dtype: torch.dtype,
    channels: int,
    num_classes: int,
    spatial: tuple[int, ...] = (5, 13),
    batch: int = 2,
    layout: str = "planes",
    label_spatial: tuple[int, ...] | None = None,
    weights: bool = False,
    seed: int = 0,
    label_dtype: torch.dtype = torch.int64,
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    double = torch.float64 if dtype == torch.float64 else torch.float32
    labels = torch.randint(0, num_classes, (batch, *(label_spatial or spatial)), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.1] = 255
    case: dict[str, Any] = {
        "features": make_features((batch, channels, *spatial), dtype, layout, g),
        "labels": labels.to(label_dtype),
        "prototypes": torch.randn(num_classes, channels, generator=g, dtype=torch.float64).to(double),
        "pixel_weight": None,
        "class_weight": None,
    }
    if weights:
        w = torch.rand(labels.shape, generator=g, dtype=torch.float64).to(double) * 3
        case["pixel_weight"] = torch.where(torch.rand(w.shape, generator=g) < 0.1, 0, w)
        case["class_weight"] = torch.rand(num_classes, generator=g, dtype=torch.float64).to(double)
    return case


def make_aligned_case(
    dtype: torch.dtype,
    channels: int,
    num_classes: int = 19,
    pixels: int = 64,
    noise: float = 0.3,
    layout: str = "planes",
) -> dict[str, Any]:
    """Features near their prototypes (cosine 0.96; 0.7 for noise 1), as training makes them: there sums that are truncated are
    biased, which random features hide."""
    case = make_case(dtype, channels, num_classes, spatial=(pixels,), batch=1)
    g = torch.Generator().manual_seed(5)
    labels = case["labels"]
    labels[:] = torch.randint(0, num_classes, labels.shape, generator=g)
    p = torch.nn.functional.normalize(case["prototypes"].double(), dim=1)
    x = p[labels[0]].t() + noise * torch.randn(channels, pixels, generator=g, dtype=torch.float64) / channels**0.5
    x = (3 * x).to(dtype)
    case["features"] = (x.t().contiguous().t() if layout == "channels_last" else x.contiguous()).unsqueeze(0)
    return case


def close(name: str, got: Tensor, truth: Tensor, absolute: float, relative: float = 0.0) -> None:
    got = got.double()
    assert torch.equal(got.isfinite(), truth.isfinite()), name
    same = got.isfinite()
    assert torch.equal(got[~same].nan_to_num(), truth[~same].nan_to_num()), name
    error = (got - truth).abs()[same] - relative * truth.abs()[same]
    assert error.numel() == 0 or float(error.max()) <= absolute, (
        f"{name}: off by {float(error.max()):.2e}, {absolute:.1e} allowed"
    )


def close_gradient(name: str, got: Tensor, truth: Tensor, tolerance: float) -> None:
    rounding = float((truth.to(got.dtype).double() - truth).norm()) if got.element_size() == 2 else 0.0
    error, size = float((got.double() - truth).norm()), float(truth.norm())
    assert error <= rounding + tolerance * size, (
        f"{name}: relative error {error:.2e} / {size:.2e}, {tolerance:.1e} allowed"
    )


def compare(
    kernels: Any,
    case: dict[str, Any],
    temperature: float = 0.1,
    num_negatives: int | None = None,
    alpha: float = 0.0,
    reduction: int = stages.MEAN,
    negative_mean: bool = False,
    ignore_index: int = 255,
    learnable: bool = False,
    nearest_exact: bool = False,
) -> None:
    """Every stage that `kernels` has against the reference's, which takes the same features in float64."""
    x, labels, prototypes = case["features"], case["labels"], case["prototypes"]
    w, c = case["pixel_weight"], case["class_weight"]
    dtype, channels, num_classes = x.dtype, x.shape[1], prototypes.shape[0]
    exact = lambda t: None if t is None else t.double()  # noqa: E731
    cosine = cosine_tolerance(dtype, channels)
    at, relative = cosine / temperature, 1e-13 if dtype == torch.float64 else 2e-6
    rng = thresholds = None
    if num_negatives is not None:
        rng = torch.tensor([-(2**62) + 12345, 7])
        sampling = (num_negatives, num_classes, ignore_index, nearest_exact)
        thresholds = kernels.select_negatives(x, labels, w, rng, *sampling)
        assert torch.equal(thresholds, reference.select_negatives(x, labels, w, rng, *sampling))
    options = (temperature, ignore_index, alpha > 0, True, nearest_exact)
    statistics, positive, first = kernels.class_statistics(x, labels, w, prototypes, thresholds, rng, *options)
    true_statistics, true_positive, true_first = reference.class_statistics(
        x.double(), labels, exact(w), prototypes.double(), thresholds, rng, *options
    )
    assert torch.equal(first, true_first)
    close("positive", positive, true_positive, at, relative)
    close("log Z", statistics[stages.LOG_Z], true_statistics[stages.LOG_Z], at, relative)
    close("hardest", statistics[stages.HARDEST_NEGATIVE], true_statistics[stages.HARDEST_NEGATIVE], at, relative)
    weight = true_statistics[stages.WEIGHT].max()
    for row in (stages.WEIGHT, stages.NEGATIVE_WEIGHT):
        close(f"row {row}", statistics[row], true_statistics[row], 0, 2e-6)
    for row in (stages.POSITIVE_SUM, stages.PIXEL_LOSS_SUM):
        close(
            f"row {row}", statistics[row], true_statistics[row], (at + relative / temperature) * float(weight), relative
        )
    options = (ignore_index, negative_mean, nearest_exact)
    sums = kernels.positive_sums(positive, labels, w, statistics, *options)
    true_sums = reference.positive_sums(true_positive, labels, exact(w), true_statistics, *options)
    close("sums", sums, true_sums, 2 * at * float(weight), 2 * relative)
    loss = kernels.reduce_loss(statistics, sums, c, alpha, reduction)
    true_loss = reference.reduce_loss(true_statistics, true_sums, exact(c), alpha, reduction)
    close(
        "loss",
        loss,
        true_loss,
        2 * at * max(1.0, 1.0 if c is None else float(c.sum())) * (num_classes if reduction == stages.SUM else 1),
        relative,
    )
    if hasattr(kernels, "loss_forward"):  # of the backends that have a kernel of their own for it
        at_once = kernels.loss_forward(
            x, labels, w, prototypes, c, thresholds, rng,
            temperature, ignore_index, negative_mean, alpha, reduction, True, nearest_exact,
        )  # fmt: skip
        for whole, by_stages in zip(at_once, (loss, statistics, sums, first), strict=True):
            assert whole.numpy().tobytes() == by_stages.numpy().tobytes(), "equal to the bit, NaN included"
    grad_loss = torch.rand(true_loss.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    rest = (temperature, ignore_index, negative_mean, alpha, reduction, True, learnable, nearest_exact)
    grad, grad_prototypes = kernels.loss_gradients(
        x, labels, w, prototypes, thresholds, rng, statistics, sums, c, grad_loss.to(positive.dtype), *rest
    )
    true_grad, true_grad_prototypes = reference.loss_gradients(
        x.double(),
        labels,
        exact(w),
        prototypes.double(),
        thresholds,
        rng,
        true_statistics,
        true_sums,
        exact(c),
        grad_loss.to(positive.dtype).double(),
        *rest,
    )
    assert grad.dtype == dtype and grad.stride() == torch.empty_like(x).stride()
    close_gradient("gradient", grad, true_grad, gradient_tolerance(dtype, temperature))
    if learnable:
        close_gradient(
            "prototypes' gradient", grad_prototypes, true_grad_prototypes, gradient_tolerance(dtype, temperature)
        )
