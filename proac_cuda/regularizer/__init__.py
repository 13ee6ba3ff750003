"""Adding the loss to an existing training script: a regularizer that hooks a layer of any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..module import ProACLoss
from ..stages.validation import LABEL_DTYPES, as_int, check_tensor
from .heads import HEAD_KINDS, ProjectionHead
from .layouts import (
    Kind,
    channel_axis,
    check_layout,
    kind_of,
    layout_of,
    pick,
    refuse_doubtful_map,
    shape_text,
)
from .tap import Kept, Tap, find_layer
from .tokens import tokens_to_map

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..stages.options import ModuleOptions

__all__ = ["ProACRegularizer", "ProjectionHead"]


class ProACRegularizer(nn.Module):
    r"""The loss on the output of a named layer of a model, which stays as it is.

    Three lines of a training script::

        proac = ProACRegularizer(model, layer="backbone.layer4", num_classes=19)
        optimizer = torch.optim.AdamW([*model.parameters(), *proac.parameters()])
        ...
        loss = criterion(model(images), labels) + 0.1 * proac(labels)

    The projection head is the regularizer's own: it starts on the model's device, its parameters go to the optimizer, and its
    ``state_dict`` beside the model's if training is to be resumed. Where a framework looks after one module only, make it a
    part of that: ``model.proac = ProACRegularizer(model, ...)``. The model holds nothing of it but a hook, which keeps the
    layer's output until the call, and which :meth:`remove` takes off.

    What the layer gives is not guessed. The output, or what ``select`` takes out of it, is

    - a map (B, C, \*spatial) with two or three spatial axes, or one with ``layout="channels_first"``;
    - (B, \*spatial, C) with ``layout="channels_last"``;
    - tokens (B, N, C) with ``layout="tokens"``: laid out in the labels' proportions, class and register tokens in front left
      out;
    - a dict or Hugging Face output with one of these under "out", "last_hidden_state" or "feature_maps"; or a tuple or list,
      of maps the last, of anything else the first.

    The layout of PyTorch's own layers is known (``Linear``, ``LayerNorm`` and ``TransformerEncoder`` have channels at the
    end), and that a "last_hidden_state" of three axes is tokens. A map whose proportions are the labels' only, or also, with
    channels at the end raises where nobody said its layout.

    The head's channels are ``in_channels``, or those of an ``example``, or known from the layer's kind, or those of the first
    map that comes. In the last case its parameters are PyTorch's ``UninitializedParameter`` until then: the optimizer takes
    them and trains them, but what looks at parameters earlier (DistributedDataParallel, counting them, an averaged copy)
    raises; pass ``in_channels`` there.

    One pass of the model with gradients goes with one call. A pass without gradients in between (a teacher, logging) does not
    matter. In evaluation the loss is that of the last pass; call ``eval()`` of the regularizer as well as the model's, or the
    output is not kept.

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
        in_channels: C.
        head: "linear" or "mlp", see :class:`ProjectionHead`; or a module of your own.
        select: takes the features out of the layer's output.
        layout: "channels_first", "channels_last" or "tokens", see above.
        example: one input of the model (positional arguments as a tuple, keywords as a dict) to run it on once, in evaluation
            mode and without gradients, for the channels.
        **options: of :class:`ProACLoss`.

    Raises:
        TypeError: an argument of another type. ValueError: no such layer, an unknown head or layout; in a call, an output of
            another layout or number of channels. RuntimeError: a call without its pass.
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
        layout: str | None = None,
        example: Any = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__()
        if not isinstance(layer, str):
            raise TypeError(f"layer: expected the name of a module, a str, got {type(layer).__name__}")
        if not isinstance(head, (str, nn.Module)):
            raise TypeError(f'head: expected "linear", "mlp" or a module, got {type(head).__name__}')
        if isinstance(head, str) and head not in HEAD_KINDS:
            raise ValueError(f'head: expected "linear", "mlp" or a module, got {head!r}')
        check_layout(layout)
        if select is not None and not callable(select):
            raise TypeError(f"select: expected a function of the layer's output, got {type(select).__name__}")
        if in_channels is not None:
            in_channels = as_int("in_channels", in_channels, 1, remedy="; None takes those of the first map")
        module = find_layer(model, layer)
        self.layer = layer
        self.select = select
        self.layout = layout
        self._kind = Kind() if select is not None else kind_of(module)
        self._tap = Tap(model, module, layer)
        self._hook = module.register_forward_hook(self._tap)
        try:
            if in_channels is None and example is not None:
                in_channels = self._channels_of(model, example)
            self.in_channels = in_channels or self._kind.channels  # None: not known yet
            if isinstance(head, str):
                head = ProjectionHead(self.in_channels, embedding_dim, head)
            self.head = head
            self.loss = ProACLoss(num_classes, embedding_dim, **options)
        except BaseException:
            self.remove()  # else the model would keep the layer's outputs for nobody
            raise
        devices = {parameter.device for parameter in module.parameters()} or {torch.device("cpu")}
        if len(devices) == 1 and torch.device("meta") not in devices:
            self.to(devices.pop())

    def forward(self, labels: Tensor, pixel_weight: Tensor | None = None) -> Any:
        r"""The loss of the model's last forward pass, for labels (B, \*any spatial size)."""
        if not isinstance(labels, Tensor):
            check_tensor("labels", labels, LABEL_DTYPES)  # all else of them is the loss's to look at
        kept = self._tap.take()
        features = self._map(kept, labels)
        if torch.is_grad_enabled() and kept.is_trained and not features.requires_grad:
            raise RuntimeError(
                f"the output of layer {self.layer!r} has no gradient: its last pass ran under torch.no_grad(), where the "
                "model is to run with gradients enabled; or within a checkpointed part of the model: checkpoint with "
                "use_reentrant=False"
            )
        return self.loss(self.head(features), labels, pixel_weight)

    def _map(self, kept: Kept, labels: Tensor) -> Tensor:
        r"""(B, C, \*spatial), in the dtype that the head takes."""
        features, layout = self._selected(kept.output)
        if kept.was_overwritten(features):
            raise RuntimeError(
                f"the output of layer {self.layer!r} was changed in place after the layer had run, perhaps by the module "
                "that follows it: make that one work out of place (ReLU(inplace=False)), or name it as the layer"
            )
        channels = features.shape[channel_axis(layout)]
        if self.in_channels is not None and channels != self.in_channels:
            raise ValueError(
                f"layer {self.layer!r}: expected an output {shape_text(features.ndim, layout, self.in_channels)}, got "
                f"{tuple(features.shape)}; pass in_channels={channels} or, if these are not its channels, another layout="
            )
        if layout == "tokens":
            features = tokens_to_map(features, labels, self.layer)
        elif layout == "channels_last":
            features = features.movedim(-1, 1)
        elif self.layout is None and self._kind.layout is None:
            refuse_doubtful_map(features, labels, self.layer)
            self.layout = layout  # what is clear at one size stays so at others
        self.in_channels = channels
        device = features.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return features
        dtype = next((parameter.dtype for parameter in self.head.parameters()), features.dtype)
        return features.to(dtype)  # the model may have run under autocast, which is over by now

    def _selected(self, output: Any) -> tuple[Tensor, str]:
        """The features in the layer's output, and their layout."""
        features, are_tokens = pick(output) if self.select is None else (self.select(output), False)
        if not isinstance(features, Tensor) or not 3 <= features.ndim <= 5:
            found = str(tuple(features.shape)) if isinstance(features, Tensor) else type(features).__name__
            if isinstance(features, (list, tuple)) and all(isinstance(item, Tensor) for item in features):
                found += f" of {len(features)} tensors"
            raise TypeError(f"layer {self.layer!r}: expected an output (B, C, H, W), got {found}; pass select=")
        said = "tokens" if are_tokens and self.layout is None and features.ndim == 3 else self.layout
        return features, layout_of(features, said, self._kind, self.layer)

    def _channels_of(self, model: nn.Module, example: Any) -> int:
        """Channels of the layer's output for an input of the model, which runs as it would in evaluation."""
        modes = [(module, module.training) for module in model.modules()]
        arguments = example if isinstance(example, tuple) else () if isinstance(example, Mapping) else (example,)
        self._tap.keeps_evaluations = True
        try:
            model.eval()
            with torch.no_grad():
                model(*arguments, **(example if isinstance(example, Mapping) else {}))
        finally:
            self._tap.keeps_evaluations = False
            for module, mode in modes:
                module.training = mode
        features, layout = self._selected(self._tap.take().output)
        return features.shape[channel_axis(layout)]

    def train(self, mode: bool = True) -> ProACRegularizer:
        """As nn.Module's. In evaluation mode, outputs of a layer in evaluation mode are kept for the call."""
        super().train(mode)
        self._tap.keeps_evaluations = not mode
        if mode:
            self._tap.without = None
        return self

    def discard(self) -> None:
        """Let go of the output that the hook kept: that pass is to have no part in the loss."""
        self._tap.clear()

    def remove(self) -> None:
        """Take the hook off the model, and let go of the output that it kept."""
        self._hook.remove()
        self._tap.is_removed = True
        self._tap.clear()
