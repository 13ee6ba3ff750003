"""The loss in plain PyTorch, in float64 if you like: what every kernel is compared with.

Its formulas stand in :mod:`proac_cuda.backends.reference`.
"""

from __future__ import annotations

from typing import Any

from . import functional


def proac_loss(*args: Any, **options: Any) -> Any:
    """:func:`proac_cuda.proac_loss` with ``backend="reference"``: same arguments, results and errors."""
    if options.setdefault("backend", "reference") != "reference":
        raise ValueError(
            f'backend: got {options["backend"]!r}, but proac_cuda.reference runs only "reference"; '
            "call proac_cuda.proac_loss for another"
        )
    return functional.proac_loss(*args, **options)
