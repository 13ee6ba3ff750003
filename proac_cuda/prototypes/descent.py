"""Descent to spherical codes: many arrangements at once, each K unit vectors in R^D that may be images of fewer.

The largest cosine is not smooth, so it is replaced by the soft maximum

    f(X) = (1/b) log sum_{i != j} exp(b <x_i, x_j>),

which exceeds the largest cosine by at most log(K(K-1))/b. It is minimised by L-BFGS for a rising sequence of sharpnesses b,
each minimisation starting where the previous one stopped. A small b looks at all pairs alike and finds the global shape of
the arrangement; a large b only looks at the closest pairs and settles the last digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Pairs of rows whose cosines are formed at once: two mebibytes of float64 stay in the processor's cache, and the memory
# needed grows with K D rather than K^2.
_BLOCK_PAIRS = 1 << 18

_LBFGS_MEMORY = 6
_BACKTRACKS = 8


class Orbits(NamedTuple):
    """B arrangements: the orbits of R vectors each under a group of p elements that act by orthogonal matrices.

    The columns of `images` (B, D, p D) are these matrices, transposed and side by side, that of the neutral element first; none
    where there is no symmetry. A vector that some elements leave alone has fewer images than p: point k of an arrangement is
    image `rows[k]` of the R p ones (the vectors themselves come first), `sizes` (R,) are the orbits' sizes, and the rows of
    `stabilisers` (R, p) are 1 / order of these elements at each of them. Gradients keep the symmetry, and a descent costs
    about p times less.
    """

    vectors: Tensor  # (B, R, D)
    images: Tensor
    rows: Tensor
    sizes: Tensor
    stabilisers: Tensor

    @property
    def order(self) -> int:
        """How many elements the group has."""
        return self.images.shape[2] // self.images.shape[1]

    def points(self) -> Tensor:
        """(B, K, D): the vectors, then their other images."""
        return _points(self.vectors, self)

    def choose(self, chosen: Tensor) -> Orbits:
        """Some of the arrangements, by their numbers."""
        return self._replace(vectors=self.vectors[chosen], images=self.images[chosen])

    def symmetrised(self, moves: Tensor) -> Tensor:
        """(B, R, D): of moves of the vectors the part that their stabilisers leave alone."""
        if not self.stabilisers.shape[1]:
            return moves
        return (_images(moves, self) * self.stabilisers[:, :, None]).sum(dim=2)


def without_symmetry(points: Tensor) -> Orbits:
    """(B, K, D) or (K, D) arrangements as orbits of the group of one element."""
    vectors = points if points.ndim == 3 else points.unsqueeze(0)
    batch, count, dimension = vectors.shape
    rows, sizes = torch.arange(count, device="cpu"), vectors.new_ones(count)
    return Orbits(vectors, vectors.new_empty(batch, dimension, 0), rows, sizes, vectors.new_empty(count, 0))


def normalise(points: Tensor) -> Tensor:
    """Vectors of length one along the last axis."""
    norms: Tensor = points.norm(dim=-1, keepdim=True)
    return points / norms


def largest_cosine(points: Tensor) -> float:
    """The largest inner product of two different rows of `points`, (K, D) with unit rows and K >= 2."""
    return float(largest_cosines(without_symmetry(points)))


def largest_cosines(orbits: Orbits) -> Tensor:
    """(B,): the largest inner product of two different vectors of each arrangement, which are unit vectors."""
    everything = orbits.points()
    blocks = _off_diagonal_blocks(orbits.vectors, everything)
    return torch.stack([products.amax(dim=(1, 2)) for _, products in blocks]).amax(dim=0)


def anneal(orbits: Orbits, sharpnesses: Iterable[Tensor], iterations: int) -> Iterator[Orbits]:
    """Minimise the soft maximum for one sharpness (B,) after the other, by so many L-BFGS steps each; yields each result."""
    for sharpness in sharpnesses:
        orbits = _minimise_soft_maximum(orbits, sharpness, iterations)
        yield orbits


def soft_maxima(orbits: Orbits, sharpness: Tensor) -> Tensor:
    """(B,): the soft maximum of each arrangement's cosines."""
    return _soft_maximum(orbits, sharpness)[0]


def _images(vectors: Tensor, orbits: Orbits) -> Tensor:
    """(B, R, p, D): what the group's elements make of each vector."""
    return torch.bmm(vectors, orbits.images).reshape(*vectors.shape[:2], -1, vectors.shape[2])


def _points(vectors: Tensor, orbits: Orbits) -> Tensor:
    return _images(vectors, orbits).flatten(1, 2)[:, orbits.rows] if orbits.order else vectors


def _off_diagonal_blocks(left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of left @ right.T, with -inf where a row meets itself: row i of `left` is row i of `right`."""
    batch, rows, _ = left.shape
    step = max(1, _BLOCK_PAIRS // (batch * right.shape[1]))
    for begin in range(0, rows, step):
        block = slice(begin, min(begin + step, rows))
        products = torch.bmm(left[:, block], right.mT)
        products.diagonal(offset=begin, dim1=1, dim2=2).fill_(-math.inf)
        yield block, products


def _soft_maximum(orbits: Orbits, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """Value (B,) and gradient of the soft maximum of the cosines; the vectors need not be unit vectors.

    A pair of a vector and a point stands for as many as the vector has images.
    """
    norms = orbits.vectors.norm(dim=2, keepdim=True)
    unit = orbits.vectors / norms
    everything = _points(unit, orbits)
    weight = orbits.sizes[:, None]
    # Each block is summed relative to its own maximum; the blocks are then brought to the common one.
    maxima, sums, pulls = [], [], []
    for block, exponents in _off_diagonal_blocks(unit * sharpness[:, None, None], everything):
        maximum = exponents.amax(dim=(1, 2), keepdim=True)
        terms = exponents.sub_(maximum).exp_()
        maxima.append(maximum[:, 0, 0])
        sums.append((terms.sum(dim=2) @ weight[block])[:, 0])
        pulls.append(torch.bmm(terms, everything))
    if len(pulls) == 1:
        common, total, pull = maxima[0], sums[0], pulls[0]
    else:
        stacked = torch.stack(maxima)
        common = stacked.amax(dim=0)
        scales = (stacked - common).exp()
        total = (torch.stack(sums) * scales).sum(dim=0)
        pull = torch.cat([part * scale[:, None, None] for part, scale in zip(pulls, scales, strict=True)], dim=1)
    # A pair counts twice in the sum, and once for each of its two rows in the gradient.
    gradient = pull * (weight * 2.0 / total[:, None, None])
    gradient -= (gradient * unit).sum(dim=2, keepdim=True) * unit
    gradient /= norms
    gradient = orbits.symmetrised(gradient)  # it is, but for rounding
    return (common + total.log()) / sharpness, gradient


def _minimise_soft_maximum(orbits: Orbits, sharpness: Tensor, iterations: int) -> Orbits:
    """L-BFGS with backtracking line search (Nocedal and Wright, Numerical Optimization, algorithm 7.4). Returns unit rows.

    torch.optim.LBFGS is not used: it takes all arrangements for one problem with one step length, its line search may evaluate
    the function 25 times a step, and it evaluates the gradient through autograd, which holds several K x K matrices.
    """
    batch, rows, dimension = orbits.vectors.shape
    history = _History()
    value, gradient = _soft_maximum(orbits, sharpness)
    for _ in range(iterations):
        direction = history.direction(gradient)
        if not history.steps:
            # A first step of the size of the differences that this sharpness sees.
            direction *= (0.3 / (sharpness.sqrt() * direction.norm(dim=2).amax(dim=1).clamp_min(1e-300)))[:, None, None]
        slope = _dot(gradient, direction)
        # No row moves by more than half a radian at once: the model is local.
        step = (0.5 / direction.norm(dim=2).amax(dim=1).clamp_min(1e-300)).clamp_max(1.0)
        new = orbits._replace(vectors=orbits.vectors + step[:, None, None] * direction)
        new_value, new_gradient = _soft_maximum(new, sharpness)
        for _ in range(_BACKTRACKS):
            rising = ~(new_value <= value + 1e-4 * step * slope)
            if not bool(rising.any()):
                break
            (again,) = rising.nonzero(as_tuple=True)
            step[again] *= 0.35
            new.vectors[again] = orbits.vectors[again] + step[again][:, None, None] * direction[again]
            new_value[again], new_gradient[again] = _soft_maximum(new.choose(again), sharpness[again])
        rising = ~(new_value <= value)
        if bool(rising.any()):  # no decrease that float64 can resolve
            new.vectors[rising], new_value[rising], new_gradient[rising] = (
                orbits.vectors[rising],
                value[rising],
                gradient[rising],
            )
        history.append(new.vectors - orbits.vectors, new_gradient - gradient)
        decrease = value - new_value
        orbits, value, gradient = new, new_value, new_gradient
        if bool((decrease < 1e-12 / (sharpness * 1e-4).clamp_min(1.0)).all()):
            break
    return orbits._replace(vectors=normalise(orbits.vectors))


class _History:
    """For each of the last steps: how the vectors moved, how the gradient turned, and 1 / the product of the two, or 0."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        self._scale: Tensor | None = None

    def append(self, moved: Tensor, turned: Tensor) -> None:
        curvature = _dot(moved, turned)
        square = _dot(turned, turned)
        good = curvature > 1e-12 * (_dot(moved, moved) * square).sqrt()
        inverse = torch.where(good, 1.0 / curvature, 0.0)
        scale = curvature / square
        self._scale = torch.where(good, scale, scale.new_tensor(1e-6) if self._scale is None else self._scale)
        self.steps = [*self.steps[-(_LBFGS_MEMORY - 1) :], (moved, turned, inverse)]

    def direction(self, gradient: Tensor) -> Tensor:
        """Minus the gradient times the inverse Hessian that the history suggests: the two-loop recursion."""
        direction = -gradient
        coefficients = []
        for moved, turned, inverse in reversed(self.steps):
            coefficient = (inverse * _dot(moved, direction))[:, None, None]
            coefficients.append(coefficient)
            direction -= coefficient * turned
        if self._scale is not None:
            direction *= self._scale[:, None, None]
        for (moved, turned, inverse), coefficient in zip(self.steps, reversed(coefficients), strict=True):
            direction += (coefficient - (inverse * _dot(turned, direction))[:, None, None]) * moved
        return direction


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(dim=(1, 2))
