"""Compiled once for all processes of a test run: who comes second waits, and finds what the first has made."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Where compiled things are kept; PROAC_TEST_CACHE names another place."""
    folder = Path(os.environ.get("PROAC_TEST_CACHE", Path(tempfile.gettempdir()) / name))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Inside, no other process makes ``target``."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
