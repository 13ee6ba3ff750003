"""Made once for all processes of a test run: who comes second waits, and finds what the first has made."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Where compiled things are kept; PROAC_TEST_CACHE names another place."""
    folder = Path(os.environ.get("PROAC_TEST_CACHE", Path(tempfile.gettempdir()) / name))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def once(target: Path, make: Callable[[Path], object]) -> Path:
    """``target``, which ``make`` writes where it is missing; never a half of it, whoever is stopped."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = target.with_suffix(".part")
            make(part)
            part.replace(target)
    return target


def make_once(target: Path, *command: str | Path) -> Path:
    """``target``, which ``command`` with ``-o`` makes where it is missing."""
    return once(target, lambda part: subprocess.run([*command, "-o", part], check=True))
