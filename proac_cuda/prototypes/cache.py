"""Optimised arrangements of prototypes, kept in the user's cache folder: a search takes seconds to minutes.

Nothing here can fail: a file that is missing, damaged or not ours is as good as none, and a folder that cannot be written to
costs one warning.
"""

from __future__ import annotations

import hashlib
import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

_warned_folders: set[str] = set()


def cache_folder() -> Path:
    """$PROAC_CACHE, else proac_cuda in $XDG_CACHE_HOME, else ~/.cache/proac_cuda. RuntimeError if there is no home."""
    own = os.environ.get("PROAC_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "proac_cuda"


def read_code(num_points: int, dimension: int, version: int) -> Tensor | None:
    """The (K, D) float64 arrangement stored for this version of the search, or None."""
    try:
        with numpy.load(_file(num_points, dimension, version), allow_pickle=False) as archive:
            points, digest = archive["points"], str(archive["digest"])
        if points.shape != (num_points, dimension) or points.dtype != numpy.float64:
            return None
        if digest != _digest(points, version):
            return None
        return torch.from_numpy(points)
    except Exception:  # a damaged archive raises errors of many kinds, and each of them means: search again
        return None


def write_code(points: Tensor, version: int) -> None:
    """Store a (K, D) float64 arrangement; warns once per folder if that is impossible."""
    array = points.numpy()
    folder = "the user's cache folder"  # its name, once it is known
    try:
        file = _file(points.shape[0], points.shape[1], version)
        folder = str(file.parent)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda stream: numpy.savez(stream, points=array, digest=_digest(array, version)))
    except (OSError, RuntimeError) as error:
        if folder not in _warned_folders:
            _warned_folders.add(folder)
            warnings.warn(
                f"optimised prototypes cannot be kept in {folder} ({error}); the next process will search again; "
                "set PROAC_CACHE to a folder that can be written to",
                stacklevel=3,
            )


def write_atomically(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside `file`, then rename: readers and an interrupted process see the old file or the new one, never a part."""
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(unfinished, "xb") as stream:
            write(stream)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def _file(num_points: int, dimension: int, version: int) -> Path:
    return cache_folder() / f"spherical-code-{num_points}-{dimension}-v{version}.npz"


def _digest(points: NDArray[Any], version: int) -> str:
    text = f"proac_cuda spherical code, version {version}, shape {points.shape}".encode()
    return hashlib.sha256(text + numpy.ascontiguousarray(points).tobytes()).hexdigest()
