"""Adding the loss to an existing training script: a projection head, and a regularizer that hooks a layer of any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .module import ProACLoss


class ProjectionHead(nn.Sequential):
    """From backbone channels to embedding dimensions, pixel by pixel: (B, in_channels, H, W) to (B, embedding_dim, H, W).

    Args:
        in_channels: channels of the feature map.
        embedding_dim: D.
        kind: "linear", the authors' one 1x1 convolution without normalisation or activation; or "mlp", two of them with a
            ReLU between.
    """

    def __init__(self, in_channels: int, embedding_dim: int, kind: str = "linear") -> None:
        if kind == "linear":
            layers: list[nn.Module] = [nn.Conv2d(in_channels, embedding_dim, 1)]
        elif kind == "mlp":
            layers = [nn.Conv2d(in_channels, in_channels, 1), nn.ReLU(), nn.Conv2d(in_channels, embedding_dim, 1)]
        else:
            raise ValueError(f'kind: expected "linear" or "mlp", got {kind!r}')
        super().__init__(*layers)


class ProACRegularizer(nn.Module):
    """The loss on the output of a named layer of a model, which stays as it is.

    Three lines of a training script::

        proac = ProACRegularizer(model, layer="backbone.layer4", num_classes=19)
        optimizer = torch.optim.AdamW([*model.parameters(), *proac.parameters()])
        ...
        loss = criterion(model(images), labels) + 0.1 * proac(labels)

    The projection head is the regularizer's own: move it to the model's device, give its parameters to the optimizer, and
    keep its ``state_dict`` beside the model's if training is to be resumed. The model holds nothing of it but a hook, which
    :meth:`remove` takes off, and which keeps the layer's output only where gradients are recorded and the regularizer is
    in training mode.

    Args:
        model: any module.
        layer: name of one of its submodules, as in ``model.named_modules()``, whose output is (B, C, H, W).
        num_classes: K.
        embedding_dim: D of the projection.
        in_channels: C; found by itself where the layer ends in a module that tells.
        head: "linear" or "mlp", see :class:`ProjectionHead`; or a module of your own.
        select: takes the feature map out of the layer's output, where that is not a tensor (a dict, a tuple).
        **options: of :class:`ProACLoss`.
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
        select: Callable[[Any], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        modules = dict(model.named_modules())
        if layer not in modules:
            near = [name for name in modules if name.rpartition(".")[2] == layer.rpartition(".")[2]] or list(modules)[
                1:
            ]
            raise ValueError(f"layer: the model has no module {layer!r}; it has, among others: {', '.join(near[:8])}")
        self.layer = layer
        self.select = select
        if isinstance(head, str):
            head = ProjectionHead(in_channels or _channels_out(modules[layer], layer), embedding_dim, head)
        self.head = head
        self.loss = ProACLoss(num_classes, embedding_dim, **options)
        self._output: Any = None
        self._hook = modules[layer].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.training and torch.is_grad_enabled():
            self._output = output

    def forward(self, labels: Tensor, pixel_weight: Tensor | None = None) -> Any:
        """The loss of the model's last forward pass, for labels (B, any H, any W)."""
        output, self._output = self._output, None
        if output is None:
            raise RuntimeError(
                f"the layer {self.layer!r} has not run since the last call: run the model on a batch first, once for each "
                "call, with gradients enabled and the regularizer in training mode"
            )
        features = output if self.select is None else self.select(output)
        if not isinstance(features, Tensor) or features.ndim != 4:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"layer {self.layer!r}: expected an output (B, C, H, W), got {found}; pass select=")
        return self.loss(self.head(features), labels, pixel_weight)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()


def _channels_out(module: nn.Module, name: str) -> int:
    """Channels of a module's output, from the last of its parts that tells."""
    for part in reversed(list(module.modules())):
        for attribute in ("out_channels", "num_features", "out_features"):
            channels = getattr(part, attribute, None)
            if isinstance(channels, int):
                return channels
    raise ValueError(f"in_channels: nothing in layer {name!r} tells how many channels it gives; pass in_channels=")
