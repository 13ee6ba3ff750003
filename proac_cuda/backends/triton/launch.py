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

from ... import stages
from ...stages import NONE
from ...stages.pixels import gradient_buffers
from . import (
    backward,
    forward,
    gradient_by_classes,
    loss,
    merge_statistics,
    prepare,
    prototype_gradient,
    selection,
    tiles,
)
from .layout import Pixels, case_of, ceil_div, lay_out, sampling, sets_of

INTERPRETED = bool(triton.knobs.runtime.interpret)
OPTIONS = {"enable_fp_fusion": True}  #: of every launch, see `run`


@functools.cache
def architecture(device: torch.device) -> str:
    """What it is called by compilers: "sm_80", "gfx942" and the like; "interpreter" on CPU tensors."""
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


class _Anchors(NamedTuple):
    """phat of :func:`prepare.prepare_kernel`, (parts, K_PAD, D_PAD), and in backward the coefficients."""

    anchors: Tensor
    coefficients: Tensor | None


def _prepare(
    features: Tensor, prototypes: Tensor, chosen: list[tiles.Tiles], norms: Tensor | None, **gradient: Any
) -> _Anchors:
    """(1): phat, padded to whole blocks of the kernels that read it or mask it; in backward also the coefficients."""
    num_classes, channels = prototypes.shape
    k_pad = tiles.round_up(num_classes, tiles.K_MULTIPLE)
    widest = max(max(tile.BD, tile.DO, tile.KEPT) for tile in chosen)
    d_pad = tiles.round_up(channels, widest)
    parts = tiles.parts(features.dtype, architecture(features.device))
    dtype = features.dtype if parts == 2 else prototypes.dtype
    anchors = torch.empty(parts, k_pad, d_pad, dtype=dtype, device=prototypes.device)
    coefficients = None
    if gradient:
        coefficients = prototypes.new_empty(prepare.NUM_COEFFICIENTS, k_pad)
    else:
        gradient = {
            "statistics": None, "sums": None, "class_weight": None, "grad_loss": None, "alpha": 0.0, "grad_stride": 0,
            "NEGATIVE_MEAN": False, "PIXEL_ANCHOR": False, "REDUCTION": NONE,
        }  # fmt: skip
    rows = 64 if INTERPRETED else 4  # the interpreter's time is the number of programs
    run(
        prepare.prepare_kernel, (ceil_div(k_pad, rows),),
        prototypes=prototypes, anchors=anchors, norms=norms, coefficients=coefficients, **gradient,
        K=num_classes, D=channels, K_PAD=k_pad, D_PAD=d_pad, RB=rows, DB=128, INTERPRETED=INTERPRETED,
    )  # fmt: skip
    return _Anchors(anchors, coefficients)


def _compiled_for(
    features: Tensor, prototypes: Tensor, anchors: Tensor, index_type: Any, pixel_anchor: bool, tile: tiles.Tiles
) -> dict[str, Any]:
    """The case that a large kernel is compiled for, and how."""
    arch = architecture(features.device)
    case = case_of(
        tile,
        prototypes.dtype,
        anchors.dtype,
        prototypes.shape,
        anchors.shape,
        index_type,
        pixel_anchor,
        arch,
        INTERPRETED,
    )
    return {"CASE": case, "num_warps": tile.num_warps, "num_stages": tile.num_stages, **_at_most(tile.max_registers)}


def _at_most(registers: int) -> dict[str, int]:
    """The launch option of :attr:`tiles.Tiles.max_registers`."""
    return {"maxnreg": registers} if registers else {}


def select_negatives(
    features: Tensor, labels: Tensor, pixel_weight: Tensor | None, rng_state: Tensor, num_negatives: int, num_classes: int,
    ignore_index: int, nearest_exact: bool = False,
) -> Tensor:  # fmt: skip
    """Stage (0), equation (2): as :func:`proac_cuda.backends.reference.select_negatives`."""
    spatial = features.shape[2:]
    pixels = Pixels(1, features.shape[0] * spatial.numel(), [])
    thresholds = rng_state.new_empty(num_classes, 2)
    ranks = rng_state.new_empty(num_classes)
    histogram = rng_state.new_zeros(num_classes + 1, 256)
    block, classes = 1024 if INTERPRETED else 256, min(32, triton.next_power_of_2(num_classes))
    tiling, total = pixels.chunks(block, 1)[0], pixels.tiles(block)
    real = tl.float64 if features.dtype == torch.float64 else tl.float32
    index_digits = max(1, ceil_div(max(0, pixels.per_image - 1).bit_length(), 8))
    digits = [(False, shift) for shift in (24, 16, 8, 0)]
    digits += [(True, 8 * digit) for digit in reversed(range(index_digits))]
    where = sampling(labels, pixel_weight, spatial, ignore_index, nearest_exact)
    with _on(features):
        for number, (of_index, shift) in enumerate(digits):
            digit = {"FIRST": number == 0, "OF_INDEX": of_index, "shift": shift, "K": num_classes}
            if total:
                run(
                    selection.count_digits_kernel, (total, 1 if number == 0 else ceil_div(num_classes, classes)),
                    rng_state=rng_state, thresholds=thresholds, histogram=histogram,
                    labels=labels, weights=pixel_weight, tiling=tiling, sampling=where, **digit,
                    REAL=real, KB=classes, BM=block, INDEX=pixels.index_type(labels), num_warps=8,
                )  # fmt: skip
            run(
                selection.pick_digit_kernel, (num_classes,),
                histogram=histogram, thresholds=thresholds, ranks=ranks, rng_state=rng_state,
                num_negatives=num_negatives, LAST=number == len(digits) - 1, **digit,
            )  # fmt: skip
    return thresholds


def _statistics(
    features: Tensor, labels: Tensor, pixel_weight: Tensor | None, prototypes: Tensor, thresholds: Tensor | None,
    rng_state: Tensor | None, temperature: float, ignore_index: int, pixel_anchor: bool, hardest_negative: bool,
    nearest_exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Stage (i), and the counters of stage (ii)."""
    num_classes, channels = prototypes.shape
    arch = architecture(features.device)
    more_options = pixel_weight is not None or thresholds is not None or pixel_anchor or hardest_negative
    tile = tiles.forward_tiles(features.dtype, channels, num_classes, arch, more_options)
    pixels = lay_out(features)
    tiling, num_chunks = pixels.chunks(tile.BM, tiles.MAX_CHUNKS)
    new = prototypes.new_empty
    positive = new(features.shape[0], *features.shape[2:])
    statistics = new(stages.NUM_STATISTICS, num_classes)
    diagnostics = new(4, dtype=torch.int64)
    partials = new(num_chunks, forward.NUM_PARTIALS.value, num_classes)
    chunk_diagnostics = new(num_chunks, 4, dtype=torch.int64)
    block = _class_block(num_classes)
    counters = new(_num_counters(num_classes), dtype=torch.int32)
    programs, index_type = ceil_div(num_classes, tile.BLOCKS * tile.KB), pixels.index_type(labels)
    # 16 of float64 spill 8 bytes on sm_90 under Triton 3.8.
    chunks_at_once = 8 if prototypes.dtype == torch.float64 else 32
    with _on(features):
        anchors = _prepare(features, prototypes, [tile], None).anchors
        log_normaliser = None
        common = {
            "features": pixels.maps[0],
            "anchors": anchors,
            "tiling": tiling,
            "inverse_temperature": 1 / temperature,
        }
        compiled_for = functools.partial(_compiled_for, features, prototypes, anchors, index_type, pixel_anchor)
        if pixel_anchor and programs > 1 and pixels.tiles(tile.BM):
            log_normaliser = torch.empty_like(positive)
            run(
                forward.log_normaliser_kernel, (pixels.tiles(tile.BM),), log_normaliser=log_normaliser, **common,
                **compiled_for(tile._replace(BLOCKS=1)),
            )  # fmt: skip
        run(
            forward.class_statistics_kernel, (num_chunks, programs), **common,
            labels=labels, weights=pixel_weight, sets=sets_of(thresholds, rng_state),
            sampling=sampling(labels, pixel_weight, features.shape[2:], ignore_index, nearest_exact),
            log_normaliser=log_normaliser, partials=partials, positive=positive, diagnostics=chunk_diagnostics,
            HARDEST=hardest_negative, **compiled_for(tile),
        )  # fmt: skip
        run(
            merge_statistics.merge_statistics_kernel, (ceil_div(num_classes, block),),
            partials=partials, diagnostics=chunk_diagnostics, statistics=statistics, merged_diagnostics=diagnostics,
            counters=counters, chunks=num_chunks, K=num_classes, KB=block, CB=chunks_at_once,
        )  # fmt: skip
    return statistics, positive, diagnostics, counters


def class_statistics(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Stage (i): as :func:`proac_cuda.backends.reference.class_statistics`."""
    return _statistics(*arguments)[:3]


def _class_block(num_classes: int) -> int:
    """Classes of a program that sums over pixels or chunks. With 64, ptxas takes six seconds for `positive_sums_kernel`."""
    return int(min(32, triton.next_power_of_2(num_classes)))


def _num_counters(num_classes: int) -> int:
    """Of stage (ii): one for each block of classes, and one for the blocks."""
    return 1 + ceil_div(num_classes, _class_block(num_classes))


def _sum_positives(
    positive: Tensor, labels: Tensor, pixel_weight: Tensor | None, statistics: Tensor, counters: Tensor, ignore_index: int,
    negative_mean: bool, nearest_exact: bool, loss_of_sums: Tensor | None = None, class_weight: Tensor | None = None,
    pixel_anchor_weight: float = 0.0, reduction: int = NONE,
) -> Tensor:  # fmt: skip
    """Stage (ii); where ``loss_of_sums`` is given, the loss is written to it. ``counters`` are 0."""
    num_classes = statistics.shape[1]
    pixels = Pixels(1, positive.numel(), [])
    block, classes = 128, _class_block(num_classes)
    tiling, num_chunks = pixels.chunks(block, tiles.MAX_CHUNKS)
    partials = statistics.new_empty(stages.NUM_POSITIVE_SUMS, num_chunks, num_classes)
    sums = statistics.new_empty(stages.NUM_POSITIVE_SUMS, num_classes)
    registers = tiles.positive_sums_registers(statistics.dtype, architecture(positive.device))
    with _on(positive):
        run(
            loss.positive_sums_kernel, (num_chunks, ceil_div(num_classes, classes)),
            positive=positive.contiguous(), statistics=statistics, class_weight=class_weight, partials=partials,
            counters=counters, sums=sums, loss=loss_of_sums, labels=labels, weights=pixel_weight, tiling=tiling,
            sampling=sampling(labels, pixel_weight, positive.shape[1:], ignore_index, nearest_exact),
            alpha=pixel_anchor_weight, NEGATIVE_MEAN=negative_mean, PIXEL_ANCHOR=pixel_anchor_weight > 0,
            REDUCTION=reduction, K=num_classes, KB=classes, BM=block, CB=32, INDEX=pixels.index_type(labels),
            **_at_most(registers),
        )  # fmt: skip
    return sums


def positive_sums(
    positive: Tensor, labels: Tensor, pixel_weight: Tensor | None, statistics: Tensor, ignore_index: int, negative_mean: bool,
    nearest_exact: bool = False,
) -> Tensor:  # fmt: skip
    """Stage (ii): as :func:`proac_cuda.backends.reference.positive_sums`."""
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
    features: Tensor, labels: Tensor, pixel_weight: Tensor | None, prototypes: Tensor, class_weight: Tensor | None,
    thresholds: Tensor | None, rng_state: Tensor | None, temperature: float, ignore_index: int, negative_mean: bool,
    pixel_anchor_weight: float, reduction: int, hardest_negative: bool, nearest_exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
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
    features: Tensor, labels: Tensor, pixel_weight: Tensor | None, prototypes: Tensor, thresholds: Tensor | None,
    rng_state: Tensor | None, statistics: Tensor, sums: Tensor, class_weight: Tensor | None, grad_loss: Tensor,
    temperature: float, ignore_index: int, negative_mean: bool, pixel_anchor_weight: float, reduction: int,
    features_need_grad: bool, prototypes_need_grad: bool, nearest_exact: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Stage (iii): as :func:`proac_cuda.backends.reference.loss_gradients`."""
    num_classes, channels = prototypes.shape
    arch = architecture(features.device)
    more_options = pixel_weight is not None or thresholds is not None or pixel_anchor_weight > 0
    feature_tile = tiles.backward_tiles(features.dtype, channels, num_classes, arch, more_options)
    channels_last = channels > 1 and features.stride(1) == 1
    prototype_tile = tiles.prototype_tiles(features.dtype, channels, num_classes, arch, more_options, channels_last)
    wanted, grad_features = gradient_buffers(features) if features_need_grad else (features.new_empty(0),) * 2
    grad_prototypes = torch.empty_like(prototypes) if prototypes_need_grad else prototypes.new_empty(0)
    norms = prototypes.new_empty(num_classes) if prototypes_need_grad else None
    pixels = lay_out(features, grad_features) if features_need_grad else lay_out(features)
    index_type, pixel_anchor = pixels.index_type(labels), pixel_anchor_weight > 0
    common = {
        "features": pixels.maps[0], "labels": labels, "weights": pixel_weight,
        "sets": sets_of(thresholds, rng_state), "inverse_temperature": 1 / temperature,
        "sampling": sampling(labels, pixel_weight, features.shape[2:], ignore_index, nearest_exact),
    }  # fmt: skip
    with _on(features):
        prepared = _prepare(
            features, prototypes, [feature_tile, prototype_tile], norms,
            statistics=statistics, sums=sums, class_weight=class_weight, grad_loss=grad_loss,
            grad_stride=grad_loss.stride(0) if grad_loss.ndim else 0, alpha=pixel_anchor_weight,
            NEGATIVE_MEAN=negative_mean, PIXEL_ANCHOR=pixel_anchor, REDUCTION=reduction,
        )  # fmt: skip
        common |= prepared._asdict()
        compiled_for = functools.partial(
            _compiled_for, features, prototypes, prepared.anchors, index_type, pixel_anchor
        )
        if features_need_grad and pixels.tiles(feature_tile.BM):
            kernel, shares = backward.feature_gradient_kernel, 1
            if feature_tile.DO:
                kernel = gradient_by_classes.gradient_by_classes_kernel
                shares = ceil_div(channels, feature_tile.DO)
            run(
                kernel, (pixels.tiles(feature_tile.BM) * shares,), grad_features=pixels.maps[1],
                tiling=pixels.chunks(feature_tile.BM, 1)[0], **common, **compiled_for(feature_tile),
            )  # fmt: skip
        if prototypes_need_grad:
            held = prototype_tile.BLOCKS * prototype_tile.KB
            grid = ceil_div(num_classes, held), ceil_div(channels, prototype_tile.DO)
            most = max(1, tiles.PROTOTYPE_PROGRAMS // (grid[0] * grid[1]))
            tiling, num_chunks = pixels.chunks(prototype_tile.BM, most)
            partials = prototypes.new_empty(num_chunks, num_classes, channels)
            run(
                prototype_gradient.prototype_gradient_kernel, (*grid, num_chunks),
                partials=partials, tiling=tiling, **common, **compiled_for(prototype_tile),
            )  # fmt: skip
            run(
                prototype_gradient.merge_prototype_gradient_kernel, (num_classes,),
                partials=partials, prototypes=prototypes, norms=norms, grad_prototypes=grad_prototypes,
                chunks=num_chunks, K=num_classes, D=channels, DB=min(256, triton.next_power_of_2(channels)),
            )  # fmt: skip
        if grad_features is not wanted:
            wanted.copy_(grad_features)
    return wanted, grad_prototypes
