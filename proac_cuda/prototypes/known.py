"""What is known about (K, D): the best largest cosine published, and coordinates that come with this package.

`best_known.csv` has the values with their sources. `coordinates.npz` has what long searches found here, as float64 under the
key "K-D"; docs/using/prototypes.md says how each was found.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from .arrangements import arrangement, named_sizes

# A subset of a larger arrangement is worth trying up to this number of its vectors for each of those wanted.
_LARGER = 1.25


class BestKnown(NamedTuple):
    """The smallest largest cosine that is published for K unit vectors in R^D."""

    cosine: float
    proven: bool  # nothing can be better
    source: str


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


def larger_arrangement(num_points: int, dimension: int) -> Tensor | None:
    """The smallest known arrangement of somewhat more vectors in R^D, or None."""
    shipped = [tuple(map(int, name.split("-"))) for name in _shipped_names()]
    sizes = [size for size, length in (*named_sizes(), *shipped) if length == dimension]
    larger = [size for size in sizes if num_points < size <= _LARGER * num_points]
    if not larger:
        return None
    named = arrangement(min(larger), dimension)
    return shipped_arrangement(min(larger), dimension) if named is None else named.make()


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
