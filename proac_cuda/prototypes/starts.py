"""Where searches for spherical codes begin: random vectors, random orbits of cyclic groups, and good arrangements disturbed.

No single kind finds all good arrangements. Symmetric starts search a space p times smaller; most entries of the published
tables of more than some thirty points have such a symmetry. Disturbing the best so far finds what lies beside it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .descent import Orbits, normalise, without_symmetry

_LARGEST_ORDER = 13
_MOST_FIXED = 3


def random_starts(num_points: int, dimension: int, batch: int, generator: torch.Generator) -> Orbits:
    """Uniformly distributed unit vectors."""
    return without_symmetry(normalise(_gaussian(generator, batch, num_points, dimension)))


def symmetric_starts(num_points: int, dimension: int, batch: int, generator: torch.Generator) -> Orbits:
    """Orbits of random unit vectors under a cyclic group of random order p, and up to three vectors that it fixes.

    The group's generator turns some planes by multiples of 1/p of a circle (p = 2: changes the sign of some coordinates) and
    leaves the other coordinates alone; the multiples and how many coordinates it moves are random.
    """
    choices = [
        (order, fixed)
        for order in range(2, min(_LARGEST_ORDER, num_points) + 1)
        for fixed in range(_MOST_FIXED + 1)
        if (num_points - fixed) % order == 0
    ]
    order, fixed = choices[_integer(generator, 0, len(choices))]
    # Fixed vectors need a coordinate that the group leaves alone, and two for three of them not to coincide.
    movable = dimension - min(fixed, 1) - (fixed > 2)
    images, still = [], []
    for _ in range(batch):
        least = movable // 2 if _integer(generator, 0, 2) else movable - 1
        moved = _integer(generator, max(1, least), movable + 1)
        matrix, moved = _cyclic_images(dimension, moved, order, generator)
        images.append(matrix)
        still.append((torch.arange(dimension, device="cpu") >= moved).to(torch.float64))
    fixed_coordinates = torch.stack(still)
    free = (num_points - fixed) // order
    vectors = _gaussian(generator, batch, free + fixed, dimension)
    vectors[:, free:] *= fixed_coordinates.unsqueeze(1)
    return Orbits(normalise(vectors), free, torch.stack(images), fixed_coordinates)


def disturbed(best: Orbits, batch: int, generator: torch.Generator, scale: float = 0.0) -> Orbits:
    """Copies of one arrangement, its symmetry kept: some of its vectors anew at random, or all of them moved a little.

    With a `scale` all are moved, by a tenth of it to ten times as much.
    """
    vectors = best.vectors.expand(batch, -1, -1).clone()
    fixed = best.fixed.expand(batch, -1)
    rows, dimension = vectors.shape[1:]
    noise = normalise(_gaussian(generator, batch, rows, dimension))
    for start in range(batch):
        if scale:
            vectors[start] += noise[start] * (0.1 * scale * 100.0 ** _uniform(generator))
        elif _integer(generator, 0, 2):
            vectors[start] += noise[start] * (0.05 * 10.0 ** _uniform(generator))
        else:
            count = _integer(generator, 1, max(1, rows // 6) + 1)
            anew = torch.randperm(rows, generator=generator, device="cpu")[:count]
            vectors[start, anew] = noise[start, anew]
    vectors[:, best.free :] *= fixed.unsqueeze(1)
    return Orbits(normalise(vectors), best.free, best.images.expand(batch, -1, -1), fixed)


def subsets(points: Tensor, num_points: int, batch: int, generator: torch.Generator) -> Orbits:
    """Random subsets of a larger arrangement."""
    chosen = [torch.randperm(len(points), generator=generator, device="cpu")[:num_points] for _ in range(batch)]
    return without_symmetry(torch.stack([points[rows] for rows in chosen]))


def _cyclic_images(dimension: int, moved: int, order: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """The matrices of the powers 1 to p - 1, transposed and side by side, and how many coordinates they move."""
    powers = torch.arange(1, order, dtype=torch.float64, device="cpu")
    matrices = torch.eye(dimension, dtype=torch.float64, device="cpu").repeat(order - 1, 1, 1)
    if order == 2:
        matrices[0].diagonal()[:moved] = -1.0
        return matrices[0], moved
    moved -= moved % 2
    for first in range(0, moved, 2):
        # Multiples above p / 2 only mirror the plane. One that divides p leaves points with fewer images; it is allowed.
        multiple = _integer(generator, 1, order // 2 + 1)
        angle = powers * (2.0 * math.pi * multiple / order)
        matrices[:, first, first] = matrices[:, first + 1, first + 1] = angle.cos()
        matrices[:, first, first + 1] = angle.sin()
        matrices[:, first + 1, first] = -angle.sin()
    return matrices.transpose(0, 1).reshape(dimension, (order - 1) * dimension), moved


def _gaussian(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    """Uniform in low, ..., high - 1."""
    return int(torch.randint(low, high, (), generator=generator, device="cpu"))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))
