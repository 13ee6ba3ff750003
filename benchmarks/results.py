"""The results of a run: in memory, as JSON with one row a line, and as CSV."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .roof import PASSES

FORMAT = 1
Row = dict[str, Any]


@dataclass
class Results:
    """``rows``: one for each contestant on each problem, for ordinary calls (mode "call") and out of CUDA graphs ("graph").

    ``left_out``: (sweep, problem, contestant) without one, and why.
    """

    machine: dict[str, Any]
    rates: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    left_out: list[Row] = field(default_factory=list)
    exchange: list[Row] = field(default_factory=list)
    training_step: Row = field(default_factory=dict)

    def leave_out(self, sweep: str, name: str, contestant: str, reason: str) -> None:
        self.left_out.append({"sweep": sweep, "name": name, "contestant": contestant, "reason": reason})

    def find(self, sweep: str, name: str, contestant: str, mode: str = "call") -> Row | None:
        wanted = (sweep, name, contestant, mode)
        return next((r for r in self.rows if (r["sweep"], r["name"], r["contestant"], r["mode"]) == wanted), None)

    def write(self, path: Path) -> None:
        """``path``, and beside it a .csv: the machine in comments (#), then a line for each pass of each row."""
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = [f'"format": {FORMAT}']
        for name in ("machine", "rates", "method", "training_step"):
            parts.append(f'"{name}": {json.dumps(getattr(self, name), indent=1)}')
        for name in ("rows", "left_out", "exchange"):
            lines = ",\n".join(json.dumps(_rounded(row)) for row in getattr(self, name))
            parts.append(f'"{name}": [\n{lines}\n]')
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
        self._write_csv(path.with_suffix(".csv"))

    def _write_csv(self, path: Path) -> None:
        lines = []
        for row in self.rows:
            common = {key: value for key, value in _rounded(row).items() if key not in PASSES}
            common["shape"] = "x".join(map(str, row["shape"]))
            lines += [{**common, "pass": which, **_rounded(row)[which]} for which in PASSES]
        columns = list(dict.fromkeys(key for line in lines for key in line))
        with path.open("w", newline="") as file:
            for name in ("cpu", "cpu_flags", "cores", "threads", "torch", "commit", "device", "date"):
                value = self.machine[name]
                file.write(f"# {name}: {' '.join(value) if isinstance(value, list) else value}\n")
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(lines)

    @staticmethod
    def read(path: Path) -> Results:
        """Raises ValueError for a file of another format."""
        values = json.loads(path.read_text())
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"{path} was not written by this version of the suite")
        return Results(**values)


def _rounded(value: Any) -> Any:
    """Floats to four digits, which is more than any of them is worth."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
