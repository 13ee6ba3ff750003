"""Fixtures of the tests of prototypes."""

from __future__ import annotations

from pathlib import Path

import pytest

from proac_cuda.prototypes import cache, search, uniform
from prototype_checks import SHORT_PLAN


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
