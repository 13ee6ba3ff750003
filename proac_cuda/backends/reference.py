r"""The loss in plain PyTorch: every formula of it, in one file. The truth that each kernel is compared with.

x_i are the features of pixel i, p_k the prototype of class k, y_i the label and w_i the weight of a pixel::

    xhat_i = x_i / |x_i|    phat_k = p_k / |p_k|    S_ki = <phat_k, xhat_i> / tau                                    (1)
    V = {i : 0 <= y_i < K, y_i != ignore_index, w_i > 0}     P_k = {i in V : y_i = k}
    N_k = V \ P_k, or the num_negatives members of it with the smallest (random key, pixel index)                    (2)
    W_k = sum_{P_k} w_i      log Z_k = log sum_{N_k} w_j exp(S_kj)                                                   (3)
    L_k = (1/W_k) sum_{P_k} w_i softplus(log Z_k - S_ki)      ("mean" negatives: log Z_k - log sum_{N_k} w_j)        (4)
    L_pix = sum_V w_i (logsumexp_c S_ci - S_{y_i,i}) / sum_V w_i                                                     (5)
    loss = reduce_k(c_k L_k) + alpha L_pix                                                                           (6)

    A_k = dL/dL_k      q_ki = sigmoid(log Z_k - S_ki)      T_k = (1/W_k) sum_{P_k} w_i q_ki                          (7)
    dL/dS_ki = -A_k w_i q_ki / W_k                  for i in P_k                                                     (8)
    dL/dS_kj =  A_k T_k w_j exp(S_kj - log Z_k)     for j in N_k, the sum form of log Z_k                            (9)
    dL/dS_ci += alpha w_i (softmax_c S_ci - [c = y_i]) / sum_V w      for i in V                                     (10)
    g_i = (1/tau) sum_k dL/dS_ki phat_k      dx_i = (g_i - <g_i, xhat_i> xhat_i) / |x_i|                             (11)

and (11) with the roles exchanged for the prototypes. A vector with |v| <= 1e-12 has vhat = 0 and gradient 0.

Source: ProAC, Ren, Lu, Mao and Dong, "Exploring Prototype-Anchor Contrast for Semantic Segmentation", IEEE TCSVT 2024.

The functions below are the stages which the registered ops run for ``backend="reference"``; a kernel backend offers the
same five. Each takes its pixels in chunks, so that nothing of size pixels x classes outlives a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import stages
from ..stages import MEAN, NONE, compute_dtype, merge_positive_sums, merge_statistics
from ..stages.pixels import Pixels, first_values, gradient_buffers, philox_keys, read_pixels

EPS = 1e-12
_CHUNK_ELEMENTS = 2**22


def unit(vectors: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(1): vectors of length one along ``dim``, and the norms. Zero where |v| <= EPS; NaN where the norm overflows."""
    scale = vectors.abs().amax(dim, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)  # squares of what is left neither overflow nor underflow
    norm = scale * torch.linalg.vector_norm(vectors / scale, dim=dim, keepdim=True)
    norm = torch.where(torch.isinf(norm), torch.nan, norm)
    return torch.where(norm <= EPS, 0, vectors / norm), norm


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, also where ``torch.set_float32_matmul_precision`` and its like let PyTorch round a and b to fewer bits."""
    settings = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(a.device.type)
    if a.dtype == torch.float32 and settings is not None and settings.matmul.fp32_precision in ("tf32", "bf16"):
        return (a.double() @ b.double()).float()
    return a @ b


def _flat_shape(features: Tensor) -> tuple[int, int, int]:
    return features.shape[0], features.shape[1], features.shape[2:].numel()


class _Chunk(NamedTuple):
    image: int
    pixel: slice
    label: Tensor  # (n,), -1 outside V
    weight: Tensor  # (n,)
    own: Tensor  # (K, n) bool: i in P_k
    negative: Tensor  # (K, n) bool: i in N_k


def _chunks(
    features: Tensor, pixels: Pixels, num_classes: int, thresholds: Tensor | None, rng_state: Tensor | None
) -> Iterator[_Chunk]:
    num_pixels = pixels.label.shape[1]
    size = max(1, _CHUNK_ELEMENTS // max(num_classes, features.shape[1]))
    classes = torch.arange(num_classes, device=features.device)[:, None]
    for image in range(features.shape[0]):
        for start in range(0, num_pixels, size):
            pixel = slice(start, min(start + size, num_pixels))
            label = pixels.label[image, pixel]
            negative = (label >= 0) & (label != classes)
            if thresholds is not None and rng_state is not None:
                local = torch.arange(pixel.start, pixel.stop, device=features.device) + image * num_pixels
                index = local + rng_state[1]
                key = philox_keys(rng_state[0], index)
                last_key, last_index = thresholds[:, :1], thresholds[:, 1:]
                negative = negative & ((key < last_key) | ((key == last_key) & (index <= last_index)))
            yield _Chunk(image, pixel, label, pixels.weight[image, pixel], label == classes, negative)


def _unit_pixels(features: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """xhat (D, n) and |x| (1, n) of a chunk. What stands in pixels outside V is never looked at."""
    x = features.view(_flat_shape(features))[chunk.image, :, chunk.pixel].to(compute_dtype(features))
    return unit(torch.where(chunk.label >= 0, x, 0), dim=0)


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
    r"""(2): the last member of each N_k in (key, index) order, (K, 2) int64; (2^32, 0) where all of V \ P_k is taken."""
    dtype = compute_dtype(features)
    pixels = read_pixels(labels, pixel_weight, features.shape[2:], num_classes, ignore_index, dtype, nearest_exact)
    index = pixels.label.flatten().ge(0).nonzero().squeeze(1)
    label = pixels.label.flatten()[index]
    index = index + rng_state[1]
    key, order = torch.sort(philox_keys(rng_state[0], index), stable=True)  # stable: equal keys stay in index order
    index, label = index[order], label[order]
    thresholds = torch.tensor([[2**32, 0]], device=features.device).repeat(num_classes, 1)
    for k in range(num_classes):
        others = (label != k).nonzero().squeeze(1)
        if others.numel() > num_negatives:
            last = others[num_negatives - 1]
            thresholds[k] = torch.stack([key[last], index[last]])
    return thresholds


def class_statistics(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage (i), equations (1), (3), (5): statistics (6, K), S_{y_i,i} of each pixel (B, *spatial), diagnostics (4,)."""
    num_classes, dtype = prototypes.shape[0], compute_dtype(features)
    spatial = features.shape[2:]
    pixels = read_pixels(labels, pixel_weight, spatial, num_classes, ignore_index, dtype, nearest_exact)
    anchors, _ = unit(prototypes, dim=1)
    positive = torch.zeros_like(pixels.weight)
    nothing = prototypes.new_zeros(stages.NUM_STATISTICS, num_classes)
    nothing[[stages.LOG_Z, stages.HARDEST_NEGATIVE]] = -torch.inf
    parts = [nothing]
    for chunk in _chunks(features, pixels, num_classes, thresholds, rng_state):
        x, _ = _unit_pixels(features, chunk)
        s = _product(anchors, x) / temperature
        part = nothing.clone()
        part[stages.LOG_Z] = torch.where(chunk.negative, s + chunk.weight.log(), -torch.inf).logsumexp(1)
        part[stages.WEIGHT] = torch.where(chunk.own, chunk.weight, 0).sum(1)
        part[stages.NEGATIVE_WEIGHT] = torch.where(chunk.negative, chunk.weight, 0).sum(1)
        part[stages.POSITIVE_SUM] = torch.where(chunk.own, chunk.weight * s, 0).sum(1)
        if pixel_anchor:
            excess = chunk.weight * (s.logsumexp(0) - s)
            part[stages.PIXEL_LOSS_SUM] = torch.where(chunk.own, excess, 0).sum(1)
        if hardest_negative:
            part[stages.HARDEST_NEGATIVE] = torch.where(chunk.negative, s, -torch.inf).amax(1)
        positive[chunk.image, chunk.pixel] = torch.where(chunk.own, s, 0).sum(0)
        parts.append(part)
    diagnostics = first_values(labels, pixel_weight, spatial, pixels, nearest_exact)
    return merge_statistics(torch.stack(parts)), positive.view(features.shape[0], *spatial), diagnostics


def contrast_log_z(statistics: Tensor, negative_mean: bool) -> Tensor:
    """The log Z_k of equations (4) and (7): that of (3), minus log sum_{N_k} w_j for the mean over negatives."""
    log_z = statistics[stages.LOG_Z]
    if negative_mean:
        negative_weight = statistics[stages.NEGATIVE_WEIGHT]
        log_z = torch.where(negative_weight > 0, log_z - negative_weight.log(), log_z)
    return log_z


def positive_sums(
    positive: Tensor,
    labels: Tensor,
    pixel_weight: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    negative_mean: bool,
    nearest_exact: bool = False,
) -> Tensor:
    """Stage (ii), the sums of equations (4) and (7) over P_k: (2, K)."""
    num_classes, dtype = statistics.shape[1], statistics.dtype
    pixels = read_pixels(labels, pixel_weight, positive.shape[1:], num_classes, ignore_index, dtype, nearest_exact)
    log_z = contrast_log_z(statistics, negative_mean)
    parts = [statistics.new_zeros(stages.NUM_POSITIVE_SUMS, num_classes)]
    flat = positive.reshape(positive.shape[0], 1, positive.shape[1:].numel())
    for chunk in _chunks(flat, pixels, num_classes, None, None):
        margin = log_z[:, None] - flat[chunk.image, :, chunk.pixel]
        softplus = torch.logaddexp(margin, torch.zeros_like(margin))
        terms = torch.stack([softplus, margin.sigmoid()]) * chunk.weight
        parts.append(torch.where(chunk.own, terms, 0).sum(2))
    return merge_positive_sums(torch.stack(parts))


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0, numerator / torch.where(denominator == 0, 1, denominator))


def reduce_loss(
    statistics: Tensor,
    sums: Tensor,
    class_weight: Tensor | None,
    pixel_anchor_weight: float,
    reduction: int,
) -> Tensor:
    """(4) and (6): the loss, () or (K,)."""
    weight = statistics[stages.WEIGHT]
    loss = _over(sums[stages.SOFTPLUS_SUM], weight)
    if class_weight is not None:
        loss = loss * class_weight
    if reduction == NONE:
        return loss
    loss = loss.sum()
    if reduction == MEAN:
        loss = _over(loss, _total_class_weight(weight, class_weight))
    if pixel_anchor_weight:
        loss = loss + pixel_anchor_weight * _over(statistics[stages.PIXEL_LOSS_SUM].sum(), weight.sum())
    return loss


def _total_class_weight(weight: Tensor, class_weight: Tensor | None) -> Tensor:
    """Sum of c_k over the classes that are present."""
    present = (weight > 0).to(weight.dtype)
    return (present if class_weight is None else present * class_weight).sum()


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
    """Stage (iii), equations (7) to (11): gradients of the features (their dtype and layout) and of the prototypes.

    One that is not asked for is an empty tensor.
    """
    num_classes, dtype = prototypes.shape[0], compute_dtype(features)
    pixels = read_pixels(labels, pixel_weight, features.shape[2:], num_classes, ignore_index, dtype, nearest_exact)
    anchors, anchor_norm = unit(prototypes, dim=1)

    weight = statistics[stages.WEIGHT]
    upstream = grad_loss.to(dtype) * (weight > 0)  # A_k
    if class_weight is not None:
        upstream = upstream * class_weight
    if reduction == MEAN:
        upstream = _over(upstream, _total_class_weight(weight, class_weight))
    positive_scale = _over(upstream, weight)[:, None]  # A_k / W_k
    negative_scale = positive_scale * sums[stages.SIGMOID_SUM][:, None]  # A_k T_k
    log_z = statistics[stages.LOG_Z][:, None]
    contrast = contrast_log_z(statistics, negative_mean)[:, None]

    wanted, grad_features = gradient_buffers(features) if features_need_grad else (features.new_empty(0),) * 2
    grad_flat = grad_features.view(_flat_shape(features)) if features_need_grad else grad_features
    grad_anchors = torch.zeros_like(anchors)
    for chunk in _chunks(features, pixels, num_classes, thresholds, rng_state):
        x, norm = _unit_pixels(features, chunk)
        s = _product(anchors, x) / temperature
        grad_own = -positive_scale * chunk.weight * (contrast - s).sigmoid()
        grad_negative = negative_scale * (s + chunk.weight.log() - log_z).exp()
        grad_s = torch.where(chunk.own, grad_own, torch.where(chunk.negative, grad_negative, 0))
        if pixel_anchor_weight:
            pixel_scale = pixel_anchor_weight * _over(grad_loss.to(dtype), weight.sum())
            others = torch.where(chunk.own, 0, s.softmax(0))
            own = others.sum(0)  # 1 - softmax of the own class, of which nothing is left where that is near 1
            grad_s = grad_s + pixel_scale * chunk.weight * torch.where(chunk.own, -own, others)
        grad_s = grad_s / temperature
        if features_need_grad:
            g = _product(anchors.T, grad_s)
            grad_x = (g - (g * x).sum(0) * x) / norm
            grad_flat[chunk.image, :, chunk.pixel] = torch.where(norm <= EPS, 0, grad_x).to(features.dtype)
        if prototypes_need_grad:
            grad_anchors += _product(grad_s, x.T)
    if grad_features is not wanted:
        wanted.copy_(grad_features)
    if not prototypes_need_grad:
        return wanted, prototypes.new_empty(0)
    grad_prototypes = (grad_anchors - (grad_anchors * anchors).sum(1, keepdim=True) * anchors) / anchor_norm
    return wanted, torch.where(anchor_norm <= EPS, 0, grad_prototypes)
