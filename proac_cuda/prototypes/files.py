"""Files of prototypes: read wherever they were saved, written complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from .cache import write_atomically

PROTOTYPE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_TORCH_SUFFIXES = (".pth", ".pt")
_SUFFIXES = (*_TORCH_SUFFIXES, ".npy")


def load_prototypes(path: str | os.PathLike[str]) -> Tensor:
    """Read prototypes from a file, wherever they were saved.

    Args:
        path: a `.pth` or `.pt` file holding a tensor or Parameter (saved on any device), a state_dict with the key "prototypes"
            or one key ending in ".prototypes", or a dict holding exactly one tensor that can be prototypes; or a `.npy` file.
            Accepted shapes: (K, D), and (K, 1, D) and (1, K, D), which lose the axis of length 1.

    Returns:
        (K, D) tensor on the CPU, detached, not normalised; float64 if stored so, else float32.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else; the message names the path, what was found and what was expected.
    """
    path = _prototype_path(path)
    try:
        if path.suffix == ".npy":
            array = numpy.load(path, allow_pickle=False)
            found: Any = torch.from_numpy(
                array.astype(array.dtype.newbyteorder("="))
            )  # torch knows one byte order only
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load and numpy raise errors of many kinds for a damaged file
        raise ValueError(
            f"{path}: cannot be read as prototypes ({type(error).__name__}: {error}); expected a tensor saved by "
            f"torch.save (.pth, .pt) or an array saved by numpy.save (.npy)"
        ) from error
    if isinstance(found, Mapping):
        found = _prototypes_in_mapping(path, found)
    if not isinstance(found, Tensor):
        raise ValueError(f"{path}: found a {type(found).__name__}, expected a (K, D) tensor or a dict holding one")
    return _as_prototypes(str(path), found)


def save_prototypes(path: str | os.PathLike[str], prototypes: Tensor) -> None:
    """Write prototypes so that `load_prototypes` gives them back; the file appears complete or not at all.

    Args:
        path: ends in `.pth` or `.pt` (torch.save) or in `.npy` (numpy.save).
        prototypes: (K, D) floating-point tensor of any device; float64 is kept, other dtypes become float32.

    Raises:
        TypeError, ValueError: bad arguments. OSError: the file cannot be written.
    """
    path = _prototype_path(path)
    if not isinstance(prototypes, Tensor):
        raise TypeError(f"prototypes: got {type(prototypes).__name__}, expected a torch.Tensor")
    values = _as_prototypes("prototypes", prototypes)
    if path.suffix == ".npy":
        write_atomically(path, lambda stream: numpy.save(stream, values.numpy(), allow_pickle=False))
    else:
        write_atomically(path, lambda stream: torch.save(values, stream))


def _prototype_path(path: str | os.PathLike[str]) -> Path:
    result = Path(path)
    if result.suffix not in _SUFFIXES:
        raise ValueError(f"{result}: found the suffix {result.suffix!r}, expected one of {', '.join(_SUFFIXES)}")
    return result


def _prototypes_in_mapping(path: Path, mapping: Mapping[Any, Any]) -> Any:
    if "prototypes" in mapping:
        return mapping["prototypes"]
    endings = [key for key in mapping if isinstance(key, str) and key.endswith(".prototypes")]
    if len(endings) == 1:
        return mapping[endings[0]]
    matrices = [value for value in mapping.values() if isinstance(value, Tensor) and _squeezed(value) is not None]
    if len(matrices) == 1 and not endings:
        return matrices[0]
    listed = ", ".join(map(str, list(mapping)[:8])) + (", ..." if len(mapping) > 8 else "")
    raise ValueError(
        f"{path}: found a dict with {len(matrices)} tensors that can be prototypes and the keys [{listed}], "
        "expected exactly one, or the key 'prototypes', or one key that ends in '.prototypes'"
    )


def _squeezed(tensor: Tensor) -> Tensor | None:
    """The tensor as (K, D), or None where its shape leaves no doubt that it is not, or some doubt which axis is which."""
    if tensor.ndim == 3 and 1 in tensor.shape[:2]:
        tensor = tensor.squeeze(1) if tensor.shape[1] == 1 else tensor.squeeze(0)
    return tensor if tensor.ndim == 2 and 0 not in tensor.shape else None


def _as_prototypes(source: str, tensor: Tensor) -> Tensor:
    """The tensor as a (K, D) float32 or float64 copy on the CPU; errors begin with `source`."""
    matrix = _squeezed(tensor)
    if matrix is None:
        raise ValueError(
            f"{source}: found shape {tuple(tensor.shape)}, expected (K, D), (K, 1, D) or (1, K, D) without empty axes"
        )
    if matrix.dtype not in PROTOTYPE_DTYPES or matrix.layout != torch.strided:
        raise ValueError(
            f"{source}: found a {matrix.layout} tensor of {matrix.dtype}, expected a dense one of "
            f"{', '.join(map(str, PROTOTYPE_DTYPES))}"
        )
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    # A copy: a view would keep, and save, the whole storage that it looks at.
    values = matrix.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{source}: found NaN or infinity, expected finite values")
    return values
