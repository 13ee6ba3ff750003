"""Certificates, and the bounds behind them."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from proac_cuda.prototypes import bounds, certificate, known, prototype_certificate, uniform_prototypes
from proac_cuda.prototypes.bounds import best_lower_bound
from prototype_checks import CODES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_classes", "dimension", "value"),
    # where a polynomial of higher degree than Levenshtein's is better: 24-cell, 600-cell (exactly its cosine), kissing in R^6
    [(24, 4, 0.4785), (120, 4, (1 + math.sqrt(5)) / 4), (72, 6, 0.4785)],
)
def test_linear_programming_bound(num_classes: int, dimension: int, value: float) -> None:
    pytest.importorskip("scipy")
    bound = bounds.linear_programming_bound(num_classes, dimension)
    assert bound == pytest.approx(value, abs=1e-4)
    assert best_lower_bound(num_classes, dimension)[0] < bound <= known.best_known(num_classes, dimension).cosine
    found = prototype_certificate(uniform_prototypes(num_classes, dimension))
    assert (found.lower_bound, found.bound) == (bound, "Delsarte")


@pytest.mark.parametrize(("num_classes", "dimension"), [(13, 3), (10, 4), (16, 5), (72, 11), (275, 22)])
def test_linear_programming_bound_is_a_bound(num_classes: int, dimension: int) -> None:
    pytest.importorskip("scipy")
    bound = bounds.linear_programming_bound(num_classes, dimension)
    assert (
        best_lower_bound(num_classes, dimension)[0] <= bound <= known.best_known(num_classes, dimension).cosine + 1e-13
    )


def test_certificate_without_scipy_says_what_was_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    certificate._lower_bound.cache_clear()
    try:
        found = prototype_certificate(uniform_prototypes(24, 4))
    finally:
        certificate._lower_bound.cache_clear()
    assert found.bound == "Levenshtein"
    assert "linear programming not tried: scipy is not installed" in found.remark


@pytest.mark.parametrize(("num_classes", "dimension", "optimum", "status"), CODES)
def test_bounds_never_exceed_known_optima(num_classes: int, dimension: int, optimum: float, status: str) -> None:
    bound, _ = best_lower_bound(num_classes, dimension)
    assert bound <= optimum + 1e-14


@pytest.mark.parametrize(
    ("num_classes", "dimension", "optimum"),
    [
        (16, 5, 1 / 5),
        (27, 6, 1 / 4),
        (56, 7, 1 / 3),
        (240, 8, 1 / 2),
        (112, 21, 1 / 9),
        (162, 21, 1 / 7),
        (100, 22, 1 / 11),
        (275, 22, 1 / 6),
        (891, 22, 1 / 4),
        (552, 23, 1 / 5),
        (4600, 23, 1 / 3),
        (196560, 24, 1 / 2),
        (120, 4, (1 + math.sqrt(5)) / 4),  # the 600-cell: sharp enough for a certificate only by a bound not used here
    ],
)
def test_levenshtein_is_tight_for_sharp_codes(num_classes: int, dimension: int, optimum: float) -> None:
    bound, name = best_lower_bound(num_classes, dimension)
    assert name == "Levenshtein"
    if (num_classes, dimension) == (120, 4):
        assert bound < optimum
    else:
        assert bound == pytest.approx(optimum, abs=1e-13)


def test_fejes_toth_is_tight_for_the_icosahedron() -> None:
    assert best_lower_bound(12, 3) == (pytest.approx(1 / math.sqrt(5), abs=1e-14), "Fejes Toth")


@pytest.mark.parametrize("dimension", [3, 4, 5, 8, 21, 64, 128])
def test_more_vectors_are_never_further_apart(dimension: int) -> None:
    sizes = [*range(2, 6 * dimension), 10 * dimension, 100 * dimension, 1000 * dimension]
    bounds = [best_lower_bound(size, dimension)[0] for size in sizes]
    assert all(left <= right + 1e-14 for left, right in zip(bounds, bounds[1:], strict=False))
    assert all(-1.0 <= bound < 1.0 for bound in bounds)


@pytest.mark.parametrize("dimension", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("num_classes", [2, 3, 5, 8, 9, 20, 61, 400])
def test_no_random_arrangement_beats_its_bound(num_classes: int, dimension: int) -> None:
    generator = torch.Generator().manual_seed(num_classes + dimension)
    rows = torch.randn(num_classes, dimension, dtype=torch.float64, generator=generator)
    certificate = prototype_certificate(rows)
    assert certificate.gap >= -1e-14
    assert certificate.gap == certificate.largest_cosine - certificate.lower_bound


def test_certificate_does_not_depend_on_lengths() -> None:
    rows = torch.randn(30, 8, dtype=torch.float64)
    expected = prototype_certificate(rows)
    lengths = torch.logspace(-300, 300, 30, dtype=torch.float64).unsqueeze(1)
    assert prototype_certificate(rows * lengths).largest_cosine == pytest.approx(expected.largest_cosine, abs=1e-14)
    assert prototype_certificate(rows.requires_grad_()) == expected


def test_certificate_sees_one_close_pair() -> None:
    rows = uniform_prototypes(19, 256)
    rows[7] = rows[3] + 0.1 * rows[7]
    assert prototype_certificate(rows).largest_cosine > 0.99


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[1.0, 0.0]], TypeError, "got list, expected a torch.Tensor"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "got dtype torch.int64"),
        (torch.ones(2, 2, dtype=torch.complex64), TypeError, "got dtype torch.complex64"),
        (torch.ones(4), ValueError, "got shape (4,), expected (K, D)"),
        (torch.ones(4, 1, 2), ValueError, "got shape (4, 1, 2)"),
        (torch.ones(0, 2), ValueError, "got shape (0, 2)"),
        (torch.ones(2, 0), ValueError, "got shape (2, 0)"),
        (torch.tensor([[1.0, math.nan]]), ValueError, "got NaN or infinity"),
        (torch.tensor([[1.0, 0.0], [math.inf, 1.0]]), ValueError, "got NaN or infinity"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), ValueError, "row 1 is zero"),
    ],
)
def test_certificate_of_bad_input(rows: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        prototype_certificate(rows)  # type: ignore[arg-type]
    assert message in str(caught.value)
