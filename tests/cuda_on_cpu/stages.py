"""The five stages on CPU tensors, computed by the CUDA kernels on the CPU: a backend "cuda_on_cpu" for the tests."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import build

module: ModuleType = build.load(Path(os.environ.get("PROAC_CUDA_ON_CPU") or build.build()))


def _array(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array))


def select_negatives(
    features: Tensor, labels: Tensor, pixel_weight: Tensor | None, rng_state: Tensor, *options: Any
) -> Tensor:
    is_double = features.dtype == torch.float64
    arrays = map(_array, (labels, pixel_weight, rng_state))
    return _tensor(module.select_negatives(list(features.shape[2:]), is_double, *arrays, *options))


def class_statistics(features: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors = map(_array, arguments[:5])
    out = module.class_statistics(_array(features), _type(features), *tensors, *arguments[5:])
    return tuple(map(_tensor, out))


def positive_sums(*arguments: Any) -> Tensor:
    return _tensor(module.positive_sums(*map(_array, arguments[:4]), *arguments[4:]))


def reduce_loss(*arguments: Any) -> Tensor:
    return _tensor(module.reduce_loss(*map(_array, arguments[:3]), *arguments[3:]))


def loss_gradients(features: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *values, features_need_grad, prototypes_need_grad = arguments
    prototypes = values[2]
    grad_features = torch.empty_like(features) if features_need_grad else None
    grad_prototypes = torch.empty_like(prototypes) if prototypes_need_grad else None
    module.loss_gradients(
        _array(features), _type(features), *map(_array, values[:9]), *values[9:],
        _array(grad_features), _array(grad_prototypes),
    )  # fmt: skip
    nothing = features.new_empty(0), prototypes.new_empty(0)
    return (
        nothing[0] if grad_features is None else grad_features,
        nothing[1] if grad_prototypes is None else grad_prototypes,
    )
