"""The search: its steps, its plan, what it says, and how it ends."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from proac_cuda.prototypes import (
    arrangements,
    contacts,
    descent,
    groups,
    known,
    search,
    search_prototypes,
    starts,
    uniform,
    uniform_prototypes,
)
from proac_cuda.prototypes.bounds import best_lower_bound
from prototype_checks import QUICK_D, QUICK_K, SHORT_PLAN, cached_files, off_diagonal


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_search_that_finds_nothing_better_than_a_part_of_a_known_arrangement_ends_early() -> None:
    """One round of each kind, of the many that the plan has."""
    plan = dataclasses.replace(SHORT_PLAN, rounds=1000)
    larger = arrangements.arrangement(27, 6).make()
    found = list(search.search(26, 6, larger=larger, plan=plan))
    assert found[-1].cosine == pytest.approx(1 / 4, abs=1e-14)
    assert found[-2].fraction <= len(search._KINDS) / plan.rounds
    # 20 of these 27 are no good start: the search goes on.
    again = search.search(20, 6, larger=larger, plan=plan)
    assert any(step.fraction > len(search._KINDS) / plan.rounds for step in again)


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


@pytest.mark.slow
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
