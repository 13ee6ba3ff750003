"""Uniform class prototypes: K unit vectors in R^D whose largest pairwise cosine is as small as possible."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from .bounds import best_lower_bound
from .cache import read_code, write_atomically, write_code
from .search import ALGORITHM_VERSION
from .descent import largest_cosine
from ..validation import as_int, as_seed

PROTOTYPE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_TORCH_SUFFIXES = (".pth", ".pt")
_SUFFIXES = (*_TORCH_SUFFIXES, ".npy")

# Arrangements that this process has searched for already: a second module costs nothing even where no cache folder can be used.
_known_codes: dict[tuple[int, int], Tensor] = {}


class PrototypeCertificate(NamedTuple):
    """How good an arrangement is: what it reaches beside what no arrangement of K unit vectors in R^D can beat."""

    largest_cosine: float
    lower_bound: float
    bound: str
    gap: float


def uniform_prototypes(
    num_classes: int,
    embedding_dim: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """Unit vectors whose largest pairwise cosine is as small as possible, randomly rotated.

    K = num_classes, D = embedding_dim:

    - K <= D + 1: the regular simplex, every cosine -1 / (K - 1). Closed form, optimal.
    - D + 1 < K <= 2D: orthogonal antipodal pairs, and one vector more for odd K; largest cosine 0. Closed form, optimal.
    - D = 2: equally spaced on the circle. Closed form, optimal.
    - other K > 2D: found by numerical search, in seconds to minutes (progress is shown on a terminal). The result is kept in
      $PROAC_CACHE, else $XDG_CACHE_HOME/proac_cuda, else ~/.cache/proac_cuda. `prototype_certificate` says how good it is.

    Source: R. A. Rankin, The closest packing of spherical caps in n dimensions, 1955, for the first two cases.

    Everything is computed in float64 on the CPU with one thread and cast last: on one machine and one version of PyTorch the
    same arguments give the same bits, whatever the number of threads and the state of the global random generators (which
    stay untouched). Other processors or versions may round differently, which a search may amplify into another, equally good
    arrangement; save the prototypes to carry them between machines. The seed chooses the rotation (a random orthogonal
    matrix) only. While the prototypes are computed torch.set_num_threads(1) holds for the whole process.

    Args:
        num_classes: K >= 1; at most 2 if embedding_dim is 1.
        embedding_dim: D >= 1.
        seed: any integer that a torch.Generator takes.
        dtype: torch.float16, torch.bfloat16, torch.float32 or torch.float64.
        device: where the result lies; the CPU by default.

    Returns:
        (K, D) tensor with unit rows.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.
    """
    num_classes = as_int("num_classes", num_classes, minimum=1)
    embedding_dim = as_int("embedding_dim", embedding_dim, minimum=1)
    seed = as_seed(seed)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {dtype!r}, expected a torch.dtype")
    if dtype not in PROTOTYPE_DTYPES:
        raise TypeError(f"dtype: got {dtype}, expected one of {', '.join(map(str, PROTOTYPE_DTYPES))}")
    if embedding_dim == 1 and num_classes > 2:
        raise ValueError(
            f"num_classes: got {num_classes} with embedding_dim=1, expected at most 2: R^1 has only two unit vectors"
        )
    with _one_thread(), torch.no_grad():
        arrangement = _arrangement(num_classes, embedding_dim)
        frame = _random_frame(arrangement.shape[1], embedding_dim, seed)
        prototypes = arrangement @ frame
        prototypes /= prototypes.norm(dim=1, keepdim=True)
    return prototypes.to(dtype=dtype, device=torch.device("cpu") if device is None else device)


def prototype_certificate(prototypes: Tensor) -> PrototypeCertificate:
    """The largest cosine between two prototypes beside the best lower bound known for their number and dimension.

    Args:
        prototypes: (K, D) floating-point tensor of any device; rows need not be unit vectors, but must be finite and not 0.

    Returns:
        `PrototypeCertificate(largest_cosine, lower_bound, bound, gap)`, computed in float64. `bound` names the bound:
        "simplex", "Rankin", "circle", "Fejes Toth", "Levenshtein" or "pigeonhole". `gap` is the difference; 0 up to rounding
        (which may make it slightly negative) proves the arrangement optimal. A bound need not be reachable, so a positive gap
        does not prove the opposite. With one prototype there is no pair: largest cosine and bound are then -1, the smallest
        cosine there is, the gap is 0 and `bound` is "no pair".

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not of rank 2, empty, not finite, or a row of zeros.
    """
    if not isinstance(prototypes, Tensor):
        raise TypeError(f"prototypes: got {type(prototypes).__name__}, expected a torch.Tensor")
    if not prototypes.is_floating_point():
        raise TypeError(f"prototypes: got dtype {prototypes.dtype}, expected a real floating-point dtype")
    if prototypes.ndim != 2 or 0 in prototypes.shape:
        raise ValueError(f"prototypes: got shape {tuple(prototypes.shape)}, expected (K, D) with K >= 1 and D >= 1")
    rows = prototypes.detach().to(device="cpu", dtype=torch.float64)
    if not bool(rows.isfinite().all()):
        raise ValueError("prototypes: got NaN or infinity, expected finite values")
    # Dividing by the largest element first keeps the norm of tiny and of huge rows within range.
    largest = rows.abs().amax(dim=1, keepdim=True)
    if not bool((largest > 0).all()):
        raise ValueError(f"prototypes: row {int(largest.argmin())} is zero, expected rows that have a direction")
    num_classes, embedding_dim = rows.shape
    if num_classes == 1:
        return PrototypeCertificate(-1.0, -1.0, "no pair", 0.0)
    rows = rows / largest
    reached = largest_cosine(rows / rows.norm(dim=1, keepdim=True))
    bound, name = best_lower_bound(num_classes, embedding_dim)
    return PrototypeCertificate(reached, bound, name, reached - bound)


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


@contextmanager
def _one_thread() -> Iterator[None]:
    """The number of threads decides the order of sums, and with it the last bits of a matrix product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _arrangement(num_classes: int, embedding_dim: int) -> Tensor:
    """(K, R) float64 unit rows, R <= D: the arrangement before it is rotated into R^D."""
    if num_classes == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    if num_classes <= embedding_dim + 1:
        return _simplex(num_classes)
    if num_classes <= 2 * embedding_dim:
        return _antipodal_pairs(num_classes)
    if embedding_dim == 2:
        return _circle(num_classes)
    return _optimised(num_classes, embedding_dim)


def _simplex(num_classes: int) -> Tensor:
    """(K, K - 1): the basis vectors of R^K less their mean, in coordinates of the hyperplane in which they lie.

    The coordinates are those of Helmert's basis: its vector j is (1, ..., 1, -j, 0, ..., 0) / sqrt(j (j + 1)), j ones.
    """
    rank = num_classes - 1
    j = torch.arange(1, num_classes, dtype=torch.float64, device="cpu")
    basis = torch.ones(num_classes, rank, dtype=torch.float64, device="cpu").triu()
    basis[torch.arange(1, num_classes, device="cpu"), torch.arange(rank, device="cpu")] = -j
    return basis / (j * (j + 1)).sqrt() * math.sqrt(num_classes / rank)


def _antipodal_pairs(num_classes: int) -> Tensor:
    """(K, ceil(K / 2)): classes 2i and 2i + 1 are +e_i and -e_i; every other pair is orthogonal.

    Of all subsets of the cross-polytope with K vectors this one has the most antipodal pairs. It treats the classes alike
    (but for the last one, if K is odd), and its sum is zero (likewise).
    """
    rank = (num_classes + 1) // 2
    axes = torch.eye(rank, dtype=torch.float64, device="cpu")
    return torch.stack([axes, -axes], dim=1).reshape(2 * rank, rank)[:num_classes]


def _circle(num_classes: int) -> Tensor:
    angles = torch.arange(num_classes, dtype=torch.float64, device="cpu") * (2 * math.pi / num_classes)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def _optimised(num_classes: int, embedding_dim: int) -> Tensor:
    """(K, D): from this process, the cache folder, or a search."""
    key = (num_classes, embedding_dim)
    if key not in _known_codes:
        points = read_code(num_classes, embedding_dim, ALGORITHM_VERSION)
        if points is None:
            lower_bound, _ = best_lower_bound(num_classes, embedding_dim)
            with _progress(f"arranging {num_classes} prototypes in {embedding_dim} dimensions") as report:
                points = find_spherical_code(num_classes, embedding_dim, lower_bound=lower_bound, on_progress=report)
            write_code(points, ALGORITHM_VERSION)
        _known_codes[key] = points
    return _known_codes[key]


@contextmanager
def _progress(title: str) -> Iterator[Callable[[float], None]]:
    """One line on stderr, rewritten in place; only on a terminal, and only once two seconds have passed."""
    began = time.monotonic()
    terminal = sys.stderr is not None and sys.stderr.isatty()
    shown = False

    def report(fraction: float) -> None:
        nonlocal shown
        if terminal and time.monotonic() - began > 2.0:
            sys.stderr.write(f"\r{title}: {fraction:4.0%}")
            sys.stderr.flush()
            shown = True

    try:
        yield report
    finally:
        if shown:
            sys.stderr.write("\n")


def _random_frame(rank: int, dimension: int, seed: int) -> Tensor:
    """(rank, dimension) float64 with orthonormal rows, uniformly distributed over all such frames.

    The Q of a Gaussian matrix is uniform once the signs, which a QR leaves to chance, are fixed so that R has a positive
    diagonal (F. Mezzadri, How to generate random matrices from the classical compact groups, 2007).
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gaussian = torch.randn(dimension, rank, generator=generator, dtype=torch.float64, device="cpu")
    orthonormal, triangular = torch.linalg.qr(gaussian)
    signs = 1.0 - 2.0 * (triangular.diagonal() < 0).to(torch.float64)
    frame: Tensor = (orthonormal * signs).T
    return frame


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
