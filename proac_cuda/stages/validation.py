"""Every check of the public arguments, in one place. Errors name the argument, what came, what was expected, what to do.

:func:`check_options` and :func:`check_tensors` look at types, shapes, dtypes and scalars, never at the contents of a tensor;
:func:`raise_for_values` looks at what the kernels reported of the contents.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import struct
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from . import REDUCTIONS

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
NEGATIVE_REDUCTIONS = ("sum", "mean")
LABEL_SAMPLINGS = ("nearest", "nearest-exact")

_FLAGS = (
    {"": None} | dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
)
_NO_DISPATCH = Tensor.__torch_dispatch__
_PLAIN = {Tensor, Parameter, type(None)}

_warned: set[str] = set()
_looked = False  #: whether a call on a GPU has looked at the values of its labels


_PACKAGE, _TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)


def warn_once(key: str, message: str) -> None:
    """One warning per process and key, at the caller's line; none inside torch.compile, which traces a call once for many."""
    if torch.compiler.is_compiling() or key in _warned:
        return
    _warned.add(key)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, _TORCH)):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def environment_flag(name: str) -> bool | None:
    """What an environment variable says: on, off, or None where it is unset or empty."""
    value = os.environ.get(name, "").strip().lower()
    if value not in _FLAGS:
        raise ValueError(f"{name}: the environment variable is {os.environ[name]!r}, expected 1 or 0 (or unset)")
    return _FLAGS[value]


def looks_at_values(device: torch.device) -> bool:
    """Whether a call may look at the contents of labels and weights: on a GPU that waits for it, so there the first call alone.

    PROAC_CHECKS=1 makes every call look, PROAC_CHECKS=0 none on a GPU. While a CUDA graph is captured none does.
    """
    global _looked
    if device.type != "cuda":
        return True
    asked = environment_flag("PROAC_CHECKS")
    if asked is False or (asked is None and _looked) or torch.cuda.is_current_stream_capturing():
        return False
    _looked = True
    return True


def plain_tensors(*values: Any) -> tuple[Any, ...]:
    """Tensors of subclasses that only add methods and metadata (MONAI's MetaTensor, torchvision's Mask) without them.

    Subclasses that hold their values elsewhere (DTensor, fake tensors) stay as they are, as does what is no tensor.
    """
    return values if _PLAIN.issuperset(map(type, values)) else tuple(map(_plain, values))


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN or not isinstance(value, Tensor) or kind.__torch_dispatch__ is not _NO_DISPATCH:
        return value
    if hasattr(value, "to_local") and hasattr(value, "placements"):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def has_values(tensor: Tensor) -> bool:
    """Whether there is something in it: meta and fake tensors have a shape only."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def check_tensor(name: str, value: Any, dtypes: Sequence[torch.dtype]) -> None:
    """A dense tensor of one of the dtypes, and all of it here."""
    if not isinstance(value, Tensor):
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
            remedy = (
                f" of {len(value)} tensors; for several maps (deep supervision) call the loss once for each and add up, "
                "or pass one of them"
            )
        elif isinstance(value, Mapping):
            remedy = f"; pass one of its tensors, {name}[{next(iter(value), 'out')!r}] or another"
        else:
            is_array = isinstance(value, (list, tuple)) or hasattr(value, "__array__")
            remedy = f"; pass torch.as_tensor({name})" if is_array else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}{remedy}")
    if value.layout != torch.strided or value.is_nested or type(value).__name__ == "MaskedTensor":
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.").removeprefix("_")
        kind = "masked" if type(value).__name__ == "MaskedTensor" else kind
        remedy = _DENSE.get(kind, f"{name}.to_dense()").format(name)
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one; pass {remedy}")
    if value.dtype not in dtypes:
        remedy = f"; pass {name}.float()" if dtypes is FEATURE_DTYPES and not value.is_complex() else ""
        raise TypeError(f"{name}: expected one of {_names(dtypes)}, got {value.dtype}{remedy}")
    if type(value) is not Tensor and hasattr(value, "to_local") and hasattr(value, "placements"):
        if name in ("prototypes", "class_weight"):
            raise TypeError(f"{name}: got a DTensor, but each rank needs all classes; pass {name}.full_tensor()")
        raise TypeError(
            f"{name}: got a DTensor; pass its local part (.to_local()), and process_group= for a loss over all ranks"
        )


_DENSE = {"nested": "{0}.to_padded_tensor(...), with the padding's labels at ignore_index", "masked": "{0}.get_data()"}


def _raise_for_labels_dtype(labels: Tensor, features: Tensor, prototypes: Any) -> None:
    """The error has every step that makes labels of them; another layout has an error of its own."""
    if labels.layout != torch.strided:
        return
    remedy, shape = "labels.long()", labels.shape
    axis = _class_axis(labels, features, prototypes)
    if labels.ndim == features.ndim > 2 and shape[1] == 1:
        remedy = "labels.squeeze(1).long()"
    elif axis is not None:
        remedy = f"labels.argmax({axis}), as one-hot labels or probabilities of classes need"
    if labels.is_floating_point() and axis is None:
        remedy += "; where they were divided by 255, as ToTensor does, load them without"
    raise TypeError(
        f"labels: expected one of {_names(LABEL_DTYPES)}, got {labels.dtype} of shape {_shape(labels)}; pass {remedy}"
    )


def _class_axis(labels: Tensor, features: Tensor, prototypes: Any) -> int | None:
    """The axis of labels that has the length of the classes, where there is one axis too many."""
    if labels.ndim != features.ndim or not isinstance(prototypes, Tensor) or prototypes.ndim != 2:
        return None
    return next((axis for axis in (1, -1) if labels.shape[axis] == prototypes.shape[0] > 1), None)


def where_channels_are(features: Tensor, expected: int) -> str | None:
    """What to do where ``expected`` channels are not on axis 1 but on another, or None."""
    shape = features.shape
    if not 2 < len(shape) < 6 or shape[1] == expected:
        return None
    if shape[-1] == expected:
        remedy = "features.transpose(1, 2)" if len(shape) == 3 else "features.movedim(-1, 1)"
        return f"channels come after the batch, and here they seem to be at the end: pass {remedy}"
    if shape[0] == expected:
        return "there seems to be no batch axis: pass features[None] and labels[None]"
    return None


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """A finite real number, >= 0, or > 0 where ``positive``."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Python float, got a tensor of dtype {value.dtype}; pass {name}.item()")
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):  # NumPy's are Real
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    number = float(value)
    if not (0 < number < math.inf if positive else 0 <= number < math.inf):  # NaN fails both
        raise ValueError(f"{name}: expected a finite number {'> 0' if positive else '>= 0'}, got {value}")


def as_int(name: str, value: Any, minimum: int | None = None, maximum: int | None = None, remedy: str = "") -> int:
    """An int, or a NumPy integer as one, within the limits; no bool, no tensor, no float."""
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        number = cast(int, value) if isinstance(value, (int, torch.SymInt)) else operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected an int") from None
    if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        expected = f"an int >= {minimum}" if maximum is None else f"an int from {minimum} to {maximum}"
        raise ValueError(f"{name}: got {number}, expected {expected}{remedy}")
    return number


def as_seed(value: Any) -> int:
    """An int of 64 bits, signed or not."""
    return as_int("seed", value, -(2**63), 2**64 - 1)


def check_options(
    *,
    temperature: Any,
    ignore_index: Any,
    num_negatives: Any,
    negative_reduction: Any,
    pixel_anchor_weight: Any,
    label_sampling: Any,
    seed: Any,
    reduction: Any,
    process_group: Any,
) -> tuple[int, int | None, int | Tensor | None]:
    """The :class:`~proac_cuda.stages.options.LossOptions`; the module checks them when it is made.

    Gives ignore_index, num_negatives and seed, NumPy's integers as ints.
    """
    check_number("temperature", temperature, positive=True)
    check_number("pixel_anchor_weight", pixel_anchor_weight)
    ignore_index = as_int("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    if num_negatives is not None:
        num_negatives = as_int("num_negatives", num_negatives, 1, 2**63 - 1, "; None takes all negatives")
    if negative_reduction not in NEGATIVE_REDUCTIONS:
        raise ValueError(f'negative_reduction: expected "sum" or "mean", got {negative_reduction!r}')
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    check_label_sampling(label_sampling)
    if reduction == "none" and pixel_anchor_weight > 0:
        raise ValueError(
            f'pixel_anchor_weight: got {pixel_anchor_weight} with reduction="none", but the pixel-anchored term is one '
            'number and has no value per class; use reduction="mean" or "sum", or pixel_anchor_weight=0'
        )
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int64 tensor of one element, got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed: expected an int64 tensor of one element, got shape {_shape(seed)}")
    elif seed is not None:
        seed = as_seed(seed)
    _check_process_group(process_group)
    return ignore_index, num_negatives, seed


def check_label_sampling(label_sampling: Any) -> None:
    """One of the two rules."""
    if label_sampling not in LABEL_SAMPLINGS:
        raise ValueError(f'label_sampling: expected "nearest" or "nearest-exact", got {label_sampling!r}')


def _check_process_group(group: Any) -> None:
    if group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return
    if dist.is_available() and isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group: this rank is no member of the group; make the call on its members only, "
            "or pass None for the loss of this rank's pixels"
        )
    remedy = "; pass its group, .get_group()" if hasattr(group, "get_group") else ""
    raise TypeError(
        f"process_group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}{remedy}"
    )


def check_tensors(features: Any, labels: Any, prototypes: Any, pixel_weight: Any, class_weight: Any, seed: Any) -> None:
    """Types, dtypes, shapes and devices of the tensors of a call."""
    check_tensor("features", features, FEATURE_DTYPES)
    if isinstance(labels, Tensor) and labels.dtype not in LABEL_DTYPES:
        _raise_for_labels_dtype(labels, features, prototypes)
    check_tensor("labels", labels, LABEL_DTYPES)
    check_tensor("prototypes", prototypes, FEATURE_DTYPES)
    size, label_size, num_axes = features.shape, labels.shape, features.ndim  # of each a new object at every look
    if not (num_axes == 2 or 3 <= num_axes <= 5):
        raise ValueError(
            "features: expected (N, D), or (B, D, *spatial) with 1 to 3 spatial axes, "
            f"got shape {_shape(features)} with labels {_shape(labels)}"
        )
    expected = num_axes - 1
    if (axis := _class_axis(labels, features, prototypes)) is not None:
        raise ValueError(
            f"labels: got shape {_shape(labels)} with features {_shape(features)}; one-hot labels, or probabilities of "
            f"the {prototypes.shape[0]} classes: pass labels.argmax({axis})"
        )
    if len(label_size) == num_axes and len(label_size) > 2 and label_size[1] == 1:
        raise ValueError(
            f"labels: got shape {_shape(labels)} with features {_shape(features)}; "
            "labels have no channel axis: pass labels.squeeze(1)"
        )
    if len(label_size) != expected:
        remedy = ""
        if len(label_size) == num_axes and label_size[-1] == 1:
            remedy = "; pass labels.squeeze(-1)"
        elif len(label_size) == num_axes > 3 and 3 in (label_size[1], label_size[-1]):
            remedy = "; a picture in colours? Map each colour to the number of its class"
        raise ValueError(
            f"labels: expected {expected} axes, (B, *spatial) of any spatial size, for features of shape "
            f"{_shape(features)}, got shape {_shape(labels)}{remedy}"
        )
    if label_size[0] != size[0]:
        raise ValueError(
            f"labels: batch size {label_size[0]} of shape {_shape(labels)} does not match that of features, "
            f"{size[0]} of shape {_shape(features)}"
        )
    for axis in range(1, len(label_size)):
        if label_size[axis] == 0 and size[axis + 1] != 0:
            raise ValueError(
                f"labels: axis {axis} of shape {_shape(labels)} is empty, so that no pixel of features "
                f"{_shape(features)} has a label"
            )
    if label_size[1:] != size[2:]:
        _check_proportions(features, labels)
    if prototypes.ndim != 2 or prototypes.shape[0] == 0:
        raise ValueError(
            f"prototypes: expected (K, D) with K >= 1, got shape {_shape(prototypes)} with features {_shape(features)}"
        )
    if prototypes.shape[1] != size[1] and (other_axis := where_channels_are(features, prototypes.shape[1])):
        raise ValueError(f"features: got shape {_shape(features)} with prototypes {_shape(prototypes)}; {other_axis}")
    if prototypes.shape[1] != size[1] or size[1] == 0:
        raise ValueError(
            f"prototypes: expected (K, {size[1]}), D being axis 1 of features {_shape(features)}, "
            f"got shape {_shape(prototypes)}" + ("; pass prototypes.t()" if prototypes.shape[0] == size[1] else "")
        )
    if pixel_weight is not None:
        check_tensor("pixel_weight", pixel_weight, FEATURE_DTYPES)
        if pixel_weight.shape != label_size:
            remedy = ""
            if pixel_weight.ndim == len(label_size) + 1 and pixel_weight.shape[1] == 1:
                remedy = "; pass pixel_weight.squeeze(1)"
            elif pixel_weight.shape == size[:1] + size[2:]:
                remedy = "; bring it from the features' resolution to that of the labels, as by interpolate"
            raise ValueError(
                f"pixel_weight: expected the shape of labels, {_shape(labels)}, got {_shape(pixel_weight)}{remedy}"
            )
    if class_weight is not None:
        check_tensor("class_weight", class_weight, FEATURE_DTYPES)
        if class_weight.shape != prototypes.shape[:1]:
            raise ValueError(
                f"class_weight: expected shape ({prototypes.shape[0]},), one for each row of prototypes "
                f"{_shape(prototypes)}, got {_shape(class_weight)}"
            )
    device = features.device
    others = (labels, prototypes, pixel_weight, class_weight, seed)
    for name, tensor in zip(("labels", "prototypes", "pixel_weight", "class_weight", "seed"), others, strict=True):
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise ValueError(
                f"{name}: is on {tensor.device}, but features are on {device}; pass {name}.to(features.device)"
            )
    if pixel_weight is not None:
        check_needs_no_gradient("pixel_weight", pixel_weight)
    if class_weight is not None:
        check_needs_no_gradient("class_weight", class_weight)


def _check_proportions(features: Tensor, labels: Tensor) -> None:
    """One warning where labels and features differ in proportions."""
    if "proportions" in _warned or torch.compiler.is_compiling():
        return
    if have_same_proportions(labels.shape[1:], features.shape[2:]):
        return
    warn_once(
        "proportions",
        f"labels of shape {_shape(labels)} and features of shape {_shape(features)} differ in proportions: are the labels "
        "transposed, or the features channels-last (B, *spatial, D)? If the strides of the axes differ, all is well",
    )


def have_same_proportions(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one stride, the same along all axes, leads from one grid to the other within a pixel of the smaller one."""
    if all(a * other[0] == b * size[0] for a, b in zip(size, other, strict=True)):
        return True
    least, most = 0.0, math.inf  # what the stride may be, from ``other`` to ``size``
    for a, b in zip(size, other, strict=True):
        if a == 0 or b == 0:
            return True  # of nothing
        if a >= b:
            low, high = a / (b + 1), a / (b - 1) if b > 1 else math.inf
        else:
            low, high = (a - 1) / b, (a + 1) / b
        least, most = max(least, low), min(most, high)
    return least <= most


def check_needs_no_gradient(name: str, weight: Tensor) -> None:
    """Weights get none."""
    if weight.requires_grad:
        raise ValueError(f"{name}: requires a gradient, which the loss does not give; pass {name}.detach()")


def check_ignore_index(ignore_index: int, num_classes: int) -> None:
    """One warning where the ignored label is a class of its own: it is allowed, as in cross_entropy."""
    if 0 <= ignore_index < num_classes:
        warn_once(
            f"ignore_index={ignore_index} of {num_classes}",
            f"ignore_index={ignore_index} is one of the {num_classes} classes: that class is never present, neither as "
            "a positive nor as a negative",
        )


def raise_for_values(
    diagnostics: Tensor, class_weight: Tensor | None, prototypes: Tensor, error: type[Exception] = ValueError
) -> None:
    """Raise for what stage (i) found in labels and pixel_weight, and for class_weight, all in the dtype of ``prototypes``.

    Reads the tensors: it synchronises.
    """
    bad_labels, label, bad_weights, weight_bits = diagnostics.tolist()
    if bad_labels:
        num_classes = prototypes.shape[0]
        remedy = f"map it to a class or to ignore_index, or check K, the number of prototypes, which is {num_classes}"
        if label in (-1, -100):
            remedy = f"if it marks pixels to ignore, pass ignore_index={label}"
        elif num_classes == 1:
            remedy = "background and foreground are two classes: K, the number of prototypes, is 1 and should be 2"
        elif label == num_classes:
            remedy = f"K, the number of prototypes, is {num_classes}: if class ids start at 1, pass labels - 1, else use more"
        raise error(f"labels: {label} is neither in [0, K) nor ignore_index (pixels like that: {bad_labels}); {remedy}")
    if bad_weights:
        weight = struct.unpack("d", struct.pack("q", weight_bits))[0]
        raise error(
            f"pixel_weight: expected numbers >= 0 that are finite in {_names([prototypes.dtype])}, got {weight} "
            f"(pixels like that: {bad_weights}); 0 ignores a pixel"
        )
    if class_weight is not None:
        raise_for_class_weights(class_weight, error)


def raise_for_class_weights(class_weight: Tensor, error: type[Exception] = ValueError) -> None:
    """Raise for class weights, in the dtype of the computation, that are negative, infinite or NaN. It synchronises."""
    for weight in class_weight.tolist():
        if not (weight >= 0 and math.isfinite(weight)):
            name = _names([class_weight.dtype])
            raise error(f"class_weight: expected numbers >= 0 that are finite in {name}, got {weight}")
