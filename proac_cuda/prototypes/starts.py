"""Where searches for spherical codes begin: random vectors, orbits of small groups, good arrangements disturbed.

No single kind finds all good arrangements. Symmetric starts search a space that is as many times smaller as the group has
elements; most entries of the published tables of more than some thirty points have a symmetry. Disturbing the best so far
finds what lies beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .descent import Orbits, normalise, without_symmetry
from .groups import Group, character, named_group

# Small ones for the most part: an arrangement with a large group has its subgroups, too.
_CYCLIC = tuple(f"Z{order}" for order in range(2, 14))
_OTHERS = ("Z2xZ2", "Z2xZ4", "Z3xZ3", "Z2xZ6", "Z2xZ2xZ2", "D3", "D4", "D5", "D6", "D7", "Q8", "A4", "5:4", "7:3")
GROUPS = (*_CYCLIC, *_OTHERS, "S4", "Z3xS3", "Z2xA4", "He3", "A5", "S5")


_MOST_FIXED = 5


class Symmetry(NamedTuple):
    """What kinds of orbits arrangements consist of, and how their group acts in each of them."""

    group: str
    orbits: tuple[int, ...]  # the numbers of the subgroups that leave one vector of each orbit alone
    representations: tuple[
        tuple[int, ...], ...
    ]  # the numbers of irreducible ones, D dimensions together, for each start

    def of(self, start: int) -> Symmetry:
        """With the representation of that number alone."""
        return self._replace(representations=(self.representations[start],))


def random_starts(num_points: int, dimension: int, batch: int, generator: torch.Generator) -> Orbits:
    """Uniformly distributed unit vectors."""
    return without_symmetry(normalise(_gaussian(generator, batch, num_points, dimension)))


def random_symmetry(
    num_points: int, dimension: int, batch: int, generator: torch.Generator, groups: Sequence[str] = GROUPS
) -> Symmetry | None:
    """One that K vectors in R^D can have, with up to `batch` representations; None where a few attempts come to nothing."""
    for _ in range(50):
        group = named_group(groups[_integer(generator, 0, len(groups))])
        first = _random_representation(group, dimension, generator)
        orbits = None if first is None else _random_orbits(group, first, num_points, generator)
        if first is None or orbits is None:
            continue
        more = (_random_representation(group, dimension, generator) for _ in range(batch - 1))
        fitting = [other for other in more if other is not None and _fits(group, other, orbits)]
        return Symmetry(group.name, orbits, (first, *fitting))
    return None


def symmetric_starts(symmetry: Symmetry, batch: int, generator: torch.Generator) -> Orbits:
    """Random unit vectors, each where the stabiliser of its orbit leaves it alone, and their orbits.

    Start number k has the representation of number k modulo how many there are.
    """
    group = named_group(symmetry.group)
    images = torch.stack([_images(group, representation) for representation in symmetry.representations])
    count, order = len(symmetry.orbits), group.order
    first = [row * order for row in range(count)]
    others = [row * order + g for row, kind in enumerate(symmetry.orbits) for g in group.cosets[kind][1:]]
    stabilisers = torch.zeros(count, order, dtype=torch.float64, device="cpu")
    for row, kind in enumerate(symmetry.orbits):
        stabilisers[row, list(group.subgroups[kind])] = 1.0 / len(group.subgroups[kind])
    orbits = Orbits(
        _gaussian(generator, batch, count, images.shape[1]),
        images[torch.arange(batch, device="cpu") % len(images)],
        torch.tensor(first + others, device="cpu"),
        torch.tensor([float(len(group.cosets[kind])) for kind in symmetry.orbits], dtype=torch.float64, device="cpu"),
        stabilisers if any(symmetry.orbits) else stabilisers[:, :0],
    )
    return orbits._replace(vectors=normalise(orbits.symmetrised(orbits.vectors)))


def disturbed(best: Orbits, batch: int, generator: torch.Generator, scale: float = 0.0) -> Orbits:
    """Copies of one arrangement, its symmetry kept: some of its vectors anew at random, or all of them moved a little.

    With a `scale` all are moved, by a tenth of it to ten times as much.
    """
    vectors = best.vectors.expand(batch, -1, -1).clone()
    rows, dimension = vectors.shape[1:]
    copies = best._replace(vectors=vectors, images=best.images.expand(batch, -1, -1))
    noise = normalise(copies.symmetrised(_gaussian(generator, batch, rows, dimension)))
    for start in range(batch):
        if scale:
            vectors[start] += noise[start] * (0.1 * scale * 100.0 ** _uniform(generator))
        elif _integer(generator, 0, 2):
            vectors[start] += noise[start] * (0.05 * 10.0 ** _uniform(generator))
        else:
            count = _integer(generator, 1, max(1, rows // 6) + 1)
            anew = torch.randperm(rows, generator=generator, device="cpu")[:count]
            vectors[start, anew] = noise[start, anew]
    return copies._replace(vectors=normalise(vectors))


def subsets(points: Tensor, num_points: int, batch: int, generator: torch.Generator) -> Orbits:
    """Random subsets of a larger arrangement."""
    chosen = [torch.randperm(len(points), generator=generator, device="cpu")[:num_points] for _ in range(batch)]
    return without_symmetry(torch.stack([points[rows] for rows in chosen]))


def _images(group: Group, representation: tuple[int, ...]) -> Tensor:
    """(D, p D): the matrices of the group's elements, transposed and side by side."""
    parts = [group.irreducible[number].mT for number in representation]
    matrices = torch.stack([torch.block_diag(*blocks) for blocks in zip(*parts, strict=True)])
    return matrices.transpose(0, 1).flatten(1)


def _random_representation(group: Group, dimension: int, generator: torch.Generator) -> tuple[int, ...] | None:
    """A faithful one of D dimensions, from a random choice of irreducible ones: those that have few kinds are not rarer."""
    numbers = torch.randperm(len(group.irreducible), generator=generator, device="cpu").tolist()
    chosen = numbers[: _integer(generator, 1, len(numbers) + 1)]
    sizes = [matrices.shape[1] for matrices in group.irreducible]
    representation: list[int] = []
    left = dimension
    while left:
        fitting = [k for k in chosen if sizes[k] <= left] or [k for k in numbers if sizes[k] <= left]
        representation.append(fitting[_integer(generator, 0, len(fitting))])
        left -= sizes[representation[-1]]
    faithful = int((_characters(group, tuple(representation)) > dimension - 1e-6).sum()) == 1
    return tuple(sorted(representation)) if faithful else None


def _random_orbits(
    group: Group, representation: tuple[int, ...], num_points: int, generator: torch.Generator
) -> tuple[int, ...] | None:
    """Kinds of orbits with K vectors together, the large ones preferred by a random degree."""
    most, sizes = _most_orbits(group, representation), [len(elements) for elements in group.cosets]
    large = _uniform(generator)
    orbits: list[int] = []
    left = num_points
    while left:
        fitting = [k for k, size in enumerate(sizes) if size <= left and orbits.count(k) < most[k]]
        if not fitting:
            return None
        kind = fitting[0] if _uniform(generator) < large else fitting[_integer(generator, 0, len(fitting))]
        orbits.append(kind)
        left -= sizes[kind]
    return tuple(sorted(orbits))


def _fits(group: Group, representation: tuple[int, ...], orbits: tuple[int, ...]) -> bool:
    most = _most_orbits(group, representation)
    return all(orbits.count(kind) <= most[kind] for kind in set(orbits))


def _most_orbits(group: Group, representation: tuple[int, ...]) -> list[float]:
    """For each kind how many orbits have room: by how many dimensions its subgroup leaves alone."""
    characters = _characters(group, representation)
    still = [round(float(characters[list(subgroup)].mean())) for subgroup in group.subgroups]
    most = [(0, 2, 3)[dimension] if dimension < 3 else math.inf for dimension in still]
    most[-1] = min(most[-1], _MOST_FIXED)
    return most


def _characters(group: Group, representation: tuple[int, ...]) -> Tensor:
    return torch.stack([character(group.irreducible[number]) for number in representation]).sum(dim=0)


def _gaussian(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    """Uniform in low, ..., high - 1."""
    return int(torch.randint(low, high, (), generator=generator, device="cpu"))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64, device="cpu"))
