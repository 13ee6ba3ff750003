"""The loss as a module that holds its prototypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .autograd import ProACStats
from .functional import proac_loss
from .prototypes import uniform_prototypes
from .validation import FEATURE_DTYPES, check_options


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
            backend, return_stats and process_group, as in :func:`proac_loss`.

    Prototypes and class weights stay float32 under ``.half()``, ``.bfloat16()`` and ``.double()``; they move with
    ``.to(device)``.

    Example::

        proac = ProACLoss(num_classes=19, embedding_dim=256).to(device)
        loss = cross_entropy + 0.1 * proac(head(features), labels)
    """

    prototypes: Tensor
    class_weight: Tensor | None

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
    ) -> None:
        super().__init__()
        check_options(
            temperature, ignore_index, num_negatives, negative_reduction, pixel_anchor_weight, seed, reduction
        )
        if prototypes is None:
            prototypes = uniform_prototypes(num_classes, embedding_dim, seed=prototype_seed)
        elif prototypes.shape != (num_classes, embedding_dim):
            raise ValueError(
                f"prototypes: expected shape ({num_classes}, {embedding_dim}), (num_classes, embedding_dim), "
                f"got {tuple(prototypes.shape)}"
            )
        elif prototypes.dtype not in FEATURE_DTYPES:
            raise TypeError(f"prototypes: expected a real floating-point tensor, got {prototypes.dtype}")
        values = prototypes.detach().to(torch.float32, copy=True)
        if learnable:
            self.prototypes = nn.Parameter(values)
        else:
            self.register_buffer("prototypes", values)
        if class_weight is not None:
            class_weight = class_weight.detach().to(torch.float32, copy=True)
            if class_weight.shape != (num_classes,):
                raise ValueError(f"class_weight: expected shape ({num_classes},), got {tuple(class_weight.shape)}")
        self.register_buffer("class_weight", class_weight)
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.num_negatives = num_negatives
        self.negative_reduction = negative_reduction
        self.pixel_anchor_weight = pixel_anchor_weight
        self.seed = seed
        self.reduction = reduction
        self.backend = backend
        self.return_stats = return_stats
        self.process_group = process_group

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
        )

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> ProACLoss:
        """As nn.Module's, but float32 stays float32: .half() is for the network, not for the anchors."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            if moved.dtype == tensor.dtype or not moved.is_floating_point():
                return moved
            return tensor.to(moved.device)

        super()._apply(keep_float32, recurse)
        return self

    def extra_repr(self) -> str:
        options = ("temperature", "ignore_index", "num_negatives", "negative_reduction", "pixel_anchor_weight")
        shown = [f"num_classes={self.num_classes}", f"embedding_dim={self.embedding_dim}"]
        shown += [f"{name}={getattr(self, name)!r}" for name in options]
        return ", ".join([*shown, f"reduction={self.reduction!r}", f"backend={self.backend!r}"])
