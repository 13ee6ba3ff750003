"""What is known about (K, D): the best largest cosine published, and coordinates that come with this package.

`best_known.csv` has the values with their sources. `coordinates.npz` has what long searches found here, as float64 under the
key "K-D"; docs/using/prototypes.md says how each was found.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from .arrangements import arrangement, named_sizes
from .bounds import best_lower_bound
from .descent import largest_cosine

# A subset of a larger arrangement is worth trying up to this number of its vectors for each of those wanted.
_LARGER = 1.25

# The shortest entries of the table have nine digits.
_TABLE_ROUNDING = 1e-9


class BestKnown(NamedTuple):
    """The smallest largest cosine that is published for K unit vectors in R^D."""

    cosine: float
    proven: bool  # nothing can be better
    source: str


class Known(NamedTuple):
    """An arrangement that needs no search."""

    name: str
    cosine: float
    make: Callable[[], Tensor]  # (K, R) float64 unit rows, R <= D


def best_known(num_points: int, dimension: int) -> BestKnown | None:
    """The value published for these K and D, or None where none is known here."""
    return _table().get((num_points, dimension))


def known_sizes() -> list[tuple[int, int]]:
    """(K, D) of the table."""
    return list(_table())


def shipped_arrangement(num_points: int, dimension: int) -> Tensor | None:
    """(K, D) float64 unit rows that come with this package, or None."""
    if f"{num_points}-{dimension}" not in _shipped_names():
        return None
    with resources.files(__package__).joinpath("coordinates.npz").open("rb") as stream, numpy.load(stream) as archive:
        return torch.from_numpy(archive[f"{num_points}-{dimension}"])


def known_arrangement(num_points: int, dimension: int) -> Known | None:
    """A closed form, coordinates that come with this package, or part of either; None where a search may find better.

    A part is taken where no smaller cosine is published for so many vectors.
    """
    whole = _whole(num_points, dimension)
    if whole is not None:
        return whole
    larger, published = larger_arrangement(num_points, dimension), best_known(num_points, dimension)
    if larger is None or published is None or larger.cosine > published.cosine + _TABLE_ROUNDING:
        return None
    return larger._replace(make=lambda: larger.make()[:num_points])


def larger_arrangement(num_points: int, dimension: int) -> Known | None:
    """The smallest known arrangement of somewhat more vectors in R^D, named for its parts, or None."""
    shipped = [tuple(map(int, name.split("-"))) for name in _shipped_names()]
    sizes = [size for size, length in (*named_sizes(), *shipped) if length == dimension]
    larger = [size for size in sizes if num_points < size <= _LARGER * num_points]
    if not larger:
        return None
    whole = _whole(min(larger), dimension)
    return None if whole is None else whole._replace(name=f"part of {whole.name}")


def _whole(num_points: int, dimension: int) -> Known | None:
    named = arrangement(num_points, dimension)
    if named is not None:
        published = best_known(num_points, dimension)
        if published is not None:
            return Known(named.name, published.cosine, named.make)
        # What the table leaves out reaches the bound; one vector has no pair, and the smallest cosine there is.
        cosine = best_lower_bound(num_points, dimension)[0] if num_points > 1 else -1.0
        return Known(named.name, cosine, named.make)
    shipped = shipped_arrangement(num_points, dimension)
    if shipped is None:
        return None
    return Known(f"{num_points} vectors that come with this package", largest_cosine(shipped), lambda: shipped)


@lru_cache(maxsize=1)
def _table() -> dict[tuple[int, int], BestKnown]:
    text = resources.files(__package__).joinpath("best_known.csv").read_text()
    return {
        (int(row["K"]), int(row["D"])): BestKnown(float(row["cosine"]), row["status"] == "proven", row["source"])
        for row in csv.DictReader(text.splitlines())
    }


@lru_cache(maxsize=1)
def _shipped_names() -> frozenset[str]:
    file = resources.files(__package__).joinpath("coordinates.npz")
    if not file.is_file():
        return frozenset()
    with file.open("rb") as stream, numpy.load(stream) as archive:
        return frozenset(archive.files)
