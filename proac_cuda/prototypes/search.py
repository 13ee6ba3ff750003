"""Numerical search for spherical codes: K unit vectors in R^D whose largest pairwise cosine is small.

Only the cases without a known arrangement come here (K > 2D, D > 2). Rounds of starts descend together: random ones,
symmetric ones, and the best so far disturbed (`starts`). Few of each round are worth a descent to the last digits (`descent`),
and the best has its contact equations solved (`contacts`). Where these leave vectors free to move, descents creep: the result
goes through a patient one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .contacts import solve_contacts
from .descent import Orbits, anneal, largest_cosine, largest_cosines, soft_maxima, without_symmetry
from .groups import named_group
from .starts import GROUPS, Symmetry, disturbed, random_starts, random_symmetry, subsets, symmetric_starts

# Raise this number whenever a change here alters the result: cached arrangements of another version are not used.
ALGORITHM_VERSION = 4

# The work of the default search, by what steps cost on a busy core of 2020.
_NANOSECONDS = 80e9

# A search ends early once so many rounds have come to the same best cosine (within the tolerance).
_AGREEING_ROUNDS = 12
_AGREEMENT = 1e-9

# What the rounds begin with, in turn.
_KINDS = ("random", "symmetric", "disturbed", "symmetric", "again", "settle", "symmetric", "subsets", "again", "broken")
_SYMMETRIES = 4
_MOST_STARTS = 384
_MOST_NUMBERS = 1 << 21

_COARSE_SHARPNESS = 2000.0
_LAST_SHARPNESS = 1e7

# The last descent of all: so many times the plan's steps at each of many sharpnesses, for up to so many numbers.
_PATIENT_SHARPNESSES = tuple(3e4 * 1.5**k for k in range(26))
_PATIENCE = 10
_MOST_PATIENT = 1 << 12
_HELPED = 1e-7
_PATIENT_SECONDS = 20.0  # at most, about
_ROUNDS_BETWEEN = 64  # in a longer search

# The soft maximum at the coarse sharpness ranks starts. Equal arrangements differ by less than the first of these, what is
# worse by more than the second stays worse; of each round so many are refined. Refined cosines are off by less than the last.
_SAME_SOFT = 3e-7
_HOPELESS = 1e-4
_REFINED_PER_ROUND = 4
_UNSETTLED = 1e-6


@dataclass(frozen=True)
class SearchPlan:
    """How much work a search may take: depends on the size of the problem only, never on the clock."""

    rounds: int
    starts: int  # that descend together in a round
    iterations: int  # L-BFGS steps for each sharpness
    sharpness_step: float  # from one sharpness to the next, up to `_COARSE_SHARPNESS`
    seconds: float = 0.0  # of a busy core, about


class Found(NamedTuple):
    """The best that a search has found so far."""

    points: Tensor  # (K, D) float64, unit rows
    cosine: float
    fraction: float  # of the plan that is done


def search_plan(num_points: int, dimension: int) -> SearchPlan:
    """Many starts where one costs milliseconds; one patient descent where it costs seconds or minutes."""
    evaluation = 20e3 + num_points**2 * (8.0 + 0.7 * dimension)  # nanoseconds of one start
    overhead = 0.7e6  # of a step, whatever the number of starts
    starts = max(1, min(32, (1 << 17) // num_points**2))
    round_time = 600 * (overhead + starts * evaluation)
    rounds = int(_NANOSECONDS / round_time)
    if rounds >= 4:
        return SearchPlan(rounds, starts, 40, 1.7, _NANOSECONDS * 1e-9 + _PATIENT_SECONDS)
    step = 1.2 if evaluation < 50e6 else 1.5
    steps = 30 * (math.log(_COARSE_SHARPNESS / 4.0) / math.log(step) + 14)
    return SearchPlan(1, 1, 30, step, steps * (overhead + evaluation) * 1e-9)


def search(
    num_points: int,
    dimension: int,
    *,
    lower_bound: float = -1.0,
    larger: Tensor | None = None,
    plan: SearchPlan | None = None,
    endless: bool = False,
    groups: Sequence[str] = GROUPS,
) -> Iterator[Found]:
    """Search for unit vectors whose largest pairwise cosine is as small as possible, and yield the best again and again.

    Args:
        num_points: K >= 2.
        dimension: D >= 2.
        lower_bound: no arrangement has a smaller largest cosine; the search ends once it is reached.
        larger: a good arrangement of K or more vectors in R^D; the search starts from its first K, and some starts are subsets.
            It ends early where one round of each kind has found nothing better.
        plan: how much work to spend; by default what `search_plan` says.
        endless: go on when the plan is done (not when the bound is reached).
        groups: the symmetries to try, by the names that `groups.named_group` knows.
    """
    plan = search_plan(num_points, dimension) if plan is None else plan
    state = _Search(num_points, dimension, plan, larger, groups)
    part = state.cosine
    for number in itertools.count():
        for fraction in state.round(number):
            yield state.found(min(1.0, (number + fraction) / plan.rounds))
        proven = state.cosine <= lower_bound + 1e-12
        unbeaten = number + 1 >= len(_KINDS) and state.cosine > part - _AGREEMENT
        done = number + 1 >= plan.rounds or state.agreeing >= _AGREEING_ROUNDS or unbeaten
        if number % _ROUNDS_BETWEEN == 0 if endless else done and not proven:
            for _ in state.descend_patiently(while_it_helps=endless):
                yield state.found(min(1.0, (number + 1) / plan.rounds))
        if proven or (done and not endless):
            yield state.found(1.0)
            return


class _Search:
    """The best so far, and how often rounds have come to it."""

    def __init__(
        self, num_points: int, dimension: int, plan: SearchPlan, larger: Tensor | None, groups: Sequence[str]
    ) -> None:
        self.num_points, self.dimension, self.plan, self.larger = num_points, dimension, plan, larger
        self.groups = groups
        self.generator = torch.Generator(device="cpu").manual_seed(0)
        self.points = None if larger is None else larger[:num_points]
        self.cosine = math.inf if self.points is None else largest_cosine(self.points)
        self.agreeing = 0
        self._refined_cosine = self.cosine  # before its contact equations were solved
        self._refined = None if self.points is None else without_symmetry(self.points)
        self._known_soft: list[float] = []  # of the arrangements that were refined
        self._symmetries: dict[Symmetry, float] = {}
        self._patient: Tensor | None = None  # what has been through the patient descent

    def found(self, fraction: float) -> Found:
        assert self.points is not None
        return Found(self.points, self.cosine, fraction)

    def round(self, number: int) -> Iterator[float]:
        """Yields the fraction of the round that is done; there are points from the first time on."""
        kind = _KINDS[number % len(_KINDS)]
        if kind == "settle" and self._refined is not None:
            # By small moves, with the symmetry and without it.
            refined = self._refined if number % (2 * len(_KINDS)) < len(_KINDS) else self._plain()
            self._settle(_refine(disturbed(refined, self.plan.starts, self.generator, scale=1e-3), self.plan))
            return
        symmetry, orbits, first = self._starts(kind)
        levels = list(_sharpnesses(first, self.plan))
        numbers = torch.arange(len(first), device="cpu")
        for level, sharpness in enumerate(levels):
            (orbits,) = anneal(orbits, [sharpness[: len(numbers)]], self.plan.iterations)
            last = level == len(levels) - 1
            if self.points is None or last:
                cosines = largest_cosines(orbits)
                if float(cosines.min()) < self.cosine:
                    self.cosine, self.points = float(cosines.min()), orbits.points()[cosines.argmin()]
            if len(numbers) > self.plan.starts and level % 2:
                # Orbits are cheap: more of them begin than are worth going on with.
                best = soft_maxima(orbits, sharpness[: len(numbers)]).argsort()[
                    : max(self.plan.starts, len(numbers) // 3)
                ]
                numbers, orbits = numbers[best], orbits.choose(best)
            yield (level + 1) / (len(levels) + 1)
        soft = soft_maxima(orbits, levels[-1][: len(numbers)])
        if symmetry is not None:
            self._remember(symmetry.of(int(numbers[soft.argmin()]) % len(symmetry.representations)), float(soft.min()))
        candidates = _worth_refining(soft, self._known_soft)
        self._known_soft += candidates.soft
        self.agreeing += candidates.agreeing
        if candidates.soft:
            self._settle(_refine(orbits.choose(candidates.starts), self.plan))

    def _remember(self, symmetry: Symmetry, soft: float) -> None:
        """The few symmetries that have come furthest."""
        self._symmetries[symmetry] = min(soft, self._symmetries.get(symmetry, math.inf))
        best = sorted(self._symmetries.items(), key=lambda item: item[1])
        self._symmetries = dict(best[:_SYMMETRIES])

    def _plain(self) -> Orbits:
        assert self._refined is not None
        return without_symmetry(self._refined.points())

    def _starts(self, kind: str) -> tuple[Symmetry | None, Orbits, Tensor]:
        """The starts of a round, their symmetry, and the sharpness to begin with for each of them.

        Low values suit very regular codes (24 points in 4 dimensions), high values those in which the points are not all
        alike (13 points in 3 dimensions).
        """
        batch, generator = self.plan.starts, self.generator
        spread = torch.rand(batch, generator=generator, dtype=torch.float64, device="cpu")
        if kind == "subsets" and self.larger is not None and len(self.larger) > self.num_points:
            return None, subsets(self.larger, self.num_points, batch, generator), 20.0 * 10.0**spread
        if kind in ("disturbed", "broken") and self._refined is not None:
            refined = self._refined if kind == "disturbed" else self._plain()
            return None, disturbed(refined, batch, generator), 30.0 * 10.0**spread
        symmetry = None
        if kind == "again" and self._symmetries:
            known = list(self._symmetries)
            symmetry = known[int(torch.randint(len(known), (), generator=generator, device="cpu"))]
        elif kind != "random":
            symmetry = random_symmetry(self.num_points, self.dimension, batch, generator, self.groups)
        if symmetry is None:
            orbits = random_starts(self.num_points, self.dimension, batch, generator)
            return None, orbits, 4.0 * (30.0 if self.dimension <= 4 else 8.0) ** spread
        order = named_group(symmetry.group).order
        # As many as cost about what `batch` cost without a symmetry, their matrices included.
        batch = max(1, min(batch * order, _MOST_STARTS, _MOST_NUMBERS // (order * self.dimension**2)))
        return symmetry, symmetric_starts(symmetry, batch, generator), 4.0 * 10.0 ** spread[:1].expand(batch)

    def _settle(self, refined: Orbits) -> None:
        """Take the best of the refined arrangements, if it is the best of all, and solve its contact equations."""
        cosines = largest_cosines(refined)
        lowest = cosines.argmin().reshape(1)
        cosine = float(cosines[lowest])
        if abs(cosine - self._refined_cosine) < _UNSETTLED:
            self.agreeing += 1
        if cosine >= min(self._refined_cosine, self.cosine + _UNSETTLED):
            return
        self._refined_cosine, self._refined = cosine, refined.choose(lowest)
        points = solve_contacts(self._refined.points()[0])
        cosine = largest_cosine(points)
        if cosine < self.cosine - _AGREEMENT:
            self.agreeing = 0
        if cosine < self.cosine:
            self.cosine, self.points = cosine, points

    def descend_patiently(self, *, while_it_helps: bool) -> Iterator[None]:
        """The best so far once more, by many small steps, once or as often as it helps. Yields on the way."""
        assert self.points is not None
        levels = [torch.full((1,), sharpness, dtype=torch.float64, device="cpu") for sharpness in _PATIENT_SHARPNESSES]
        while self._patient is not self.points and self.points.numel() <= _MOST_PATIENT:
            for orbits in anneal(without_symmetry(self.points), levels, _PATIENCE * self.plan.iterations):  # noqa: B007
                yield
            points, before = solve_contacts(orbits.points()[0]), self.cosine
            cosine = largest_cosine(points)
            if cosine < before:
                self.cosine, self.points = cosine, points
            if not while_it_helps or self.cosine > before - _HELPED:
                self._patient = self.points


def _sharpnesses(first: Tensor, plan: SearchPlan) -> Iterator[Tensor]:
    """From the first values to the coarse one, by equal factors for each start."""
    count = math.ceil(math.log(_COARSE_SHARPNESS / float(first.min())) / math.log(plan.sharpness_step))
    for level in range(count + 1):
        yield first * (_COARSE_SHARPNESS / first) ** (level / count)


class _Candidates(NamedTuple):
    starts: Tensor  # their numbers, best first
    soft: list[float]
    agreeing: bool  # one of the round's starts came to the best arrangement known


def _worth_refining(soft: Tensor, known: list[float]) -> _Candidates:
    """The starts of a round that may beat the best: not much worse now, and not an arrangement that was refined already."""
    starts: list[int] = []
    values: list[float] = []
    agreeing = False
    for start in soft.argsort().tolist():
        value = float(soft[start])
        if len(starts) == _REFINED_PER_ROUND or (known and value > min(known) + _HOPELESS):
            break
        agreeing |= bool(known) and abs(value - min(known)) < _SAME_SOFT
        if all(abs(value - other) >= _SAME_SOFT for other in (*known, *values)):
            starts.append(start)
            values.append(value)
    return _Candidates(torch.tensor(starts, dtype=torch.int64, device="cpu"), values, agreeing)


def _refine(orbits: Orbits, plan: SearchPlan) -> Orbits:
    count = math.ceil(math.log(_LAST_SHARPNESS / _COARSE_SHARPNESS) / math.log(4.0))
    shape = orbits.vectors.shape[:1]
    levels = [
        torch.full(shape, _COARSE_SHARPNESS * 4.0**k, dtype=torch.float64, device="cpu") for k in range(1, count + 1)
    ]
    for refined in anneal(orbits, levels, 2 * plan.iterations):
        orbits = refined
    return orbits
