"""Uniform class prototypes: K unit vectors in R^D whose largest pairwise cosine is as small as possible."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..stages.validation import as_int, as_seed
from .arrangements import arrangement
from .bounds import best_lower_bound
from .cache import cache_folder, read_code, write_code
from .files import PROTOTYPE_DTYPES
from .groups import named_group
from .known import known_arrangement, larger_arrangement, shipped_arrangement
from .search import ALGORITHM_VERSION, Found, search, search_plan
from .starts import GROUPS

# Arrangements that this process has searched for already: a second module costs nothing even where no cache folder can be used.
_known_codes: dict[tuple[int, int], Tensor] = {}

# Without a terminal progress is a line now and then.
_SECONDS_BETWEEN_LINES = 15.0


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
    - other K > 2D: an arrangement of known mathematics (root systems, eigenspaces of strongly regular graphs, parts of the
      Leech lattice), coordinates that come with this package, or part of either, where that is the best known;
    - else found by numerical search, in at most two minutes of one core for K <= 300 (progress goes to stderr). The result is
      kept in $PROAC_CACHE, else $XDG_CACHE_HOME/proac_cuda, else ~/.cache/proac_cuda. `prototype_certificate` says how good
      it is; `python -m proac_cuda prototypes K D --seconds 600` searches longer.

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
    num_classes, embedding_dim, seed = _checked(num_classes, embedding_dim, seed)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {dtype!r}, expected a torch.dtype")
    if dtype not in PROTOTYPE_DTYPES:
        raise TypeError(f"dtype: got {dtype}, expected one of {', '.join(map(str, PROTOTYPE_DTYPES))}")
    with _one_thread(), torch.no_grad():
        prototypes = _rotated(_arrangement(num_classes, embedding_dim), embedding_dim, seed)
    return prototypes.to(dtype=dtype, device=torch.device("cpu") if device is None else device)


def search_prototypes(
    num_classes: int, embedding_dim: int, seconds: float, *, seed: int = 0, groups: Sequence[str] = GROUPS
) -> Tensor:
    """Prototypes from a search that goes on for so many seconds; Ctrl-C ends it, and keeps the best so far.

    It begins where `uniform_prototypes` does: with the arrangement that comes with this package or a larger one's subset, and
    with the same starts. Where a closed form is known to be optimal it is returned at once. Progress goes to stderr.

    Args:
        num_classes, embedding_dim, seed: as in `uniform_prototypes`.
        seconds: > 0, on the clock. A run that is given more finds the same or better.
        groups: the symmetries that starts may have, such as Z12, D6, A5, He3 or Z2xS3. To try few of them goes deeper.

    Returns:
        (K, D) float64 tensor on the CPU with unit rows, for `save_prototypes` and `prototypes=`.
    """
    num_classes, embedding_dim, seed = _checked(num_classes, embedding_dim, seed)
    if not seconds > 0:
        raise ValueError(f"seconds: got {seconds}, expected more than 0")
    with _one_thread(), torch.no_grad():
        for name in groups:
            named_group(name)  # raises ValueError; kept, hence made with one thread as well
        named = arrangement(num_classes, embedding_dim)
        if named is not None:
            return _rotated(named.make(), embedding_dim, seed)
        first = shipped_arrangement(num_classes, embedding_dim)
        larger = _larger(num_classes, embedding_dim) if first is None else first
        points = None if larger is None else larger[:num_classes]
        deadline = time.monotonic() + seconds
        title = (
            f"proac_cuda: searching for {num_classes} prototypes in {embedding_dim} dimensions for {_duration(seconds)}; "
            "Ctrl-C ends the search and keeps the best so far"
        )
        bound, _ = best_lower_bound(num_classes, embedding_dim)
        with progress(title) as report:
            try:
                for found in search(
                    num_classes, embedding_dim, lower_bound=bound, larger=larger, endless=True, groups=groups
                ):
                    points = found.points
                    report(found)
                    if time.monotonic() >= deadline:
                        break
            except KeyboardInterrupt:
                if points is None:
                    raise
        assert points is not None
        return _rotated(points, embedding_dim, seed)


def _checked(num_classes: int, embedding_dim: int, seed: int) -> tuple[int, int, int]:
    num_classes = as_int("num_classes", num_classes, minimum=1)
    embedding_dim = as_int("embedding_dim", embedding_dim, minimum=1)
    if embedding_dim == 1 and num_classes > 2:
        raise ValueError(
            f"num_classes: got {num_classes} with embedding_dim=1, expected at most 2: R^1 has only two unit vectors"
        )
    return num_classes, embedding_dim, as_seed(seed)


def _rotated(arrangement: Tensor, embedding_dim: int, seed: int) -> Tensor:
    prototypes: Tensor = arrangement @ _random_frame(arrangement.shape[1], embedding_dim, seed)
    prototypes /= prototypes.norm(dim=1, keepdim=True)
    return prototypes


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
    known = known_arrangement(num_classes, embedding_dim)
    return _searched(num_classes, embedding_dim) if known is None else known.make()


def _searched(num_classes: int, embedding_dim: int) -> Tensor:
    """(K, D): from this process, the cache folder, or a search."""
    key = (num_classes, embedding_dim)
    if key not in _known_codes:
        points = read_code(num_classes, embedding_dim, ALGORITHM_VERSION)
        if points is None:
            points = _search(num_classes, embedding_dim)
            write_code(points, ALGORITHM_VERSION)
        _known_codes[key] = points
    return _known_codes[key]


def _larger(num_classes: int, embedding_dim: int) -> Tensor | None:
    """A known arrangement of somewhat more vectors, for a search to begin with."""
    known = larger_arrangement(num_classes, embedding_dim)
    return None if known is None else known.make()


def _search(num_classes: int, embedding_dim: int) -> Tensor:
    lower_bound, _ = best_lower_bound(num_classes, embedding_dim)
    larger = _larger(num_classes, embedding_dim)
    seconds = search_plan(num_classes, embedding_dim).seconds
    title = (
        f"proac_cuda: searching for {num_classes} prototypes in {embedding_dim} dimensions (num_classes={num_classes}, "
        f"embedding_dim={embedding_dim}), at most about {_duration(seconds)} of one core, once; the result is kept in "
        f"{_cache_name()}. More than 2 * embedding_dim classes have no closed form: did you swap num_classes and "
        "embedding_dim?"
    )
    with progress(title) as report:
        for found in search(num_classes, embedding_dim, lower_bound=lower_bound, larger=larger):
            report(found)
    return found.points


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def _cache_name() -> str:
    try:
        return str(cache_folder())
    except RuntimeError:
        return "memory (there is no cache folder)"


@contextmanager
def progress(title: str) -> Iterator[Callable[[Found], None]]:
    """The title, then how far a search is and its best, on stderr: one line rewritten in place on a terminal.

    Without a terminal a new line now and then.
    """
    stream = sys.stderr
    began = last = time.monotonic()
    terminal = stream is not None and stream.isatty()
    shown = False
    if stream is not None:
        print(title, file=stream, flush=True)

    def report(found: Found) -> None:
        nonlocal last, shown
        now = time.monotonic()
        if stream is None or now - last < (0.2 if terminal else _SECONDS_BETWEEN_LINES):
            return
        last, shown = now, True
        line = f"proac_cuda: {now - began:.0f} s, {found.fraction:.0%} of the plan, largest cosine {found.cosine:.6f}"
        print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=stream, flush=True)

    try:
        yield report
    finally:
        if terminal and shown:
            print(file=stream, flush=True)


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
