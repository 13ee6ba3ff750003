"""What a pass needs of the classes before it looks at pixels: unit prototypes; in backward the coefficients of (7) to (10)."""

from __future__ import annotations

import triton.language as tl

from .forward import WEIGHT
from .loss import MEAN, REDUCED, contrast_log_z, over, total_weights
from .pixels import kernel
from .vectors import add_squares, norm_and_inverse, split

# Rows of the coefficients of backward, (5, K_PAD).
POSITIVE_SCALE = tl.constexpr(0)  # A_k / W_k
NEGATIVE_SCALE = tl.constexpr(1)  # A_k T_k
LOG_Z = tl.constexpr(2)  # that of (3)
CONTRAST = tl.constexpr(3)  # the log Z_k of (4) and (7)
PIXEL_SCALE = tl.constexpr(4)  # alpha dL / sum_V w, the same for every class
NUM_COEFFICIENTS = 5


@kernel
def prepare_kernel(
    prototypes, anchors, norms,
    statistics, sums, class_weight, grad_loss, coefficients, alpha: "fp64", grad_stride,
    NEGATIVE_MEAN: tl.constexpr, PIXEL_ANCHOR: tl.constexpr, REDUCTION: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, K_PAD: tl.constexpr, D_PAD: tl.constexpr,
    RB: tl.constexpr, DB: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """phat of RB classes, padded with zeros and in as many parts as its dtype needs; in backward also the coefficients."""
    REAL: tl.constexpr = prototypes.dtype.element_ty
    PART: tl.constexpr = anchors.dtype.element_ty
    k = tl.program_id(0) * RB + tl.arange(0, RB)
    squares = tl.full((RB, DB), 0.0, REAL)
    far_squares = squares
    for d0 in range(0, D, DB):
        d = d0 + tl.arange(0, DB)
        p = tl.load(prototypes + k[:, None] * D + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
        squares, far_squares = add_squares(squares, far_squares, p)
    norm, inverse = norm_and_inverse(tl.sum(squares, 1), tl.sum(far_squares, 1))
    for d0 in range(0, D_PAD, DB):
        d = d0 + tl.arange(0, DB)
        p = tl.load(prototypes + k[:, None] * D + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
        unit = p * inverse[:, None]
        target = anchors + k[:, None] * D_PAD + d[None, :]
        mask = (k < K_PAD)[:, None] & (d < D_PAD)[None, :]
        if REAL == PART:
            tl.store(target, unit, mask=mask)
        else:
            high, low = split(unit, PART, INTERPRETED)
            tl.store(target, high, mask=mask)
            tl.store(target + K_PAD * D_PAD, low, mask=mask)
    if norms is not None:
        tl.store(norms + k, norm, mask=k < K)
    if coefficients is not None:
        classes, pixels = total_weights(statistics, class_weight, K, REDUCED)
        weight = tl.load(statistics + WEIGHT * K + k, mask=k < K, other=0.0)
        upstream = tl.load(grad_loss + k * grad_stride, mask=k < K, other=0.0).to(REAL)
        a = tl.where(weight > 0, upstream, 0.0)  # A_k
        if class_weight is not None:
            a *= tl.load(class_weight + k, mask=k < K, other=0.0)
        if REDUCTION == MEAN:
            a = over(a, tl.zeros_like(a) + classes)
        positive_scale = over(a, weight)
        sigmoid_sum = tl.load(sums + K + k, mask=k < K, other=0.0)
        log_z = tl.load(statistics + k, mask=k < K, other=0.0)
        row = coefficients + k
        tl.store(row + POSITIVE_SCALE * K_PAD, positive_scale, mask=k < K_PAD)
        tl.store(row + NEGATIVE_SCALE * K_PAD, positive_scale * sigmoid_sum, mask=k < K_PAD)
        tl.store(row + LOG_Z * K_PAD, log_z, mask=k < K_PAD)
        contrast = contrast_log_z(statistics, k, k < K, NEGATIVE_MEAN, K)
        tl.store(row + CONTRAST * K_PAD, contrast, mask=k < K_PAD)
        if PIXEL_ANCHOR:
            scale = tl.full((), alpha, REAL) * over(upstream, tl.zeros_like(upstream) + pixels)
            tl.store(row + PIXEL_SCALE * K_PAD, scale, mask=k < K_PAD)
