"""Random calls of the public function on every backend that can run, compared with the reference in float64.

    python tests/fuzz.py --seconds 3600 --seed 1     # until the time is up, or ten findings
    python tests/fuzz.py --seed 1 --case 4711        # one of its cases again

Shapes (empty ones too), strides, dtypes, options, labels and weights are drawn at random; some calls are wrong on purpose.
What must hold: a good call gives the reference's loss, statistics and gradients within the accuracy table, changes no input,
and gives the same bits at another number of threads; NaN comes out where the reference has it; a bad call raises the
reference's error with the reference's text; nothing crashes. Views lie in buffers full of NaN and invalid labels, so that a
read beside them shows. ``tests/sanitize.sh --fuzz SECONDS`` runs this under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import proac_cuda
from compare import gradient_tolerance, loss_tolerance, rounding
from proac_cuda.backends import BACKENDS

FEATURE_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LABEL_DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]
INVALID_LABEL = 254
MOST_FINDINGS = 10


class Answer(NamedTuple):
    """What a call gave: tensors, or an error."""

    loss: Tensor | None = None
    stats: proac_cuda.ProACStats | None = None
    features_grad: Tensor | None = None
    prototypes_grad: Tensor | None = None
    error: str = ""


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


def call(problem: Problem, backend: str, device: str, exactly: bool = False) -> Answer:
    """Forward and backward. ``exactly``: in float64, on the values that the backend sees."""

    def prepare(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        moved = value.detach().to(device) if device != "cpu" else value.detach()
        if exactly and moved.is_floating_point():
            narrow = problem.features.dtype != torch.float64 and value is not problem.features
            moved = (moved.float() if narrow else moved).double()
        return moved.requires_grad_(value.requires_grad)

    features, prototypes = prepare(problem.features), prepare(problem.prototypes)
    options = {name: prepare(value) for name, value in problem.options.items()}
    answer = proac_cuda.proac_loss(features, prepare(problem.labels), prototypes, backend=backend, **options)
    loss, stats = answer if isinstance(answer, tuple) else (answer, None)
    if loss.requires_grad:
        loss.backward(problem.upstream.to(loss))
    return Answer(loss.detach(), stats, features.grad, prototypes.grad)


def attempt(problem: Problem, backend: str, device: str) -> Answer:
    """As :func:`call`; an error that the contract knows is an answer too."""
    try:
        return call(problem, backend, device)
    except (ValueError, TypeError) as error:
        return Answer(error=f"{type(error).__name__}: {error}")


def expect(problem: Problem) -> Answer:
    """What the reference answers: in float64 where the answer is numbers, an error where it is one."""
    if problem.kind == "good":
        return call(problem, "reference", "cpu", exactly=True)
    answer = attempt(problem, "reference", "cpu")
    return answer if answer.error or problem.kind == "not finite" else call(problem, "reference", "cpu", exactly=True)


def check(problem: Problem, expected: Answer, backend: str, device: str) -> None:
    """Raises AssertionError where a backend's answer is not what it must be."""
    torch.set_num_threads(problem.threads)
    before = [_bits(value) for value in _tensors(problem)]
    actual = attempt(problem, backend, device)
    assert actual.error == expected.error, f"{actual.error!r} instead of {expected.error!r}"
    assert actual.error or not problem.kind.startswith("bad argument"), "a bad argument was taken"
    changed = [not torch.equal(_bits(value), copy) for value, copy in zip(_tensors(problem), before, strict=True)]
    assert not any(changed), "the call changed its inputs"
    if actual.error:
        return
    if problem.kind == "not finite":
        _compare_nan(actual, expected)
    else:
        _compare(problem, actual, expected)
    torch.set_num_threads(problem.threads % 3 + 1)
    again = attempt(problem, backend, device)
    same = [torch.equal(one, other) for one, other in zip(_flat(actual), _flat(again), strict=True)]
    assert all(same), "other bits at another number of threads"


def _tensors(problem: Problem) -> list[Tensor]:
    values = [problem.features, problem.labels, problem.prototypes, *problem.options.values()]
    return [value for value in values if isinstance(value, Tensor)]


def _bits(values: Tensor) -> Tensor:
    """Comparable also where it is NaN."""
    return values.detach().cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _flat(answer: Answer) -> list[Tensor]:
    tensors = [answer.loss, *(answer.stats or ()), answer.features_grad, answer.prototypes_grad]
    return [_bits(tensor) for tensor in tensors if tensor is not None]


def _compare_nan(actual: Answer, expected: Answer) -> None:
    """The loss is NaN where the reference's is."""
    assert actual.loss is not None and expected.loss is not None
    assert torch.equal(actual.loss.cpu().isnan(), expected.loss.isnan()), f"{actual.loss} instead of {expected.loss}"


def _compare(problem: Problem, actual: Answer, truth: Answer) -> None:
    """Loss, statistics and gradients within the accuracy table."""
    x, options = problem.features, problem.options
    temperature = float(options.get("temperature", 0.1))
    cosine = loss_tolerance(x.dtype, 1.0, x.shape[1])
    relative, epsilon = (1e-13, 4e-16) if x.dtype == torch.float64 else (2e-6, 2.4e-7)
    classes = len(problem.prototypes)
    class_weight = options.get("class_weight")
    parts = float(class_weight.sum()) if class_weight is not None else classes
    scale = {"mean": 1.0, "sum": parts, "none": 1.0}[options.get("reduction", "mean")]
    alpha = options.get("pixel_anchor_weight", 0.0)
    _close("loss", actual.loss, truth.loss, cosine / temperature * (scale + alpha), relative * (1 + alpha))
    if actual.stats is not None and truth.stats is not None:
        # log Z near 0 is the logarithm of a sum near 1, or a difference of two logarithms, and has their rounding
        logarithm = 1 + math.log(1 + problem.labels.numel() * 1000)
        tolerances = {"log_z": cosine / temperature + epsilon * logarithm, "loss": cosine / temperature}
        tolerances |= {"mean_positive_cosine": cosine, "hardest_negative_cosine": cosine}
        for name in actual.stats._fields:
            _close(name, getattr(actual.stats, name), getattr(truth.stats, name), tolerances.get(name, 0.0), relative)

    # Relative to the gradient, and to what can cancel in it: the derivatives by S add up to no more than this.
    upstream = float(problem.upstream.abs().max()) * (scale + alpha) * 2 / temperature
    smallest = 1e-14 if x.dtype == torch.float64 else 1e-6
    tolerance = gradient_tolerance(x.dtype, temperature)
    for name, gradient, exact, vectors in (
        ("features' gradient", actual.features_grad, truth.features_grad, x.detach()),
        ("prototypes' gradient", actual.prototypes_grad, truth.prototypes_grad, problem.prototypes.detach()),
    ):
        if gradient is None or exact is None or exact.numel() == 0:
            assert gradient is None or gradient.numel() == 0
            continue
        assert gradient.dtype == vectors.dtype and gradient.shape == vectors.shape, name
        norms = vectors.double().norm(dim=1)
        length = float(norms[norms > 1e-12].min()) if (norms > 1e-12).any() else 1.0
        gradient, info = gradient.cpu().double(), torch.finfo(gradient.dtype)
        beyond = exact.abs() > info.max
        assert (gradient[beyond].abs() >= info.max).all(), f"{name}: no infinity where it overflows"
        gradient, exact = gradient.masked_fill(beyond, 0), exact.masked_fill(beyond, 0)
        smaller = info.bits < 32 or info.bits < torch.finfo(x.dtype).bits
        rounded = rounding(exact, vectors.dtype).norm() if smaller else 0.0
        error, limit = (gradient - exact).norm(), tolerance * exact.norm() + rounded
        limit = limit + smallest * upstream / length
        assert error <= limit, f"{name}: off by {error:.3g}, allowed {limit:.3g}, norm {exact.norm():.3g}"


def _close(name: str, actual: Any, truth: Any, absolute: float, relative: float) -> None:
    actual, truth = actual.cpu().double(), truth.double()
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    limit = absolute + relative * truth.abs()
    close = same | ((actual - truth).abs() <= limit)
    assert close.all(), f"{name}: {actual[~close]} instead of {truth[~close]}"


def targets(wanted: list[str] | None) -> list[tuple[str, str]]:
    """(backend, device) of those that can run here."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    pairs = [(name, device) for device in devices for name in BACKENDS]
    return [
        (name, device)
        for name, device in pairs
        if (name in wanted if wanted else name != "reference") and BACKENDS[name].why_not(torch.device(device)) is None
    ]


def run(
    seconds: float, seed: int, backends: list[str] | None = None, first_case: int = 0, cases: int | None = None
) -> int:
    """Fuzz until the time is up, or that many cases are done; the number of findings."""
    os.environ["PROAC_CHECKS"] = "1"
    warnings.simplefilter("ignore")
    kinds: collections.Counter[str] = collections.Counter()
    findings, case, start, said = 0, first_case, time.monotonic(), 0.0
    chosen = targets(backends)
    threads = torch.get_num_threads()
    # Where the process dies, this file still tells in which case.
    with tempfile.NamedTemporaryFile("w", prefix="fuzz-case-", delete=False) as current:
        print(f"fuzz: seed {seed}; {', '.join(f'{n} on {d}' for n, d in chosen)}; the case in progress: {current.name}")
        while findings < MOST_FINDINGS and (cases is None or case < first_case + cases):
            elapsed = time.monotonic() - start
            if elapsed >= seconds:
                break
            if elapsed - said >= 60:
                said = elapsed
                print(f"fuzz: {case - first_case} cases in {elapsed:.0f} s, findings: {findings}", flush=True)
            os.pwrite(current.fileno(), f"{seed} {case}\n".encode(), 0)
            problem = draw_problem(seed, case)
            kinds[problem.kind.partition(":")[0]] += 1
            expected = None
            for name, device in chosen:
                try:
                    torch.set_num_threads(threads)
                    expected = expected or expect(problem)
                    check(problem, expected, name, device)
                except Exception:
                    findings += 1
                    print(f"FINDING --seed {seed} --case {case}, {name} on {device}: {problem.describe()}", flush=True)
                    traceback.print_exc(file=sys.stdout)
            case += 1
    Path(current.name).unlink()
    torch.set_num_threads(threads)
    done = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    elapsed = time.monotonic() - start
    print(f"fuzz: {case - first_case} cases ({done}) in {elapsed:.0f} s from seed {seed}, findings: {findings}")
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--backend", action="append", help="only this one; default: every kernel that can run")
    arguments = parser.parse_args()
    if arguments.case is not None:
        return run(math.inf, arguments.seed, arguments.backend, arguments.case, cases=1) > 0
    return run(arguments.seconds, arguments.seed, arguments.backend) > 0


if __name__ == "__main__":
    sys.exit(main())
