"""What the tests of prototypes share: the table of known codes, and what is asked of rows."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from proac_cuda.prototypes import arrangements, known, search

with open(Path(__file__).parent / "data" / "spherical_codes.csv", newline="") as stream:
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


def gram(rows: torch.Tensor) -> torch.Tensor:
    return rows.double() @ rows.double().T


def off_diagonal(rows: torch.Tensor) -> torch.Tensor:
    return gram(rows)[~torch.eye(len(rows), dtype=torch.bool)]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.numpy().tobytes() == right.numpy().tobytes()


def cached_files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []
