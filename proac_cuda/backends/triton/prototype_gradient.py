"""Stage (iii) for the prototypes: equation (11) with the roles exchanged, in two deterministic steps.

Each chunk of pixels leaves its sum_i dL/dS_ki xhat_i / tau, (K, D); a second kernel adds the chunks in their order and takes
away the part along phat. There are at most MAX_PROTOTYPE_CHUNKS chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import gradient_of_similarities, operands
from .forward import similarities_of_blocks
from .gradient_by_classes import normaliser_of_pixels
from .pixels import kernel, read_pixels, tile_of_pixels
from .vectors import EPS, dot, load_features


@kernel
def prototype_gradient_kernel(
    features, partials, anchors, coefficients, labels, weights, thresholds, rng_state,
    inverse_temperature: "fp64", ignore_index, P, tiles_per_image, tiles, tiles_per_chunk,
    strides, size, label_size, scale, label_strides, weight_strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, PIXEL_ANCHOR: tl.constexpr,
    KB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, DO: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, INTERPRETED: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """sum_i G_ki xhat_i / tau over a chunk (program axis 0), for KB classes (axis 1) and DO channels (axis 2)."""
    REAL: tl.constexpr = partials.dtype.element_ty
    PART: tl.constexpr = anchors.dtype.element_ty
    chunk = tl.program_id(0)
    k = tl.program_id(1) * KB + tl.arange(0, KB)
    d_own = tl.program_id(2) * DO + tl.arange(0, DO)
    tau_inverse = tl.full((), inverse_temperature, REAL)
    total = tl.full((KB, DO), 0.0, REAL)
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        image, pixel, index, inside = tile_of_pixels(tile, tiles_per_image, P, BM, INDEX)
        label, weight, _, _, _, _ = read_pixels(
            index, inside, labels, label_strides, weights, weight_strides, size, label_size, scale, ignore_index, K,
            REAL,
        )  # fmt: skip
        s, inverse = similarities_of_blocks(
            features, anchors, image, pixel, inside, k, strides, tau_inverse,
            D, K_PAD, D_PAD, 1, BD, REAL, PRECISION, INTERPRETED,
        )  # fmt: skip
        normaliser = inverse
        if PIXEL_ANCHOR:
            normaliser = normaliser_of_pixels(
                (), features, anchors, image, pixel, inside, inverse * tau_inverse, K, strides,
                K, D, K_PAD, D_PAD, KB, BD, False, REAL, PRECISION, INTERPRETED, REGISTERS,
            )  # fmt: skip
        grad = gradient_of_similarities(
            s[0], label, weight, normaliser, k, index, coefficients, thresholds, rng_state, K, K_PAD, PIXEL_ANCHOR,
            weights is not None,
        )  # fmt: skip
        kept = (label >= 0)[None, :]  # 0 times the NaN of an ignored pixel would be NaN
        grad = tl.where(kept, grad * (inverse * tau_inverse)[None, :], 0.0)
        x = load_features(features, image, pixel, inside, d_own, strides, D)
        x = tl.trans(tl.where(kept, x, 0.0).to(PART))
        if PART == tl.float16 or PART == tl.bfloat16:
            high, low, peak = operands(grad, 1, PART, INTERPRETED)
            part = dot(low, x, tl.full((KB, DO), 0.0, REAL), PRECISION, INTERPRETED)
            total += dot(high, x, part, PRECISION, INTERPRETED) * peak
        else:
            total = dot(grad, x, total, PRECISION, INTERPRETED)
    row = partials + (chunk.to(tl.int64) * K + k)[:, None] * D
    tl.store(row + d_own[None, :], total, mask=(k < K)[:, None] & (d_own < D)[None, :])


@kernel
def merge_prototype_gradient_kernel(
    partials, prototypes, norms, grad_prototypes, chunks, K: tl.constexpr, D: tl.constexpr, DB: tl.constexpr
):
    """(11) with the roles exchanged, for one class: the sum over chunks in their order, without its part along phat."""
    REAL: tl.constexpr = partials.dtype.element_ty
    k = tl.program_id(0)
    norm = tl.load(norms + k)
    inverse = tl.where(norm <= EPS, 0.0, 1.0 / norm)
    along = tl.full((DB,), 0.0, REAL)
    for d0 in range(0, D, DB):
        d = d0 + tl.arange(0, DB)
        g = chunk_sum(partials, k, d, chunks, K, D)
        unit = tl.load(prototypes + k * D + d, mask=d < D, other=0.0) * inverse
        along += g * unit
    along_sum = tl.sum(along, 0)
    for d0 in range(0, D, DB):
        d = d0 + tl.arange(0, DB)
        g = chunk_sum(partials, k, d, chunks, K, D)
        unit = tl.load(prototypes + k * D + d, mask=d < D, other=0.0) * inverse
        tl.store(grad_prototypes + k * D + d, (g - along_sum * unit) * inverse, mask=d < D)


@triton.jit
def chunk_sum(partials, k, d, chunks, K: tl.constexpr, D: tl.constexpr):
    """Channels d of class k, summed over the chunks in their order."""
    total = tl.full(d.shape, 0.0, partials.dtype.element_ty)
    for chunk in range(chunks):
        total += tl.load(partials + (tl.full((), chunk, tl.int64) * K + k) * D + d, mask=d < D, other=0.0)
    return total
