"""The five stages of the loss as launches of the Triton kernels, and :func:`loss_forward`, three of them in one go.

Nothing here looks at the contents of a tensor, so nothing waits for the GPU and every call can be captured in a CUDA graph.
Launches, without sampling: forward 4 (prepare, statistics, their merge, positive sums with the loss), 5 where the twin meets
more classes than one program deals with; backward 2, and 2 more where the prototypes need a gradient. Statistics are merged
by a launch of their own, and so is the prototypes' gradient: of 150 classes they leave 2 MB and more, which one program
at the end would read for longer than a launch takes. Ranks exchange sums between the stages: there forward takes 6.

Sums over pixels come in at most MAX_CHUNKS chunks for K-vectors: that many programs share the features, and 64 would leave
three quarters of a large GPU idle (two programs fit on a multiprocessor, of which there are 108 and more). They cost
9 x 512 x K numbers. The prototypes' gradient is made by about PROTOTYPE_PROGRAMS programs, those for other classes and channels
counted; what each keeps is its block of the gradient: 8 MB in all, or K x D numbers where that is more.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import stages
from ..stages import NONE
from . import backward, forward, gradient_by_classes, loss, prepare, prototype_gradient, selection, tiles
from .layout import Pixels, label_arguments, lay_out

INTERPRETED = bool(triton.knobs.runtime.interpret)
OPTIONS = {"enable_fp_fusion": True}  #: of every launch, see `run`


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_80", "gfx942" and the like; "interpreter" on CPU tensors."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


_one_at_a_time = threading.Lock() if INTERPRETED else contextlib.nullcontext()


def run(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """One launch. The interpreter keeps its state in globals, so that threads must take turns.

    Products and sums are fused, a b + c rounded once: Triton's default up to 3.9, not from 3.10 on. No formula here needs
    two roundings, one is nearer to the truth, and without it the kernels would take more instructions.
    """
    with _one_at_a_time:
        kernel[grid](**arguments, **OPTIONS)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _precision(arch: str, dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 and not arch.startswith("gfx") and arch not in tiles.FMA else "ieee"


def _registers(arch: str) -> str | None:
    """Whose names of registers `vectors.opaque` uses; the interpreter has none."""
    return None if INTERPRETED else {"sm": "nvidia", "gf": "amd"}.get(arch[:2])


class _Anchors(NamedTuple):
    """phat of :func:`prepare.prepare_kernel`, and the sizes that its readers need."""

    tensor: Tensor
    arguments: dict[str, Any]


def _prepare(
    features: Tensor, prototypes: Tensor, chosen: list[tiles.Tiles], norms: Tensor | None, **gradient: Any
) -> _Anchors:
    """(1): phat, padded to whole blocks of the kernels that read it or mask it; in backward also the coefficients."""
    num_classes, channels = prototypes.shape
    k_pad = _round_up(num_classes, tiles.K_MULTIPLE)
    d_pad = _round_up(channels, max(max(tile.BD, tile.DO, tile.KEPT) for tile in chosen))
    parts = tiles.parts(features.dtype, architecture(features.device))
    dtype = features.dtype if parts == 2 else prototypes.dtype
    anchors = torch.empty(parts, k_pad, d_pad, dtype=dtype, device=prototypes.device)
    coefficients = None
    if gradient:
        shape = prepare.NUM_COEFFICIENTS, k_pad
        coefficients = torch.empty(shape, dtype=prototypes.dtype, device=prototypes.device)
    else:
        gradient = {
            "statistics": None, "sums": None, "class_weight": None, "grad_loss": None, "alpha": 0.0, "grad_stride": 0,
            "NEGATIVE_MEAN": False, "PIXEL_ANCHOR": False, "REDUCTION": NONE,
        }  # fmt: skip
    rows = 4
    run(
        prepare.prepare_kernel, (triton.cdiv(k_pad, rows),),
        prototypes=prototypes, anchors=anchors, norms=norms, coefficients=coefficients, **gradient,
        K=num_classes, D=channels, K_PAD=k_pad, D_PAD=d_pad, RB=rows, DB=128, INTERPRETED=INTERPRETED,
    )  # fmt: skip
    sizes = {"anchors": anchors, "K": num_classes, "D": channels, "K_PAD": k_pad, "D_PAD": d_pad}
    if coefficients is not None:
        sizes["coefficients"] = coefficients
    return _Anchors(anchors, sizes)


def _blocks(tile: tiles.Tiles, *names: str) -> dict[str, Any]:
    return {name: getattr(tile, name) for name in (*names, "num_warps", "num_stages")}


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
    """Stage (0), equation (2): as :func:`proac_cuda.reference.select_negatives`."""
    spatial = features.shape[2:]
    pixels = Pixels(1, features.shape[0] * spatial.numel(), [])
    thresholds = rng_state.new_empty(num_classes, 2)
    ranks = rng_state.new_empty(num_classes)
    histogram = rng_state.new_zeros(num_classes + 1, 256)
    block, classes = 1024 if INTERPRETED else 256, min(32, triton.next_power_of_2(num_classes))
    per_image, total = pixels.grid(block)
    real = tl.float64 if features.dtype == torch.float64 else tl.float32
    index_digits = max(1, triton.cdiv(max(0, pixels.per_image - 1).bit_length(), 8))
    digits = [(False, shift) for shift in (24, 16, 8, 0)]
    digits += [(True, 8 * digit) for digit in reversed(range(index_digits))]
    arguments = label_arguments(labels, pixel_weight, spatial, ignore_index, nearest_exact)
    with _on(features):
        for number, (of_index, shift) in enumerate(digits):
            digit = {"FIRST": number == 0, "OF_INDEX": of_index, "shift": shift, "K": num_classes}
            if total:
                run(
                    selection.count_digits_kernel, (total, 1 if number == 0 else triton.cdiv(num_classes, classes)),
                    rng_state=rng_state, thresholds=thresholds, histogram=histogram,
                    P=pixels.per_image, tiles_per_image=per_image, **arguments, **digit,
                    REAL=real, KB=classes, BM=block, INDEX=pixels.index_type(labels), num_warps=8,
                )  # fmt: skip
            run(
                selection.pick_digit_kernel, (num_classes,),
                histogram=histogram, thresholds=thresholds, ranks=ranks, rng_state=rng_state,
                num_negatives=num_negatives, LAST=number == len(digits) - 1, **digit,
            )  # fmt: skip
    return thresholds


def _statistics(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stage (i), and the counters of stage (ii)."""
    num_classes, channels = prototypes.shape
    arch = architecture(features.device)
    more_options = pixel_weight is not None or thresholds is not None or pixel_anchor or hardest_negative
    tile = tiles.forward_tiles(features.dtype, channels, num_classes, arch, more_options)
    pixels = lay_out(features)
    chunks = pixels.chunks(tile.BM, tiles.MAX_CHUNKS)
    num_chunks = max(1, triton.cdiv(chunks["tiles"], chunks["tiles_per_chunk"]))
    new = prototypes.new_empty
    positive = new(features.shape[0], *features.shape[2:])
    statistics = new(stages.NUM_STATISTICS, num_classes)
    diagnostics = new(4, dtype=torch.int64)
    partials = new(num_chunks, forward.NUM_PARTIALS.value, num_classes)
    chunk_diagnostics = new(num_chunks, 4, dtype=torch.int64)
    block = _class_block(num_classes)
    counters = new(_num_counters(num_classes), dtype=torch.int32)
    common = {
        "features": features, "inverse_temperature": 1 / temperature, "strides": pixels.strides[0],
        "P": pixels.per_image, "PRECISION": _precision(arch, features.dtype), "INDEX": pixels.index_type(labels),
        "INTERPRETED": INTERPRETED, "REGISTERS": _registers(arch), **_blocks(tile, "KB", "BM", "BD"),
    }  # fmt: skip
    with _on(features):
        anchors = _prepare(features, prototypes, [tile], None)
        log_normaliser = None
        if pixel_anchor and num_classes > tile.BLOCKS * tile.KB and chunks["tiles"]:
            log_normaliser = torch.empty_like(positive)
            run(
                forward.log_normaliser_kernel, (chunks["tiles"],), log_normaliser=log_normaliser,
                tiles_per_image=chunks["tiles_per_image"], **common, **anchors.arguments,
            )  # fmt: skip
        run(
            forward.class_statistics_kernel, (num_chunks, triton.cdiv(num_classes, tile.BLOCKS * tile.KB)),
            partials=partials, positive=positive, diagnostics=chunk_diagnostics, log_normaliser=log_normaliser,
            thresholds=thresholds, rng_state=rng_state, PIXEL_ANCHOR=pixel_anchor, HARDEST=hardest_negative, BLOCKS=tile.BLOCKS,
            **label_arguments(labels, pixel_weight, features.shape[2:], ignore_index, nearest_exact),
            **chunks, **common, **anchors.arguments,
        )  # fmt: skip
        run(
            forward.merge_statistics_kernel, (triton.cdiv(num_classes, block),),
            partials=partials, diagnostics=chunk_diagnostics, statistics=statistics, merged_diagnostics=diagnostics,
            counters=counters, chunks=num_chunks, K=num_classes, KB=block, CB=16 if prototypes.dtype == torch.float64 else 32,
        )  # fmt: skip
    return statistics, positive, diagnostics, counters


def class_statistics(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Stage (i): as :func:`proac_cuda.reference.class_statistics`."""
    return _statistics(*arguments)[:3]


def _class_block(num_classes: int) -> int:
    """Classes of a program that sums over pixels or chunks. With 64, ptxas takes six seconds for `positive_sums_kernel`."""
    return int(min(32, triton.next_power_of_2(num_classes)))


def _num_counters(num_classes: int) -> int:
    """Of stage (ii): one for each block of classes, and one for the blocks."""
    return 1 + int(triton.cdiv(num_classes, _class_block(num_classes)))


def _sum_positives(
    positive: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    statistics: Tensor,
    counters: Tensor,
    ignore_index: int,
    negative_mean: bool,
    nearest_exact: bool,
    loss_of_sums: Tensor | None = None,
    class_weight: Tensor | None = None,
    pixel_anchor_weight: float = 0.0,
    reduction: int = NONE,
) -> Tensor:
    """Stage (ii); where ``loss_of_sums`` is given, the loss is written to it. ``counters`` are 0."""
    num_classes = statistics.shape[1]
    pixels = Pixels(1, positive.numel(), [])
    block, classes = 128, _class_block(num_classes)
    chunks = pixels.chunks(block, tiles.MAX_CHUNKS)
    num_chunks = max(1, triton.cdiv(chunks["tiles"], chunks["tiles_per_chunk"]))
    partials = statistics.new_empty(stages.NUM_POSITIVE_SUMS, num_chunks, num_classes)
    sums = statistics.new_empty(stages.NUM_POSITIVE_SUMS, num_classes)
    with _on(positive):
        run(
            loss.positive_sums_kernel, (num_chunks, triton.cdiv(num_classes, classes)),
            positive=positive.contiguous(), statistics=statistics, class_weight=class_weight, partials=partials,
            counters=counters, sums=sums, loss=loss_of_sums, P=pixels.per_image, **chunks,
            **label_arguments(labels, pixel_weight, positive.shape[1:], ignore_index, nearest_exact),
            alpha=pixel_anchor_weight, NEGATIVE_MEAN=negative_mean, PIXEL_ANCHOR=pixel_anchor_weight > 0,
            REDUCTION=reduction, K=num_classes, KB=classes, BM=block, CB=32, INDEX=pixels.index_type(labels),
        )  # fmt: skip
    return sums


def positive_sums(
    positive: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    negative_mean: bool,
    nearest_exact: bool = False,
) -> Tensor:
    """Stage (ii): as :func:`proac_cuda.reference.positive_sums`."""
    num_classes = statistics.shape[1]
    counters = labels.new_zeros(_num_counters(num_classes), dtype=torch.int32)
    options = ignore_index, negative_mean, nearest_exact
    return _sum_positives(positive, labels, pixel_weight, statistics, counters, *options)


def _new_loss(statistics: Tensor, reduction: int) -> Tensor:
    return statistics.new_empty((statistics.shape[1],) if reduction == NONE else ())


def reduce_loss(
    statistics: Tensor,
    sums: Tensor,
    class_weight: Tensor | None,
    pixel_anchor_weight: float,
    reduction: int,
) -> Tensor:
    """Equations (4) and (6): the loss, () or (K,)."""
    result = _new_loss(statistics, reduction)
    with _on(statistics):
        run(
            loss.reduce_loss_kernel, (1,),
            statistics=statistics.contiguous(), sums=sums.contiguous(), class_weight=class_weight, loss=result,
            alpha=pixel_anchor_weight, PIXEL_ANCHOR=pixel_anchor_weight > 0, REDUCTION=reduction, K=statistics.shape[1],
        )  # fmt: skip
    return result


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stages (i) and (ii) and the reduction in one go: loss, statistics, sums, diagnostics, equal to the stages' to the bit."""
    statistics, positive, diagnostics, counters = _statistics(
        features, labels, pixel_weight, prototypes, thresholds, rng_state, temperature, ignore_index,
        pixel_anchor_weight > 0, hardest_negative, nearest_exact,
    )  # fmt: skip
    result = _new_loss(statistics, reduction)
    sums = _sum_positives(
        positive, labels, pixel_weight, statistics, counters, ignore_index, negative_mean, nearest_exact,
        result, class_weight, pixel_anchor_weight, reduction,
    )  # fmt: skip
    return result, statistics, sums, diagnostics


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
    """Stage (iii): as :func:`proac_cuda.reference.loss_gradients`."""
    num_classes, channels = prototypes.shape
    arch = architecture(features.device)
    more_options = pixel_weight is not None or thresholds is not None or pixel_anchor_weight > 0
    feature_tile = tiles.backward_tiles(features.dtype, channels, num_classes, arch, more_options)
    prototype_tile = tiles.prototype_tiles(features.dtype, channels, num_classes, arch, more_options)
    grad_features = torch.empty_like(features) if features_need_grad else features.new_empty(0)
    grad_prototypes = torch.empty_like(prototypes) if prototypes_need_grad else prototypes.new_empty(0)
    norms = prototypes.new_empty(num_classes) if prototypes_need_grad else None
    pixels = lay_out(features, grad_features) if features_need_grad else lay_out(features)
    common = {
        "features": features, "thresholds": thresholds, "rng_state": rng_state,
        "inverse_temperature": 1 / temperature, "strides": pixels.strides[0], "P": pixels.per_image,
        "PIXEL_ANCHOR": pixel_anchor_weight > 0, "PRECISION": _precision(arch, features.dtype),
        "INDEX": pixels.index_type(labels), "INTERPRETED": INTERPRETED, "REGISTERS": _registers(arch),
        **label_arguments(labels, pixel_weight, features.shape[2:], ignore_index, nearest_exact),
    }  # fmt: skip
    with _on(features):
        anchors = _prepare(
            features, prototypes, [feature_tile, prototype_tile], norms,
            statistics=statistics, sums=sums, class_weight=class_weight, grad_loss=grad_loss,
            grad_stride=grad_loss.stride(0) if grad_loss.ndim else 0, alpha=pixel_anchor_weight,
            NEGATIVE_MEAN=negative_mean, PIXEL_ANCHOR=pixel_anchor_weight > 0, REDUCTION=reduction,
        )  # fmt: skip
        per_image, total = pixels.grid(feature_tile.BM)
        if features_need_grad and total:
            arguments = {
                "grad_features": grad_features, "grad_strides": pixels.strides[1], "tiles_per_image": per_image,
                **common, **anchors.arguments,
            }  # fmt: skip
            if feature_tile.DO:
                programs = total * triton.cdiv(channels, feature_tile.DO)
                blocks = _blocks(feature_tile, "KB", "BM", "BD", "DO", "HELD")
                run(gradient_by_classes.gradient_by_classes_kernel, (programs,), **arguments, **blocks)
            else:
                blocks = _blocks(feature_tile, "KB", "BM", "BD", "KEPT")
                run(backward.feature_gradient_kernel, (total,), **arguments, **blocks)
        if prototypes_need_grad:
            held = prototype_tile.BLOCKS * prototype_tile.KB
            shares = triton.cdiv(num_classes, held), triton.cdiv(channels, prototype_tile.DO)
            chunks = pixels.chunks(prototype_tile.BM, max(1, tiles.PROTOTYPE_PROGRAMS // (shares[0] * shares[1])))
            num_chunks = max(1, triton.cdiv(chunks["tiles"], chunks["tiles_per_chunk"]))
            partials = prototypes.new_empty(num_chunks, num_classes, channels)
            run(
                prototype_gradient.prototype_gradient_kernel, (*shares, num_chunks), partials=partials,
                **chunks, **common, **anchors.arguments, **_blocks(prototype_tile, "BLOCKS", "KB", "BM", "BD", "DO"),
            )  # fmt: skip
            run(
                prototype_gradient.merge_prototype_gradient_kernel, (num_classes,),
                partials=partials, prototypes=prototypes, norms=norms, grad_prototypes=grad_prototypes,
                chunks=num_chunks, K=num_classes, D=channels, DB=min(256, triton.next_power_of_2(channels)),
            )  # fmt: skip
    return grad_features, grad_prototypes
