"""Arrangements that are known by name or shipped: as good as what is published."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from proac_cuda.prototypes import arrangements, descent, known, prototype_certificate, uniform, uniform_prototypes
from proac_cuda.prototypes.bounds import best_lower_bound
from prototype_checks import TABLE_ROUNDING, off_diagonal

NAMED = sorted(arrangements.named_sizes())


SHIPPED = sorted(tuple(map(int, name.split("-"))) for name in known._shipped_names())


# Values reached by the coordinates that come with the package: they never get worse.
REACHED = {
    (73, 9): 0.3286565,
    (71, 12): 0.2276015,
    (86, 6): 0.5491686,
    (90, 13): 0.2413901,
    (72, 11): 0.2539738,
    (77, 15): 0.1682747,
    (150, 64): 0.0331298,
}


def large_ones_slow(sizes: Iterable[tuple[int, int]]) -> list:
    """Parameters of which those of more than 60 vectors, whose bounds take a second, are slow."""
    return [pytest.param(*size, marks=[pytest.mark.slow] * (size[0] > 60)) for size in sizes]


@pytest.mark.parametrize(("num_classes", "dimension"), large_ones_slow(NAMED))
def test_named_arrangements_are_what_is_published(num_classes: int, dimension: int) -> None:
    rows = uniform_prototypes(num_classes, dimension, dtype=torch.float64)
    found = prototype_certificate(rows)
    assert rows.shape == (num_classes, dimension)
    assert torch.linalg.matrix_rank(rows) == dimension
    assert found.largest_cosine == pytest.approx(found.best_known, abs=1e-14)
    assert found.arrangement == arrangements.arrangement(num_classes, dimension).name
    assert found.source


def test_a_graphs_eigenspace_has_two_cosines() -> None:
    cosines = off_diagonal(uniform_prototypes(100, 22, dtype=torch.float64))
    assert torch.all(((cosines - 1 / 11).abs() < 1e-13) | ((cosines + 4 / 11).abs() < 1e-13))


@pytest.mark.parametrize(("num_classes", "dimension"), SHIPPED)
def test_shipped_coordinates_are_as_good_as_published(num_classes: int, dimension: int) -> None:
    rows = known.shipped_arrangement(num_classes, dimension)
    assert rows.shape == (num_classes, dimension) and rows.dtype == torch.float64
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(num_classes, dtype=torch.float64), atol=1e-15, rtol=0)
    if (num_classes, dimension) in REACHED:
        assert descent.largest_cosine(rows) <= REACHED[num_classes, dimension]
    else:
        assert descent.largest_cosine(rows) <= known.best_known(num_classes, dimension).cosine + 1e-5


@pytest.mark.parametrize(("num_classes", "dimension"), large_ones_slow(known.known_sizes()))
def test_no_proven_optimum_is_beaten_and_no_bound_exceeds_what_is_published(num_classes: int, dimension: int) -> None:
    value = known.best_known(num_classes, dimension)
    assert best_lower_bound(num_classes, dimension)[0] <= value.cosine + TABLE_ROUNDING
    here = arrangements.arrangement(num_classes, dimension)
    rows = known.shipped_arrangement(num_classes, dimension) if here is None else here.make()
    if value.proven and rows is not None:
        assert descent.largest_cosine(rows) >= value.cosine - TABLE_ROUNDING


@pytest.mark.parametrize(
    ("num_classes", "dimension", "whole"),
    [
        (11, 3, "icosahedron"),
        (72, 9, "73 vectors that come with this package"),
        (58, 13, "59 vectors that come with this package"),
    ],
)
def test_part_of_a_known_arrangement_is_taken_without_a_search(
    num_classes: int, dimension: int, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(uniform, "_search")
    found = prototype_certificate(uniform_prototypes(num_classes, dimension, dtype=torch.float64))
    assert found.arrangement == f"part of {whole}"
    assert found.largest_cosine <= found.best_known + TABLE_ROUNDING


@pytest.mark.parametrize(("num_classes", "dimension"), known.known_sizes())
def test_no_search_is_for_what_a_part_of_a_known_arrangement_is_as_good_as(num_classes: int, dimension: int) -> None:
    """Nor is a part taken where something better is published."""
    published = known.best_known(num_classes, dimension).cosine
    here = known.known_arrangement(num_classes, dimension)
    for larger in range(num_classes, num_classes + 4):
        whole = known.known_arrangement(larger, dimension)
        if whole is not None and whole.cosine <= published + 1e-9:
            assert here.cosine <= whole.cosine
    if here is not None and here.name.startswith("part of"):
        assert here.cosine <= published + TABLE_ROUNDING


def test_certificate_of_what_is_not_the_arrangement_has_no_name() -> None:
    rows = torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = prototype_certificate(rows)
    assert found.arrangement == ""
    assert found.best_known == 0.5


def test_closed_forms_have_certificates_too() -> None:
    assert prototype_certificate(uniform_prototypes(19, 256)).arrangement == "regular simplex"
    assert prototype_certificate(uniform_prototypes(20, 12)).arrangement == "antipodal pairs of a cross-polytope"
    assert prototype_certificate(uniform_prototypes(9, 2)).source.endswith("proven optimal")
