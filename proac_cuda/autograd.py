"""The loss as a torch.autograd.Function over the registered stages of a backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import distributed, stages
from .backends import BACKENDS, stage_ops
from .reference import contrast_log_z


class Options(NamedTuple):
    """What a call passes to the stages beside tensors."""

    backend: str
    temperature: float
    ignore_index: int
    num_negatives: int | None
    negative_mean: bool
    pixel_anchor_weight: float
    reduction: int
    hardest_negative: bool  #: look for it, for the statistics that the caller asked for
    check_values: bool  #: in a compiled graph: raise RuntimeError for bad values when it runs
    nearest_exact: bool  #: which of the two rules labels and weights are read by
    process_group: Any  #: whose ranks' pixels make up the loss; None for this process alone


class ProACFunction(torch.autograd.Function):
    """(loss, statistics (6, K), positive sums (2, K), diagnostics (4,)); only the loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        pixel_weight: Tensor | None,
        class_weight: Tensor | None,
        rng_state: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ops, group = stage_ops(BACKENDS[options.backend]), options.process_group
        thresholds = None
        if rng_state is not None and options.num_negatives is not None:
            pixels = features, labels, pixel_weight
            sampling = options.num_negatives, prototypes.shape[0], options.ignore_index
            if group is None:
                thresholds = ops.select_negatives(*pixels, rng_state, *sampling, options.nearest_exact)
            else:
                num_pixels = features.shape[0] * features.shape[2:].numel()
                rng_state = distributed.share_rng_state(rng_state, num_pixels, group)
                thresholds = distributed.select_negatives(*pixels, rng_state, *sampling, options.nearest_exact, group)
        statistics, positive, diagnostics = ops.class_statistics(
            features,
            labels,
            pixel_weight,
            prototypes,
            thresholds,
            rng_state,
            options.temperature,
            options.ignore_index,
            options.pixel_anchor_weight > 0,
            options.hardest_negative,
            options.nearest_exact,
        )
        if options.check_values:
            statistics = torch.ops.proac_cuda.check_values(statistics, diagnostics, class_weight)
        statistics = distributed.merge(statistics, stages.merge_statistics, group)
        sums = ops.positive_sums(
            positive,
            labels,
            pixel_weight,
            statistics,
            options.ignore_index,
            options.negative_mean,
            options.nearest_exact,
        )
        sums = distributed.merge(sums, stages.merge_positive_sums, group)
        loss = ops.reduce_loss(statistics, sums, class_weight, options.pixel_anchor_weight, options.reduction)
        ctx.save_for_backward(
            features, labels, pixel_weight, prototypes, thresholds, rng_state, statistics, sums, class_weight
        )
        ctx.options = options
        ctx.mark_non_differentiable(statistics, sums, diagnostics)
        ctx.set_materialize_grads(False)
        return loss, statistics, sums, diagnostics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 7
        options = ctx.options
        features_need_grad, prototypes_need_grad = ctx.needs_input_grad[:2]
        ops = stage_ops(BACKENDS[options.backend])
        saved = ctx.saved_tensors
        world_size = distributed.world_size(options.process_group)
        features, prototypes = saved[0], saved[3]
        grad_features, grad_prototypes = ops.loss_gradients(
            *saved,
            grad_loss if options.process_group is None else grad_loss * world_size,
            options.temperature,
            options.ignore_index,
            options.negative_mean,
            options.pixel_anchor_weight,
            options.reduction,
            features_need_grad,
            prototypes_need_grad,
            options.nearest_exact,
        )
        if torch.is_grad_enabled():  # create_graph=True
            sources = (features, prototypes, grad_loss)
            grad_features, grad_prototypes = _FirstDerivativeOnly.apply(grad_features, grad_prototypes, *sources)
        return (
            grad_features if features_need_grad else None,
            grad_prototypes if prototypes_need_grad else None,
            *(None,) * 5,
        )


class _FirstDerivativeOnly(torch.autograd.Function):
    """Passes gradients on, and raises where somebody differentiates them.

    ``once_differentiable`` does so only where the upstream gradient requires one; a gradient penalty does not, and
    would silently lose the loss's part.
    """

    @staticmethod
    def forward(ctx: Any, grad_features: Tensor, grad_prototypes: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        return grad_features.view_as(grad_features), grad_prototypes.view_as(grad_prototypes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "proac_loss has no second derivative: its gradient was differentiated (a gradient penalty, or a Hessian). "
            "Leave the loss out of that term, or detach its gradient"
        )


class ProACStats(NamedTuple):
    """What the loss saw of each class; detached tensors, of shape (K,) but for the last, float32 (float64 for float64).

    Cosines of a class that is absent, or has no negatives, are NaN.
    """

    weight: Tensor  #: W_k, the sum of the weights of its pixels; 0 where absent
    loss: Tensor  #: L_k; 0 where absent
    log_z: Tensor  #: log Z_k, as the loss has it; -inf without negatives
    mean_positive_cosine: Tensor  #: weighted mean of the cosines of its pixels with its prototype
    hardest_negative_cosine: Tensor  #: the largest cosine of a member of N_k with its prototype
    invalid_labels: Tensor  #: int64, a scalar: pixels ignored for an invalid label or weight


def make_stats(
    statistics: Tensor, sums: Tensor, diagnostics: Tensor, temperature: float, negative_mean: bool
) -> ProACStats:
    """The statistics of a call in the form that users see."""
    weight, hardest = statistics[stages.WEIGHT], statistics[stages.HARDEST_NEGATIVE]
    present = weight > 0
    some_weight = torch.where(present, weight, 1)
    return ProACStats(
        weight=weight.clone(),
        loss=torch.where(present, sums[stages.SOFTPLUS_SUM] / some_weight, 0),
        log_z=contrast_log_z(statistics, negative_mean).clone(),
        mean_positive_cosine=torch.where(
            present, statistics[stages.POSITIVE_SUM] / some_weight * temperature, torch.nan
        ),
        hardest_negative_cosine=torch.where(present & (hardest > -torch.inf), hardest * temperature, torch.nan),
        invalid_labels=diagnostics[0] + diagnostics[2],
    )
