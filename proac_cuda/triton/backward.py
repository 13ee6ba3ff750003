"""Stage (iii), equations (7) to (11): the gradient of the features.

S is recomputed from the features; what comes from the forward pass are numbers per class. With G_ki = dL/dS_ki,

    g_i = (1/tau) sum_k G_ki phat_k      <g_i, xhat_i> = sum_k G_ki S_ki      dx_i = (g_i - <g_i, xhat_i> xhat_i) / |x_i|

so one loop over blocks of classes gives both sums. A program holds the features of its tile in registers from S to dx:
each is read once and each gradient written once, up to D = DO. Beyond that a program makes DO channels of the gradient
and streams the others through, once to find |x| and once for each block of classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import add_to_log_sum
from .pixels import kernel, members, read_pixels, tile_of_pixels
from .prepare import CONTRAST, LOG_Z, NEGATIVE_SCALE, PIXEL_SCALE, POSITIVE_SCALE
from .vectors import (
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
    features, anchors, image, pixel, inside, d0, strides,
    D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, KB: tl.constexpr, BD: tl.constexpr, DO: tl.constexpr,
    FIRST_PRODUCTS: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """DO channels of a tile from d0 on, as a tuple of blocks (BD, BM), and 1/|x|; on the way <phat_k, x> of KB classes.

    All of it block by block: a block that is needed again later would stay in the registers in two layouts.
    """
    blocks = ()
    total = tl.full((KB, pixel.shape[0]), 0.0, REAL)
    squares = tl.full((BD, pixel.shape[0]), 0.0, REAL)
    far_squares = squares
    for part in tl.static_range(DO // BD):
        d = d0 + part * BD + tl.arange(0, BD)
        x = load_features(features, image, pixel, inside, d, strides, D)
        if FIRST_PRODUCTS:
            total = add_products(total, anchors, x, tl.arange(0, KB), d, K_PAD, D_PAD, PRECISION, INTERPRETED)
        squares, far_squares = add_squares(squares, far_squares, x.to(REAL))
        blocks = blocks + (x,)
    if D > DO:  # these blocks are not all of x
        squares = tl.full((BD, pixel.shape[0]), 0.0, REAL)
        far_squares = squares
        for d1 in range(0, D, BD):
            x = load_features(features, image, pixel, inside, d1 + tl.arange(0, BD), strides, D)
            squares, far_squares = add_squares(squares, far_squares, x.to(REAL))
    _, inverse = norm_and_inverse(tl.sum(squares, 0), tl.sum(far_squares, 0))
    return blocks, inverse, total


@triton.jit
def products(
    blocks, features, anchors, image, pixel, inside, k0, classes, k, strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, BD: tl.constexpr, RESIDENT: tl.constexpr,
    REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """<phat_k, x_i>, (KB, BM), from the blocks in registers or, where those are not all channels, from memory."""
    total = tl.full((k.shape[0], pixel.shape[0]), 0.0, REAL)
    if RESIDENT:
        for part in tl.static_range(len(blocks)):
            d = part * BD + tl.arange(0, BD)
            # x as it is, but tied to the loop over classes: else the compiler keeps a second copy of all of x, in the form that
            # tensor cores take, across the loop, and registers or shared memory run out. That form is made by arithmetic
            # where the dtype is wide, and then the zero must not be known before run time.
            if blocks[part].dtype == REAL:
                x = blocks[part] + tl.where(k0 < classes, 0.0, 1.0)
            else:
                x = tl.where(k0 < K, blocks[part], 0.0).to(blocks[part].dtype)
            total = add_products(total, anchors, x, k, d, K_PAD, D_PAD, PRECISION, INTERPRETED)
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
    blocks, features, anchors, image, pixel, inside, inverse, classes, strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, KB: tl.constexpr, BD: tl.constexpr,
    RESIDENT: tl.constexpr, REAL: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """logsumexp_c S_ci of a tile's pixels; ``inverse`` is 1/(|x| tau)."""
    top = tl.full(inverse.shape, float("-inf"), REAL)
    total = tl.full(inverse.shape, 0.0, REAL)
    for k0 in range(0, K, KB):
        k = k0 + tl.arange(0, KB)
        cosines = products(
            blocks, features, anchors, image, pixel, inside, k0, classes, k, strides,
            K, D, K_PAD, D_PAD, BD, RESIDENT, REAL, PRECISION, INTERPRETED,
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
def operands(grad, AXIS: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Coefficients as a product takes them: (high, low, factor) with grad = (high + low) factor; low only for 16 bits."""
    if DTYPE == tl.float16 or DTYPE == tl.bfloat16:
        peak = peak_of(grad, AXIS, DTYPE)
        high, low = split(grad / peak, DTYPE, INTERPRETED)
        return high, low, peak
    else:
        return grad, grad, 1.0


@triton.jit
def add_gradient(
    g, anchors, k, d, grad, K_PAD: tl.constexpr, D_PAD: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr
):
    """(11): g (BD, BM) + sum over this block of classes of phat[k, d] grad[k], with ``grad`` of :func:`operands`."""
    high, low, factor = grad
    anchor = tl.trans(load_anchors(anchors, k, d, 0, K_PAD, D_PAD, AGAIN=True))
    if high.dtype == tl.float16 or high.dtype == tl.bfloat16:
        rest = tl.trans(load_anchors(anchors, k, d, 1, K_PAD, D_PAD, AGAIN=True))
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
    grad_features,
    image,
    pixel,
    inside,
    d,
    strides,
    g,
    x,
    along,
    inverse,
    kept,
    D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """(11): dx = (g - <g, xhat> xhat) / |x| of a block of channels, exactly 0 outside V."""
    unit = x.to(g.dtype) * inverse[None, :]
    dx = tl.where(kept[None, :], (g - along[None, :] * unit) * inverse[None, :], 0.0)
    pointer = grad_features + image.to(tl.int64) * strides[0]
    offset = d[:, None].to(tl.int64) * strides[1] + pixel[None, :].to(tl.int64) * strides[2]
    tl.store(pointer + offset, round_to(dx, x.dtype, INTERPRETED), mask=(d < D)[:, None] & inside[None, :])


@kernel
def feature_gradient_kernel(
    features, grad_features, anchors, coefficients, labels, weights, thresholds, rng_state,
    inverse_temperature: "fp64", ignore_index, classes, P, tiles_per_image,
    strides, grad_strides, size, label_size, scale, label_strides, weight_strides,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr, PIXEL_ANCHOR: tl.constexpr,
    KB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, DO: tl.constexpr, DG: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(11) for a tile of pixels (program axis 0) and DO channels (axis 1); ``classes`` is K once more, at run time."""
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
    x, inverse, total = load_blocks(
        features, anchors, image, pixel, inside, d_first, strides,
        D, K_PAD, D_PAD, KB, BD, DO, RESIDENT and K <= KB, REAL, PRECISION, INTERPRETED,
    )  # fmt: skip
    normaliser = inverse
    if PIXEL_ANCHOR:
        normaliser = normaliser_of_pixels(
            x, features, anchors, image, pixel, inside, inverse * tau_inverse, classes, strides,
            K, D, K_PAD, D_PAD, KB, BD, RESIDENT, REAL, PRECISION, INTERPRETED,
        )  # fmt: skip
    if K <= KB:  # one block of classes: g is made block by block of channels
        k = tl.arange(0, KB)
        if not RESIDENT:
            total = products(
                x, features, anchors, image, pixel, inside, 0, classes, k, strides,
                K, D, K_PAD, D_PAD, BD, RESIDENT, REAL, PRECISION, INTERPRETED,
            )  # fmt: skip
        s = total * (inverse * tau_inverse)[None, :]
        grad = gradient_of_similarities(
            s, label, weight, normaliser, k, index, coefficients, thresholds, rng_state, K, K_PAD, PIXEL_ANCHOR
        )
        along = tl.sum(grad * s, 0)  # <g, xhat>
        grad_operands = operands(grad * tau_inverse, 0, DTYPE, INTERPRETED)
        for part in tl.static_range(BLOCKS):
            d = d_first + part * BD + tl.arange(0, BD)
            g = tl.full((BD, BM), 0.0, REAL)
            g = add_gradient(g, anchors, k, d, grad_operands, K_PAD, D_PAD, PRECISION, INTERPRETED)
            store_gradient(
                grad_features,
                image,
                pixel,
                inside,
                d,
                grad_strides,
                g,
                x[part],
                along,
                inverse,
                label >= 0,
                D,
                INTERPRETED,
            )
    else:  # several blocks of classes, whose sums g grow together for DG channels; S is made anew for the next DG
        for first in tl.static_range(0, BLOCKS, DG // BD):
            sums = ()
            for _ in tl.static_range(DG // BD):
                sums = sums + (tl.full((BD, BM), 0.0, REAL),)
            along = tl.full((BM,), 0.0, REAL)
            done = tl.full((), 0, tl.int32)
            for k0 in range(0, K, KB):
                k = k0 + tl.arange(0, KB)
                total = products(
                    x, features, anchors, image, pixel, inside, k0, classes, k, strides,
                    K, D, K_PAD, D_PAD, BD, RESIDENT, REAL, PRECISION, INTERPRETED,
                )  # fmt: skip
                s = total * (inverse * tau_inverse)[None, :]
                grad = gradient_of_similarities(
                    s, label, weight, normaliser, k, index, coefficients, thresholds, rng_state, K, K_PAD, PIXEL_ANCHOR
                )
                along += tl.sum(grad * s, 0)
                grad_operands = operands(grad * tau_inverse, 0, DTYPE, INTERPRETED)
                grown = ()
                for part in tl.static_range(DG // BD):
                    d = d_first + (first + part) * BD + tl.arange(0, BD)
                    grown = grown + (
                        add_gradient(sums[part], anchors, k, d, grad_operands, K_PAD, D_PAD, PRECISION, INTERPRETED),
                    )
                sums = grown
                done += KB
            for part in tl.static_range(DG // BD):
                d = d_first + (first + part) * BD + tl.arange(0, BD)
                # Always true, and for the same reason as in `products`: one copy of x, not a second in the layout of the sums.
                own = tl.where(done > 0, x[first + part], 0.0).to(DTYPE)
                store_gradient(
                    grad_features, image, pixel, inside, d, grad_strides, sums[part], own, along, inverse,
                    label >= 0, D, INTERPRETED,
                )  # fmt: skip
