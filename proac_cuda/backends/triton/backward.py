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
from .pixels import kernel, members, read_pixels, sampling_key, tile_of_pixels
from .prepare import CONTRAST, LOG_Z, NEGATIVE_SCALE, PIXEL_SCALE, POSITIVE_SCALE
from .vectors import (
    add_squares,
    dot_with_pixels,
    load_features,
    load_parts,
    norm_and_inverse,
    opaque,
    pointers,
    round_to,
    split,
    turned,
)


@triton.jit
def products_and_features(features, anchors, image, pixel, inside, CASE: tl.constexpr):
    """<phat_k, x_i> of all classes, 1/|x|, and KEPT channels of the features, as a tuple of blocks (BD, BM)."""
    totals = times(tl.full((CASE.KB, CASE.BM), 0.0, CASE.REAL), (CASE.K + CASE.KB - 1) // CASE.KB)
    k = tl.arange(0, CASE.KB)
    kept = ()
    squares = tl.full((CASE.BD, CASE.BM), 0.0, CASE.REAL)
    far_squares = squares
    for part in tl.static_range(CASE.KEPT // CASE.BD):
        d = part * CASE.BD + tl.arange(0, CASE.BD)
        x = load_features(features, image, pixel, inside, d, CASE)
        totals = add_products_of_blocks(totals, anchors, x, k, d, CASE)
        squares, far_squares = add_squares(squares, far_squares, x.to(CASE.REAL))
        kept = kept + (x,)
    if CASE.KEPT < CASE.D:
        for d0 in range(CASE.KEPT, CASE.D, CASE.BD):
            d = d0 + tl.arange(0, CASE.BD)
            x = load_features(features, image, pixel, inside, d, CASE)
            totals = add_products_of_blocks(totals, anchors, x, k, d, CASE)
            squares, far_squares = add_squares(squares, far_squares, x.to(CASE.REAL))
    _, inverse = norm_and_inverse(tl.sum(squares, 0), tl.sum(far_squares, 0))
    return totals, inverse, kept


@triton.jit
def add_to_normaliser(top, total, own, s, label, k, CASE: tl.constexpr):
    """One more block S (KB, BM) of the classes ``k`` for :func:`normaliser_of`: others' log-sum-exp, own class's S."""
    mine, inside = label[None, :] == k[:, None], (k < CASE.K)[:, None]
    top, total = add_to_log_sum(top, total, tl.where(inside & ~mine, s, float("-inf")), 0)
    return top, total, own + tl.sum(tl.where(mine, s, 0.0), 0)


@triton.jit
def normaliser_of(top, total, own):
    """(10), of each pixel: logsumexp_c S_ci, and the sum of the other classes' softmax.

    That sum is 1 - softmax of the own class, of which a difference would leave nothing where it is near 1.
    """
    others = top + tl.log(total)  # -inf where there is one class
    high = tl.maximum(others, own)
    log_sum = high + tl.log(tl.exp(others - high) + tl.exp(own - high))
    return log_sum, tl.exp(others - log_sum)


@triton.jit
def gradient_of_similarities(
    s, label, weight, normaliser, k, key, coefficients, sets, WEIGHTED: tl.constexpr, CASE: tl.constexpr
):
    """(8), (9), (10): dL/dS_ki, (KB, BM); exactly 0 outside V. One exponential serves (8) and (9)."""
    own, negative = members(label, k, key, sets, CASE.K)
    positive_scale = tl.load(coefficients + POSITIVE_SCALE * CASE.K_PAD + k)[:, None]
    negative_scale = tl.load(coefficients + NEGATIVE_SCALE * CASE.K_PAD + k)[:, None]
    log_z = tl.load(coefficients + LOG_Z * CASE.K_PAD + k)[:, None]
    contrast = tl.load(coefficients + CONTRAST * CASE.K_PAD + k)[:, None]
    shifted = s - log_z
    if WEIGHTED:
        shifted = s + tl.log(weight)[None, :] - log_z
    e = tl.exp(tl.where(own, s - contrast, shifted))
    grad_own = -positive_scale / (1.0 + e)
    if WEIGHTED:  # else the weights of V, where alone a gradient is, are 1
        grad_own *= weight[None, :]
    grad = tl.where(own, grad_own, tl.where(negative, negative_scale * e, 0.0))
    if CASE.PIXEL_ANCHOR:
        scale = tl.load(coefficients + PIXEL_SCALE * CASE.K_PAD) * weight
        log_sum, others = normaliser
        softmax = tl.where(own, -others[None, :], tl.exp(s - log_sum[None, :]))
        kept = (label >= 0)[None, :] & (k < CASE.K)[:, None]
        grad += tl.where(kept, scale[None, :] * softmax, 0.0)
    return grad


@triton.jit
def peak_of(values, AXIS: tl.constexpr, CASE: tl.constexpr):
    """What to divide by before rounding to CASE.PART: float16 has too few exponents for the range of gradients."""
    if CASE.PART == tl.float16:
        peak = tl.max(tl.abs(values), AXIS, keep_dims=True)
        return tl.where(peak > 1e-37, peak, 1.0)
    else:
        return 1.0


@triton.jit
def operands(grad, AXIS: tl.constexpr, CASE: tl.constexpr):
    """Coefficients as a product takes them: (high, low, factor) with grad = (high + low) factor; low only for 16 bits."""
    if CASE.PARTS == 2:
        peak = peak_of(grad, AXIS, CASE)
        high, low = split(grad / peak, CASE.PART, CASE.INTERPRETED)
        return high, low, peak
    else:
        return grad, grad, 1.0


@triton.jit
def add_gradient(g, parts, grad, CASE: tl.constexpr):
    """(11): g + sum over a block of classes of phat[k, d] grad[k], (BD, BM) as :func:`.vectors.turned` has it.

    phat is in ``parts``, ``grad`` is of :func:`operands`, or (high, low, None) where g is in their units.
    """
    high, low, factor = grad
    anchor = tl.trans(parts[0])
    if len(parts) == 2:
        rest = tl.trans(parts[1])
        start = g
        if high.dtype == tl.float16 and factor is not None:
            start = tl.zeros_like(g)
        product = dot_with_pixels(anchor, low, start, CASE)
        product = dot_with_pixels(rest, high, product, CASE)
        product = dot_with_pixels(anchor, high, product, CASE)
        if high.dtype == tl.float16 and factor is not None:
            product = g + product * turned(factor, CASE)
        return product
    else:
        return dot_with_pixels(anchor, high, g, CASE)


@triton.jit
def store_gradient(grad_features, image, pixel, inside, d, g, x, along, inverse, kept, CASE: tl.constexpr):
    """(11): dx = (g - <g, xhat> xhat) / |x| of a block of channels, exactly 0 outside V."""
    unit = x.to(g.dtype) * inverse[None, :]
    dx = tl.where(kept[None, :], (g - along[None, :] * unit) * inverse[None, :], 0.0)
    place = pointers(grad_features, image, pixel, d)
    tl.store(
        place,
        round_to(dx, grad_features.data.dtype.element_ty, CASE.INTERPRETED),
        mask=(d < CASE.D)[:, None] & inside[None, :],
    )


@triton.jit
def gradient_block(anchors, d, coefficients_of_blocks, CASE: tl.constexpr):
    """(11): g (BD, BM) of the channels d, summed over all blocks of classes."""
    g = tl.full((CASE.BD, CASE.BM), 0.0, CASE.REAL)
    for block in tl.static_range(len(coefficients_of_blocks)):
        parts = load_parts(anchors, block * CASE.KB + tl.arange(0, CASE.KB), d, CASE, AGAIN=True)
        g = add_gradient(g, parts, coefficients_of_blocks[block], CASE)
    return g


@kernel
def feature_gradient_kernel(
    features, grad_features, anchors, coefficients, labels, weights, sets,
    tiling, sampling, inverse_temperature: "fp64", CASE: tl.constexpr,
):  # fmt: skip
    """(11) for a tile of pixels and all classes at once."""
    image, pixel, index, inside = tile_of_pixels(tl.program_id(0), tiling, CASE.BM, CASE.INDEX)
    label, weight, _, _, _, _ = read_pixels(index, inside, labels, weights, sampling, CASE.K, CASE.REAL)
    tau_inverse = tl.full((), inverse_temperature, CASE.REAL)
    totals, inverse, kept = products_and_features(features, anchors, image, pixel, inside, CASE)
    factor = (inverse * tau_inverse)[None, :]
    normaliser = (inverse, inverse)
    if CASE.PIXEL_ANCHOR:
        top = tl.full((CASE.BM,), float("-inf"), CASE.REAL)
        total = tl.full((CASE.BM,), 0.0, CASE.REAL)
        own = total
        for block in tl.static_range(len(totals)):
            k = block * CASE.KB + tl.arange(0, CASE.KB)
            top, total, own = add_to_normaliser(top, total, own, totals[block] * factor, label, k, CASE)
        normaliser = normaliser_of(top, total, own)
    along = tl.full((CASE.BM,), 0.0, CASE.REAL)  # <g, xhat>
    key = sampling_key(index, sets)
    grads = ()
    for block in tl.static_range(len(totals)):
        k = block * CASE.KB + tl.arange(0, CASE.KB)
        s = totals[block] * factor
        grad = gradient_of_similarities(
            s, label, weight, normaliser, k, key, coefficients, sets, weights is not None, CASE
        )
        along += tl.sum(grad * s, 0)
        grads = grads + (operands(grad * tau_inverse, 0, CASE),)
    for part in tl.static_range(CASE.KEPT // CASE.BD):
        d = part * CASE.BD + tl.arange(0, CASE.BD)
        g = gradient_block(anchors, d, grads, CASE)
        x = opaque(kept[part], CASE)  # else its form as float32, made for |x|, is kept as well
        store_gradient(grad_features, image, pixel, inside, d, g, x, along, inverse, label >= 0, CASE)
    if CASE.KEPT < CASE.D:
        for d0 in range(CASE.KEPT, CASE.D, CASE.BD):
            d = d0 + tl.arange(0, CASE.BD)
            g = gradient_block(anchors, d, grads, CASE)
            x = load_features(features, image, pixel, inside, d, CASE)
            store_gradient(grad_features, image, pixel, inside, d, g, x, along, inverse, label >= 0, CASE)
