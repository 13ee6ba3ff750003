"""What got slower, or needs more memory, between two runs, beyond the noise.

    python benchmarks/compare.py old.json new.json [--tolerance 0.05]

A row got slower where the median grew by more than the tolerance and the quartiles lie apart: the new lower one is above the
old upper one; rows of fewer than three calls have no spread and are passed over. Memory of the allocator has no noise: 1 % more
is more. Exits with 1 where something got worse, and with 2 where a row of the old run is missing from the new one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

KEY = ("sweep", "name", "contestant", "mode", "dtype")
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


def changes(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> Iterator[Change]:
    """Every measurement of both runs that moved beyond the noise, in either direction."""
    before = rows_by_key(old)
    for key, now in rows_by_key(new).items():
        if key not in before:
            continue
        then, name = before[key], ", ".join(key)
        for which in ("forward", "backward", "both"):
            a, b = then[which], now[which]
            if min(a["runs"], b["runs"]) < LEAST_RUNS:
                continue
            slower = b["lower_ms"] > a["upper_ms"] and b["median_ms"] > a["median_ms"] * (1 + tolerance)
            faster = b["upper_ms"] < a["lower_ms"] and a["median_ms"] > b["median_ms"] * (1 + tolerance)
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
