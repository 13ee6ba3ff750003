"""A forward hook that keeps its layer's output until the loss is asked for, and knows why there is none."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Kept(NamedTuple):
    """A layer's output, and what is needed to tell later whether it can be used."""

    output: Any
    versions: dict[int, int]  # how often its tensors, and what they are views of, had been written to, by id
    is_trained: bool  # whether a parameter of the layer was to get a gradient

    def was_overwritten(self, features: Tensor) -> bool:
        """Whether one of the output's tensors, or a view of one, is not what it was."""
        return any(self.versions.get(part, now) != now for part, now in _versions([features]).items())


class Tap:
    """A layer's last output with gradients, and its last without. Copies and pickles keep none: it is no part of the model.

    A pass without gradients between a pass with gradients and the loss (a teacher that shares the model, logging) leaves the
    latter's output alone.
    """

    def __init__(self, model: nn.Module, layer: nn.Module, name: str) -> None:
        self.name = name
        self.keeps_evaluations = False  #: also passes of a layer in evaluation mode without gradients
        self.model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self.layer: weakref.ref[nn.Module] | None = weakref.ref(layer)
        self.is_alone = self.is_removed = False  # a copy that no model has fed yet; without its hook
        self.clear()

    def clear(self) -> None:
        """Let go of all outputs."""
        self.with_gradients: Kept | None = None
        self.without: Kept | None = None  # since then
        self.has_evaluated = False  # without keeping the output
        self.passes: list[_Pass] = []  # with gradients, since the last call

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The forward hook: keep the output, if it belongs to a step."""
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "ProACRegularizer: torch.nn.DataParallel runs the layer in several threads, each on a part of the batch; "
                "use DistributedDataParallel"
            )
        is_compiling = torch.compiler.is_compiling()
        if not torch.compiler.is_dynamo_compiling() and (  # where PyTorch 2.10 takes torch.compile for an export
            torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
        ):
            return  # no batch
        if not is_compiling and torch._C._current_graph_task_id() != -1:
            return  # in backward a checkpointed layer runs again: that output belongs to the step that is over
        self.is_alone = False
        if not (torch.is_grad_enabled() or module.training or self.keeps_evaluations):
            self.has_evaluated = True
            return
        leaves = [] if is_compiling else [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        kept = Kept(output, _versions(leaves), any(parameter.requires_grad for parameter in module.parameters()))
        if torch.is_grad_enabled():
            self.with_gradients, self.without = kept, None
            if not is_compiling:
                self.passes = [*(one for one in self.passes if one.is_open()), _Pass(leaves)]
            return
        self.without = kept
        if not is_compiling and not (self.passes and self.passes[-1].is_open()):
            self.with_gradients = None  # its backward pass is over

    @property
    def is_empty(self) -> bool:
        """Whether no pass has been kept."""
        return self.with_gradients is None and self.without is None

    def take(self) -> Kept:
        """The output that the loss is of, which is then let go; an error that says why there is none."""
        count = sum(one.is_open() for one in self.passes)
        kept = self.with_gradients
        if kept is None or (self.without is not None and not torch.is_grad_enabled()):
            kept = self.without
        if kept is None:
            raise RuntimeError(f"the layer {self.name!r} has not run since the last call: {self._why_not()}")
        self.clear()
        if count > 1:
            raise RuntimeError(
                f"the layer {self.name!r} has run {count} times with gradients since the last call, and the loss would be "
                "that of the last pass alone: call the regularizer after each pass, or its discard() after one that is to "
                "have no part in it; run what is not for training under torch.no_grad()"
            )
        return kept

    def _why_not(self) -> str:
        if self.is_removed:
            return "remove() has taken the hook off; make another regularizer, with the state_dict of this one"
        if self.has_evaluated:
            return (
                "but in evaluation mode and without gradients, whose outputs are kept only where the regularizer is in "
                "evaluation mode as well: call its eval(), too"
            )
        if self.is_alone:
            return (
                "this regularizer is a copy or was unpickled, and no model has fed it yet. Copy or pickle it together with its "
                "model and run that one, or make a regularizer for the model at hand and load this one's state_dict"
            )
        model, layer = (None if part is None else part() for part in (self.model, self.layer))
        if self.model is not None and model is None:
            return "the model that it was made for is gone; make a regularizer for the one at hand, with the state_dict of this"
        if model is not None and all(part is not layer for part in model.modules()):
            return (
                "the model has another module in its place now, as SyncBatchNorm.convert_sync_batchnorm puts one where a "
                "BatchNorm was. Make the regularizer after that change, with the state_dict of this one"
            )
        return (
            "run the model on a batch first, once for each call. A model which torch.compile ran before the regularizer was "
            "made, it or another of its class, does not run its hook: make the regularizer first, or call "
            "torch._dynamo.reset() after making it"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "keeps_evaluations": self.keeps_evaluations, "is_removed": self.is_removed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, model=None, layer=None, is_alone=True)
        self.clear()


class _Pass:
    """A pass with gradients: open until its backward pass reaches the output, or nobody can run that any more."""

    def __init__(self, leaves: list[Tensor]) -> None:
        end = _End()
        self.end = weakref.ref(end)  # the autograd graph holds it
        self.is_frozen = True
        for leaf in leaves:
            if leaf.requires_grad and not leaf.is_leaf:
                leaf.register_hook(end)
                self.is_frozen = False

    def is_open(self) -> bool:
        if self.is_frozen:
            return True  # nothing tells
        end = self.end()
        return end is not None and not end.is_reached


class _End:
    is_reached = False

    def __call__(self, gradient: Tensor) -> None:
        self.is_reached = True


def _versions(leaves: list[Tensor]) -> dict[int, int]:
    """The version counters of tensors and of their bases, by id. Tensors of inference mode have none."""
    tensors = [leaf for leaf in leaves if not leaf.is_inference()]
    return {id(part): part._version for tensor in tensors for part in (tensor, tensor._base) if part is not None}


_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name; wrappers (DistributedDataParallel, torch.compile) may be left out of it."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name in modules:
        return modules[name]

    def bare(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in _WRAPPERS)

    # of a wrapper and what it wraps, which have the same bare name, the one inside, which comes last
    unwrapped = {bare(name): module for name, module in modules.items()}
    if bare(name) in unwrapped:
        return unwrapped[bare(name)]
    near = [other for other in modules if other.rpartition(".")[2] == name.rpartition(".")[2]] or list(modules)[1:]
    raise ValueError(f"layer: the model has no module {name!r}; it has, among others: {', '.join(near[:8])}")
