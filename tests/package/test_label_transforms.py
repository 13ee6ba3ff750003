"""The table of docs/using/frameworks.md is what scripts/label_transforms.py finds, for packages of the page's versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import label_transforms

PAGE = Path(__file__).parents[2] / "docs" / "using" / "frameworks.md"


def _first(line: str) -> str:
    return line.split("|")[1].strip()


@pytest.mark.slow
@pytest.mark.parametrize("make", label_transforms.ROWS, ids=lambda make: make.__name__.removesuffix("_rows"))
def test_rows_of_the_page(make):
    page = {_first(line): line for line in PAGE.read_text().splitlines() if line.startswith("|")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lines = [label_transforms.line(row) for row in make()]
    except (ModuleNotFoundError, PackageNotFoundError) as error:
        pytest.skip(f"{error}; pip install '.[frameworks]'")
    finally:
        torch.set_num_threads(threads)
    names = {name.rpartition(", ")[0] for name in page}
    assert all(_first(line).rpartition(", ")[0] in names for line in lines), "print the table anew"
    here = [line for line in lines if _first(line) in page]
    if not here:
        pytest.skip(f"another version than the page's: {_first(lines[0])}")
    assert [page[_first(line)] for line in here] == here
