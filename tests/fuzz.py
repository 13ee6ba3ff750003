"""Random calls of the public function on every backend that can run, compared with the reference in float64.

    python tests/fuzz.py --seconds 3600 --seed 1     # until the time is up, or ten findings
    python tests/fuzz.py --seed 1 --case 4711        # one of its cases again

Shapes (empty ones too), strides, dtypes, options, labels and weights are drawn at random; some calls are wrong on purpose.
What must hold: a good call gives the reference's loss, statistics and gradients within the accuracy table, changes no input,
and gives the same bits at another number of threads; NaN comes out where the reference has it; a bad call raises the
reference's error with the reference's text; nothing crashes. Views lie in buffers full of NaN and invalid labels, so that a
read beside them shows. ``tests/sanitize.py --fuzz SECONDS`` runs this under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import proac_cuda
from compare import gradient_tolerance, loss_tolerance, rounding
from fuzz_problems import Problem, draw_problem
from proac_cuda.backends import BACKENDS

MOST_FINDINGS = 10


class Answer(NamedTuple):
    """What a call gave: tensors, or an error."""

    loss: Tensor | None = None
    stats: proac_cuda.ProACStats | None = None
    features_grad: Tensor | None = None
    prototypes_grad: Tensor | None = None
    error: str = ""


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
    # One NaN for all: PyTorch makes different ones of it in bfloat16, by where a thread's share of a tensor begins.
    return [
        _bits(tensor.masked_fill(tensor.isnan(), math.nan) if tensor.is_floating_point() else tensor)
        for tensor in tensors
        if tensor is not None
    ]


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
