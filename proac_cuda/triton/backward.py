"""Stage (iii), equations (7) to (11): the gradient of the features.

S is recomputed from the features; what comes from the forward pass are numbers per class. With G_ki = dL/dS_ki,

    g_i = (1/tau) sum_k G_ki phat_k      <g_i, xhat_i> = sum_k G_ki S_ki      dx_i = (g_i - <g_i, xhat_i> xhat_i) / |x_i|

A program of the kernel here has S of its tile for all classes in registers, as a tuple of blocks, and turns it into G there;
then g is made block by block of channels. The first KEPT channels of the features stay in registers from S to dx; those
beyond are read a second time, by the same program. What all programs under way have read since is their tiles, BM x D
features each: with 132 multiprocessors, two programs on each, D = 256 and float32, 17 MB. That is below the L2 cache of the
GPUs with this many multiprocessors (40 MB and more), so that device memory should serve each feature once.

:mod:`.gradient_by_classes` has the kernel for more classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import add_products_of_blocks, add_to_log_sum, times
from .pixels import kernel, members, read_pixels, tile_of_pixels
from .prepare import CONTRAST, LOG_Z, NEGATIVE_SCALE, PIXEL_SCALE, POSITIVE_SCALE
from .vectors import (
    add_squares,
    dot,
    load_features,
    load_parts,
    norm_and_inverse,
    opaque,
    round_to,
    split,
)


@triton.jit
def products_and_features(
    features, anchors, image, pixel, inside, strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, KB: tl.constexpr, BD: tl.constexpr,
    KEPT: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """<phat_k, x_i> of all classes, 1/|x|, and KEPT channels of the features, as a tuple of blocks (BD, BM)."""
    totals = times(tl.full((KB, pixel.shape[0]), 0.0, REAL), (K + KB - 1) // KB)
    k = tl.arange(0, KB)
    kept = ()
    squares = tl.full((BD, pixel.shape[0]), 0.0, REAL)
    far_squares = squares
    for part in tl.static_range(KEPT // BD):
        d = part * BD + tl.arange(0, BD)
        x = load_features(features, image, pixel, inside, d, strides, D)
        totals = add_products_of_blocks(totals, anchors, x, k, d, K_PAD, D_PAD, PRECISION, INTERPRETED)
        squares, far_squares = add_squares(squares, far_squares, x.to(REAL))
        kept = kept + (x,)
    if KEPT < D:
        for d0 in range(KEPT, D, BD):
            d = d0 + tl.arange(0, BD)
            x = load_features(features, image, pixel, inside, d, strides, D)
            totals = add_products_of_blocks(totals, anchors, x, k, d, K_PAD, D_PAD, PRECISION, INTERPRETED)
            squares, far_squares = add_squares(squares, far_squares, x.to(REAL))
    _, inverse = norm_and_inverse(tl.sum(squares, 0), tl.sum(far_squares, 0))
    return totals, inverse, kept


@triton.jit
def gradient_of_similarities(
    s, label, weight, normaliser, k, index, coefficients, thresholds, rng_state,
    K: tl.constexpr, K_PAD: tl.constexpr, PIXEL_ANCHOR: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """(8), (9), (10): dL/dS_ki, (KB, BM); exactly 0 outside V. One exponential serves (8) and (9)."""
    own, negative = members(label, k, index, thresholds, rng_state, K)
    positive_scale = tl.load(coefficients + POSITIVE_SCALE * K_PAD + k)[:, None]
    negative_scale = tl.load(coefficients + NEGATIVE_SCALE * K_PAD + k)[:, None]
    log_z = tl.load(coefficients + LOG_Z * K_PAD + k)[:, None]
    contrast = tl.load(coefficients + CONTRAST * K_PAD + k)[:, None]
    shifted = s - log_z
    if WEIGHTED:
        shifted = s + tl.log(weight)[None, :] - log_z
    e = tl.exp(tl.where(own, s - contrast, shifted))
    grad_own = -positive_scale / (1.0 + e)
    if WEIGHTED:  # else the weights of V, where alone a gradient is, are 1
        grad_own *= weight[None, :]
    grad = tl.where(own, grad_own, tl.where(negative, negative_scale * e, 0.0))
    if PIXEL_ANCHOR:
        scale = tl.load(coefficients + PIXEL_SCALE * K_PAD) * weight
        softmax = tl.exp(s - normaliser[None, :]) - tl.where(own, 1.0, 0.0)
        kept = (label >= 0)[None, :] & (k < K)[:, None]
        grad += tl.where(kept, scale[None, :] * softmax, 0.0)
    return grad


@triton.jit
def peak_of(values, AXIS: tl.constexpr, PART: tl.constexpr):
    """What to divide by before rounding to PART: float16 has too few exponents for the range of gradients."""
    if PART == tl.float16:
        peak = tl.max(tl.abs(values), AXIS, keep_dims=True)
        return tl.where(peak > 1e-37, peak, 1.0)
    else:
        return 1.0


@triton.jit
def operands(grad, AXIS: tl.constexpr, PART: tl.constexpr, INTERPRETED: tl.constexpr):
    """Coefficients as a product takes them: (high, low, factor) with grad = (high + low) factor; low only for 16 bits."""
    if PART == tl.float16 or PART == tl.bfloat16:
        peak = peak_of(grad, AXIS, PART)
        high, low = split(grad / peak, PART, INTERPRETED)
        return high, low, peak
    else:
        return grad, grad, 1.0


@triton.jit
def add_gradient(g, parts, grad, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """(11): g (BD, BM) + sum over a block of classes of phat[k, d] grad[k], phat in ``parts``, ``grad`` of :func:`operands`."""
    high, low, factor = grad
    anchor = tl.trans(parts[0])
    if len(parts) == 2:
        rest = tl.trans(parts[1])
        start = g
        if high.dtype == tl.float16:
            start = tl.zeros_like(g)
        product = dot(anchor, low, start, PRECISION, INTERPRETED)
        product = dot(rest, high, product, PRECISION, INTERPRETED)
        product = dot(anchor, high, product, PRECISION, INTERPRETED)
        if high.dtype == tl.float16:
            product = g + product * factor
        return product
    else:
        return dot(anchor, high, g, PRECISION, INTERPRETED)


@triton.jit
def store_gradient(
    grad_features, image, pixel, inside, d, strides, g, x, along, inverse, kept,
    D: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(11): dx = (g - <g, xhat> xhat) / |x| of a block of channels, exactly 0 outside V."""
    unit = x.to(g.dtype) * inverse[None, :]
    dx = tl.where(kept[None, :], (g - along[None, :] * unit) * inverse[None, :], 0.0)
    pointer = grad_features + image.to(tl.int64) * strides[0]
    offset = d[:, None].to(tl.int64) * strides[1] + pixel[None, :].to(tl.int64) * strides[2]
    tl.store(pointer + offset, round_to(dx, x.dtype, INTERPRETED), mask=(d < D)[:, None] & inside[None, :])


@triton.jit
def gradient_block(
    anchors, d, coefficients_of_blocks, BM: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, KB: tl.constexpr,
    REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(11): g (BD, BM) of the channels d, summed over all blocks of classes."""
    g = tl.full((d.shape[0], BM), 0.0, REAL)
    for block in tl.static_range(len(coefficients_of_blocks)):
        k = block * KB + tl.arange(0, KB)
        parts = load_parts(anchors, k, d, K_PAD, D_PAD, AGAIN=True)
        g = add_gradient(g, parts, coefficients_of_blocks[block], PRECISION, INTERPRETED)
    return g


@kernel
def feature_gradient_kernel(
    features, grad_features, anchors, coefficients, labels, weights, thresholds, rng_state,
    inverse_temperature: "fp64", ignore_index, P, tiles_per_image,
    strides, grad_strides, size, label_size, scale, label_strides, weight_strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, PIXEL_ANCHOR: tl.constexpr,
    KB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, KEPT: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, INTERPRETED: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """(11) for a tile of pixels and all classes at once."""
    REAL: tl.constexpr = coefficients.dtype.element_ty
    PART: tl.constexpr = anchors.dtype.element_ty
    image, pixel, index, inside = tile_of_pixels(tl.program_id(0), tiles_per_image, P, BM, INDEX)
    label, weight, _, _, _, _ = read_pixels(
        index, inside, labels, label_strides, weights, weight_strides, size, label_size, scale, ignore_index, K,
        REAL,
    )  # fmt: skip
    tau_inverse = tl.full((), inverse_temperature, REAL)
    totals, inverse, kept = products_and_features(
        features, anchors, image, pixel, inside, strides,
        K, D, K_PAD, D_PAD, KB, BD, KEPT, REAL, PRECISION, INTERPRETED,
    )  # fmt: skip
    factor = (inverse * tau_inverse)[None, :]
    normaliser = inverse
    if PIXEL_ANCHOR:
        top = tl.full((BM,), float("-inf"), REAL)
        total = tl.full((BM,), 0.0, REAL)
        for block in tl.static_range(len(totals)):
            k = block * KB + tl.arange(0, KB)
            s = tl.where((k < K)[:, None], totals[block] * factor, float("-inf"))
            top, total = add_to_log_sum(top, total, s, 0)
        normaliser = top + tl.log(total)
    along = tl.full((BM,), 0.0, REAL)  # <g, xhat>
    grads = ()
    for block in tl.static_range(len(totals)):
        k = block * KB + tl.arange(0, KB)
        s = totals[block] * factor
        grad = gradient_of_similarities(
            s, label, weight, normaliser, k, index, coefficients, thresholds, rng_state, K, K_PAD, PIXEL_ANCHOR,
            weights is not None,
        )  # fmt: skip
        along += tl.sum(grad * s, 0)
        grads = grads + (operands(grad * tau_inverse, 0, PART, INTERPRETED),)
    for part in tl.static_range(KEPT // BD):
        d = part * BD + tl.arange(0, BD)
        g = gradient_block(anchors, d, grads, BM, K_PAD, D_PAD, KB, REAL, PRECISION, INTERPRETED)
        x = opaque(kept[part], REGISTERS)  # else its form as float32, made for |x|, is kept as well
        store_gradient(
            grad_features, image, pixel, inside, d, grad_strides, g, x, along, inverse, label >= 0, D, INTERPRETED
        )
    if KEPT < D:
        for d0 in range(KEPT, D, BD):
            d = d0 + tl.arange(0, BD)
            g = gradient_block(anchors, d, grads, BM, K_PAD, D_PAD, KB, REAL, PRECISION, INTERPRETED)
            x = load_features(features, image, pixel, inside, d, strides, D)
            store_gradient(
                grad_features, image, pixel, inside, d, grad_strides, g, x, along, inverse, label >= 0, D, INTERPRETED
            )
