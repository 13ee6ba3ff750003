"""Numerical search for spherical codes: K unit vectors in R^D whose largest pairwise cosine is small.

Only the cases without a closed form come here (K > 2D, D > 2). The largest cosine is not smooth, so it is replaced by the
soft maximum

    f(X) = (1/b) log sum_{i != j} exp(b <x_i, x_j>),

which exceeds the largest cosine by at most log(K(K-1))/b. It is minimised by L-BFGS for a rising sequence of sharpnesses b,
each minimisation starting where the previous one stopped. A small b looks at all pairs alike and finds the global shape of
the arrangement; a large b only looks at the closest pairs and settles the last digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Raise this number whenever a change here alters the result: cached arrangements of another version are not used.
ALGORITHM_VERSION = 1

# The sharpness grows by `SearchPlan.sharpness_step` up to the first value, and then, where only the last digits are left to
# settle, by doubling up to the last one.
_COARSE_SHARPNESS = 1e4

# Past the coarse sharpness the largest cosine falls by less than this: a start that is further behind the best is dropped.
_HOPELESS = 2e-3

# Pairs of rows whose cosines are formed at once: one mebibyte of float64, so a block stays in the processor's cache and the
# memory needed grows with K D rather than K^2.
_BLOCK_PAIRS = 1 << 17

# A search ends early once so many starts have come to the same best cosine (within the tolerance).
_AGREEING_STARTS = 15
_AGREEMENT = 1e-7

_LBFGS_MEMORY = 10


@dataclass(frozen=True)
class SearchPlan:
    """How much work a search may take: depends on the size of the problem only, never on the clock."""

    starts: int
    first_iterations: int  # at most so many L-BFGS steps for the first sharpness, which decides the shape
    iterations: int  # and for each of the following ones
    sharpness_step: float
    last_sharpness: float


def search_plan(num_points: int, dimension: int) -> SearchPlan:
    """Many starts where one costs milliseconds; one patient descent where it costs seconds or minutes."""
    pair_products = num_points * num_points * dimension
    if pair_products <= 400_000:
        return SearchPlan(starts=60, first_iterations=500, iterations=80, sharpness_step=1.5, last_sharpness=1e9)
    if pair_products <= 10_000_000:
        return SearchPlan(starts=2, first_iterations=500, iterations=150, sharpness_step=1.1, last_sharpness=1e7)
    if pair_products <= 300_000_000:
        return SearchPlan(starts=1, first_iterations=300, iterations=100, sharpness_step=1.2, last_sharpness=1e6)
    return SearchPlan(starts=1, first_iterations=50, iterations=30, sharpness_step=1.5, last_sharpness=1e5)


def find_spherical_code(
    num_points: int,
    dimension: int,
    *,
    lower_bound: float = -1.0,
    plan: SearchPlan | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Search for unit vectors whose largest pairwise cosine is as small as possible.

    Args:
        num_points: K >= 2.
        dimension: D >= 2.
        lower_bound: no arrangement has a smaller largest cosine; the search ends once it is reached.
        plan: how much work to spend; by default what `search_plan` says.
        on_progress: called with the fraction of the work done so far.

    Returns:
        (K, D) float64 tensor on the CPU with unit rows.
    """
    plan = search_plan(num_points, dimension) if plan is None else plan
    generator = torch.Generator(device="cpu").manual_seed(0)
    best, best_cosine, agreeing = None, math.inf, 0
    for start in range(plan.starts):
        points, first_sharpness = _starting_points(num_points, dimension, start, generator)
        sharpnesses = list(_sharpnesses(first_sharpness, plan))
        for level, sharpness in enumerate(sharpnesses):
            if sharpness > _COARSE_SHARPNESS and largest_cosine(points) > best_cosine + _HOPELESS:
                break
            iterations = plan.first_iterations if level == 0 else plan.iterations
            points = _minimise_soft_maximum(points, sharpness, iterations)
            if on_progress is not None:
                on_progress((start + (level + 1) / len(sharpnesses)) / plan.starts)
        cosine = largest_cosine(points)
        if cosine < best_cosine - _AGREEMENT:
            agreeing = 0
        agreeing += cosine < best_cosine + _AGREEMENT
        if cosine < best_cosine:
            best, best_cosine = points, cosine
        if best_cosine <= lower_bound + 1e-8 or agreeing == _AGREEING_STARTS:
            break
    if on_progress is not None:
        on_progress(1.0)
    assert best is not None
    return best


def largest_cosine(points: Tensor) -> float:
    """The largest inner product of two different rows of `points`, (K, D) with unit rows and K >= 2."""
    return max(float(cosines.max()) for _, cosines in _off_diagonal_blocks(points, points))


def _sharpnesses(first: float, plan: SearchPlan) -> Iterator[float]:
    sharpness = first
    while sharpness < plan.last_sharpness:
        yield sharpness
        sharpness *= plan.sharpness_step if sharpness < _COARSE_SHARPNESS else 2.0
    yield plan.last_sharpness


def _starting_points(num_points: int, dimension: int, start: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Random unit rows, and the sharpness to begin with.

    Two things differ between starts, because no single choice finds all good arrangements:

    - Where the sharpness begins. Low values suit very regular codes (24 points in 4 dimensions), high values those in which
      the points are not all alike (13 points in 3 dimensions).
    - Symmetry. The starting points may be invariant under a rotation of order 2 or 3. Gradients keep this symmetry, so the
      search runs in a much smaller space; it finds the 100 points in 22 and the 112 points in 21 dimensions this way, which
      free starts miss.
    """
    choices = (8.0, 60.0, 2.0, 30.0, 120.0) if dimension <= 4 else (8.0, 8.0, 2.0, 8.0, 30.0)
    first_sharpness = choices[start % len(choices)]
    # (order of the rotation, fraction of the dimensions that it turns)
    order, turned_fraction = ((1, 0.0), (2, 1 / 2), (3, 6 / 7), (3, 2 / 3))[start % 4]
    turned = int(dimension * turned_fraction)
    if order == 3:
        turned -= turned % 2  # whole planes
    orbits = num_points // order
    base = torch.randn(orbits, dimension, generator=generator, dtype=torch.float64, device="cpu")
    images = [base]
    for _ in range(order - 1):
        images.append(_turn(images[-1], order, turned))
    # What is left over must lie where the rotation fixes it.
    rest_count = num_points - orbits * order
    rest = torch.randn(rest_count, dimension, generator=generator, dtype=torch.float64, device="cpu")
    rest[:, :turned] = 0.0
    return _normalise(torch.cat([*images, rest])), first_sharpness


def _turn(points: Tensor, order: int, turned: int) -> Tensor:
    """Rotate the first `turned` coordinates: change their sign (order 2), or turn each pair by 1/order of a circle."""
    result = points.clone()
    if order == 2:
        result[:, :turned] *= -1.0
        return result
    cosine, sine = math.cos(2 * math.pi / order), math.sin(2 * math.pi / order)
    first, second = points[:, 0:turned:2], points[:, 1:turned:2]
    result[:, 0:turned:2] = cosine * first - sine * second
    result[:, 1:turned:2] = sine * first + cosine * second
    return result


def _normalise(points: Tensor) -> Tensor:
    norms: Tensor = points.norm(dim=1, keepdim=True)
    return points / norms


def _off_diagonal_blocks(left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of left @ right.T, with -inf where a row meets itself."""
    num_points = left.shape[0]
    rows = max(1, _BLOCK_PAIRS // num_points)
    for begin in range(0, num_points, rows):
        block = slice(begin, min(begin + rows, num_points))
        products = left[block] @ right.T
        products.diagonal(offset=begin).fill_(-math.inf)
        yield block, products


def _soft_maximum(points: Tensor, sharpness: float) -> tuple[float, Tensor]:
    """Value and gradient of the soft maximum of the cosines between the rows of `points`, which need not be unit vectors."""
    norms = points.norm(dim=1, keepdim=True)
    unit = points / norms
    scaled = unit * sharpness
    # Each block is summed relative to its own maximum; the blocks are then brought to the common one.
    maxima, sums, pulls = [], [], []
    for _, exponents in _off_diagonal_blocks(scaled, unit):
        maximum = exponents.max()
        weights = exponents.sub_(maximum).exp_()
        maxima.append(maximum)
        sums.append(weights.sum())
        pulls.append(weights @ unit)
    block_maxima = torch.stack(maxima)
    common = block_maxima.max()
    block_scales = (block_maxima - common).exp()
    total = (torch.stack(sums) * block_scales).sum()
    pull = torch.cat([part * scale for part, scale in zip(pulls, block_scales, strict=True)])
    # A pair counts twice in the sum, and once for each of its two rows in the gradient.
    gradient = pull * (2.0 / total)
    gradient -= (gradient * unit).sum(dim=1, keepdim=True) * unit
    return float(common + total.log()) / sharpness, gradient / norms


def _minimise_soft_maximum(points: Tensor, sharpness: float, iterations: int) -> Tensor:
    """L-BFGS with backtracking line search (Nocedal and Wright, Numerical Optimization, algorithm 7.4). Returns unit rows.

    torch.optim.LBFGS is not used: its line search may evaluate the function 25 times a step, and it evaluates the gradient
    through autograd, which holds several K x K matrices.
    """
    # For each of the last steps: how the points moved, how the gradient turned, and 1 / the product of the two.
    history: list[tuple[Tensor, Tensor, float]] = []
    value, gradient = _soft_maximum(points, sharpness)
    for _ in range(iterations):
        direction = _lbfgs_direction(gradient, history)
        slope = _dot(gradient, direction)
        if not history:
            largest = float(gradient.norm(dim=1).max())
            if largest == 0.0:
                break
            direction *= 0.3 / (largest * math.sqrt(sharpness))
            slope = _dot(gradient, direction)
        # No row moves by more than half a radian at once: the model is local.
        step = min(1.0, 0.5 / float(direction.norm(dim=1).max()))
        for _ in range(15):
            new_points = points + step * direction
            new_value, new_gradient = _soft_maximum(new_points, sharpness)
            if new_value <= value + 1e-4 * step * slope:
                break
            step *= 0.4
        else:
            break  # no decrease that float64 can resolve
        moved, turned = step * direction, new_gradient - gradient
        curvature = _dot(moved, turned)
        if curvature > 1e-12 * float(moved.norm()) * float(turned.norm()):
            history = [*history[-(_LBFGS_MEMORY - 1) :], (moved, turned, 1.0 / curvature)]
        decrease = value - new_value
        points, value, gradient = new_points, new_value, new_gradient
        if decrease < 1e-12 / max(1.0, sharpness * 1e-4):
            break
    return _normalise(points)


def _lbfgs_direction(gradient: Tensor, history: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Minus the gradient times the inverse Hessian that the history suggests: the two-loop recursion."""
    direction = -gradient
    if not history:
        return direction
    coefficients = []
    for moved, turned, inverse in reversed(history):
        coefficient = inverse * _dot(moved, direction)
        coefficients.append(coefficient)
        direction.sub_(turned, alpha=coefficient)
    _, turned, inverse = history[-1]
    direction *= 1.0 / (inverse * _dot(turned, turned))
    for (moved, turned, inverse), coefficient in zip(history, reversed(coefficients), strict=True):
        direction.add_(moved, alpha=coefficient - inverse * _dot(turned, direction))
    return direction


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))
