"""Means over seeds, and paired differences with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with what it takes to judge it; all in the unit of the values."""

    mean: float  # NaN for no seed
    deviation: float  # standard deviation from seed to seed; NaN for one seed
    half_width: float  # of the 95 % interval; infinite for one seed
    count: int

    @property
    def verdict(self) -> str:
        """Of a difference: what can be said about its sign."""
        if self.count < 2:
            return "one seed, no interval" if self.count else ""
        if abs(self.mean) <= self.half_width:
            return "no measurable difference"
        return "higher" if self.mean > 0 else "lower"

    def value(self, digits: int = 1) -> str:
        """The mean alone."""
        return f"{self.mean:.{digits}f}" if self.count else "-"

    def spread(self, digits: int = 1) -> str:
        """The mean, and the deviation of several seeds."""
        return self.value(digits) + (f" +- {self.deviation:.{digits}f}" if self.count > 1 else "")

    def interval(self, digits: int = 1, sign: str = "+-") -> str:
        """Of a difference: its value with its sign, and the half width of several seeds."""
        if self.count == 0:
            return "-"
        return f"{self.mean:+.{digits}f}" + (f" {sign} {self.half_width:.{digits}f}" if self.count > 1 else "")


def estimate(values: Iterable[float]) -> Estimate:
    """Mean, deviation and t-interval of the values that are not NaN."""
    known = [value for value in values if not math.isnan(value)]
    count = len(known)
    if count < 2:
        return Estimate(known[0] if known else math.nan, math.nan, math.inf, count)
    deviation = stdev(known)
    quantile = float(student_t.ppf(0.975, count - 1))
    return Estimate(mean(known), deviation, quantile * deviation / math.sqrt(count), count)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Of values minus baseline, over the seeds that both have; a pandas Series is such a mapping too."""
    seeds = sorted(set(values.keys()) & set(baseline.keys()))
    return estimate(values[seed] - baseline[seed] for seed in seeds)
