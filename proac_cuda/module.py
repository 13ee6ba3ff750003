"""The loss as a module that holds its prototypes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .autograd import ProACStats
from .backends import check_name
from .functional import proac_loss
from .prototypes import uniform_prototypes
from .validation import (
    FEATURE_DTYPES,
    check_needs_no_gradient,
    check_options,
    check_tensor,
    has_values,
    raise_for_class_weights,
    warn_once,
)


class ProACLoss(nn.Module):
    """:func:`proac_loss` with its prototypes: fixed, spread uniformly over the hypersphere, saved in ``state_dict``.

    Args:
        num_classes: K.
        embedding_dim: D, the channels of the features.
        prototypes: (K, D) to use instead of :func:`uniform_prototypes`; copied, and kept in float32.
        prototype_seed: seed of their random rotation.
        learnable: make them a Parameter. They are a buffer otherwise.
        class_weight: (K,) tensor, a buffer.
        **options: temperature, ignore_index, num_negatives, negative_reduction, pixel_anchor_weight, seed, reduction,
            backend, return_stats, process_group and label_sampling, as in :func:`proac_loss`.

    Prototypes and class weights stay float32 under ``.half()``, ``.bfloat16()`` and ``.double()``; they move with
    ``.to(device)``, as a seed tensor does, which ``state_dict`` leaves out. A copy shares the process group; a pickle
    holds none: set ``process_group`` again after loading.

    Raises:
        TypeError, ValueError: when it is made, for all that :func:`proac_loss` would refuse of its options.

    Example::

        proac = ProACLoss(num_classes=19, embedding_dim=256).to(device)
        loss = cross_entropy + 0.1 * proac(head(features), labels)
    """

    prototypes: Tensor
    class_weight: Tensor | None
    seed: int | Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        prototypes: Tensor | None = None,
        prototype_seed: int = 0,
        learnable: bool = False,
        temperature: float = 0.1,
        ignore_index: int = 255,
        class_weight: Tensor | None = None,
        num_negatives: int | None = None,
        negative_reduction: str = "sum",
        pixel_anchor_weight: float = 0.0,
        seed: int | Tensor | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        return_stats: bool = False,
        process_group: Any = None,
        label_sampling: str = "nearest",
    ) -> None:
        super().__init__()
        ignore_index, num_negatives, seed = check_options(
            temperature,
            ignore_index,
            num_negatives,
            negative_reduction,
            pixel_anchor_weight,
            seed,
            reduction,
            process_group,
            label_sampling,
        )
        check_name(backend)
        if prototypes is None:
            prototypes = uniform_prototypes(num_classes, embedding_dim, seed=prototype_seed)
        check_tensor("prototypes", prototypes, FEATURE_DTYPES)
        if prototypes.shape != (num_classes, embedding_dim):
            raise ValueError(
                f"prototypes: expected shape ({num_classes}, {embedding_dim}), (num_classes, embedding_dim), "
                f"got {tuple(prototypes.shape)}"
            )
        values = prototypes.detach().to(torch.float32, copy=True)
        if learnable:
            self.prototypes = nn.Parameter(values)
        else:
            self.register_buffer("prototypes", values)
        if class_weight is not None:
            check_tensor("class_weight", class_weight, FEATURE_DTYPES)
            check_needs_no_gradient("class_weight", class_weight)
            if class_weight.shape != (num_classes,):
                raise ValueError(f"class_weight: expected shape ({num_classes},), got {tuple(class_weight.shape)}")
            class_weight = class_weight.to(torch.float32, copy=True)
            if has_values(class_weight):
                raise_for_class_weights(class_weight)
        self.register_buffer("class_weight", class_weight)
        if isinstance(seed, Tensor):
            self.register_buffer("seed", seed, persistent=False)
        else:
            self.seed = seed
        # reset_parameters goes back to these; a module made on the meta device gets them by it
        self._initial = {
            name: tensor.detach().clone() for name, tensor in (*self.named_parameters(), *self.named_buffers())
        }
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.num_negatives = num_negatives
        self.negative_reduction = negative_reduction
        self.pixel_anchor_weight = pixel_anchor_weight
        self.reduction = reduction
        self.backend = backend
        self.return_stats = return_stats
        self.process_group = process_group
        self.label_sampling = label_sampling

    def forward(
        self, features: Tensor, labels: Tensor, pixel_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ProACStats]:
        r"""The loss of (B, D, \*spatial) features and (B, \*any size) labels; see :func:`proac_loss`."""
        return proac_loss(
            features,
            labels,
            self.prototypes,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            pixel_weight=pixel_weight,
            class_weight=self.class_weight,
            num_negatives=self.num_negatives,
            negative_reduction=self.negative_reduction,
            pixel_anchor_weight=self.pixel_anchor_weight,
            seed=self.seed,
            reduction=self.reduction,
            backend=self.backend,
            return_stats=self.return_stats,
            process_group=self.process_group,
            label_sampling=self.label_sampling,
        )

    def reset_parameters(self) -> None:
        """Prototypes, class weights and a seed tensor as they were when the module was made; for use after ``to_empty()``."""
        with torch.no_grad():
            for name, value in self._initial.items():
                getattr(self, name).copy_(value)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> ProACLoss:
        """As nn.Module's, but float32 stays float32: .half() is for the network, not for the anchors."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            if moved.dtype == tensor.dtype or not moved.is_floating_point():
                return moved
            return tensor.to(moved.device)

        super()._apply(keep_float32, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """As nn.Module's, but float32 stays float32: ``assign=True`` would take the checkpoint's dtype."""
        for name in ("prototypes", "class_weight"):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.dtype != torch.float32:
                state_dict[prefix + name] = value.detach().to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> ProACLoss:
        """Shares the process group, of which there are no copies."""
        copied = type(self).__new__(type(self))
        memo |= {id(self): copied, id(self.process_group): self.process_group}
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            warn_once(
                "pickled process_group",
                "ProACLoss: its process_group is not part of the pickle; set module.process_group again after loading, "
                "or each rank has a loss of its own",
            )
        return {**self.__dict__, "process_group": None}

    def extra_repr(self) -> str:
        options = (
            "temperature",
            "ignore_index",
            "num_negatives",
            "negative_reduction",
            "pixel_anchor_weight",
            "label_sampling",
        )
        shown = [f"num_classes={self.num_classes}", f"embedding_dim={self.embedding_dim}"]
        shown += [f"{name}={getattr(self, name)!r}" for name in options]
        return ", ".join([*shown, f"reduction={self.reduction!r}", f"backend={self.backend!r}"])
