"""Prototypes: known optima are reached and never beaten, bounds are sound."""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

from proac_cuda.prototypes import (
    arrangements,
    bounds,
    cache,
    certificate,
    contacts,
    descent,
    groups,
    known,
    prototype_certificate,
    search,
    search_prototypes,
    starts,
    uniform,
    uniform_prototypes,
)
from proac_cuda.prototypes.bounds import best_lower_bound

with open(Path(__file__).parents[1] / "data" / "spherical_codes.csv", newline="") as stream:
    CODES = [(int(row["K"]), int(row["D"]), float(row["max_cos"]), row["status"]) for row in csv.DictReader(stream)]


def is_searched(num_classes: int, dimension: int) -> bool:
    if arrangements.arrangement(num_classes, dimension) is not None:
        return False
    return known.shipped_arrangement(num_classes, dimension) is None


# The last digits of the table are rounded: its shortest entry has eight.
TABLE_ROUNDING = 5e-9

# A pair that takes a search; tests that need one, and not a good one, make a short search of it.
QUICK_K, QUICK_D = 11, 4
SHORT_PLAN = search.SearchPlan(rounds=2, starts=3, iterations=10, sharpness_step=4.0)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has an empty cache of its own, in memory and on disk."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PROAC_CACHE", str(folder))
    monkeypatch.setattr(uniform, "_known_codes", {})
    monkeypatch.setattr(cache, "_warned_folders", set())
    return folder


@pytest.fixture
def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "search_plan", lambda num_points, dimension: SHORT_PLAN)


def gram(rows: torch.Tensor) -> torch.Tensor:
    return rows.double() @ rows.double().T


def off_diagonal(rows: torch.Tensor) -> torch.Tensor:
    return gram(rows)[~torch.eye(len(rows), dtype=torch.bool)]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.numpy().tobytes() == right.numpy().tobytes()


# Arrangements


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


# Determinism


@pytest.mark.usefixtures("short_searches")
@pytest.mark.parametrize(("num_classes", "dimension"), [(2, 1), (19, 64), (100, 64), (7, 2), (QUICK_K, QUICK_D)])
def test_same_bits_whatever_the_threads_and_the_global_generator(
    num_classes: int, dimension: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
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
    assert same_bits(*results)


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


# The search


def test_soft_maximum_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(2, 11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sharpness = torch.tensor([20.0, 3.0], dtype=torch.float64)
    unit = points / points.norm(dim=2, keepdim=True)
    cosines = (unit @ unit.mT)[:, ~torch.eye(11, dtype=torch.bool)]
    expected = torch.logsumexp(sharpness[:, None] * cosines, dim=1) / sharpness
    (expected_gradient,) = torch.autograd.grad(expected.sum(), points)
    for pairs in (1, 66, 10_000):  # blocks of one row, of three rows with a shorter last one, and a single block
        monkeypatch.setattr(descent, "_BLOCK_PAIRS", pairs)
        value, gradient = descent._soft_maximum(descent.without_symmetry(points.detach()), sharpness)
        torch.testing.assert_close(value, expected.detach(), atol=1e-14, rtol=0)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-14, rtol=1e-12)


# Cyclic groups, products, groups that do not commute; stabilisers of every order are among their orbits.
@pytest.mark.parametrize("group", ["Z2", "Z7", "Z2xZ2", "Z2xZ4", "D3", "Q8", "A4", "5:4"])
@pytest.mark.parametrize("seed", range(3))
def test_orbits_are_the_same_problem_with_fewer_unknowns(group: str, seed: int) -> None:
    """Soft maximum and gradient of 22 vectors in R^6 that are orbits, and of the same vectors taken one by one."""
    generator = torch.Generator().manual_seed(seed)
    symmetry = starts.random_symmetry(22, 6, 3, generator, [group])
    orbits = starts.symmetric_starts(symmetry, 3, generator)
    sharpness = torch.tensor([5.0, 20.0, 80.0], dtype=torch.float64)
    points = orbits.points()
    assert points.shape == (3, 22, 6)
    torch.testing.assert_close(points.norm(dim=2), torch.ones(3, 22, dtype=torch.float64), atol=1e-13, rtol=0)
    value, gradient = descent._soft_maximum(orbits, sharpness)
    all_value, all_gradient = descent._soft_maximum(descent.without_symmetry(points), sharpness)
    torch.testing.assert_close(value, all_value, atol=1e-13, rtol=0)
    # A vector of an orbit moves its images along, and each of them contributes as much.
    rows = orbits.vectors.shape[1]
    assert float(orbits.sizes.sum()) == 22
    torch.testing.assert_close(gradient, orbits.sizes[:, None] * all_gradient[:, :rows], atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("name", "order", "dimensions", "orbits"),
    [
        ("Z5", 5, [1, 2, 2], [5, 1]),
        ("D4", 8, [1, 1, 1, 1, 2], [8, 4, 4, 4, 2, 2, 2, 1]),
        ("Q8", 8, [1, 1, 1, 1, 4], [8, 4, 2, 2, 2, 1]),
        ("A4", 12, [1, 2, 3], [12, 6, 4, 3, 1]),
        ("He3", 27, [1, 2, 2, 2, 2, 6], [27, 9, 9, 9, 9, 9, 3, 3, 3, 3, 1]),
        ("7:3", 21, [1, 2, 6], [21, 7, 3, 1]),
        ("A5", 60, [1, 3, 3, 4, 5], [60, 30, 20, 15, 12, 10, 6, 5, 1]),
        ("Z2xS3", 12, [1, 1, 1, 1, 2, 2], [12, 6, 6, 6, 4, 3, 2, 2, 2, 1]),
    ],
)
def test_groups(name: str, order: int, dimensions: list[int], orbits: list[int]) -> None:
    """The tables of these groups: real irreducible representations, subgroups up to conjugacy."""
    group = groups.named_group(name)
    assert group.order == order
    assert [matrices.shape[1] for matrices in group.irreducible] == dimensions
    assert [len(cosets) for cosets in group.cosets] == orbits
    assert all(len(s) * len(c) == order for s, c in zip(group.subgroups, group.cosets, strict=True))
    torch.testing.assert_close(group.irreducible[0], torch.ones(order, 1, 1, dtype=torch.float64), atol=1e-12, rtol=0)
    for matrices in group.irreducible:
        unit = torch.eye(matrices.shape[1], dtype=torch.float64)
        torch.testing.assert_close(matrices @ matrices.mT, unit.expand_as(matrices), atol=1e-12, rtol=0)
        # Closed under multiplication: every product of two is one of them.
        products = (matrices[:, None] @ matrices[None]).flatten(0, 1)
        distances = torch.cdist(products.flatten(1), matrices.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        assert float(distances.amin(dim=1).max()) < 1e-11


@pytest.mark.parametrize("name", ["", "Z", "X3", "Z2x", "7:5", "D2", "A4:2"])
def test_groups_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="group: got"):
        groups.named_group(name)


def test_contact_equations_are_solved_to_the_last_digit() -> None:
    """From an icosahedron known to five digits to one known to fifteen."""
    exact = arrangements.arrangement(12, 3).make()
    noise = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solved = contacts.solve_contacts(descent.normalise(exact + 3e-6 * noise))
    assert descent.largest_cosine(solved) == pytest.approx(1 / math.sqrt(5), abs=1e-14)


def test_wrong_contacts_never_make_it_worse() -> None:
    points = descent.normalise(torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert descent.largest_cosine(contacts.solve_contacts(points)) <= descent.largest_cosine(points)


def test_work_depends_on_the_size_only_and_is_bounded() -> None:
    plans = [search.search_plan(size, 128) for size in (20, 300, 1000, 100_000)]
    work = [plan.rounds * plan.starts for plan in plans]
    assert work == sorted(work, reverse=True)
    assert work[-1] == 1
    assert all(search.search_plan(size, 24).seconds <= 100 for size in (10, 60, 150, 300))


def test_a_short_plan_already_gives_a_valid_arrangement() -> None:
    plan = search.SearchPlan(1, 1, 5, 4.0)
    found = list(search.search(400, 4, plan=plan))
    fractions = [step.fraction for step in found]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    cosines = [step.cosine for step in found]
    assert cosines == sorted(cosines, reverse=True)
    rows = found[-1].points
    assert found[-1].cosine == pytest.approx(float(off_diagonal(rows).max()), abs=1e-14)
    assert best_lower_bound(400, 4)[0] < found[-1].cosine < 0.985


def test_a_search_never_ends_above_the_larger_arrangement_that_it_knows() -> None:
    larger = arrangements.arrangement(120, 4).make()
    *_, last = search.search(118, 4, larger=larger, plan=SHORT_PLAN)
    assert last.cosine <= descent.largest_cosine(larger) + 1e-15


@pytest.mark.parametrize(("num_classes", "dimension"), [(72, 9), (58, 13)])
def test_one_vector_less_than_a_known_arrangement_is_as_good_as_published(num_classes: int, dimension: int) -> None:
    larger = known.larger_arrangement(num_classes, dimension)
    first = next(search.search(num_classes, dimension, larger=larger))
    assert first.cosine <= known.best_known(num_classes, dimension).cosine + 1e-5


@pytest.mark.exhaustive
@pytest.mark.parametrize(("num_classes", "dimension"), [(13, 3), (20, 3), (40, 10)])
def test_the_default_search_finds_what_is_published(num_classes: int, dimension: int) -> None:
    began = time.process_time()
    *_, last = search.search(num_classes, dimension, lower_bound=best_lower_bound(num_classes, dimension)[0])
    assert last.cosine <= known.best_known(num_classes, dimension).cosine + 1e-5
    assert time.process_time() - began < 120


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.usefixtures("short_searches")
def test_a_search_says_what_it_does(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Swapped arguments are the likely cause of a long search, and a job without a terminal must not look hung."""
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(uniform.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    uniform_prototypes(QUICK_K, QUICK_D)
    text = capsys.readouterr().err
    for part in (
        f"{QUICK_K} prototypes in {QUICK_D} dimensions",
        f"(num_classes={QUICK_K}, embedding_dim={QUICK_D})",
        "of one core, once",
        os.environ["PROAC_CACHE"],
        "did you swap num_classes and embedding_dim?",
        "largest cosine 0.",
        "% of the plan",
    ):
        assert part in text
    assert ("\r" in text) == terminal
    assert text.endswith("\n")
    uniform_prototypes(QUICK_K, QUICK_D, seed=1)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("short_searches")
def test_an_interrupted_search_keeps_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def interrupted(*arguments: object, **options: object):
        for found in search.search(*arguments, **options):
            yield found
            seen.append(found.cosine)
            if len(seen) == 20:
                raise KeyboardInterrupt

    monkeypatch.setattr(uniform, "search", interrupted)
    rows = search_prototypes(QUICK_K, QUICK_D, 3600)
    assert float(off_diagonal(rows).max()) == pytest.approx(min(seen), abs=1e-14)


@pytest.mark.usefixtures("short_searches")
def test_an_interrupted_default_search_is_not_taken_for_a_whole_one(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object):
        yield next(iter(search.search(*arguments, **options)))
        raise KeyboardInterrupt

    monkeypatch.setattr(uniform, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uniform_prototypes(QUICK_K, QUICK_D)
    assert cached_files(fresh_cache) == [] and uniform._known_codes == {}


@pytest.mark.usefixtures("short_searches")
def test_a_search_ends_in_time() -> None:
    began = time.monotonic()
    rows = search_prototypes(QUICK_K, QUICK_D, 0.5)
    assert rows.shape == (QUICK_K, QUICK_D)
    assert time.monotonic() - began < 10
    with pytest.raises(ValueError, match="seconds: got 0"):
        search_prototypes(QUICK_K, QUICK_D, 0)
    with pytest.raises(ValueError, match="group: got 'G2'"):
        search_prototypes(QUICK_K, QUICK_D, 0.5, groups=["Z3", "G2"])


def test_random_symmetries_have_the_right_size() -> None:
    generator = torch.Generator().manual_seed(0)
    symmetry = starts.random_symmetry(40, 10, 8, generator, ["A5"])
    assert symmetry.group == "A5"
    assert sum(len(groups.named_group("A5").cosets[kind]) for kind in symmetry.orbits) == 40
    for representation in symmetry.representations:
        assert sum(groups.named_group("A5").irreducible[k].shape[1] for k in representation) == 10


# What is known


NAMED = sorted(arrangements.named_sizes())
SHIPPED = sorted(tuple(map(int, name.split("-"))) for name in known._shipped_names())

# Values reached by the coordinates that come with the package: they never get worse.
REACHED = {
    (73, 9): 0.3286565,
    (71, 12): 0.2276015,
    (86, 6): 0.5491686,
    (90, 13): 0.2413901,
    (72, 11): 0.2540060,
    (77, 15): 0.1682833,
    (150, 64): 0.0331298,
}


@pytest.mark.parametrize(("num_classes", "dimension"), NAMED)
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


@pytest.mark.parametrize(("num_classes", "dimension"), known.known_sizes())
def test_no_proven_optimum_is_beaten_and_no_bound_exceeds_what_is_published(num_classes: int, dimension: int) -> None:
    value = known.best_known(num_classes, dimension)
    assert best_lower_bound(num_classes, dimension)[0] <= value.cosine + TABLE_ROUNDING
    here = arrangements.arrangement(num_classes, dimension)
    rows = known.shipped_arrangement(num_classes, dimension) if here is None else here.make()
    if value.proven and rows is not None:
        assert descent.largest_cosine(rows) >= value.cosine - TABLE_ROUNDING


def test_certificate_of_what_is_not_the_arrangement_has_no_name() -> None:
    rows = torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = prototype_certificate(rows)
    assert found.arrangement == ""
    assert found.best_known == 0.5


def test_closed_forms_have_certificates_too() -> None:
    assert prototype_certificate(uniform_prototypes(19, 256)).arrangement == "regular simplex"
    assert prototype_certificate(uniform_prototypes(20, 12)).arrangement == "antipodal pairs of a cross-polytope"
    assert prototype_certificate(uniform_prototypes(9, 2)).source.endswith("proven optimal")


# The cache


def cached_files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def forbid_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(uniform, "search", fail)


@pytest.mark.usefixtures("short_searches")
def test_one_search_serves_all_seeds(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = uniform_prototypes(QUICK_K, QUICK_D)
    assert len(cached_files(fresh_cache)) == 1  # and no unfinished file beside it
    forbid_search(monkeypatch)
    monkeypatch.setattr(uniform, "_known_codes", {})
    assert same_bits(uniform_prototypes(QUICK_K, QUICK_D), first)
    uniform_prototypes(QUICK_K, QUICK_D, seed=9)


def test_closed_forms_write_nothing(fresh_cache: Path) -> None:
    for num_classes, dimension in ((1, 4), (5, 4), (8, 4), (9, 2)):
        uniform_prototypes(num_classes, dimension)
    assert cached_files(fresh_cache) == []


def damage_truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_other_code(file: Path) -> None:
    """A well-formed archive with other unit rows."""
    rows = torch.eye(QUICK_D, dtype=torch.float64).repeat(4, 1)[:QUICK_K].numpy()
    numpy.savez(file, points=rows, digest="0" * 64)


def damage_shape(file: Path) -> None:
    numpy.savez(file, points=numpy.zeros((2, 2)), digest="")


def damage_pickle(file: Path) -> None:
    numpy.savez(file, points=numpy.array([{}], dtype=object), digest="")


@pytest.mark.usefixtures("short_searches")
@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_other_code, damage_shape, damage_pickle])
def test_damaged_cache_files_are_replaced(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, damage) -> None:
    first = uniform_prototypes(QUICK_K, QUICK_D)
    (file,) = cached_files(fresh_cache)
    damage(file)
    damaged = file.read_bytes()
    monkeypatch.setattr(uniform, "_known_codes", {})
    assert same_bits(uniform_prototypes(QUICK_K, QUICK_D), first)
    assert file.read_bytes() != damaged
    forbid_search(monkeypatch)
    monkeypatch.setattr(uniform, "_known_codes", {})
    assert same_bits(uniform_prototypes(QUICK_K, QUICK_D), first)


@pytest.mark.usefixtures("short_searches")
def test_a_folder_that_cannot_be_used_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")  # unlike permissions, this also stops the superuser
    monkeypatch.setenv("PROAC_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="PROAC_CACHE") as caught:
        first = uniform_prototypes(QUICK_K, QUICK_D)
        uniform._known_codes.clear()
        second = uniform_prototypes(QUICK_K, QUICK_D)
    assert len(caught) == 1
    assert same_bits(first, second)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(stream: object) -> None:
        raise OSError("disk full")

    (tmp_path / "kept").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        cache.write_atomically(tmp_path / "kept", fail)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROAC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "proac_cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "proac_cuda"


# Bad arguments


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


# Certificates and bounds


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
