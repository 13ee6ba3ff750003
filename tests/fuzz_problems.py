"""The calls that the fuzzer makes: each drawn from a seed and a number, so that it can be made again."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEATURE_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LABEL_DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]
INVALID_LABEL = 254


@dataclass
class Problem:
    """One call: its arguments on the CPU, and what may be expected of it."""

    kind: str  #: "good", "bad values", "not finite", or "bad argument: ..."
    features: Any
    labels: Any
    prototypes: Any
    options: dict[str, Any]
    upstream: Tensor
    threads: int

    def describe(self) -> str:
        def words(value: Any) -> str:
            if not isinstance(value, Tensor):
                return repr(value)
            text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} strides {list(value.stride())}"
            return text + (" with gradient" if value.requires_grad else "")

        arguments = {"features": self.features, "labels": self.labels, "prototypes": self.prototypes, **self.options}
        return f"{self.kind}; {self.threads} threads; " + ", ".join(f"{k}={words(v)}" for k, v in arguments.items())


class Draw:
    """The random choices of one case."""

    def __init__(self, seed: int, case: int) -> None:
        self.random = random.Random(f"{seed}/{case}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def log_uniform(self, low: int, high: int) -> int:
        return round(math.exp(self.random.uniform(math.log(low), math.log(high))))

    def choice(self, *values: Any) -> Any:
        return self.random.choice(values)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def view(self, values: Tensor, poison: float, channels: bool) -> Tensor:
        """The same values with strides of some pattern, in a buffer whose other elements are ``poison``."""
        pattern = self.choice("plain", "plain", "slice", "permuted", "permuted slice", "last axis first", "expanded")
        if values.ndim == 0 or pattern == "plain":
            return values.contiguous()
        if pattern == "expanded":
            axis = self.random.randrange(values.ndim)
            if channels and axis == 1:  # all channels alike: no direction to speak of
                axis = 0
            return values.narrow(axis, 0, min(1, values.shape[axis])).expand(values.shape)
        order = list(range(values.ndim))
        if "permuted" in pattern:
            self.random.shuffle(order)
        elif pattern == "last axis first" and channels and values.ndim > 2:  # channels_last
            order = [0, *range(2, values.ndim), 1]
        pads = [(self.random.randrange(3), self.random.randrange(3)) if "slice" in pattern else (0, 0) for _ in order]
        steps = [self.choice(1, 1, 2) if pattern == "permuted slice" else 1 for _ in order]
        sizes = [
            before + values.shape[axis] * step + after
            for axis, (before, after), step in zip(order, pads, steps, strict=True)
        ]
        view = torch.full(sizes, poison, dtype=values.dtype)
        for position, (axis, (before, _), step) in enumerate(zip(order, pads, steps, strict=True)):
            index = torch.arange(before, before + values.shape[axis] * step, step)
            stop = int(index[-1]) + 1 if len(index) else before
            view = view[(slice(None),) * position + (slice(before, stop, step),)]
        view = view.permute(*(order.index(axis) for axis in range(values.ndim)))
        return view.copy_(values)


def draw_problem(seed: int, case: int) -> Problem:
    """The case of that number."""
    draw = Draw(seed, case)
    kind = draw.random.choices(["good", "bad values", "not finite", "bad argument"], [75, 8, 9, 8])[0]
    dtype = draw.choice(*FEATURE_DTYPES)
    classes = draw.choice(1, 2, 19, draw.log_uniform(1, 200))
    dimensions = draw.choice(draw.log_uniform(1, 300), draw.log_uniform(1, 40), 32, 64, 256)
    axes = draw.choice(0, 1, 2, 2, 3)
    most = draw.choice(10**5, 10**6, 10**6, 10**7)  # products: what the reference takes its time for
    pixels = draw.log_uniform(1, max(1, min(6000, most // (classes * dimensions))))
    batch = draw.choice(1, 2, 3, 5)
    spatial = _factors(draw, max(1, pixels // batch), axes)
    size = list(spatial)
    if axes == 0:
        batch = pixels
    elif draw.chance(0.6):
        size = [max(1, round(extent * draw.random.uniform(0.2, 4))) for extent in spatial]
    if draw.chance(0.04):
        batch = 0
    elif axes and draw.chance(0.04):
        axis = draw.random.randrange(axes)
        spatial[axis] = 0
        size[axis] = draw.choice(0, size[axis])

    features = draw.normal(batch, dimensions, *spatial) * draw.choice(1, 1, 1, 0.01, 30)
    if kind == "not finite":
        features = _spoil(draw, features, dtype)
    elif draw.chance(0.15):  # some pixels are zero vectors
        features = features * (draw.uniform(batch, 1, *spatial) < 0.8)
    features = draw.view(features.to(dtype), math.nan, channels=True)
    prototypes = draw.normal(classes, dimensions)
    if draw.chance(0.3):
        prototypes = prototypes.abs()  # all close to each other
    if draw.chance(0.05):
        prototypes[draw.random.randrange(classes)] = 0
    prototype_dtype = draw.choice(torch.float32, torch.float32, *FEATURE_DTYPES)
    prototypes = draw.view(prototypes.to(prototype_dtype), math.nan, channels=False)

    ignore_index = draw.choice(255, 255, -1, 0, classes)
    labels = _draw_labels(draw, [batch, *size], classes, ignore_index, kind == "bad values")
    options = _draw_options(draw, classes, labels, ignore_index, kind == "bad values")
    temperature = options.get("temperature", 0.1)
    if dtype != torch.float64 and temperature < 0.01 and prototype_dtype == torch.float64:
        prototypes = prototypes.float()  # rounding them would be the larger part of the error
    if draw.chance(0.7):
        features = features.detach().requires_grad_()
    if draw.chance(0.3):
        prototypes = prototypes.detach().requires_grad_()
    upstream = draw.normal(classes) if options.get("reduction") == "none" else draw.normal()
    problem = Problem(kind, features, labels, prototypes, options, upstream, draw.choice(1, 2, 3, 8))
    if kind == "bad argument":
        _break(draw, problem)
    return problem


def _factors(draw: Draw, pixels: int, axes: int) -> list[int]:
    """Extents of that many axes whose product is about ``pixels``."""
    extents = []
    for left in range(axes, 0, -1):
        extent = pixels if left == 1 else draw.log_uniform(1, max(1, pixels))
        extents.append(extent)
        pixels = max(1, pixels // extent)
    draw.random.shuffle(extents)
    return extents


def _spoil(draw: Draw, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Features with NaN, infinities, and numbers at the ends of the range."""
    info = torch.finfo(dtype)
    value = draw.choice(math.nan, math.inf, -math.inf, info.max, info.tiny, info.smallest_normal * info.eps)
    if draw.chance(0.3):
        return torch.full_like(features, value)
    return features.masked_fill(draw.uniform(*features.shape) < draw.choice(0.001, 0.3), value)


def _draw_labels(draw: Draw, shape: list[int], classes: int, ignore_index: int, bad: bool) -> Tensor:
    dtype = draw.choice(*(d for d in LABEL_DTYPES if ignore_index >= 0 or d != torch.uint8))
    labels = (draw.uniform(*shape) ** draw.choice(1, 1, 3) * classes).long().clamp_(max=classes - 1)
    if draw.chance(0.2):
        labels.fill_(draw.random.randrange(classes))  # one class only
    if draw.chance(0.6):
        labels.masked_fill_(draw.uniform(*shape) < draw.choice(0.1, 0.9, 1), ignore_index)
    if bad:
        value = draw.choice(INVALID_LABEL, classes + 1, -3, 2**31 - 1, 2**63 - 1, -(2**63))
        info = torch.iinfo(dtype)
        labels.masked_fill_(draw.uniform(*shape) < draw.choice(0.01, 0.5), min(max(value, info.min), info.max))
    return draw.view(labels.to(dtype), INVALID_LABEL, channels=False)


def _draw_options(draw: Draw, classes: int, labels: Tensor, ignore_index: int, bad: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"ignore_index": ignore_index, "return_stats": draw.chance(0.7)}
    if draw.chance(0.7):
        options["temperature"] = draw.choice(1e-3, 0.02, 0.07, 1, 1, 30, 1e3)
    if draw.chance(0.5):
        options["negative_reduction"] = draw.choice("sum", "mean")
    if draw.chance(0.5):
        options["reduction"] = draw.choice("mean", "sum", "none")
    if draw.chance(0.5):
        options["label_sampling"] = draw.choice("nearest", "nearest-exact")
    if draw.chance(0.3) and options.get("reduction") != "none":
        options["pixel_anchor_weight"] = draw.choice(0.0, 0.3, 2)
    if draw.chance(0.4):
        options["num_negatives"] = draw.choice(1, draw.log_uniform(1, 3000), 2**40)
        seed = draw.choice(0, -1, draw.random.getrandbits(64), draw.random.getrandbits(63))
        as_tensor = seed < 2**63 and draw.chance(0.3)
        options["seed"] = torch.tensor([seed] if draw.chance(0.5) else seed) if as_tensor else seed
    if draw.chance(0.4):
        weight = draw.uniform(*labels.shape) * draw.choice(1, 1, 1000)
        weight.masked_fill_(draw.uniform(*labels.shape) < 0.2, 0)
        if bad:
            value = draw.choice(-1, math.nan, math.inf)
            weight.masked_fill_(draw.uniform(*labels.shape) < 0.1, value)
        options["pixel_weight"] = draw.view(weight.to(draw.choice(*FEATURE_DTYPES)), math.nan, channels=False)
    if draw.chance(0.3):
        weight = draw.uniform(classes).masked_fill_(draw.uniform(classes) < 0.2, 0)
        if bad and draw.chance(0.3):
            weight[draw.random.randrange(classes)] = draw.choice(-1, math.nan, math.inf)
        options["class_weight"] = draw.view(weight.to(draw.choice(*FEATURE_DTYPES)), math.nan, channels=False)
    return options


def _break(draw: Draw, problem: Problem) -> None:
    """Make one argument wrong: every backend must raise the same error."""
    x, y, p, options = problem.features, problem.labels, problem.prototypes, problem.options
    changes: dict[str, dict[str, Any]] = {
        "features' type": {"features": draw.choice(x.detach().to(torch.complex64), x.detach().long(), None, 3, [1.0])},
        "features' rank": {"features": draw.choice(x.detach().flatten(), x.detach()[(None,) * (6 - x.ndim)])},
        "labels' type": {"labels": draw.choice(y.float(), y.bool(), y.to(torch.int8), y.tolist())},
        "labels' rank": {"labels": draw.choice(y[None], y[:, None], y.flatten()[:0].sum())},
        "labels' batch": {"labels": torch.cat([y, y.new_zeros(1, *y.shape[1:])])},
        "prototypes' shape": {"prototypes": draw.choice(p.detach()[:, :0], p.detach()[:0], p.detach().flatten())},
        "prototypes' type": {"prototypes": p.detach().long()},
        "temperature": {"temperature": draw.choice(0, -1, math.nan, math.inf, "0.1", torch.tensor(0.1), None)},
        "num_negatives": {"num_negatives": draw.choice(0, -5, 2.0, True)},
        "reduction": {"reduction": draw.choice("average", None, 0)},
        "negative_reduction": {"negative_reduction": draw.choice("max", None)},
        "label_sampling": {"label_sampling": draw.choice("bilinear", "nearest_exact", None, True)},
        "pixel_anchor_weight": {"pixel_anchor_weight": draw.choice(-1, math.nan, "1")},
        "seed": {"num_negatives": 2, "seed": draw.choice(2**64, 1.5, torch.tensor([1, 2]), torch.tensor(1.0))},
        "pixel_weight": {
            "pixel_weight": draw.choice(torch.ones(3, 3, 3, 3, 3), y, torch.ones(y.shape).requires_grad_())
        },
        "class_weight": {"class_weight": draw.choice(torch.ones(len(p) + 1), p.detach(), torch.ones(len(p)).long())},
        "ignore_index": {"ignore_index": draw.choice(1.5, None, True)},
    }
    name = draw.choice(*changes)
    problem.kind = f"bad argument: {name}"
    for argument, value in changes[name].items():
        if argument in ("features", "labels", "prototypes"):
            setattr(problem, argument, value)
        else:
            options[argument] = value
