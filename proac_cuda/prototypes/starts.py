"""Where searches for spherical codes begin: random vectors, orbits of small abelian groups, good arrangements disturbed.

No single kind finds all good arrangements. Symmetric starts search a space that is as many times smaller as the group has
elements; most entries of the published tables of more than some thirty points have a symmetry. Disturbing the best so far
finds what lies beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .descent import Orbits, normalise, without_symmetry

# Abelian groups, as the orders of their cyclic factors.
_GROUPS = (*((order,) for order in range(2, 14)), (2, 2), (2, 4), (3, 3), (2, 6), (2, 2, 2))
_MOST_FIXED = 3


def random_starts(num_points: int, dimension: int, batch: int, generator: torch.Generator) -> Orbits:
    """Uniformly distributed unit vectors."""
    return without_symmetry(normalise(_gaussian(generator, batch, num_points, dimension)))


def symmetric_starts(
    num_points: int,
    dimension: int,
    batch: int,
    generator: torch.Generator,
    groups: Sequence[tuple[int, ...]] = _GROUPS,
) -> Orbits:
    """Orbits of random unit vectors under a random abelian group of few elements, and up to three vectors that it fixes.

    The groups to choose from are given by the orders of their cyclic factors. The group turns the plane of each pair of
    coordinates by a random one of its characters, the trivial one included.
    """
    choices = [
        (group, fixed)
        for group in groups
        for fixed in range(_MOST_FIXED + 1)
        if num_points >= 2 * math.prod(group) and (num_points - fixed) % math.prod(group) == 0
    ]
    if not choices:
        return random_starts(num_points, dimension, batch, generator)
    group, fixed = choices[_integer(generator, 0, len(choices))]
    # Fixed vectors need a coordinate that the group leaves alone, and two for three of them not to coincide.
    least_still = min(fixed, 1) + (fixed > 2)
    actions = [_random_action(group, dimension, least_still, generator) for _ in range(batch)]
    images, still = (torch.stack(parts) for parts in zip(*actions, strict=True))
    free = (num_points - fixed) // math.prod(group)
    vectors = _gaussian(generator, batch, free + fixed, dimension)
    vectors[:, free:] *= still.unsqueeze(1)
    return Orbits(normalise(vectors), free, images, still)


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


def _random_action(
    group: tuple[int, ...], dimension: int, least_still: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The matrices of the elements other than 1, transposed and side by side, and which coordinates they all leave alone."""
    elements = list(itertools.product(*(range(order) for order in group)))[1:]
    powers = torch.tensor(elements, dtype=torch.float64, device="cpu")
    matrices = torch.eye(dimension, dtype=torch.float64, device="cpu").repeat(len(elements), 1, 1)
    still = torch.ones(dimension, dtype=torch.float64, device="cpu")
    mostly = _integer(generator, 0, 2)  # move every plane, or leave about a third alone
    first = least_still
    while first < dimension:
        if not mostly and not _integer(generator, 0, 3):
            first += 2
            continue
        plane = first + 1 < dimension and max(group) > 2
        # A single coordinate can only change its sign, which takes a factor of even order.
        multiples = [_integer(generator, 0, order) if plane else order // 2 * (order % 2 == 0) for order in group]
        if not plane:
            multiples = [multiple * _integer(generator, 0, 2) for multiple in multiples]
        angles = powers @ torch.tensor(
            [2.0 * math.pi * m / o for m, o in zip(multiples, group, strict=True)], dtype=torch.float64
        )
        last = first + plane
        matrices[:, first, first] = matrices[:, last, last] = angles.cos()
        if plane:
            matrices[:, first, last] = angles.sin()
            matrices[:, last, first] = -angles.sin()
        if any(multiples):
            still[first : last + 1] = 0.0
        first = last + 1
    return matrices.transpose(0, 1).reshape(dimension, len(elements) * dimension), still


def _gaussian(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    """Uniform in low, ..., high - 1."""
    return int(torch.randint(low, high, (), generator=generator, device="cpu"))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))
