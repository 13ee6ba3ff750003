"""Speed of the compiled CPU kernels, forward + backward, beside what else one could run. Prints one table of ratios.

    python benchmarks/cpu_speed.py [--threads 2] [--quick] [--only NAME ...] [--clock wall|cpu]

Compared are: a literal eager port of the published loss; torch.compile of the vectorised loss, in its plain form and in one
factored by hand; and the unavoidable, reading the features once (``features.sum()``), then reading them again and writing
fresh memory (``features.clone()``).

Runs alternate, medians count; a busy machine still shows in the figures, so look at the spread. Where others use the machine
too, ``--threads 1 --clock cpu`` measures the process's own time, of which a busy machine takes nothing.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import proac_cuda
from proac_cuda.extension import build_info

IGNORED = 255
TEMPERATURE = 0.1
GOLDEN = Path(__file__).parent.parent / "tests" / "data"


def literal_port(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """The published loss as it is written: a loop over classes, boolean masks, host synchronisations, one class at a time."""
    labels = F.interpolate(labels.float().unsqueeze(1), features.shape[2:], mode="nearest").squeeze(1).long().flatten()
    pixels = F.normalize(features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]), dim=1)
    losses = []
    for k in range(prototypes.shape[0]):
        own = labels == k
        if own.sum().item() == 0:
            continue
        anchor = F.normalize(prototypes[k : k + 1], dim=1)
        positives, negatives = pixels[own], pixels[~own & (labels != IGNORED)]
        positive_logits = torch.exp(anchor @ positives.t() / TEMPERATURE)
        negative_sum = torch.exp(anchor @ negatives.t() / TEMPERATURE).sum(1, keepdim=True)
        losses.append(-torch.log(positive_logits / (positive_logits + negative_sum)).mean())
    return torch.stack(losses).mean()


def lean_expression(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """The same, factored by hand: norms divide the product, so that nothing else is of size pixels x channels."""
    x, labels = features.flatten(2), labels.flatten(1)
    s = torch.matmul(F.normalize(prototypes, dim=1), x)
    s = s / (torch.linalg.vector_norm(x, dim=1, keepdim=True) * TEMPERATURE)
    classes = torch.arange(prototypes.shape[0], device=x.device)[:, None]
    kept = labels != IGNORED
    index = torch.where(kept, labels, 0)
    excluded = (labels[:, None] == classes) | ~kept[:, None]
    log_z = s.masked_fill(excluded, -torch.inf).logsumexp((0, 2))
    positive = s.gather(1, index[:, None]).squeeze(1)
    loss = F.softplus(log_z[index] - positive) * kept
    count = torch.zeros_like(log_z).index_add(0, index.flatten(), kept.flatten().to(log_z.dtype))
    return (loss / count.clamp(min=1)[index]).sum() / (count > 0).sum()


def plain_expression(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """What one would write first: normalise the features, one product, the loss by pixel."""
    x = F.normalize(features, dim=1).permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    labels = labels.flatten()
    s = x @ F.normalize(prototypes, dim=1).t() / TEMPERATURE
    kept = labels != IGNORED
    index = torch.where(kept, labels, 0)
    own = F.one_hot(index, prototypes.shape[0]).bool()
    log_z = s.masked_fill(own | ~kept[:, None], -torch.inf).logsumexp(0)
    loss = F.softplus(log_z[index] - s.gather(1, index[:, None]).squeeze(1)) * kept
    count = (own & kept[:, None]).sum(0)
    return (loss / count.clamp(min=1)[index]).sum() / (count > 0).sum()


def kernels(features: Tensor, labels: Tensor, prototypes: Tensor, **options: object) -> Tensor:
    return proac_cuda.proac_loss(features, labels, prototypes, backend="cpp", temperature=TEMPERATURE, **options)


def check_against_published_answers() -> None:
    """The port must give what the published code gave, or its time means nothing."""
    for path in sorted(GOLDEN.glob("*.npz")):
        data = np.load(path)
        features = torch.from_numpy(data["features"]).requires_grad_()
        labels, prototypes = torch.from_numpy(data["labels"]), torch.from_numpy(data["prototypes"])
        loss = literal_port(features, labels, prototypes)
        loss.backward()
        torch.testing.assert_close(loss.item(), float(data["loss"]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(features.grad, torch.from_numpy(data["grad"]), rtol=1e-3, atol=1e-6)


class Problem(NamedTuple):
    features: Tensor
    labels: Tensor
    prototypes: Tensor


def make_problem(shape: tuple[int, ...], classes: int, dtype: torch.dtype = torch.float32) -> Problem:
    """Random labels, a twentieth of them ignored."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator).to(dtype)
    labels = torch.randint(0, classes, (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = IGNORED
    return Problem(features.requires_grad_(), labels, torch.randn(classes, shape[1], generator=generator))


def step(problem: Problem, loss: Callable[..., Tensor], **options: object) -> Callable[[], None]:
    def run() -> None:
        problem.features.grad = None
        loss(*problem, **options).backward()

    return run


def forward(problem: Problem, **options: object) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            kernels(*problem, **options)

    return run


def unavoidable(problem: Problem) -> Callable[[], None]:
    values = problem.features.detach()

    def run() -> None:
        problem.features.grad = None
        values.sum()
        values.clone()

    return run


clock = time.perf_counter


def alternate(contestants: dict[str, Callable[[], None]], repeats: dict[str, int]) -> dict[str, list[float]]:
    """Milliseconds of each contestant: one run of each in turn, those with few repeats spread over all rounds."""
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    rounds = max(repeats.values())
    for i in range(rounds):
        for name, run in contestants.items():
            if i * repeats[name] // rounds == (i - 1) * repeats[name] // rounds and i > 0:
                continue
            start = clock()
            run()
            times[name].append((clock() - start) * 1e3)
    return times


class Table:
    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.failed = 0

    def measure(self, setting: str, contestants: dict[str, Callable[[], None]], slow: int = 3) -> dict[str, float]:
        repeats = {n: slow if n == "literal port" else self.repeats for n in contestants}
        times = alternate(contestants, repeats)
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(f"\n{setting}")
        for name, values in times.items():
            print(
                f"  {name:34s} {medians[name]:9.2f} ms   ({min(values):.2f} to {max(values):.2f}, {len(values)} runs)"
            )
        return medians

    def ratio(self, text: str, value: float, limit: float, at_least: bool) -> None:
        holds = value >= limit if at_least else value <= limit
        self.failed += not holds
        print(
            f"    {text}: {value:.2f}  ({'at least' if at_least else 'at most'} {limit})  {'ok' if holds else 'NOT MET'}"
        )


BESIDE_PORT = {"kernels": kernels, "literal port": literal_port}


def compare_with_others(table: Table, shape: tuple[int, ...], classes: int, port: float, compiled: float) -> None:
    problem = make_problem(shape, classes)
    torch._dynamo.reset()
    plain, lean = torch.compile(plain_expression), torch.compile(lean_expression)
    values = [loss(*problem).item() for loss in (kernels, literal_port, plain_expression, lean_expression)]
    assert max(values) - min(values) < 1e-4 * values[0], values
    contestants = {
        "kernels": step(problem, kernels),
        "kernels, forward alone": forward(problem),
        "sum + clone": unavoidable(problem),
        "compiled plain expression": step(problem, plain),
        "compiled factored expression": step(problem, lean),
    }
    ms = table.measure(f"float32 {shape}, K={classes}", contestants)
    # Apart: it lasts so long that memory freed by others is gone from the caches, and from the machine, when they run again.
    slow = table.measure("  beside the port", {n: step(problem, f) for n, f in BESIDE_PORT.items()})
    table.ratio("literal port / kernels", slow["literal port"] / slow["kernels"], port, True)
    table.ratio("compiled plain / kernels", ms["compiled plain expression"] / ms["kernels"], compiled, True)
    print(f"    compiled factored / kernels: {ms['compiled factored expression'] / ms['kernels']:.2f}")
    if classes == 19 and shape[1] == 256:
        table.ratio("kernels / (sum + clone)", ms["kernels"] / ms["sum + clone"], 1.5, False)
    table.ratio("forward alone / kernels", ms["kernels, forward alone"] / ms["kernels"], 0.5, False)


def compare_forms(table: Table) -> None:
    shape = (4, 256, 128, 128)
    base = make_problem(shape, 19)
    half = make_problem(shape, 19, torch.bfloat16)
    last = base._replace(features=base.features.detach().to(memory_format=torch.channels_last).requires_grad_())
    contestants = {
        "float32": step(base, kernels),
        "bfloat16": step(half, kernels),
        "channels_last": step(last, kernels),
    }
    ms = table.measure(f"forms of {shape}, K=19", contestants)
    table.ratio("bfloat16 / float32", ms["bfloat16"] / ms["float32"], 1.0, False)
    table.ratio("channels_last / contiguous", ms["channels_last"] / ms["float32"], 1.3, False)

    many = make_problem(shape, 150)
    contestants = {
        "all negatives": step(many, kernels),
        "num_negatives=4096": step(many, kernels, num_negatives=4096),
    }
    ms = table.measure(f"sampled sets, {shape}, K=150", contestants)
    table.ratio("4096 negatives / all", ms["num_negatives=4096"] / ms["all negatives"], 1.0, False)
    flops = 3 * 2 * 150 * many.features.numel()
    square = torch.randn(2048, 2048)
    rate = table.measure("matrix products, 2048^3", {"square @ square": lambda: square @ square})
    share = flops / ms["all negatives"] / (2 * 2048**3 / rate["square @ square"])
    print(f"    K=150 runs at {100 * share:.0f} % of the machine's float32 matrix-product rate")


def compare_sizes(table: Table) -> None:
    problems = {n: make_problem((1, 32, 2**n), 19) for n in range(14, 23, 2)}
    ms = table.measure("pixels, D=32, K=19", {f"2^{n}": step(p, kernels) for n, p in problems.items()})
    per_pixel = {n: ms[f"2^{n}"] / 2**n * 1e6 for n in problems}
    print("    ns a pixel: " + ", ".join(f"2^{n}: {value:.1f}" for n, value in per_pixel.items()))
    table.ratio("largest / smallest time per pixel", max(per_pixel.values()) / min(per_pixel.values()), 2.0, False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--only", nargs="+", choices=["K19", "K150", "pixels", "forms", "sizes"])
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    arguments = parser.parse_args()
    global clock
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    torch.set_num_threads(arguments.threads)
    check_against_published_answers()
    print(
        f"{platform.processor() or platform.machine()}, {build_info()['cpu']}, {arguments.threads} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}; {arguments.clock} clock, medians of alternating runs"
    )
    table = Table(5 if arguments.quick else 15)
    sections: dict[str, Callable[[], None]] = {
        "K19": lambda: compare_with_others(table, (4, 256, 128, 128), 19, 30, 8),
        "K150": lambda: compare_with_others(table, (4, 256, 128, 128), 150, 40, 3),
        "pixels": lambda: compare_with_others(table, (2, 64, 512, 512), 19, 40, 10),
        "forms": lambda: compare_forms(table),
        "sizes": lambda: compare_sizes(table),
    }
    for name, section in sections.items():
        if not arguments.only or name in arguments.only:
            section()
    print(f"\n{table.failed} ratio(s) not met" if table.failed else "\nall ratios met")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
