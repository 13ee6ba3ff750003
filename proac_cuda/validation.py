"""Every check of the public arguments, in one place. Errors name the argument, what came, what was expected, what to do.

:func:`check_options` and :func:`check_tensors` look at types, shapes, dtypes and scalars, never at the contents of a tensor;
:func:`raise_for_values` looks at what the kernels reported of the contents.
"""

from __future__ import annotations

import math
import operator
import struct
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .stages import REDUCTIONS

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
NEGATIVE_REDUCTIONS = ("sum", "mean")
LABEL_SAMPLINGS = ("nearest", "nearest-exact")

_warned: set[str] = set()


def warn_once(key: str, message: str) -> None:
    """One warning per process and key; none from inside torch.compile, which traces a call once for many."""
    if not torch.compiler.is_compiling() and key not in _warned:
        _warned.add(key)
        warnings.warn(message, UserWarning, stacklevel=4)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def has_values(tensor: Tensor) -> bool:
    """Whether there is something in it: meta and fake tensors have a shape only."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def check_tensor(name: str, value: Any, dtypes: Sequence[torch.dtype]) -> None:
    """A tensor of one of the dtypes, and all of it here."""
    if not isinstance(value, Tensor):
        is_array = isinstance(value, (list, tuple)) or hasattr(value, "__array__")
        remedy = f"; pass torch.as_tensor({name})" if is_array else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}{remedy}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {_names(dtypes)}, got {value.dtype}")
    if hasattr(value, "to_local") and hasattr(value, "placements"):
        if name in ("prototypes", "class_weight"):
            raise TypeError(f"{name}: got a DTensor, but each rank needs all classes; pass {name}.full_tensor()")
        raise TypeError(
            f"{name}: got a DTensor; pass its local part (.to_local()), and process_group= for a loss over all ranks"
        )


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """A finite real number, >= 0, or > 0 where ``positive``."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Python float, got a tensor of dtype {value.dtype}; pass {name}.item()")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not (0 < value < math.inf if positive else 0 <= value < math.inf):  # NaN fails both
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
    temperature: Any,
    ignore_index: Any,
    num_negatives: Any,
    negative_reduction: Any,
    pixel_anchor_weight: Any,
    seed: Any,
    reduction: Any,
    process_group: Any,
    label_sampling: Any,
) -> tuple[int, int | None, int | Tensor | None]:
    """The options which do not depend on the tensors of a call; the module checks them when it is made.

    Gives ignore_index, num_negatives and seed, NumPy's integers as ints.
    """
    check_number("temperature", temperature, positive=True)
    check_number("pixel_anchor_weight", pixel_anchor_weight)
    ignore_index = as_int("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    if num_negatives is not None:
        num_negatives = as_int("num_negatives", num_negatives, 1, 2**63 - 1, "; None takes all negatives")
    if negative_reduction not in NEGATIVE_REDUCTIONS:
        raise ValueError(f'negative_reduction: expected "sum" or "mean", got {negative_reduction!r}')
    if reduction not in REDUCTIONS:
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
    check_tensor("labels", labels, LABEL_DTYPES)
    check_tensor("prototypes", prototypes, FEATURE_DTYPES)
    if not (features.ndim == 2 or 3 <= features.ndim <= 5):
        raise ValueError(
            "features: expected (N, D), or (B, D, *spatial) with 1 to 3 spatial axes, "
            f"got shape {_shape(features)} with labels {_shape(labels)}"
        )
    expected = features.ndim - 1
    if labels.ndim == features.ndim and labels.ndim > 2 and labels.shape[1] == 1:
        raise ValueError(
            f"labels: got shape {_shape(labels)} with features {_shape(features)}; "
            "labels have no channel axis: pass labels.squeeze(1)"
        )
    if labels.ndim != expected:
        raise ValueError(
            f"labels: expected {expected} axes, (B, *spatial) of any spatial size, for features of shape "
            f"{_shape(features)}, got shape {_shape(labels)}"
        )
    if labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"labels: batch size {labels.shape[0]} of shape {_shape(labels)} does not match that of features, "
            f"{features.shape[0]} of shape {_shape(features)}"
        )
    for axis in range(1, labels.ndim):
        if labels.shape[axis] == 0 and features.shape[axis + 1] != 0:
            raise ValueError(
                f"labels: axis {axis} of shape {_shape(labels)} is empty, so that no pixel of features "
                f"{_shape(features)} has a label"
            )
    if prototypes.ndim != 2 or prototypes.shape[0] == 0:
        raise ValueError(
            f"prototypes: expected (K, D) with K >= 1, got shape {_shape(prototypes)} with features {_shape(features)}"
        )
    if prototypes.shape[1] != features.shape[1] or features.shape[1] == 0:
        raise ValueError(
            f"prototypes: expected (K, {features.shape[1]}), D being axis 1 of features {_shape(features)}, "
            f"got shape {_shape(prototypes)}"
        )
    if pixel_weight is not None:
        check_tensor("pixel_weight", pixel_weight, FEATURE_DTYPES)
        if pixel_weight.shape != labels.shape:
            raise ValueError(
                f"pixel_weight: expected the shape of labels, {_shape(labels)}, got {_shape(pixel_weight)}"
            )
    if class_weight is not None:
        check_tensor("class_weight", class_weight, FEATURE_DTYPES)
        if class_weight.shape != prototypes.shape[:1]:
            raise ValueError(
                f"class_weight: expected shape ({prototypes.shape[0]},), one for each row of prototypes "
                f"{_shape(prototypes)}, got {_shape(class_weight)}"
            )
    others = {
        "labels": labels,
        "prototypes": prototypes,
        "pixel_weight": pixel_weight,
        "class_weight": class_weight,
        "seed": seed,
    }
    for name, tensor in others.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device != features.device:
            raise ValueError(
                f"{name}: is on {tensor.device}, but features are on {features.device}; pass {name}.to(features.device)"
            )
        if name.endswith("_weight"):
            check_needs_no_gradient(name, tensor)


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
    diagnostics: Tensor, class_weight: Tensor | None, dtype: torch.dtype, error: type[Exception] = ValueError
) -> None:
    """Raise for what stage (i), computing in ``dtype``, found in labels and pixel_weight, and for class_weight.

    Reads the tensors: it synchronises.
    """
    bad_labels, label, bad_weights, weight_bits = diagnostics.tolist()
    if bad_labels:
        raise error(
            f"labels: {label} is neither in [0, K) nor ignore_index (pixels like that: {bad_labels}); "
            "map it to a class or to ignore_index, or check K, the number of prototypes"
        )
    if bad_weights:
        weight = struct.unpack("d", struct.pack("q", weight_bits))[0]
        raise error(
            f"pixel_weight: expected numbers >= 0 that are finite in {_names([dtype])}, got {weight} "
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
