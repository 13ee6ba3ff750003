"""How good prototypes are: what they reach, what nobody has beaten, and what nobody can beat."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import best_lower_bound, linear_programming_bound
from .descent import largest_cosine
from .known import BestKnown, best_known, known_arrangement, larger_arrangement

# Cosines of float32 prototypes are this close to those of the arrangement that they hold.
_SAME = 1e-6


class PrototypeCertificate(NamedTuple):
    """How good an arrangement is: what it reaches, what no K unit vectors in R^D can beat, what is published."""

    largest_cosine: float
    lower_bound: float
    bound: str
    gap: float
    arrangement: str = ""
    best_known: float | None = None
    source: str = ""
    remark: str = ""


def prototype_certificate(prototypes: Tensor) -> PrototypeCertificate:
    """The largest cosine between two prototypes beside the best lower bound known for their number and dimension.

    Args:
        prototypes: (K, D) floating-point tensor of any device; rows need not be unit vectors, but must be finite and not 0.

    Returns:
        `PrototypeCertificate(largest_cosine, lower_bound, bound, gap, arrangement, best_known, source, remark)`, computed in
        float64. `bound` names the bound: "simplex", "Rankin", "circle", "Fejes Toth", "Levenshtein", "Delsarte" (by linear
        programming, which needs scipy: `remark` says where it was not tried) or "pigeonhole". `gap` is the difference of the
        first two; 0 up to rounding (which may make it slightly negative) proves the arrangement optimal. A bound need not be
        reachable, so a positive gap does not prove the opposite. With one prototype there is no pair: largest cosine and bound
        are then -1, the smallest cosine there is, the gap is 0 and `bound` is "no pair".

        `arrangement` names what this is, or what it is part of, as far as its largest cosine tells; "" where that is nothing
        with a name. `best_known`
        is the smallest largest cosine published for K and D, and `source` says where, and whether it is proven to be the
        smallest possible; None and "" where none is known here.

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
        return PrototypeCertificate(-1.0, -1.0, "no pair", 0.0, "one vector")
    rows = rows / largest
    reached = largest_cosine(rows / rows.norm(dim=1, keepdim=True))
    bound, name, remark = _lower_bound(num_classes, embedding_dim)
    known = best_known(num_classes, embedding_dim)
    if known is None and (num_classes <= 2 * embedding_dim or embedding_dim == 2):
        known = BestKnown(bound, True, "R. A. Rankin 1955" if embedding_dim > 2 else "equally spaced on the circle")
    return PrototypeCertificate(
        reached,
        bound,
        name,
        reached - bound,
        _name(num_classes, embedding_dim, reached),
        None if known is None else known.cosine,
        "" if known is None else known.source + (", proven optimal" if known.proven else ""),
        remark,
    )


def _name(num_classes: int, embedding_dim: int, reached: float) -> str:
    """The known arrangement, or one of somewhat more vectors, with this largest cosine."""
    for known in (known_arrangement(num_classes, embedding_dim), larger_arrangement(num_classes, embedding_dim)):
        if known is not None and abs(reached - known.cosine) < _SAME:
            return known.name
    return ""


@lru_cache(maxsize=256)
def _lower_bound(num_classes: int, embedding_dim: int) -> tuple[float, str, str]:
    """The best lower bound, its name, and a remark."""
    bound, name = best_lower_bound(num_classes, embedding_dim)
    if num_classes <= 2 * embedding_dim or embedding_dim <= 2:
        return bound, name, ""
    delsarte = linear_programming_bound(num_classes, embedding_dim)
    if delsarte is None:
        return bound, name, "linear programming not tried: scipy is not installed (pip install proac_cuda[prototypes])"
    return (delsarte, "Delsarte", "") if delsarte > bound else (bound, name, "")
