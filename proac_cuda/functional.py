"""The public function: checks its arguments, gives the tensors the form the stages take, and runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .backends import choose_backend, stage_ops
from .stages import REDUCTIONS, compute_dtype
from .stages.autograd import Options, call_loss
from .stages.exchange import group_name
from .stages.pixels import collapses
from .stages.validation import check_ignore_index, check_options, check_tensors, plain_tensors, warn_once
from .statistics import ProACStats, make_stats

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .stages.options import CallOptions


@overload
def proac_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    pixel_weight: Tensor | None = ...,
    class_weight: Tensor | None = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[CallOptions],
) -> Tensor: ...
@overload
def proac_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    pixel_weight: Tensor | None = ...,
    class_weight: Tensor | None = ...,
    return_stats: Literal[True],
    **options: Unpack[CallOptions],
) -> tuple[Tensor, ProACStats]: ...
@overload
def proac_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    pixel_weight: Tensor | None = ...,
    class_weight: Tensor | None = ...,
    return_stats: bool,
    **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, ProACStats]: ...
def proac_loss(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    ignore_index: int = 255,
    pixel_weight: Tensor | None = None,
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
) -> Tensor | tuple[Tensor, ProACStats]:
    r"""Prototype-anchor contrast: each class prototype against its own pixels and the pixels of all other classes.

    With S_ki the cosine of prototype k and pixel i over the temperature, P_k the pixels of class k and N_k its negatives::

        L_k = (1/W_k) sum_{i in P_k} w_i softplus(log Z_k - S_ki),    log Z_k = log sum_{j in N_k} w_j exp(S_kj)

    averaged over the classes that are present. Add it to cross-entropy: ``total = ce + 0.1 * proac``.
    The value grows like the logarithm of the number of negatives.

    Args:
        features: pixel embeddings, (B, D, \*spatial) with 1 to 3 spatial axes, or (N, D); float16, bfloat16, float32 or
            float64; not normalised. Read where they lie if the spatial axes collapse into one stride and the channel or
            the pixel stride is 1 (contiguous, channels_last, slices of these); else copied once, with a warning.
        labels: class of each pixel, (B, \*any spatial size) or (N,); uint8, int16, int32 or int64; read at the features'
            resolution by the rule of ``interpolate(mode="nearest")``, see ``label_sampling``.
        prototypes: one anchor per class, (K, D); normalised inside. See :func:`uniform_prototypes`.
        temperature: divides the cosines.
        ignore_index: label of pixels that take no part and get a gradient of exactly 0.
        pixel_weight: shape of ``labels``; finite and >= 0, for example the confidence of a pseudo label. 0 means ignored,
            and so does a weight below the smallest normal number, 2^-126 (2^-1022 for float64 features).
        class_weight: (K,), finite and >= 0.
        num_negatives: None takes every pixel of another class as a negative; M draws, for each class, exactly
            min(M, number of them), uniformly and without replacement.
        negative_reduction: "sum" (the authors') or "mean" over the negatives, inside the logarithm.
        pixel_anchor_weight: weight of the pixel-anchored twin, cross-entropy over the cosines.
        seed: names the sampled sets: an int (the same sets at every call), an int64 tensor of one element (copied at the
            call), or None (a fresh one from PyTorch's default generator of the features' device).
        reduction: "mean" over the classes present, weighted by ``class_weight``; "sum"; or "none", a value per class.
        backend: "auto", or one of :func:`available_backends`. The environment variable PROAC_BACKEND overrides "auto".
        return_stats: also return :class:`ProACStats`, out of the same pass.
        process_group: a torch.distributed group: the classes' sums run over the pixels of all its ranks, by exchanging
            vectors of one number per class. Every rank makes the call; each gets the global loss, and R (the number of
            ranks) times its slice of the global gradient, which DistributedDataParallel's averaging turns into that of
            one process holding the whole batch. Over ranks, rank 0's seed is used; ``invalid_labels`` counts this rank's.
        label_sampling: which pixel of the labels, and of ``pixel_weight``, a feature reads: "nearest", the authors', the
            first of each s x s cell; "nearest-exact" the one in its middle, each as ``interpolate`` of that mode does.

    Returns:
        The loss, a scalar, or (K,) for ``reduction="none"``; float32, or float64 for float64 features. With
        ``return_stats``, a tuple of the loss and the statistics.

    Raises:
        TypeError: a dtype or type that is not in the list above.
        ValueError: shapes or devices that do not fit, options out of range, a process group of which this rank is no
            member; on the CPU also a label outside [0, K) that
            is not ``ignore_index``, and a weight that is negative, infinite or NaN. On CUDA the first call of a process
            looks; after it such pixels are ignored and counted in the statistics, since looking synchronises.
            PROAC_CHECKS=1 makes every call look, 0 none on CUDA.
        RuntimeError: a backend asked for by name cannot run; under torch.compile, what only shows at run time; an attempt
            to differentiate the gradient.

    Source: ProAC, Ren, Lu, Mao and Dong, "Exploring Prototype-Anchor Contrast for Semantic Segmentation", IEEE TCSVT
    2024. Every formula stands in :mod:`proac_cuda.backends.reference`.
    """
    ignore_index, num_negatives, seed = check_options(
        temperature=temperature,
        ignore_index=ignore_index,
        num_negatives=num_negatives,
        negative_reduction=negative_reduction,
        pixel_anchor_weight=pixel_anchor_weight,
        label_sampling=label_sampling,
        seed=seed,
        reduction=reduction,
        process_group=process_group,
    )
    features, labels, prototypes, pixel_weight, class_weight = plain_tensors(
        features, labels, prototypes, pixel_weight, class_weight
    )
    check_tensors(features, labels, prototypes, pixel_weight, class_weight, seed)
    check_ignore_index(ignore_index, prototypes.shape[0])
    chosen = choose_backend(backend, features.device)

    dtype = compute_dtype(features)
    features, labels, pixel_weight = _with_channel_axis_second(features, labels, pixel_weight)
    options = Options(
        temperature=float(temperature),
        ignore_index=ignore_index,
        num_negatives=num_negatives,
        negative_mean=negative_reduction == "mean",
        pixel_anchor_weight=float(pixel_anchor_weight),
        reduction=REDUCTIONS[reduction],
        hardest_negative=return_stats,
        nearest_exact=label_sampling == "nearest-exact",
        compiled=torch.compiler.is_compiling(),
        group=group_name(process_group),
    )
    loss, outputs = call_loss(
        stage_ops(chosen),
        _readable_in_place(features),
        prototypes.to(dtype).contiguous(),
        labels,
        None if pixel_weight is None else pixel_weight.to(dtype),
        None if class_weight is None else class_weight.to(dtype).contiguous(),
        None if num_negatives is None else _rng_state(seed, features.device),
        options=options,
    )
    return (loss, make_stats(outputs, options)) if return_stats else loss


def _with_channel_axis_second(
    features: Tensor, labels: Tensor, pixel_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(N, D) features as (1, D, N), a view, with their labels and weights as (1, N); all others as they are."""
    if features.ndim > 2:
        return features, labels, pixel_weight
    weight = None if pixel_weight is None else pixel_weight.unsqueeze(0)
    return features.t().unsqueeze(0), labels.unsqueeze(0), weight


def _readable_in_place(features: Tensor) -> Tensor:
    """The features themselves where the kernels can read them, else one contiguous copy, with a warning."""
    if features.is_contiguous():
        return features
    sizes, strides = features.shape, features.stride()
    axes = [axis for axis in range(2, features.ndim) if sizes[axis] != 1]  # the stride of the others means nothing
    unit_stride = not axes or sizes[1] == 1 or 1 in (strides[1], strides[axes[-1]])
    if (collapses(features) and unit_stride) or features.numel() == 0:
        return features
    warn_once(
        "copy",
        f"features of shape {tuple(sizes)} and strides {tuple(strides)} are copied at every call: they can be read in "
        "place where the spatial axes collapse into one stride and the channel or the pixel stride is 1 "
        "(contiguous, channels_last, and channel or batch slices of these)",
    )
    return features.contiguous()


def _rng_state(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """(seed, index of the first pixel) as int64 on the device: a copy of a seed tensor, never a host synchronisation."""
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    elif not isinstance(seed, Tensor):
        signed = seed if seed < 2**63 else seed - 2**64  # no modulo: the numbers of a compiled graph have 64 bits
        seed = torch.full((1,), signed, dtype=torch.int64, device=device)
    first_index = torch.zeros(1, dtype=torch.int64, device=device)
    return torch.cat([seed.detach().reshape(1), first_index])
