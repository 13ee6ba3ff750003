"""Adding the loss to an existing training script: a projection head, and a regularizer that hooks a layer of any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .module import ProACLoss

_KINDS = ("linear", "mlp")


class ProjectionHead(nn.Sequential):
    """From backbone channels to embedding dimensions, pixel by pixel: (B, in_channels, H, W) to (B, embedding_dim, H, W).

    Args:
        in_channels: channels of the feature map.
        embedding_dim: D.
        kind: "linear", the authors' one 1x1 convolution without normalisation or activation; or "mlp", two of them with a
            ReLU between.
    """

    def __init__(self, in_channels: int, embedding_dim: int, kind: str = "linear") -> None:
        if kind not in _KINDS:
            raise ValueError(f'kind: expected "linear" or "mlp", got {kind!r}')
        if kind == "linear":
            layers: list[nn.Module] = [nn.Conv2d(in_channels, embedding_dim, 1)]
        else:
            layers = [nn.Conv2d(in_channels, in_channels, 1), nn.ReLU(), nn.Conv2d(in_channels, embedding_dim, 1)]
        super().__init__(*layers)


class ProACRegularizer(nn.Module):
    """The loss on the output of a named layer of a model, which stays as it is.

    Three lines of a training script::

        proac = ProACRegularizer(model, layer="backbone.layer4", num_classes=19)
        optimizer = torch.optim.AdamW([*model.parameters(), *proac.parameters()])
        ...
        loss = criterion(model(images), labels) + 0.1 * proac(labels)

    The projection head is the regularizer's own: it starts on the model's device, its parameters go to the optimizer, and its
    ``state_dict`` beside the model's if training is to be resumed. Where a framework looks after one module only, make it a
    part of that: ``model.proac = ProACRegularizer(model, ...)``. The model holds nothing of it but a hook, which keeps the
    layer's last output until the call, and which :meth:`remove` takes off.

    The layer's output may be a map (B, C, H, W) or, with a head of the regularizer's own making, (B, H, W, C); the tokens
    (B, N, C) of a transformer, which are laid out in the labels' proportions, class and register tokens in front left out;
    a dict or Hugging Face output with one of these under "out", "last_hidden_state" or "feature_maps"; or a tuple or list,
    of maps the last, of anything else the first. ``select`` serves the rest.

    Over ranks, wrap it as the model is: ``DistributedDataParallel(ProACRegularizer(...))`` keeps the heads alike, and
    ``process_group=`` makes the loss that of all ranks' pixels. Wrappers may be left out of ``layer``, whether the model is
    wrapped or not. A model that torch.compile has run already takes no new hooks: make the regularizer first. For a layer
    within a checkpointed part of the model, checkpoint with ``use_reentrant=False``. ``torch.nn.DataParallel`` is refused.
    ``torch.jit.script`` takes no such hook: :meth:`remove` it before an export.

    Args:
        model: any module.
        layer: name of one of its submodules, as in ``model.named_modules()``.
        num_classes: K.
        embedding_dim: D of the projection.
        in_channels: C; found by itself where the layer ends in a module that tells.
        head: "linear" or "mlp", see :class:`ProjectionHead`; or a module of your own.
        select: takes the feature map (B, C, H, W) out of the layer's output.
        **options: of :class:`ProACLoss`.

    Raises:
        TypeError: an argument of another type. ValueError: no such layer, an unknown head, or nothing that tells the channels.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        num_classes: int,
        *,
        embedding_dim: int = 256,
        in_channels: int | None = None,
        head: str | nn.Module = "linear",
        select: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(layer, str):
            raise TypeError(f"layer: expected the name of a module, a str, got {type(layer).__name__}")
        if not isinstance(head, (str, nn.Module)):
            raise TypeError(f'head: expected "linear", "mlp" or a module, got {type(head).__name__}')
        if isinstance(head, str) and head not in _KINDS:
            raise ValueError(f'head: expected "linear", "mlp" or a module, got {head!r}')
        module = _find(model, layer)
        self.layer = layer
        self.select = select
        self.in_channels = in_channels  # None: the head takes what comes
        if isinstance(head, str):
            self.in_channels = in_channels or _channels_out(module, layer)
            head = ProjectionHead(self.in_channels, embedding_dim, head)
        self.head = head
        self.loss = ProACLoss(num_classes, embedding_dim, **options)
        devices = {parameter.device for parameter in module.parameters()} or {torch.device("cpu")}
        if len(devices) == 1 and torch.device("meta") not in devices:
            self.to(devices.pop())
        self._tap = _Tap()
        self._hook = module.register_forward_hook(self._tap)

    def forward(self, labels: Tensor, pixel_weight: Tensor | None = None) -> Any:
        """The loss of the model's last forward pass, for labels (B, any H, any W)."""
        output, self._tap.output = self._tap.output, None
        if output is None:
            raise RuntimeError(
                f"the layer {self.layer!r} has not run since the last call: run the model on a batch first, once for each "
                "call. A model which torch.compile ran before the regularizer was made does not run its hook"
            )
        features = self._feature_map(output, labels)
        if torch.is_grad_enabled() and self._tap.is_trained and not features.requires_grad:
            raise RuntimeError(
                f"the output of layer {self.layer!r} has no gradient: run the model with gradients enabled. For a layer "
                "within a checkpointed part of the model, checkpoint with use_reentrant=False"
            )
        return self.loss(self.head(features), labels, pixel_weight)

    def _feature_map(self, output: Any, labels: Tensor) -> Tensor:
        """(B, C, H, W), in the dtype that the head takes."""
        features = _pick(output) if self.select is None else self.select(output)
        if isinstance(features, Tensor) and self._tap.was_overwritten(features):
            raise RuntimeError(
                f"the output of layer {self.layer!r} was changed in place after the layer had run, perhaps by the module "
                "that follows it: make that one work out of place (ReLU(inplace=False)), or name it as the layer"
            )
        if isinstance(features, Tensor) and self.in_channels is not None:
            if features.ndim == 3 and features.shape[2] == self.in_channels:
                features = _tokens_to_map(features, labels, self.layer)
            elif features.ndim == 4 and features.shape[1] != self.in_channels == features.shape[3]:
                features = features.movedim(3, 1)
        if not isinstance(features, Tensor) or features.ndim < 3:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"layer {self.layer!r}: expected an output (B, C, H, W), got {found}; pass select=")
        if self.in_channels is not None and (features.ndim != 4 or features.shape[1] != self.in_channels):
            raise ValueError(
                f"layer {self.layer!r}: expected an output (B, {self.in_channels}, H, W), got {tuple(features.shape)}; "
                "pass in_channels=, or select= to make it such a map"
            )
        device = features.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return features
        dtype = next((parameter.dtype for parameter in self.head.parameters()), features.dtype)
        return features.to(dtype)  # the model may have run under autocast, which is over by now

    def remove(self) -> None:
        """Take the hook off the model, and let go of the output that it kept."""
        self._hook.remove()
        self._tap.output = None


class _Tap:
    """A forward hook that keeps its layer's last output. Copies and pickles of it keep none: it is no part of the model."""

    output: Any = None
    versions: dict[int, int] = {}  #: how often its tensors, and what they are views of, had been written to, by id
    is_trained = False  #: whether a parameter of the layer was to get a gradient

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "ProACRegularizer: torch.nn.DataParallel runs the layer in several threads, each on a part of the batch; "
                "use DistributedDataParallel"
            )
        # In backward, a checkpointed layer runs again: that output belongs to the step that is over.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.output = output
            self.versions = {} if torch.compiler.is_compiling() else _versions(tree_leaves(output))
            self.is_trained = any(parameter.requires_grad for parameter in module.parameters())

    def was_overwritten(self, features: Tensor) -> bool:
        """Whether one of the output's tensors, or a view of one, is not what it was."""
        return any(self.versions.get(part, now) != now for part, now in _versions([features]).items())

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _versions(leaves: list[Any]) -> dict[int, int]:
    """The version counters of tensors and of their bases, by id. Tensors of inference mode have none."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
    return {id(part): part._version for tensor in tensors for part in (tensor, tensor._base) if part is not None}


_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _find(model: nn.Module, layer: str) -> nn.Module:
    """The submodule of that name; wrappers (DistributedDataParallel, torch.compile) may be left out of it."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if layer in modules:
        return modules[layer]

    def bare(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in _WRAPPERS)

    # of a wrapper and what it wraps, which have the same bare name, the one inside, which comes last
    unwrapped = {bare(name): module for name, module in modules.items()}
    if bare(layer) in unwrapped:
        return unwrapped[bare(layer)]
    near = [name for name in modules if name.rpartition(".")[2] == layer.rpartition(".")[2]] or list(modules)[1:]
    raise ValueError(f"layer: the model has no module {layer!r}; it has, among others: {', '.join(near[:8])}")


def _channels_out(module: nn.Module, name: str) -> int:
    """Channels of a module's output, from the last of its parts that tells."""
    for part in reversed(list(module.modules())):
        for attribute in ("out_channels", "num_features", "out_features", "normalized_shape"):
            channels = getattr(part, attribute, None)
            if attribute == "normalized_shape" and isinstance(channels, tuple):
                channels = channels[-1]
            if isinstance(channels, int):
                return channels
    raise ValueError(f"in_channels: nothing in layer {name!r} tells how many channels it gives; pass in_channels=")


def _pick(output: Any) -> Any:
    """The map or tokens in a layer's output."""
    if isinstance(output, Mapping):  # Hugging Face's outputs are OrderedDicts
        names = [name for name in ("out", "last_hidden_state", "feature_maps") if name in output]
        return _pick(output[names[0]]) if names else output
    if isinstance(output, (tuple, list)) and output:
        are_maps = all(isinstance(item, Tensor) and item.ndim == 4 for item in output)
        return output[-1] if are_maps else _pick(output[0])
    return output


def _tokens_to_map(tokens: Tensor, labels: Tensor, layer: str) -> Tensor:
    """(B, N, C) as (B, C, h, w): h and w in the labels' proportions, exactly or, where patches cross the border, nearly.

    In front there may be a class token, a distillation token beside it, or four register tokens.
    """
    count, (height, width) = tokens.shape[1], labels.shape[-2:]
    for most in (0, max(height, width)):  # of |h W - w H|: nothing, or one row or column
        for prefix in (0, 1, 2, 5):
            for h in range(1, count - prefix + 1):
                w, rest = divmod(count - prefix, h)
                if rest == 0 and abs(h * width - w * height) <= most:
                    grid: Tensor = tokens[:, prefix:].transpose(1, 2).unflatten(2, (h, w))
                    return grid
    raise ValueError(
        f"layer {layer!r}: {count} tokens do not make a grid in the proportions of labels {tuple(labels.shape)}; "
        "pass select= to make them a map (B, C, H, W)"
    )
