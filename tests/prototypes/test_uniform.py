"""`uniform_prototypes`: known optima are reached and never beaten; dtypes, seeds, threads, bad arguments."""

from __future__ import annotations

import math
import os
import time

import numpy
import pytest
import torch

from proac_cuda.prototypes import prototype_certificate, uniform, uniform_prototypes
from prototype_checks import CODES, QUICK_D, QUICK_K, TABLE_ROUNDING, gram, is_searched, same_bits


@pytest.mark.parametrize(
    ("num_classes", "dimension", "optimum", "status"),
    [
        pytest.param(*code, id=f"{code[0]}-{code[1]}", marks=[pytest.mark.slow] * is_searched(*code[:2]))
        for code in CODES
    ],
)
def test_known_optima(num_classes: int, dimension: int, optimum: float, status: str) -> None:
    rows = uniform_prototypes(num_classes, dimension, dtype=torch.float64)
    certificate = prototype_certificate(rows)
    assert certificate.largest_cosine <= optimum + 1e-8
    if status == "proven":
        assert certificate.largest_cosine >= optimum - TABLE_ROUNDING
    assert certificate.gap >= -1e-14
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(num_classes, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_classes", "dimension", "largest", "seconds"), [(150, 64, 0.035, 60.0), (1000, 128, 0.075, 300.0)]
)
def test_large_searches_end_in_time(num_classes: int, dimension: int, largest: float, seconds: float) -> None:
    began = time.process_time()  # the search has one thread, and other programs' shares of its core do not count
    rows = uniform_prototypes(num_classes, dimension)
    elapsed = time.process_time() - began
    reached = prototype_certificate(rows).largest_cosine
    print(f"K={num_classes}, D={dimension}: largest cosine {reached:.5f} in {elapsed:.1f} s")
    assert reached <= largest
    assert elapsed < seconds


@pytest.mark.parametrize(
    ("num_classes", "dimension"), [(2, 1), (2, 5), (3, 2), (4, 3), (19, 256), (150, 256), (171, 256), (257, 256)]
)
def test_simplex(num_classes: int, dimension: int) -> None:
    rows = uniform_prototypes(num_classes, dimension, dtype=torch.float64)
    expected = torch.full((num_classes, num_classes), -1.0 / (num_classes - 1), dtype=torch.float64)
    expected.fill_diagonal_(1.0)
    torch.testing.assert_close(gram(rows), expected, atol=1e-14, rtol=0)
    certificate = prototype_certificate(rows)
    assert certificate.bound == "simplex"
    assert abs(certificate.gap) < 1e-14


@pytest.mark.parametrize(
    ("num_classes", "dimension"), [(5, 3), (6, 3), (4, 2), (7, 5), (10, 5), (300, 256), (512, 256)]
)
def test_antipodal_pairs(num_classes: int, dimension: int) -> None:
    rows = uniform_prototypes(num_classes, dimension, dtype=torch.float64)
    cosines = gram(rows)
    pairs = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    for first in range(0, num_classes - 1, 2):
        pairs[first, first + 1] = pairs[first + 1, first] = -1.0
    torch.testing.assert_close(cosines, pairs + torch.eye(num_classes, dtype=torch.float64), atol=1e-14, rtol=0)
    certificate = prototype_certificate(rows)
    assert certificate.bound == "Rankin"
    assert abs(certificate.gap) < 1e-14


@pytest.mark.parametrize("num_classes", [5, 6, 7, 100])
def test_circle(num_classes: int) -> None:
    certificate = prototype_certificate(uniform_prototypes(num_classes, 2, dtype=torch.float64))
    assert certificate.largest_cosine == pytest.approx(math.cos(2 * math.pi / num_classes), abs=1e-14)
    assert certificate.bound == "circle"


@pytest.mark.parametrize("dimension", [1, 2, 7])
def test_one_class(dimension: int) -> None:
    rows = uniform_prototypes(1, dimension)
    assert rows.shape == (1, dimension)
    assert rows.norm().item() == pytest.approx(1.0, abs=1e-7)
    assert prototype_certificate(rows)[:5] == (-1.0, -1.0, "no pair", 0.0, "one vector")


@pytest.mark.usefixtures("short_searches")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("num_classes", "dimension"), [(19, 256), (20, 12), (QUICK_K, QUICK_D), (9, 2)])
def test_dtype_shape_and_unit_rows(dtype: torch.dtype, num_classes: int, dimension: int) -> None:
    rows = uniform_prototypes(num_classes, dimension, dtype=dtype, device="cpu")
    assert rows.shape == (num_classes, dimension)
    assert rows.dtype == dtype
    assert rows.device.type == "cpu"
    assert rows.is_contiguous()
    assert not rows.requires_grad
    norms = rows.double().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=2 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.usefixtures("short_searches")
@pytest.mark.parametrize(
    # closed forms, a search, an eigenspace, coordinates that come with the package, part of such
    ("num_classes", "dimension"),
    [(2, 1), (19, 64), (100, 64), (7, 2), (QUICK_K, QUICK_D), (56, 20), (73, 9), (72, 9)],
)
def test_same_bits_whatever_the_threads_and_the_global_generator(
    num_classes: int, dimension: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            monkeypatch.setattr(uniform, "_known_codes", {})
            monkeypatch.setenv("PROAC_CACHE", os.path.join(os.environ["PROAC_CACHE"], str(count)))
            torch.set_num_threads(count)
            torch.manual_seed(count)
            state = torch.get_rng_state()
            results.append(uniform_prototypes(num_classes, dimension, seed=3))
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


def test_threads_are_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    threads = torch.get_num_threads()
    monkeypatch.setattr(uniform, "_arrangement", fail)
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyboardInterrupt):
            uniform_prototypes(4, 3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("short_searches")
@pytest.mark.parametrize(("num_classes", "dimension"), [(1, 8), (19, 64), (30, 16), (7, 2), (QUICK_K, QUICK_D)])
def test_the_seed_rotates(num_classes: int, dimension: int) -> None:
    first = uniform_prototypes(num_classes, dimension, seed=0, dtype=torch.float64)
    second = uniform_prototypes(num_classes, dimension, seed=1, dtype=torch.float64)
    assert (first - second).abs().max() > 0.05
    torch.testing.assert_close(gram(first), gram(second), atol=1e-14, rtol=0)


def test_rotations_are_uniform() -> None:
    """Of a frame uniform over all frames every coordinate has mean 0 and variance 1/D: a QR without the sign fix has not."""
    frames = torch.stack([uniform._random_frame(3, 3, seed) for seed in range(500)])
    identity = torch.eye(3, dtype=torch.float64).expand(500, 3, 3)
    torch.testing.assert_close(frames @ frames.mT, identity, atol=1e-14, rtol=0)
    assert frames.mean(dim=0).abs().max() < 5 / math.sqrt(3 * 500)
    assert (frames.square().mean(dim=0) - 1 / 3).abs().max() < 5 * math.sqrt(4 / 45 / 500)


@pytest.mark.usefixtures("short_searches")
def test_the_users_defaults_play_no_part() -> None:
    expected = uniform_prototypes(QUICK_K, QUICK_D), uniform_prototypes(5, 8), uniform_prototypes(9, 2)
    uniform._known_codes.clear()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"), torch.inference_mode():
            found = uniform_prototypes(QUICK_K, QUICK_D), uniform_prototypes(5, 8), uniform_prototypes(9, 2)
    finally:
        torch.set_default_dtype(default)
    for left, right in zip(expected, found, strict=True):
        assert same_bits(left, right)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 4), {}, ValueError, "num_classes: got 0"),
        ((-3, 4), {}, ValueError, "num_classes: got -3"),
        ((4, 0), {}, ValueError, "embedding_dim: got 0"),
        ((3, 1), {}, ValueError, "num_classes: got 3 with embedding_dim=1, expected at most 2"),
        ((2.0, 4), {}, TypeError, "num_classes: got 2.0 of type float, expected an int"),
        ((True, 4), {}, TypeError, "num_classes: got True of type bool"),
        ((2, "4"), {}, TypeError, "embedding_dim: got '4' of type str"),
        ((2, 4), {"seed": 0.5}, TypeError, "seed: got 0.5"),
        ((2, 4), {"seed": None}, TypeError, "seed: got None"),
        ((2, 4), {"seed": 2**64}, ValueError, "seed: got 18446744073709551616"),
        ((2, 4), {"dtype": torch.int64}, TypeError, "dtype: got torch.int64, expected one of torch.float16"),
        ((2, 4), {"dtype": torch.complex64}, TypeError, "dtype: got torch.complex64"),
        ((2, 4), {"dtype": "float32"}, TypeError, "dtype: got 'float32', expected a torch.dtype"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        uniform_prototypes(*arguments, **options)
    assert message in str(caught.value)


def test_numpy_integers_and_every_seed_are_accepted() -> None:
    assert uniform_prototypes(numpy.int64(3), numpy.int32(4), seed=numpy.int64(-1)).shape == (3, 4)
    assert uniform_prototypes(3, 4, seed=2**64 - 1).shape == (3, 4)
