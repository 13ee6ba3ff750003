"""Running a backend on a case, and the accuracy table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import oracle
import proac_cuda

COSINE_ERROR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
SMALL_D_COSINE_ERROR = {**COSINE_ERROR, torch.bfloat16: 5e-6, torch.float16: 5e-6}


def gradient_tolerance(dtype: torch.dtype, temperature: float) -> float:
    """Relative L2 error of the gradient before its final rounding."""
    if dtype == torch.float64:
        return 1e-12
    return 1e-6 + 4e-6 / temperature if dtype == torch.float32 else 2e-4


def loss_tolerance(dtype: torch.dtype, temperature: float, channels: int) -> float:
    """Absolute error of S, to be added to 2e-6 relative; of log Z and the loss."""
    table = COSINE_ERROR if channels >= 64 else SMALL_D_COSINE_ERROR
    return table[dtype] / temperature


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of ``dtype`` at each float64 value, subnormals included."""
    info = torch.finfo(dtype)
    return torch.maximum(values.abs() * info.eps, torch.tensor(info.smallest_normal * info.eps)) / 2


def assert_loss_close(actual: Tensor, truth: Tensor, dtype: torch.dtype, temperature: float, channels: int) -> None:
    relative = 1e-13 if dtype == torch.float64 else 2e-6
    limit = loss_tolerance(dtype, temperature, channels) + relative * truth.abs()
    actual, truth = actual.detach().cpu().double(), truth.detach()
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    assert ((actual - truth).abs().le(limit) | same).all(), (actual - truth).abs().max()


def assert_gradient_close(actual: Tensor, truth: Tensor, temperature: float, eager: Tensor | None = None) -> None:
    """Relative L2, cosine, signed bias, and element by element against eager code in the same dtype."""
    dtype = actual.dtype
    actual = actual.detach().cpu().double()
    tolerance = gradient_tolerance(dtype, temperature)
    rounded = rounding(truth, dtype) if dtype not in (torch.float32, torch.float64) else 0 * truth
    error = actual - truth
    norm = truth.norm()
    assert error.norm() <= tolerance * norm + rounded.norm(), (error.norm() / norm, tolerance)
    if norm == 0:
        return
    cosine = (actual * truth).sum() / (actual.norm() * norm)
    assert cosine >= 1 - max(tolerance, 1e-12) - (rounded.norm() / norm) ** 2
    # Errors of either sign cancel in a sum: what is left over is a bias, which no relative L2 would show.
    bias = (error * truth.sign()).sum().abs() / truth.abs().sum()
    assert bias <= tolerance + (rounded.norm() / norm) / max(1, truth.numel()) ** 0.5 * 4, bias
    if eager is not None:
        allowed = (truth - eager.detach().cpu().double()).abs() + tolerance * truth.abs().max() + rounded
        assert (error.abs() <= allowed).all(), (error.abs() - allowed).max()


def run(
    backend: Any, features: Tensor, labels: Tensor, prototypes: Tensor, options: dict[str, Any], **more: Any
) -> Any:
    """The public function on the backend's device."""
    on_device = {
        name: value.to(backend.device) if isinstance(value, Tensor) else value for name, value in options.items()
    }
    return proac_cuda.proac_loss(
        features,
        labels.to(backend.device),
        prototypes,
        backend=backend.name,
        **on_device,
        **more,
    )


def leaf(values: Tensor, backend: Any, dtype: torch.dtype) -> Tensor:
    """A leaf of ``dtype`` on the backend's device, with the strides of ``values``."""
    moved = torch.empty_strided(values.shape, values.stride(), dtype=dtype, device=backend.device)
    return moved.copy_(values).requires_grad_()


def assert_twin_of_trained_features(
    backend: Any, classes: int, channels: int, temperature: float, dtype: torch.dtype
) -> None:
    """Features on their prototypes: softmax of the own class is 1 but for 1e-8, and that is all of the twin's gradient."""
    g = torch.Generator().manual_seed(9)
    prototypes = torch.nn.functional.normalize(torch.randn(classes, channels, generator=g), dim=1)
    labels = torch.arange(96).reshape(2, 48) % classes
    features = prototypes[labels] + 0.2 * torch.randn(2, 48, channels, generator=g) / channels**0.5
    x = leaf(features.movedim(2, 1), backend, dtype)
    p = leaf(prototypes, backend, torch.float64 if dtype == torch.float64 else torch.float32)
    options: dict[str, Any] = {"temperature": temperature, "pixel_anchor_weight": 1.0}
    scale = 65536.0 if dtype == torch.float16 else 1.0  # or its gradient would be below float16's smallest number
    (scale * run(backend, x, labels, p, options)).backward()
    truth_x, truth_p = (v.detach().cpu().double().requires_grad_() for v in (x, p))
    (scale * oracle.loss(truth_x, labels, truth_p, **options).loss).backward()
    assert_gradient_close(x.grad, truth_x.grad, temperature)
    if dtype != torch.bfloat16:
        assert_gradient_close(p.grad, truth_p.grad, temperature)
