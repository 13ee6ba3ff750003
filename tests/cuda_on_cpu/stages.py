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
    features: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    rng_state: Tensor,
    num_negatives: int,
    num_classes: int,
    ignore_index: int,
    nearest_exact: bool = False,
) -> Tensor:
    is_double = features.dtype == torch.float64
    arrays = map(_array, (labels, pixel_weight, rng_state))
    options = num_negatives, num_classes, ignore_index, nearest_exact
    return _tensor(module.select_negatives(list(features.shape[2:]), is_double, *arrays, *options))


def class_statistics(
    features: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    prototypes: Tensor,
    thresholds: Tensor | None,
    rng_state: Tensor | None,
    temperature: float,
    ignore_index: int,
    pixel_anchor: bool,
    hardest_negative: bool,
    nearest_exact: bool = False,
) -> tuple[Tensor, ...]:
    arrays = map(_array, (labels, pixel_weight, prototypes, thresholds, rng_state))
    options = temperature, ignore_index, pixel_anchor, hardest_negative, nearest_exact
    return tuple(map(_tensor, module.class_statistics(_array(features), _type(features), *arrays, *options)))


def positive_sums(
    positive: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    negative_mean: bool,
    nearest_exact: bool = False,
) -> Tensor:
    arrays = map(_array, (positive, labels, pixel_weight, statistics))
    return _tensor(module.positive_sums(*arrays, ignore_index, negative_mean, nearest_exact))


def reduce_loss(*arguments: Any) -> Tensor:
    return _tensor(module.reduce_loss(*map(_array, arguments[:3]), *arguments[3:]))


def loss_forward(
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
) -> tuple[Tensor, ...]:
    arrays = map(_array, (labels, pixel_weight, prototypes, class_weight, thresholds, rng_state))
    options = temperature, ignore_index, negative_mean, pixel_anchor_weight, reduction, hardest_negative, nearest_exact
    return tuple(map(_tensor, module.loss_forward(_array(features), _type(features), *arrays, *options)[:4]))


def loss_gradients(
    features: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    prototypes: Tensor,
    thresholds: Tensor | None,
    rng_state: Tensor | None,
    statistics: Tensor,
    sums: Tensor,
    class_weight: Tensor | None,
    grad_loss: Tensor,
    temperature: float,
    ignore_index: int,
    negative_mean: bool,
    pixel_anchor_weight: float,
    reduction: int,
    features_need_grad: bool,
    prototypes_need_grad: bool,
    nearest_exact: bool = False,
) -> tuple[Tensor, Tensor]:
    tensors = labels, pixel_weight, prototypes, thresholds, rng_state, statistics, sums, class_weight, grad_loss
    options = temperature, ignore_index, negative_mean, pixel_anchor_weight, reduction, nearest_exact
    grad_features = torch.empty_like(features) if features_need_grad else None
    grad_prototypes = torch.empty_like(prototypes) if prototypes_need_grad else None
    module.loss_gradients(
        _array(features), _type(features), *map(_array, tensors), *options,
        _array(grad_features), _array(grad_prototypes),
    )  # fmt: skip
    nothing = features.new_empty(0), prototypes.new_empty(0)
    return (
        nothing[0] if grad_features is None else grad_features,
        nothing[1] if grad_prototypes is None else grad_prototypes,
    )
