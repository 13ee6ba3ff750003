"""The cache of searched arrangements."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from proac_cuda.prototypes import cache, uniform, uniform_prototypes
from prototype_checks import QUICK_D, QUICK_K, cached_files, same_bits


def forbid_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(uniform, "search", fail)


@pytest.mark.usefixtures("short_searches")
def test_one_search_serves_all_seeds(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = uniform_prototypes(QUICK_K, QUICK_D)
    assert len(cached_files(fresh_cache)) == 1  # and no unfinished file beside it
    forbid_search(monkeypatch)
    monkeypatch.setattr(uniform, "_known_codes", {})
    assert same_bits(uniform_prototypes(QUICK_K, QUICK_D), first)
    uniform_prototypes(QUICK_K, QUICK_D, seed=9)


def test_closed_forms_write_nothing(fresh_cache: Path) -> None:
    for num_classes, dimension in ((1, 4), (5, 4), (8, 4), (9, 2)):
        uniform_prototypes(num_classes, dimension)
    assert cached_files(fresh_cache) == []


def damage_truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_other_code(file: Path) -> None:
    """A well-formed archive with other unit rows."""
    rows = torch.eye(QUICK_D, dtype=torch.float64).repeat(4, 1)[:QUICK_K].numpy()
    numpy.savez(file, points=rows, digest="0" * 64)


def damage_shape(file: Path) -> None:
    numpy.savez(file, points=numpy.zeros((2, 2)), digest="")


def damage_pickle(file: Path) -> None:
    numpy.savez(file, points=numpy.array([{}], dtype=object), digest="")


@pytest.mark.usefixtures("short_searches")
@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_other_code, damage_shape, damage_pickle])
def test_damaged_cache_files_are_replaced(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, damage) -> None:
    first = uniform_prototypes(QUICK_K, QUICK_D)
    (file,) = cached_files(fresh_cache)
    damage(file)
    damaged = file.read_bytes()
    monkeypatch.setattr(uniform, "_known_codes", {})
    assert same_bits(uniform_prototypes(QUICK_K, QUICK_D), first)
    assert file.read_bytes() != damaged
    forbid_search(monkeypatch)
    monkeypatch.setattr(uniform, "_known_codes", {})
    assert same_bits(uniform_prototypes(QUICK_K, QUICK_D), first)


@pytest.mark.usefixtures("short_searches")
def test_a_folder_that_cannot_be_used_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")  # unlike permissions, this also stops the superuser
    monkeypatch.setenv("PROAC_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="PROAC_CACHE") as caught:
        first = uniform_prototypes(QUICK_K, QUICK_D)
        uniform._known_codes.clear()
        second = uniform_prototypes(QUICK_K, QUICK_D)
    assert len(caught) == 1
    assert same_bits(first, second)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(stream: object) -> None:
        raise OSError("disk full")

    (tmp_path / "kept").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        cache.write_atomically(tmp_path / "kept", fail)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROAC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "proac_cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "proac_cuda"
