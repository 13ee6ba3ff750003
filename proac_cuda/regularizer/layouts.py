r"""What a layer's output is: a map (B, C, \*spatial), channels at the end, or tokens. Nothing here guesses.

A layout is said, or known from the layer's kind. Where a map could be read in another way than the default, and the labels'
proportions speak for that, it is an error which asks for the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.activation import ReLU, ReLU6
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ..stages.validation import have_same_proportions
from .tokens import is_scaled

LAYOUTS = ("channels_first", "channels_last", "tokens")

_ELEMENTWISE = (ReLU, ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.PReLU, nn.Identity, _DropoutNd)


class Kind(NamedTuple):
    """What is known of a layer's output."""

    channels: int | None = None
    layout: str | None = None


def kind_of(layer: nn.Module) -> Kind:
    """What PyTorch's own layers are known to give; nothing of others, and of their subclasses with a forward of their own."""

    def is_a(*classes: type[nn.Module]) -> bool:
        return any(isinstance(layer, one) and type(layer).forward is one.forward for one in classes)

    if isinstance(layer, _ConvNd) and type(layer).__module__.startswith("torch.nn."):
        return Kind(layer.out_channels or None, "channels_first")  # a lazy one may not know yet
    if isinstance(layer, (_BatchNorm, _InstanceNorm)) and type(layer).__module__.startswith("torch.nn."):
        return Kind(layer.num_features or None, "channels_first")
    if is_a(nn.GroupNorm):
        return Kind(layer.num_channels, "channels_first")  # type: ignore[arg-type]
    if is_a(nn.Linear):
        return Kind(layer.out_features, "channels_last")  # type: ignore[arg-type]
    if is_a(nn.LayerNorm):
        shape: Sequence[int] = layer.normalized_shape  # type: ignore[assignment]
        return Kind(shape[0], "channels_last") if len(shape) == 1 else Kind()
    if is_a(nn.TransformerEncoderLayer):
        attention: Any = layer.self_attn
        return Kind(attention.embed_dim, "tokens") if attention.batch_first else Kind()
    if is_a(nn.TransformerEncoder):
        if layer.norm is not None and kind_of(layer.norm).layout is None:  # type: ignore[arg-type]
            return Kind()
        return kind_of(layer.layers[-1])  # type: ignore[index, arg-type]
    if is_a(nn.Sequential):
        for part in reversed(list(layer.children())):
            if not isinstance(part, _ELEMENTWISE):
                return kind_of(part)
    return Kind()


def pick(output: Any) -> tuple[Any, bool]:
    """The map or tokens in a layer's output, and whether three axes are known to be tokens."""
    if isinstance(output, Mapping):  # Hugging Face's outputs are OrderedDicts
        for name in ("out", "last_hidden_state", "feature_maps"):
            if name in output:
                found, are_tokens = pick(output[name])
                return found, are_tokens or name == "last_hidden_state"
        return output, False
    if isinstance(output, (tuple, list)) and output:
        if all(isinstance(item, Tensor) and item.ndim in (4, 5) for item in output):
            return output[-1], False
        several = len(output) > 1 and all(isinstance(item, Tensor) and item.ndim == 3 for item in output)
        return (output, False) if several else pick(output[0])
    return output, False


def check_layout(layout: Any) -> None:
    """One of the layouts, or None."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: expected {', '.join(map(repr, LAYOUTS))} or None, got {layout!r}")


def layout_of(features: Tensor, layout: str | None, kind: Kind, layer: str) -> str:
    """The layout that is said or known; by default channels come first."""
    layout = layout or kind.layout
    if layout == "channels_last" and features.ndim == 3:
        layout = "tokens"
    if layout is None and features.ndim == 3:
        raise ValueError(
            f"layer {layer!r}: its output {tuple(features.shape)} may be tokens (B, N, C) or a map (B, C, L), which no shape "
            'tells apart; pass layout="tokens" or layout="channels_first"'
        )
    if layout == "tokens" and features.ndim != 3:
        raise ValueError(
            f"layer {layer!r}: expected tokens (B, N, C), got an output {tuple(features.shape)}; pass another layout="
        )
    return layout or "channels_first"


def channel_axis(layout: str) -> int:
    """Which axis of the output the channels are."""
    return 1 if layout == "channels_first" else -1


def shape_text(axes: int, layout: str, channels: int) -> str:
    """The shape of an output in words, for errors."""
    spatial = {3: ["N" if layout == "tokens" else "L"], 4: ["H", "W"], 5: ["D", "H", "W"]}[axes]
    names = [str(channels), *spatial] if layout == "channels_first" else [*spatial, str(channels)]
    return f"(B, {', '.join(names)})"


def refuse_doubtful_map(features: Tensor, labels: Tensor, layer: str) -> None:
    """Raise where the labels' proportions say that channels are, or may be, at the end of a map whose layout nobody said."""
    size = labels.shape[1:]
    if len(size) != features.ndim - 2 or len(size) == 1:
        return
    is_first, is_last = (have_same_proportions(size, grid) for grid in (features.shape[2:], features.shape[1:-1]))
    if (is_last and not is_first) or is_scaled(features.shape[1:-1], size):
        first = "and as well" if is_first else "but not"
        raise ValueError(
            f"layer {layer!r}: its output {tuple(features.shape)} has the proportions of labels {tuple(labels.shape)} if "
            f'channels are at the end, {first} if they are axis 1; say which: layout="channels_last" or '
            'layout="channels_first"'
        )
