"""The loss as a module that holds its prototypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .backends import check_name
from .functional import proac_loss
from .initial_values import KeepsInitialValues, why_no_direction
from .prototypes import uniform_prototypes
from .stages.options import CALL_OPTIONS, LOSS_OPTIONS
from .stages.validation import (
    FEATURE_DTYPES,
    check_needs_no_gradient,
    check_options,
    check_tensor,
    has_values,
    raise_for_class_weights,
    warn_once,
    where_channels_are,
)
from .statistics import ProACStats

#: What makes a module the loss that it is: the same on all ranks, and what its repr shows.
_SETTINGS = (
    "num_classes",
    "embedding_dim",
    *(name for name in LOSS_OPTIONS if name not in ("seed", "process_group")),  # rank 0's seed is used
)


class ProACLoss(KeepsInitialValues):
    """:func:`proac_loss` with its prototypes: fixed, spread uniformly over the hypersphere, saved in ``state_dict``.

    Args:
        num_classes: K.
        embedding_dim: D, the channels of the features.
        prototypes: (K, D) to use instead of :func:`uniform_prototypes`; copied, and kept in float32.
        prototype_seed: seed of their random rotation.
        learnable: make them a Parameter. They are a buffer otherwise.
        class_weight: (K,) tensor, a buffer.
        **options: all others are those of :func:`proac_loss`.

    Prototypes and class weights stay float32 under ``.half()``, ``.bfloat16()`` and ``.double()``; they move with
    ``.to(device)``, as a seed tensor does, which ``state_dict`` leaves out. A copy shares the process group; a pickle
    holds none: set ``process_group`` again after loading.

    Frameworks that make a model without memory (``to_empty()``, Hugging Face's ``from_pretrained``) leave what no checkpoint
    fills as the memory was. The first call afterwards looks: prototypes of the module's own making come back, with a
    warning; prototypes, class weights and a seed tensor that were given to it raise, and :meth:`reset_parameters` brings
    them back. What was trained, loaded or written in place is never touched.

    Raises:
        TypeError, ValueError: when it is made, for all that :func:`proac_loss` would refuse of its options; ValueError when it
            is made with prototypes that have no direction; and when it is called, for tensors that nobody filled, and for
            features of other than ``embedding_dim`` channels.

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
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.temperature = temperature
        self.negative_reduction = negative_reduction
        self.pixel_anchor_weight = pixel_anchor_weight
        self.label_sampling = label_sampling
        self.reduction = reduction
        self.process_group = process_group
        self.backend = backend
        self.return_stats = return_stats
        self.ignore_index, self.num_negatives, self.seed = ignore_index, num_negatives, seed
        checked = check_options(**{name: getattr(self, name) for name in LOSS_OPTIONS})
        self.ignore_index, self.num_negatives, self.seed = checked
        check_name(backend)
        self._makes_prototypes = prototypes is None
        if prototypes is None:
            prototypes = uniform_prototypes(num_classes, embedding_dim, seed=prototype_seed)
        check_tensor("prototypes", prototypes, FEATURE_DTYPES)
        if prototypes.shape != (num_classes, embedding_dim):
            raise ValueError(
                f"prototypes: expected shape ({num_classes}, {embedding_dim}), (num_classes, embedding_dim), "
                f"got {tuple(prototypes.shape)}"
            )
        given = not self._makes_prototypes and has_values(prototypes)
        if given and (reason := why_no_direction(prototypes, unit=False)):
            raise ValueError(
                f"prototypes: {reason}: no direction to draw pixels to; pass rows that are finite and not 0"
            )
        if num_classes == 1:
            warn_once(
                "one class",
                "num_classes=1: one class has no negatives, and the loss is always 0; background and foreground are two",
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
            del self.seed
            self.register_buffer("seed", seed, persistent=False)
        self._remember()

    def forward(
        self, features: Tensor, labels: Tensor, pixel_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ProACStats]:
        r"""The loss of (B, D, \*spatial) features and (B, \*any size) labels; see :func:`proac_loss`."""
        self._look_if_needed()
        if (
            isinstance(features, Tensor)
            and not features.is_nested
            and features.ndim > 1
            and features.shape[1] != self.embedding_dim
        ):
            remedy = where_channels_are(features, self.embedding_dim) or (
                f"make it with embedding_dim={features.shape[1]}, or give the features a head of {self.embedding_dim} output "
                "channels"
            )
            raise ValueError(
                f"features: got shape {tuple(features.shape)}, which has {features.shape[1]} channels (axis 1), but this "
                f"module was made with embedding_dim={self.embedding_dim}: {remedy}"
            )
        return proac_loss(
            features,
            labels,
            self.prototypes,
            pixel_weight=pixel_weight,
            class_weight=self.class_weight,
            return_stats=self.return_stats,
            **{name: getattr(self, name) for name in CALL_OPTIONS},
        )

    def same_on_all_ranks(self) -> dict[str, Any]:
        """What has to be the same on all ranks, by name; :func:`proac_cuda.distributed.check_ranks` compares it."""
        names = (*_SETTINGS, "class_weight", "prototypes")
        ranks = None if self.process_group is None else self.process_group.size()
        return {"ranks of process_group": ranks, **{name: getattr(self, name) for name in names}}

    def _why_empty(self, name: str, tensor: Tensor, history: str) -> str | None:
        never_filled = history == "lost"
        if name != "prototypes":
            return "it does not hold what it was made with" if never_filled else None
        if not self._makes_prototypes:
            reason = why_no_direction(tensor, unit=False)
            return "they are not what the module was made with" if never_filled and reason is None else reason
        # What a checkpoint brought is what it is; and who trains prototypes may move them off the sphere by any way.
        may_be_trained = history == "loaded" or name in self._parameters
        return why_no_direction(tensor, unit=never_filled or not may_be_trained)

    def _is_restored(self, name: str) -> bool:
        return name == "prototypes" and self._makes_prototypes

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> ProACLoss:
        """As nn.Module's, but float32 stays float32: .half() is for the network, not for the anchors."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            if moved.dtype == tensor.dtype or not moved.is_floating_point():
                return moved
            return tensor.to(moved.device)

        super()._apply(keep_float32, recurse)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As nn.Module's, but float32 stays float32 (``assign=True`` would take the checkpoint's dtype)."""
        for name in ("prototypes", "class_weight"):
            value, mine = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(value, Tensor) and value.dtype != torch.float32:
                state_dict[prefix + name] = value.detach().to(torch.float32)
            if isinstance(value, Tensor) and isinstance(mine, Tensor) and value.shape != mine.shape:
                error_msgs.append(
                    f"{prefix}{name}: the checkpoint's are of shape {tuple(value.shape)}, but this ProACLoss was made with "
                    f"num_classes={self.num_classes}, embedding_dim={self.embedding_dim}. For the checkpoint's classes make "
                    "it with their numbers; for other classes start with its own prototypes: remove the key from the "
                    f"state_dict, state_dict.pop({prefix + name!r}), and load with strict=False"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> KeepsInitialValues:
        """Shares the process group, of which there are no copies."""
        memo[id(self.process_group)] = self.process_group
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            warn_once(
                "pickled process_group",
                "ProACLoss: its process_group is not part of the pickle; set module.process_group again after loading, "
                "or each rank has a loss of its own",
            )
        return {**super().__getstate__(), "process_group": None}

    def extra_repr(self) -> str:
        """The sizes and options, as nn.Module's repr shows them."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*_SETTINGS, "backend"))
