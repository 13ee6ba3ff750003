"""What got slower, or needs more memory, between two runs, beyond the noise.

    python benchmarks/compare.py old.json new.json [--tolerance 0.05]

Judged are the rows of proac_cuda's backends. A row got slower where the quartiles lie apart, the new lower one above the old
upper one, and the median grew by more than the noise between runs: the tolerance, or what 95 % of the other contestants' rows
moved by, since their code is the same in both runs, or what the floor of the same problem grew by, whichever is most. Rows of
fewer than three calls have no spread and are passed over. Memory of the allocator has no noise: 1 % more is more. Exits with 1
where something got worse, and with 2 where a row of the old run is missing from the new one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

KEY = ("sweep", "name", "contestant", "mode", "dtype")
BACKENDS = ("cpp", "cuda", "triton", "reference")
PASSES = ("forward", "backward", "both")
MEMORY_TOLERANCE = 0.01
LEAST_RUNS = 3  # fewer have no spread to speak of


class Change(NamedTuple):
    row: str
    what: str
    old: float
    new: float

    def __str__(self) -> str:
        return f"{self.row:60s} {self.what:10s} {self.old:12.4g} -> {self.new:12.4g}   {self.new / self.old:.2f}x"


def rows_by_key(results: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    return {tuple(row[name] for name in KEY): row for row in results["rows"]}


def is_own(key: tuple) -> bool:
    return key[KEY.index("contestant")] in BACKENDS


def growth(then: dict[str, Any], now: dict[str, Any], which: str) -> float:
    return now[which]["median_ms"] / then[which]["median_ms"]


def noise(old: dict[str, Any], new: dict[str, Any]) -> float:
    """The factor within which 95 % of the other contestants' medians stayed, in either direction; 1 without any."""
    before, now = rows_by_key(old), rows_by_key(new)
    others = [key for key in now if key in before and not is_own(key)]
    factors = sorted(max(g, 1 / g) for key in others for p in PASSES for g in [growth(before[key], now[key], p)])
    return factors[int(0.95 * (len(factors) - 1))] if factors else 1.0


def changes(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> Iterator[Change]:
    """Every measurement of a backend that moved beyond the noise, in either direction."""
    before, after = rows_by_key(old), rows_by_key(new)
    allowed = max(1 + tolerance, noise(old, new))
    for key, now in after.items():
        if key not in before or not is_own(key):
            continue
        then, name = before[key], ", ".join(key)
        floor = tuple("floor" if field == "contestant" else value for field, value in zip(KEY, key, strict=True))
        for which in PASSES:
            a, b = then[which], now[which]
            if min(a["runs"], b["runs"]) < LEAST_RUNS:
                continue
            drift = growth(before[floor], after[floor], which) if floor in before and floor in after else 1.0
            grown = growth(then, now, which)
            slower = b["lower_ms"] > a["upper_ms"] and grown > max(allowed, drift)
            faster = b["upper_ms"] < a["lower_ms"] and 1 / grown > max(allowed, 1 / drift)
            if slower or faster:
                yield Change(name, f"{which}, ms", a["median_ms"], b["median_ms"])
        a, b = then.get("peak_extra_bytes"), now.get("peak_extra_bytes")
        if a and b and not 1 - MEMORY_TOLERANCE <= b / a <= 1 + MEMORY_TOLERANCE:
            yield Change(name, "bytes", a, b)


def missing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Rows of the old run that the new one lacks."""
    return [", ".join(key) for key in rows_by_key(old).keys() - rows_by_key(new).keys()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="growth of a median that is let pass (%(default)s)"
    )


def main(arguments: argparse.Namespace) -> int:
    old, new = (json.loads(path.read_text()) for path in (arguments.old, arguments.new))
    for what in ("cpu", "cpu_flags", "threads", "torch", "device"):
        if old["machine"].get(what) != new["machine"].get(what):
            print(f"not the same {what}: {old['machine'].get(what)}, {new['machine'].get(what)}")
    print(f"noise between the runs: a factor of {noise(old, new):.2f}, by the other contestants")
    moved = sorted(changes(old, new, arguments.tolerance), key=lambda change: change.old / change.new)
    worse = [change for change in moved if change.new > change.old]
    gone = sorted(missing(old, new))
    for title, lines in (
        ("worse", worse),
        ("better", [change for change in moved if change.new < change.old]),
        ("missing", gone),
    ):
        print(f"\n{len(lines)} {title}")
        for line in lines:
            print(f"  {line}")
    return 1 if worse else 2 if gone else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
