"""The least that any implementation has to do, and what the machine can do: what speeds are measured against.

Bytes. Forward reads features and labels once; the loss of one pixel depends on all others, so backward reads both again,
and writes the gradient once. Nothing else that is stored grows with channels or classes.

Flops. Forward needs every cosine, 2 N K D; backward needs them again, since N x K numbers are not to be stored, and
multiplies by the prototypes, 4 N K D. With M sampled negatives each class has its own pixels and M others; classes share
the draw, so that about min(M, N) pixels meet all K classes and the others only their own: N K becomes N + min(M, N) K.
Exponentials, norms and sums are not counted.

The roof of a pass is the longer of its bytes at the measured copy bandwidth and its flops at the measured rate of matrix
products: float32 for 16-bit features on a CPU, whose prototypes and sums stay float32; the features' own dtype on a GPU.
A CPU's tile unit (AMX) may pass it: from 64 classes on it multiplies float32 numbers as digits of 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .problems import Problem
from .timing import Clock, Step

PASSES = ("forward", "backward", "both")


def least_bytes(problem: Problem) -> dict[str, int]:
    """Bytes read and written by each pass; labels are int64."""
    features, labels = problem.feature_bytes, 8 * problem.pixels
    forward, backward = features + labels, 2 * features + labels
    return {"forward": forward, "backward": backward, "both": forward + backward}


def flops(problem: Problem) -> dict[str, int]:
    """Floating-point operations of the matrix products of each pass."""
    products = problem.pixels * problem.classes
    if problem.num_negatives is not None:
        products = problem.pixels + min(problem.num_negatives, problem.pixels) * problem.classes
    forward = 2 * products * problem.channels
    return {"forward": forward, "backward": 2 * forward, "both": 3 * forward}


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do."""

    copy: float  #: bytes read and written a second, copying memory larger than the last-level cache
    products: dict[str, float]  #: flop/s of square matrix products, by dtype

    def roof_seconds(self, problem: Problem, device: str) -> dict[str, float]:
        """The least time of each pass."""
        rate = self.products[product_dtype(problem.dtype, device)]
        moved, computed = least_bytes(problem), flops(problem)
        seconds = {name: max(moved[name] / self.copy, computed[name] / rate) for name in ("forward", "backward")}
        return {**seconds, "both": seconds["forward"] + seconds["backward"]}


def product_dtype(dtype: str, device: str) -> str:
    """The dtype whose matrix products bound the loss of features of ``dtype``."""
    return dtype if device.startswith("cuda") or dtype == "float64" else "float32"


def measure_rates(dtypes: set[str], clock: Clock, copied_bytes: int, repeats: int) -> Rates:
    """Copy bandwidth over ``copied_bytes`` and rates of square products: the best of ``repeats``, as befits a roof."""
    products = {product_dtype(dtype, clock.device) for dtype in dtypes}
    return Rates(
        _copy_rate(copied_bytes, clock, repeats),
        {dtype: _product_rate(dtype, clock, repeats) for dtype in sorted(products)},
    )


def _copy_rate(size: int, clock: Clock, repeats: int) -> float:
    source = torch.ones(size // 4, device=clock.device)
    target = torch.ones_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), clock, repeats)


def _product_rate(dtype: str, clock: Clock, repeats: int) -> float:
    n = 8192 if clock.device.startswith("cuda") else 2048  # smaller ones do not fill a large GPU
    square = torch.randn(n, n, device=clock.device).to(getattr(torch, dtype))
    return 2 * n**3 / _least_seconds(lambda: square @ square, clock, repeats)


def _least_seconds(work: Step, clock: Clock, repeats: int) -> float:
    work()
    return min(sum(clock.time([work])) for _ in range(repeats))
