"""What the tests of a GPU's own matters call: a problem, and a step of loss and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import proac_cuda

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


def step(backend: str, x: Tensor, labels: Tensor, p: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the features' gradient."""
    loss = proac_cuda.proac_loss(x, labels, p, backend=backend, **options)
    return loss, torch.autograd.grad(loss, x)[0]


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Whether two results are equal to the bit, wherever they lie."""
    return all(torch.equal(one.detach().cpu(), other.detach().cpu()) for one, other in zip(a, b, strict=True))
