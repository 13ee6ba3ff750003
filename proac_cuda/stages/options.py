"""The options of the loss, each said once: its name and what it takes.

Signatures spell them out, with their defaults, so that an editor shows them; a test holds those against this list. What each
does stands in the docstring of :func:`proac_cuda.proac_loss`.
"""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor


class LossOptions(TypedDict, total=False):
    """What :func:`proac_cuda.stages.validation.check_options` looks at: nothing here belongs to a call's tensors."""

    temperature: float
    ignore_index: int
    num_negatives: int | None
    negative_reduction: str
    pixel_anchor_weight: float
    label_sampling: str
    seed: int | Tensor | None
    reduction: str
    process_group: Any


class CallOptions(LossOptions, total=False):
    """What a call takes beside its tensors, but ``return_stats``, on which the type of its result depends."""

    backend: str


class ModuleOptions(CallOptions, total=False):
    """What a module of the loss takes beside its sizes."""

    return_stats: bool
    class_weight: Tensor | None
    prototypes: Tensor | None
    prototype_seed: int
    learnable: bool


LOSS_OPTIONS = tuple(LossOptions.__annotations__)
CALL_OPTIONS = tuple(CallOptions.__annotations__)  #: those of LossOptions first
