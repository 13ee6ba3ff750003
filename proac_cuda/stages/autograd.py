"""The loss as one registered op with its derivative, over the stages of a backend.

``torch.ops.<namespace>.loss`` is what a graph holds, whoever traced it: torch.compile, torch.export, make_fx, torch.func.
Its kernel runs the stages, :func:`run_stages`. Its derivative is the op's own autograd kernel, which the dispatcher finds
wherever the op is called, so that no tool can flatten it away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from . import exchange, merge_positive_sums, merge_statistics
from .validation import has_values, looks_at_values, raise_for_values

_Function: Any = _SingleLevelFunction  # untyped in PyTorch

NUM_TENSORS = 6  #: the first arguments of the op: features, prototypes, labels, pixel_weight, class_weight, rng_state


class Options(NamedTuple):
    """What a call passes to the stages beside tensors: the last arguments of the op, in their order."""

    temperature: float
    ignore_index: int
    num_negatives: int | None
    negative_mean: bool
    pixel_anchor_weight: float
    reduction: int
    hardest_negative: bool  #: look for it, for the statistics that the caller asked for
    nearest_exact: bool  #: which of the two rules labels and weights are read by
    compiled: bool  #: bad values raise RuntimeError, not ValueError
    group: str | None  #: name of the process group whose ranks' pixels make up the loss; None for this process alone


class Outputs(NamedTuple):
    """What the op returns; only the loss is differentiable."""

    loss: Tensor  #: () or (K,)
    statistics: Tensor  #: (6, K), see :mod:`proac_cuda.stages`
    sums: Tensor  #: (2, K)
    diagnostics: Tensor  #: int64 (4,), see :func:`proac_cuda.stages.pixels.first_values`
    thresholds: Tensor | None  #: int64 (K, 2), the last member of each sampled set; without sampling None, or (0,)
    rng_state: Tensor | None  #: int64 (2,), as shared by the ranks of the group; likewise


#: Namespaces and device types whose backend has a kernel of its own for the op ``loss_forward``.
HAVE_FORWARD: set[tuple[str, str]] = set()


def tensors_and_options(*arguments: Any) -> tuple[Any, ...]:
    """The arguments of the op ``loss``, its options as one: autograd.Function and the stages pass them on together."""
    return *arguments[:NUM_TENSORS], Options(*arguments[NUM_TENSORS:])


def loss_forward(
    ops: Any,
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
    hardest_negative: bool,
    nearest_exact: bool = False,
    group: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, positive sums and diagnostics, one stage after the other; over the ranks of ``group``, if any.

    The kernel of the op ``loss_forward`` where a backend has none of its own.
    """
    statistics, positive, diagnostics = ops.class_statistics(
        features,
        labels,
        pixel_weight,
        prototypes,
        thresholds,
        rng_state,
        temperature,
        ignore_index,
        pixel_anchor_weight > 0,
        hardest_negative,
        nearest_exact,
    )
    if group is not None:
        statistics = exchange.merge(statistics, merge_statistics, group)
    sums = ops.positive_sums(positive, labels, pixel_weight, statistics, ignore_index, negative_mean, nearest_exact)
    if group is not None:
        sums = exchange.merge(sums, merge_positive_sums, group)
    loss = ops.reduce_loss(statistics, sums, class_weight, pixel_anchor_weight, reduction)
    return loss, statistics, sums, diagnostics


def run_stages(
    ops: Any,
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    class_weight: Tensor | None,
    rng_state: Tensor | None,
    options: Options,
) -> Outputs:
    """The whole forward pass on the backend whose stages are ``ops``."""
    group = None if options.group is None else exchange.named_group(options.group)
    thresholds = None
    if rng_state is not None and options.num_negatives is not None:
        select = ops.select_negatives
        if group is not None:
            num_pixels = features.shape[0] * features.shape[2:].numel()
            rng_state = exchange.share_rng_state(rng_state, num_pixels, group)
            select = functools.partial(exchange.select_negatives, group=group)
        thresholds = select(
            features,
            labels,
            pixel_weight,
            rng_state,
            options.num_negatives,
            prototypes.shape[0],
            options.ignore_index,
            options.nearest_exact,
        )
    arguments = (
        features,
        labels,
        pixel_weight,
        prototypes,
        class_weight,
        thresholds,
        rng_state,
        options.temperature,
        options.ignore_index,
        options.negative_mean,
        options.pixel_anchor_weight,
        options.reduction,
        options.hardest_negative,
        options.nearest_exact,
    )
    if group is None and (ops.name, features.device.type) in HAVE_FORWARD:
        loss, statistics, sums, diagnostics = ops.loss_forward(*arguments)
    else:  # not through the op, which on small problems costs a tenth of a call
        loss, statistics, sums, diagnostics = loss_forward(ops, *arguments, group)
    if has_values(diagnostics) and looks_at_values(features.device):
        # after the exchange between ranks, so that none waits for one that raises
        raise_for_values(diagnostics, class_weight, prototypes, RuntimeError if options.compiled else ValueError)
    return Outputs(loss, statistics, sums, diagnostics, thresholds, rng_state)


@_disable_dynamo  # which would trace it where a graph breaks around the op
def run_op(ops: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """The kernel of the op ``loss``: an op returns tensors alone, and no argument of its own."""
    outputs = run_stages(ops, *tensors_and_options(*arguments))
    if outputs.thresholds is None or outputs.rng_state is None:
        return (*outputs[:4], outputs.diagnostics.new_empty(0), outputs.diagnostics.new_empty(0))
    return (*outputs[:4], outputs.thresholds, outputs.rng_state.clone())


def _grad_mode_of_next_level() -> AbstractContextManager[Any]:
    """Within forward, where gradients are off: on again for the next level of torch.func, which turns off what is off there."""
    return torch.enable_grad() if torch._C._are_functorch_transforms_active() else nullcontext()


class ProACFunction(_Function):
    """The derivative of the op ``loss``. Of one level: torch.func reaches it through the dispatcher, level by level."""

    @staticmethod
    def forward(
        ctx: Any,
        ops: Any,
        found: list[Outputs] | None,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        pixel_weight: Tensor | None,
        class_weight: Tensor | None,
        rng_state: Tensor | None,
        options: Options,
    ) -> Any:
        """All the outputs, for the op; or the loss alone, and all of them in ``found``, which eager mode is faster with."""
        tensors = features, prototypes, labels, pixel_weight, class_weight, rng_state
        if found is None:
            with torch._C._AutoDispatchBelowAutograd(), _grad_mode_of_next_level():
                outputs = Outputs(*ops.loss(*tensors, *options))
            ctx.mark_non_differentiable(*outputs[1:])
        else:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = run_stages(ops, *tensors, options)
            found.append(outputs)
        sampled = options.num_negatives is not None
        ctx.save_for_backward(
            features,
            labels,
            pixel_weight,
            prototypes,
            outputs.thresholds if sampled else None,
            outputs.rng_state if sampled else None,
            outputs.statistics,
            outputs.sums,
            class_weight,
        )
        ctx.ops, ctx.options = ops, options
        ctx.set_materialize_grads(False)
        return outputs if found is None else outputs.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        """Stage (iii): the gradients of the features and of the prototypes."""
        nothing = (None,) * (2 + NUM_TENSORS + 1)
        if grad_loss is None:
            return nothing
        options: Options = ctx.options
        features_need_grad, prototypes_need_grad = ctx.needs_input_grad[2:4]
        if options.group is not None:
            grad_loss = grad_loss * exchange.world_size(exchange.named_group(options.group))
        arguments = (
            *ctx.saved_tensors,
            grad_loss,
            options.temperature,
            options.ignore_index,
            options.negative_mean,
            options.pixel_anchor_weight,
            options.reduction,
            features_need_grad,
            prototypes_need_grad,
            options.nearest_exact,
        )
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():  # create_graph=True
            grad_features, grad_prototypes = ctx.ops.loss_gradients(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grad_features, grad_prototypes = ctx.ops.loss_gradients(*arguments)
        return (
            None,
            None,
            grad_features if features_need_grad else None,
            grad_prototypes if prototypes_need_grad else None,
            *nothing[4:],
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """There is none."""
        raise RuntimeError(
            "proac_loss has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, forward_ad): "
            "use reverse mode, .backward(), torch.func.grad, vjp or jacrev"
        )


class _FirstDerivativeOnly(_Function):
    """The op ``loss_gradients``, which passes gradients on and raises where somebody differentiates them."""

    @staticmethod
    def forward(ctx: Any, ops: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd(), _grad_mode_of_next_level():
            return ops.loss_gradients(*arguments)

    @staticmethod
    def backward(ctx: Any, *unused: Any) -> Any:
        raise RuntimeError(
            "proac_loss has no second derivative: its gradient was differentiated (a gradient penalty, or a Hessian). "
            "Leave the loss out of that term, or detach its gradient"
        )

    jvp = backward


#: The dispatch keys that are on where nobody watches the ops go by: no mode (make_fx), torch.func, jit.trace.
_UNWATCHED = (
    torch._C.DispatchKeySet.from_raw_repr(0)
    .add(torch._C.DispatchKey.BackendSelect)
    .add(torch._C.DispatchKey.ADInplaceOrView)
)


def call_loss(ops: Any, *tensors: Any, options: Options) -> tuple[Tensor, Outputs]:
    """The loss, with its derivative, and all that the op ``loss`` returns.

    In eager mode its function is called itself, which saves two ways through the dispatcher.
    """
    is_eager = type(tensors[0]) is Tensor and not torch.compiler.is_compiling()
    if is_eager and torch._C._dispatch_tls_local_include_set() == _UNWATCHED:
        found: list[Outputs] = []
        return ProACFunction.apply(ops, found, *tensors, options), found[0]
    outputs = Outputs(*ops.loss(*tensors, *options))
    return outputs.loss, outputs


def autograd_kernels(ops: Any, stage_names: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """The autograd kernels of a backend's ops, by the op's name."""

    def at_every_level(apply: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> tuple[Tensor, ...]:
            if not torch._C._are_functorch_transforms_active():
                return tuple(apply(*arguments))
            with enable_single_level_autograd_function():
                return tuple(apply(*arguments))

        return call

    def apply_loss(*arguments: Any) -> Any:
        return ProACFunction.apply(ops, None, *tensors_and_options(*arguments))

    def not_differentiable(name: str) -> Callable[..., Any]:
        op = getattr(ops, name)

        def call(*arguments: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
                raise RuntimeError(
                    f"{op}: a stage of proac_loss has no derivative of its own. A tool that took the loss apart would lose "
                    "the gradient: call proac_loss under it, or trace with torch.export, make_fx or torch.compile"
                )
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)

        return call

    kernels = {name: not_differentiable(name) for name in stage_names}
    kernels["loss"] = at_every_level(apply_loss)
    kernels["loss_gradients"] = at_every_level(functools.partial(_FirstDerivativeOnly.apply, ops))
    return kernels
