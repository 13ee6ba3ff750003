"""The loss again, in float64, with loops, written from the formulas alone: what the package is compared with.

It shares no line with the package: labels are resized by PyTorch's own interpolate, random keys come from Python's
integers, sampled sets from sorting, gradients from autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MASK32 = 2**32 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python's integers."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        product0, product2 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (product2 >> 32) ^ counter[1] ^ key[0],
            product2 & MASK32,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & MASK32,
        ]
        key = [(key[0] + 0x9E3779B9) & MASK32, (key[1] + 0xBB67AE85) & MASK32]
    return counter


def pixel_key(seed: int, index: int) -> int:
    return philox([index & MASK32, index >> 32, 0, 0], [seed & MASK32, (seed >> 32) & MASK32])[0]


@dataclass
class Answer:
    loss: Tensor  #: scalar or (K,), differentiable
    class_loss: Tensor
    log_z: Tensor
    weight: Tensor
    mean_positive_cosine: Tensor
    hardest_negative_cosine: Tensor
    negatives: list[list[int]]  #: of each class: pixel indices in (batch, spatial) order


def _resize(values: Tensor, spatial: tuple[int, ...], mode: str = "nearest") -> Tensor:
    if values.ndim == 1:
        return values
    resized = torch.nn.functional.interpolate(values.float()[:, None], size=spatial, mode=mode)
    return resized.flatten()


def _unit(v: Tensor) -> Tensor:
    norm = v.norm()
    return v * 0 if norm <= 1e-12 else v / norm


def _cross_entropy(s: Tensor, k: int) -> Tensor:
    """logsumexp(s) - s_k, without the difference, of which little is left where the class k has almost all."""
    others = torch.cat([s[:k], s[k + 1 :]])
    if not others.numel():
        return 0 * s[k]
    margin = torch.logsumexp(others, 0) - s[k]
    return torch.logaddexp(margin, torch.zeros_like(margin))


def loss(
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
    seed: int = 0,
    reduction: str = "mean",
    label_sampling: str = "nearest",
) -> Answer:
    spatial = tuple(features.shape[2:])
    num_classes = prototypes.shape[0]
    x = features.double().movedim(1, -1).reshape(-1, features.shape[1])
    y = [int(v) for v in _resize(labels, spatial, label_sampling).tolist()]
    w = [1.0] * len(y)
    if pixel_weight is not None:
        w = _resize(pixel_weight, spatial, label_sampling).tolist()
    c = [1.0] * num_classes if class_weight is None else class_weight.tolist()

    valid = [i for i in range(len(y)) if 0 <= y[i] < num_classes and y[i] != ignore_index and w[i] > 0]
    anchors = [_unit(p) for p in prototypes.double()]
    xhat = {i: _unit(x[i]) for i in valid}
    s = {i: torch.stack([p @ xhat[i] for p in anchors]) / temperature for i in valid}
    keys = {i: (pixel_key(seed, i), i) for i in valid} if num_negatives is not None else {}

    zero = x.new_zeros(()) + 0 * sum((xhat[i].sum() for i in valid[:1]), x.new_zeros(()))
    class_loss, log_z, weight, positive_cosine, hardest_cosine, sets = [], [], [], [], [], []
    for k in range(num_classes):
        positives = [i for i in valid if y[i] == k]
        negatives = [i for i in valid if y[i] != k]
        if num_negatives is not None:
            negatives = sorted(negatives, key=lambda i: keys[i])[:num_negatives]
        sets.append(sorted(negatives))
        total = sum(w[i] for i in positives)
        weight.append(total)
        z = torch.tensor(-math.inf, dtype=torch.float64)
        if negatives:
            z = torch.logsumexp(torch.stack([s[j][k] + math.log(w[j]) for j in negatives]), 0)
            if negative_reduction == "mean":
                z = z - math.log(sum(w[j] for j in negatives))
        log_z.append(z)
        value = zero
        if positives and negatives:
            margins = torch.stack([z - s[i][k] for i in positives])
            terms = torch.logaddexp(margins, torch.zeros_like(margins))
            value = sum((w[i] * t for i, t in zip(positives, terms, strict=True)), zero) / total
        class_loss.append(value)
        cosines = [s[i][k].item() * temperature * w[i] for i in positives]
        positive_cosine.append(sum(cosines) / total if positives else math.nan)
        hardest = [s[j][k].item() * temperature for j in negatives]
        hardest_cosine.append(max(hardest) if positives and hardest else math.nan)

    present = [k for k in range(num_classes) if weight[k] > 0]
    each = torch.stack([c[k] * class_loss[k] for k in range(num_classes)])
    if reduction == "none":
        value = each
    else:
        value = sum((each[k] for k in present), zero)
        if reduction == "mean":
            denominator = sum(c[k] for k in present)
            value = value / denominator if denominator else zero
        if pixel_anchor_weight and valid:
            twin = sum((w[i] * _cross_entropy(s[i], y[i]) for i in valid), zero)
            value = value + pixel_anchor_weight * twin / sum(w[i] for i in valid)
    return Answer(
        value,
        torch.stack(class_loss).detach(),
        torch.stack(log_z).detach(),
        torch.tensor(weight, dtype=torch.float64),
        torch.tensor(positive_cosine, dtype=torch.float64),
        torch.tensor(hardest_cosine, dtype=torch.float64),
        sets,
    )


def eager(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    pixel_anchor_weight: float = 0.0,
) -> Tensor:
    """What a user would write: all in the features' dtype, all negatives, mean over the classes present, 255 ignored."""
    dtype = features.dtype
    x = torch.nn.functional.normalize(features.movedim(1, -1).flatten(0, -2), dim=1)
    p = torch.nn.functional.normalize(prototypes.to(dtype), dim=1)
    y = _resize(labels, tuple(features.shape[2:])).long()
    x, y = x[y != 255], y[y != 255]
    s = x @ p.T / temperature
    own = torch.nn.functional.one_hot(y, p.shape[0]).bool()
    log_z = s.masked_fill(own, -math.inf).logsumexp(0)
    softplus = torch.nn.functional.softplus(log_z - s)
    counts = own.sum(0)
    value = (softplus * own).sum(0) / counts.clamp(min=1)
    value = value[counts > 0].mean()
    if pixel_anchor_weight:
        value = value + pixel_anchor_weight * torch.nn.functional.cross_entropy(s, y)
    return value
