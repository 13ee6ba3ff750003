"""Registration of the loss and its stages as PyTorch ops: one schema and one fake each, for every backend.

A backend, of :mod:`proac_cuda.backends`, is a namespace that holds the same five stages: ``torch.ops.proac_cuda_reference``;
``torch.ops.proac_cuda`` of the compiled extension, whose CPU kernels are "cpp" and whose CUDA kernels "cuda";
``torch.ops.proac_cuda_triton``. In each, ``loss`` runs them: a call is one node of a graph, the same whichever backend runs
it, with a derivative of its own. ``loss_forward`` is three of the stages in one, where nothing is merged between them; a
backend may have a kernel of its own for it.

Shapes, in every op: features (B, D, *spatial) with 1 to 3 spatial axes which collapse into one pixel stride, the channel
or the pixel stride being 1; labels and pixel_weight (B, *any size), any strides; prototypes (K, D) contiguous.
float64 features go with float64 prototypes, weights and class vectors, all others with float32 ones.
``nearest_exact`` says by which of the two rules of :func:`proac_cuda.stages.pixels.nearest_index` labels and weights are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import NONE, NUM_POSITIVE_SUMS, NUM_STATISTICS, autograd

LOSS = """(
    Tensor features, Tensor prototypes, Tensor labels, Tensor? pixel_weight, Tensor? class_weight, Tensor? rng_state,
    float temperature, int ignore_index, int? num_negatives, bool negative_mean, float pixel_anchor_weight, int reduction,
    bool hardest_negative, bool nearest_exact, bool compiled, str? group) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""

LOSS_FORWARD = """(
    Tensor features, Tensor labels, Tensor? pixel_weight, Tensor prototypes, Tensor? class_weight, Tensor? thresholds,
    Tensor? rng_state, float temperature, int ignore_index, bool negative_mean, float pixel_anchor_weight, int reduction,
    bool hardest_negative, bool nearest_exact=False) -> (Tensor, Tensor, Tensor, Tensor)"""

#: The stages, which each backend implements.
SCHEMAS = {
    "select_negatives": """(
        Tensor features, Tensor labels, Tensor? pixel_weight, Tensor rng_state,
        int num_negatives, int num_classes, int ignore_index, bool nearest_exact=False) -> Tensor""",
    "class_statistics": """(
        Tensor features, Tensor labels, Tensor? pixel_weight, Tensor prototypes, Tensor? thresholds, Tensor? rng_state,
        float temperature, int ignore_index, bool pixel_anchor, bool hardest_negative,
        bool nearest_exact=False) -> (Tensor, Tensor, Tensor)""",
    "positive_sums": """(
        Tensor positive, Tensor labels, Tensor? pixel_weight, Tensor statistics,
        int ignore_index, bool negative_mean, bool nearest_exact=False) -> Tensor""",
    "reduce_loss": """(
        Tensor statistics, Tensor sums, Tensor? class_weight, float pixel_anchor_weight, int reduction) -> Tensor""",
    "loss_gradients": """(
        Tensor features, Tensor labels, Tensor? pixel_weight, Tensor prototypes, Tensor? thresholds, Tensor? rng_state,
        Tensor statistics, Tensor sums, Tensor? class_weight, Tensor grad_loss,
        float temperature, int ignore_index, bool negative_mean, float pixel_anchor_weight, int reduction,
        bool features_need_grad, bool prototypes_need_grad, bool nearest_exact=False) -> (Tensor, Tensor)""",
}


def _fake_select_negatives(
    features: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    rng_state: Tensor,
    num_negatives: int,
    num_classes: int,
    ignore_index: int,
    nearest_exact: bool = False,
) -> Tensor:
    return rng_state.new_empty(num_classes, 2)


def _fake_class_statistics(
    features: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    prototypes: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        prototypes.new_empty(NUM_STATISTICS, prototypes.shape[0]),
        prototypes.new_empty(features.shape[0], *features.shape[2:]),
        features.new_empty(4, dtype=torch.int64),
    )


def _fake_positive_sums(
    positive: Tensor, labels: Tensor, pixel_weight: Tensor | None, statistics: Tensor, *options: Any
) -> Tensor:
    return statistics.new_empty(NUM_POSITIVE_SUMS, statistics.shape[1])


def _fake_loss_forward(
    features: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    prototypes: Tensor,
    class_weight: Tensor | None,
    thresholds: Tensor | None,
    rng_state: Tensor | None,
    temperature: float,
    ignore_index: int,
    negative_mean: bool,
    pixel_anchor_weight: float,
    reduction: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics, positive, diagnostics = _fake_class_statistics(features, labels, pixel_weight, prototypes)
    sums = _fake_positive_sums(positive, labels, pixel_weight, statistics)
    return (
        _fake_reduce_loss(statistics, sums, class_weight, pixel_anchor_weight, reduction),
        statistics,
        sums,
        diagnostics,
    )


def _fake_reduce_loss(
    statistics: Tensor,
    sums: Tensor,
    class_weight: Tensor | None,
    pixel_anchor_weight: float,
    reduction: int,
) -> Tensor:
    return statistics.new_empty((statistics.shape[1],) if reduction == NONE else ())


def _fake_loss_gradients(
    features: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    prototypes: Tensor,
    thresholds: Tensor | None,
    rng_state: Tensor | None,
    statistics: Tensor,
    sums: Tensor,
    class_weight: Tensor | None,
    grad_loss: Tensor,
    temperature: float,
    ignore_index: int,
    negative_mean: bool,
    pixel_anchor_weight: float,
    reduction: int,
    features_need_grad: bool,
    prototypes_need_grad: bool,
    nearest_exact: bool = False,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(features) if features_need_grad else features.new_empty(0),
        torch.empty_like(prototypes) if prototypes_need_grad else prototypes.new_empty(0),
    )


def _fake_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    rng_state: Tensor | None,
    *values: Any,
) -> autograd.Outputs:
    classes = prototypes.shape[0]
    sampled = rng_state is not None
    return autograd.Outputs(
        prototypes.new_empty((classes,) if autograd.Options(*values).reduction == NONE else ()),
        prototypes.new_empty(NUM_STATISTICS, classes),
        prototypes.new_empty(NUM_POSITIVE_SUMS, classes),
        features.new_empty(4, dtype=torch.int64),
        features.new_empty((classes, 2) if sampled else 0, dtype=torch.int64),
        features.new_empty(2 if sampled else 0, dtype=torch.int64),
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "select_negatives": _fake_select_negatives,
    "class_statistics": _fake_class_statistics,
    "positive_sums": _fake_positive_sums,
    "reduce_loss": _fake_reduce_loss,
    "loss_gradients": _fake_loss_gradients,
    "loss_forward": _fake_loss_forward,
    "loss": _fake_loss,
}


def define_stages(namespace: str) -> torch.library.Library:
    """Define the ops of a backend under ``namespace``, with their fakes and derivatives, and ``loss`` over its stages."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in {**SCHEMAS, "loss_forward": LOSS_FORWARD, "loss": LOSS}.items():
        library.define(name + " ".join(schema.split()), tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    ops = getattr(torch.ops, namespace)
    library.impl("loss_forward", functools.partial(autograd.loss_forward, ops), "CompositeExplicitAutograd")
    library.impl("loss", functools.partial(autograd.run_op, ops), "CompositeExplicitAutograd")
    for name, kernel in autograd.autograd_kernels(ops, (*SCHEMAS, "loss_forward")).items():
        library.impl(name, kernel, "Autograd")
    return library


def implement_stages(library: torch.library.Library, module: Any, dispatch_key: str) -> None:
    """Implement the five ops with the functions of the same names in ``module``, out of reach of autocast."""
    for name in SCHEMAS:
        library.impl(name, _without_autocast(getattr(module, name)), dispatch_key)


def implement_forward(library: torch.library.Library, function: Callable[..., Any], dispatch_key: str) -> None:
    """Implement ``loss_forward`` by a function of the backend's own, in place of its stages one after the other."""
    library.impl("loss_forward", _without_autocast(function), dispatch_key)
    autograd.HAVE_FORWARD.add((library.ns, dispatch_key.lower()))


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(features: Tensor, *arguments: Any) -> Any:
        with torch.autocast(features.device.type, enabled=False):
            return function(features, *arguments)

    return call
