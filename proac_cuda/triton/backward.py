"""Stage (iii), equations (7) to (11): the gradient of the features, and of the prototypes in two stages.

S is recomputed from the features; what comes from the forward pass are numbers per class. With G_ki = dL/dS_ki,

    g_i = (1/tau) sum_k G_ki phat_k      <g_i, xhat_i> = sum_k G_ki S_ki      dx_i = (g_i - <g_i, xhat_i> xhat_i) / |x_i|

so one loop over blocks of classes gives both sums. A program holds the features of its tile in registers from S to dx:
each is read once and each gradient written once, up to D = DO. Beyond that a program makes DO channels of the gradient
and streams the others through, once to find |x| and once for each block of classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import add_to_log_sum, similarities
from .pixels import members, read_pixels, tile_of_pixels
from .prepare import CONTRAST, LOG_Z, NEGATIVE_SCALE, PIXEL_SCALE, POSITIVE_SCALE
from .vectors import (
    EPS,
    add_products,
    add_squares,
    dot,
    load_anchors,
    load_features,
    norm_and_inverse,
    round_to,
    split,
)


@triton.jit
def load_blocks(
    features, image, pixel, inside, d0, strides, D: tl.constexpr, DO: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """DO channels of a tile from d0 on, as a tuple of blocks (BD, BM)."""
    blocks = ()
    for part in tl.static_range(DO // BD):
        d = d0 + part * BD + tl.arange(0, BD)
        blocks = blocks + (load_features(features, image, pixel, inside, d, strides, D),)
    return blocks


@triton.jit
def inverse_norms(
    blocks, features, image, pixel, inside, strides,
    D: tl.constexpr, BD: tl.constexpr, RESIDENT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """1/|x| of a tile's pixels."""
    squares = tl.zeros((BD, pixel.shape[0]), REAL)
    far_squares = squares
    if RESIDENT:
        for part in tl.static_range(len(blocks)):
            squares, far_squares = add_squares(squares, far_squares, blocks[part].to(REAL))
    else:
        for d0 in range(0, D, BD):
            x = load_features(features, image, pixel, inside, d0 + tl.arange(0, BD), strides, D)
            squares, far_squares = add_squares(squares, far_squares, x.to(REAL))
    _, inverse = norm_and_inverse(tl.sum(squares, 0), tl.sum(far_squares, 0))
    return inverse


@triton.jit
def products(
    blocks, features, anchors, image, pixel, inside, k, strides,
    D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, BD: tl.constexpr, RESIDENT: tl.constexpr,
    REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """<phat_k, x_i>, (KB, BM), from the blocks in registers or, where those are not all channels, from memory."""
    total = tl.zeros((k.shape[0], pixel.shape[0]), REAL)
    if RESIDENT:
        for part in tl.static_range(len(blocks)):
            d = part * BD + tl.arange(0, BD)
            total = add_products(total, anchors, blocks[part], k, d, K_PAD, D_PAD, PRECISION, INTERPRETED)
    else:
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            x = load_features(features, image, pixel, inside, d, strides, D)
            total = add_products(total, anchors, x, k, d, K_PAD, D_PAD, PRECISION, INTERPRETED)
    return total


@triton.jit
def gradient_of_similarities(
    s, label, weight, normaliser, k, index, coefficients, thresholds, rng_state,
    K: tl.constexpr, K_PAD: tl.constexpr, PIXEL_ANCHOR: tl.constexpr,
):  # fmt: skip
    """(8), (9), (10): dL/dS_ki, (KB, BM); exactly 0 outside V. One exponential serves (8) and (9)."""
    own, negative = members(label, k, index, thresholds, rng_state, K)
    positive_scale = tl.load(coefficients + POSITIVE_SCALE * K_PAD + k)[:, None]
    negative_scale = tl.load(coefficients + NEGATIVE_SCALE * K_PAD + k)[:, None]
    log_z = tl.load(coefficients + LOG_Z * K_PAD + k)[:, None]
    contrast = tl.load(coefficients + CONTRAST * K_PAD + k)[:, None]
    e = tl.exp(tl.where(own, s - contrast, s + tl.log(weight)[None, :] - log_z))
    grad_own = -positive_scale * weight[None, :] / (1.0 + e)
    grad = tl.where(own, grad_own, tl.where(negative, negative_scale * e, 0.0))
    if PIXEL_ANCHOR:
        scale = tl.load(coefficients + PIXEL_SCALE * K_PAD) * weight
        softmax = tl.exp(s - normaliser[None, :]) - tl.where(own, 1.0, 0.0)
        kept = (label >= 0)[None, :] & (k < K)[:, None]
        grad += tl.where(kept, scale[None, :] * softmax, 0.0)
    return grad


@triton.jit
def normaliser_of_pixels(
    blocks, features, anchors, image, pixel, inside, inverse, strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, KB: tl.constexpr, BD: tl.constexpr,
    RESIDENT: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """logsumexp_c S_ci of a tile's pixels; ``inverse`` is 1/(|x| tau)."""
    top = tl.full(inverse.shape, float("-inf"), REAL)
    total = tl.zeros(inverse.shape, REAL)
    for k0 in range(0, K, KB):
        k = k0 + tl.arange(0, KB)
        cosines = products(
            blocks, features, anchors, image, pixel, inside, k, strides,
            D, K_PAD, D_PAD, BD, RESIDENT, REAL, PRECISION, INTERPRETED,
        )  # fmt: skip
        s = tl.where((k < K)[:, None], cosines * inverse[None, :], float("-inf"))
        top, total = add_to_log_sum(top, total, s, 0)
    return top + tl.log(total)


@triton.jit
def peak_of(values, AXIS: tl.constexpr, DTYPE: tl.constexpr):
    """What to divide by before rounding to DTYPE: float16 has too few exponents for the range of gradients."""
    if DTYPE == tl.float16:
        peak = tl.max(tl.abs(values), AXIS, keep_dims=True)
        return tl.where(peak > 1e-37, peak, 1.0)
    else:
        return 1.0


@triton.jit
def feature_gradient_kernel(
    features, grad_features, anchors, coefficients, labels, weights, thresholds, rng_state,
    inverse_temperature: "fp64", ignore_index, P, tiles_per_image,
    strides, grad_strides, size, label_size, scale, label_strides, weight_strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, PIXEL_ANCHOR: tl.constexpr,
    KB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, DO: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(11) for a tile of pixels (program axis 0) and DO channels (axis 1)."""
    REAL: tl.constexpr = coefficients.dtype.element_ty
    DTYPE: tl.constexpr = features.dtype.element_ty
    RESIDENT: tl.constexpr = D <= DO
    BLOCKS: tl.constexpr = DO // BD
    image, pixel, index, inside = tile_of_pixels(tl.program_id(0), tiles_per_image, P, BM, INDEX)
    label, weight, _, _, _, _ = read_pixels(
        index, inside, labels, label_strides, weights, weight_strides, size, label_size, scale, ignore_index, K, REAL
    )
    d_first = tl.program_id(1) * DO
    tau_inverse = tl.full((), inverse_temperature, REAL)
    x = load_blocks(features, image, pixel, inside, d_first, strides, D, DO, BD)
    inverse = inverse_norms(x, features, image, pixel, inside, strides, D, BD, RESIDENT, REAL)
    normaliser = inverse
    if PIXEL_ANCHOR:
        normaliser = normaliser_of_pixels(
            x, features, anchors, image, pixel, inside, inverse * tau_inverse, strides,
            K, D, K_PAD, D_PAD, KB, BD, RESIDENT, REAL, PRECISION, INTERPRETED,
        )  # fmt: skip

    g = ()
    for _ in tl.static_range(BLOCKS):
        g = g + (tl.zeros((BD, BM), REAL),)
    along = tl.zeros((BM,), REAL)  # <g, xhat>
    for k0 in range(0, K, KB):
        k = k0 + tl.arange(0, KB)
        total = products(
            x, features, anchors, image, pixel, inside, k, strides,
            D, K_PAD, D_PAD, BD, RESIDENT, REAL, PRECISION, INTERPRETED,
        )  # fmt: skip
        s = total * (inverse * tau_inverse)[None, :]
        grad = gradient_of_similarities(
            s, label, weight, normaliser, k, index, coefficients, thresholds, rng_state, K, K_PAD, PIXEL_ANCHOR
        )
        along += tl.sum(grad * s, 0)
        grad = grad * tau_inverse
        sums = ()
        if DTYPE == tl.float16 or DTYPE == tl.bfloat16:
            peak = peak_of(grad, 0, DTYPE)
            high, low = split(grad / peak, DTYPE, INTERPRETED)
            for part in tl.static_range(BLOCKS):
                d = d_first + part * BD + tl.arange(0, BD)
                anchor = tl.trans(load_anchors(anchors, k, d, 0, K_PAD, D_PAD))
                rest = tl.trans(load_anchors(anchors, k, d, 1, K_PAD, D_PAD))
                if DTYPE == tl.float16:
                    product = dot(anchor, low, tl.zeros((BD, BM), REAL), PRECISION, INTERPRETED)
                    product = dot(rest, high, product, PRECISION, INTERPRETED)
                    sums = sums + (g[part] + dot(anchor, high, product, PRECISION, INTERPRETED) * peak,)
                else:
                    product = dot(anchor, low, g[part], PRECISION, INTERPRETED)
                    product = dot(rest, high, product, PRECISION, INTERPRETED)
                    sums = sums + (dot(anchor, high, product, PRECISION, INTERPRETED),)
        else:
            for part in tl.static_range(BLOCKS):
                d = d_first + part * BD + tl.arange(0, BD)
                anchor = tl.trans(load_anchors(anchors, k, d, 0, K_PAD, D_PAD))
                sums = sums + (dot(anchor, grad, g[part], PRECISION, INTERPRETED),)
        g = sums

    for part in tl.static_range(BLOCKS):
        d = d_first + part * BD + tl.arange(0, BD)
        unit = x[part].to(REAL) * inverse[None, :]
        dx = (g[part] - along[None, :] * unit) * inverse[None, :]
        dx = tl.where((label >= 0)[None, :], dx, 0.0)
        pointer = grad_features + image.to(tl.int64) * grad_strides[0]
        offset = d[:, None].to(tl.int64) * grad_strides[1] + pixel[None, :].to(tl.int64) * grad_strides[2]
        tl.store(pointer + offset, round_to(dx, DTYPE, INTERPRETED), mask=(d < D)[:, None] & inside[None, :])


@triton.jit
def prototype_gradient_kernel(
    features, partials, anchors, coefficients, labels, weights, thresholds, rng_state,
    inverse_temperature: "fp64", ignore_index, P, tiles_per_image, tiles, tiles_per_chunk,
    strides, size, label_size, scale, label_strides, weight_strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, PIXEL_ANCHOR: tl.constexpr,
    KB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, DO: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sum_i G_ki xhat_i / tau over a chunk (program axis 0), for KB classes (axis 1) and DO channels (axis 2)."""
    REAL: tl.constexpr = partials.dtype.element_ty
    DTYPE: tl.constexpr = features.dtype.element_ty
    chunk = tl.program_id(0)
    k = tl.program_id(1) * KB + tl.arange(0, KB)
    d_own = tl.program_id(2) * DO + tl.arange(0, DO)
    tau_inverse = tl.full((), inverse_temperature, REAL)
    total = tl.zeros((KB, DO), REAL)
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        image, pixel, index, inside = tile_of_pixels(tile, tiles_per_image, P, BM, INDEX)
        label, weight, _, _, _, _ = read_pixels(
            index, inside, labels, label_strides, weights, weight_strides, size, label_size, scale, ignore_index, K, REAL
        )
        s, inverse = similarities(
            features, anchors, image, pixel, inside, k, strides, tau_inverse,
            D, K_PAD, D_PAD, BD, REAL, PRECISION, INTERPRETED,
        )  # fmt: skip
        normaliser = inverse
        if PIXEL_ANCHOR:
            normaliser = normaliser_of_pixels(
                (), features, anchors, image, pixel, inside, inverse * tau_inverse, strides,
                K, D, K_PAD, D_PAD, KB, BD, False, REAL, PRECISION, INTERPRETED,
            )  # fmt: skip
        grad = gradient_of_similarities(
            s, label, weight, normaliser, k, index, coefficients, thresholds, rng_state, K, K_PAD, PIXEL_ANCHOR
        )
        kept = (label >= 0)[None, :]  # 0 times the NaN of an ignored pixel would be NaN
        grad = tl.where(kept, grad * (inverse * tau_inverse)[None, :], 0.0)
        x = load_features(features, image, pixel, inside, d_own, strides, D)
        x = tl.trans(tl.where(kept, x, 0.0).to(DTYPE))
        if DTYPE == tl.float16 or DTYPE == tl.bfloat16:
            peak = peak_of(grad, 1, DTYPE)
            high, low = split(grad / peak, DTYPE, INTERPRETED)
            part = dot(low, x, tl.zeros((KB, DO), REAL), PRECISION, INTERPRETED)
            total += dot(high, x, part, PRECISION, INTERPRETED) * peak
        else:
            total = dot(grad, x, total, PRECISION, INTERPRETED)
    row = partials + (chunk.to(tl.int64) * K + k)[:, None] * D
    tl.store(row + d_own[None, :], total, mask=(k < K)[:, None] & (d_own < D)[None, :])


@triton.jit
def merge_prototype_gradient_kernel(
    partials, prototypes, norms, grad_prototypes, chunks, K: tl.constexpr, D: tl.constexpr, DB: tl.constexpr
):
    """(11) with the roles exchanged, for one class: the sum over chunks in their order, without its part along phat."""
    REAL: tl.constexpr = partials.dtype.element_ty
    k = tl.program_id(0)
    norm = tl.load(norms + k)
    inverse = tl.where(norm <= EPS, 0.0, 1.0 / norm)
    along = tl.zeros((DB,), REAL)
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
    total = tl.zeros(d.shape, partials.dtype.element_ty)
    for chunk in range(0, chunks):
        total += tl.load(partials + (tl.full((), chunk, tl.int64) * K + k) * D + d, mask=d < D, other=0.0)
    return total
