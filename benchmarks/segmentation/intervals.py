"""Means over seeds, and paired differences with their 95 % intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with what it takes to judge it; all in the unit of the values."""

    mean: float
    deviation: float  # standard deviation from seed to seed; NaN for one seed
    half_width: float  # of the 95 % interval; infinite for one seed
    count: int

    @property
    def verdict(self) -> str:
        """Of a difference: what can be said about its sign."""
        if self.count < 2:
            return "one seed, no interval"
        if abs(self.mean) <= self.half_width:
            return "no measurable difference"
        return "higher" if self.mean > 0 else "lower"


def estimate(values: list[float]) -> Estimate:
    """Mean, deviation and t-interval of at least one value."""
    count = len(values)
    if count == 1:
        return Estimate(values[0], math.nan, math.inf, 1)
    deviation = stdev(values)
    quantile = float(student_t.ppf(0.975, count - 1))
    return Estimate(mean(values), deviation, quantile * deviation / math.sqrt(count), count)


def paired(values: dict[int, float], baseline: dict[int, float]) -> Estimate | None:
    """Of values minus baseline, over the seeds that both have; None where there are none."""
    seeds = sorted(values.keys() & baseline.keys())
    return estimate([values[seed] - baseline[seed] for seed in seeds]) if seeds else None
