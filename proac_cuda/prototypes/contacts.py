"""The last digits of a spherical code: its contact equations, solved by Newton's method.

At a local optimum of the largest cosine t the vectors that are held fast touch: <x_i, x_j> = t for every pair of contacts, and
<x_i, x_i> = 1. A descent finds which pairs these are, and Newton's method squares the error at every step. The equations are
fewer or more than the unknowns (rattlers are free, symmetric arrangements have more contacts than they need), so each step is
the shortest least-squares one; conjugate gradients find it without a matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .descent import largest_cosine, normalise

_NEWTON_STEPS = 12
_CONJUGATE_STEPS = 3000

# Of large problems fewer, so that their last digits do not take longer than the search: as many numbers in all are moved.
_MOST_MOVES = 1 << 22

# Gaps in cosine below which a pair counts as a contact. Descents end with errors of about 1e-7; no one value suits all.
_TOLERANCES = (3e-5, 3e-6, 3e-7, 3e-8)


# Beyond so many unknowns the equations take minutes, for digits that matter to nobody there.
_MOST_UNKNOWNS = 1 << 12


def solve_contacts(points: Tensor) -> Tensor:
    """(K, D) unit rows near a local optimum, with the last digits of the largest cosine settled where that can be done.

    Never worse than `points`: where a guess of the contacts is wrong, its solution is dropped. More than 2^12 numbers stay as
    they are.
    """
    if points.numel() > _MOST_UNKNOWNS:
        return points
    best, best_cosine = points, largest_cosine(points)
    for tolerance in _TOLERANCES:
        solved = _newton(points, tolerance)
        cosine = largest_cosine(solved)
        if cosine < best_cosine:
            best, best_cosine = solved, cosine
    return best


def _newton(points: Tensor, tolerance: float) -> Tensor:
    cosines = (points @ points.T).fill_diagonal_(-2.0).triu_(1)
    top = float(cosines.max())
    first, second = (cosines > top - tolerance).nonzero(as_tuple=True)
    level = cosines[first, second].mean()
    before = math.inf
    for _ in range(_NEWTON_STEPS):
        touch = (points[first] * points[second]).sum(dim=1) - level
        length = 0.5 * ((points * points).sum(dim=1) - 1.0)
        error = float(torch.cat([touch, length]).abs().max())
        # Solved, or wrong: Newton's method converges faster than this where the contacts are right.
        if not error < min(1e-2, 0.5 * before) or error < 1e-15:
            break
        before = error
        moved, raised = _shortest_step(points, first, second, touch, length)
        points, level = points - moved, level - raised
    return normalise(points)


def _shortest_step(
    points: Tensor, first: Tensor, second: Tensor, touch: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """The least-squares solution of the linearised equations with the smallest norm (CGLS, Paige and Saunders 1982)."""

    def product(moved: Tensor, raised: Tensor) -> tuple[Tensor, Tensor]:
        touches = (moved[first] * points[second]).sum(dim=1) + (points[first] * moved[second]).sum(dim=1) - raised
        return touches, (points * moved).sum(dim=1)

    def transposed(touches: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        moved = points * lengths[:, None]
        moved = moved.index_add(0, first, points[second] * touches[:, None])
        return moved.index_add(0, second, points[first] * touches[:, None]), -touches.sum()

    moved, raised = torch.zeros_like(points), touch.new_zeros(())
    rest = (touch, length)
    slope = transposed(*rest)
    direction, square = slope, _square(slope)
    target = 1e-26 * square
    for _ in range(min(_CONJUGATE_STEPS, _MOST_MOVES // points.numel())):
        if float(square) <= float(target) or float(square) == 0.0:
            break
        image = product(*direction)
        step = square / _square(image)
        moved, raised = moved + step * direction[0], raised + step * direction[1]
        rest = (rest[0] - step * image[0], rest[1] - step * image[1])
        slope = transposed(*rest)
        square, before = _square(slope), square
        direction = (slope[0] + square / before * direction[0], slope[1] + square / before * direction[1])
    return moved, raised


def _square(pair: tuple[Tensor, Tensor]) -> Tensor:
    return (pair[0] * pair[0]).sum() + (pair[1] * pair[1]).sum()
