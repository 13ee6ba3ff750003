"""The demo: what ProAC does to the embeddings of a network, and what it costs on this machine, in five phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from proac_cuda import ProACLoss, ProjectionHead, proac_loss

from ..losses import lean_expression, literal_port
from ..memory import peak_extra_bytes
from ..problems import Inputs, Problem
from ..timing import CpuClock
from .data import SegmentationDataset, Splits, to_tensor
from .progress import progress_of
from .report import BASELINE, Runs, draw, score_table, write_json
from .sphere import Sphere, draw_sphere, save_animation
from .train import TrainConfig, TrainResult, train

SPEED = Problem("a quarter of a Cityscapes crop", (1, 256, 128, 128), 19)
SPHERE_STEPS = 150
SPHERE_TEMPERATURE = (
    0.3  # three dimensions are few for eight classes: at 0.1 most pixels are someone's hardest negative
)
SHOWN_PIXELS = 1200


@contextmanager
def phase(number: int, title: str, console: Console) -> Iterator[None]:
    """Say what begins, and what it took."""
    start = time.perf_counter()
    console.print(f"[bold]\\[{number}/5][/bold] {title}")
    yield
    console.print(f"      {time.perf_counter() - start:.0f} s")


@dataclass(frozen=True)
class Cosines:
    """Of the pixels of some images with the prototypes, over the classes that are present."""

    own: float  #: mean cosine with the prototype of the pixel's own class
    hardest: float  #: largest cosine of a prototype with a pixel of another class, mean over the classes
    nearest_is_own: float  #: share of the pixels whose nearest prototype is that of their class


@torch.no_grad()
def batch_of(dataset: SegmentationDataset, count: int, device: str) -> tuple[Tensor, Tensor]:
    """The first ``count`` images that are spread over a data set, and their labels, one size for all."""
    chosen = [dataset[i] for i in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)]
    images = torch.stack([to_tensor(image) for image, _ in chosen])
    return images.to(device), torch.stack([torch.from_numpy(label).long() for _, label in chosen]).to(device)


def labels_read(labels: Tensor, features: Tensor) -> Tensor:
    """The labels (B, H, W) at the resolution of a map of features, by the loss's rule."""
    return F.interpolate(labels[:, None].float(), features.shape[2:], mode="nearest")[:, 0].long()


@torch.no_grad()
def cosines(run: TrainResult, images: Tensor, labels: Tensor, prototypes: Tensor) -> Cosines:
    """What the statistics of the loss say of a network, whether or not it was trained with the loss."""
    run.network.eval()
    features = run.network(images)[1]
    _, stats = proac_loss(features, labels, prototypes, return_stats=True)
    read = labels_read(labels, features)
    nearest = torch.einsum("kd,bdhw->bkhw", F.normalize(prototypes, dim=1), F.normalize(features, dim=1)).argmax(1)
    kept = (read >= 0) & (read < len(prototypes))
    return Cosines(
        float(stats.mean_positive_cosine.nanmean()),
        float(stats.hardest_negative_cosine.nanmean()),
        float((nearest == read)[kept].float().mean()),
    )


def cosine_table(found: dict[str, Cosines]) -> Table:
    """One column a run."""
    table = Table(title="Test images: cosines of pixels with prototypes", caption="Means over the classes; -1 to 1.")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    table.add_row("own prototype", *(f"{c.own:.2f}" for c in found.values()))
    table.add_row("hardest negative", *(f"{c.hardest:.2f}" for c in found.values()))
    table.add_row("nearest prototype is the own", *(f"{100 * c.nearest_is_own:.0f} %" for c in found.values()))
    return table


def sphere_of(run: TrainResult, data: Splits, steps: int) -> Sphere:
    """Train a head to three dimensions by ProAC alone, on the frozen features of a network; watch held-out pixels."""
    device, network, names = run.config.device, run.network, data.train.class_names
    network.eval()
    with torch.no_grad():
        pairs = [batch_of(part, 32, device) for part in (data.train, data.test)]
        (features, labels), (shown, shown_labels) = [(network.feature_map(images), y) for images, y in pairs]
    torch.manual_seed(run.config.seed)
    head = ProjectionHead(features.shape[1], 3, "mlp").to(device)
    loss = ProACLoss(len(names), 3, temperature=SPHERE_TEMPERATURE).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)
    read = labels_read(shown_labels, shown).flatten()
    kept = torch.nonzero(read < len(names)).flatten()
    chosen = kept[torch.randperm(len(kept))[:SHOWN_PIXELS]]
    rows = shown.movedim(1, -1).flatten(0, -2)[chosen]
    frames, own, hardest = [], [], []
    for _ in range(steps + 1):
        with torch.no_grad():
            embeddings = F.normalize(head(rows.t()[None, :, :]).squeeze(0).t(), dim=1)
            _, stats = proac_loss(embeddings, read[chosen], loss.prototypes, return_stats=True)
            frames.append(embeddings.cpu())
            own.append(float(stats.mean_positive_cosine.nanmean()))
            hardest.append(float(stats.hardest_negative_cosine.nanmean()))
        batch = torch.randperm(len(features))[:16]
        optimizer.zero_grad()
        loss(head(features[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    prototypes = F.normalize(loss.prototypes.detach(), dim=1).cpu()
    return Sphere(prototypes, torch.stack(frames), read[chosen].cpu(), own, hardest, names, data.train.colours)


def speed_table(problem: Problem = SPEED, rounds: int = 3) -> Table:
    """The loss beside its published form and the leanest eager PyTorch, alternating, forward and backward."""
    contestants = {
        "proac_cuda": lambda x, y, p: proac_loss(x, y, p, ignore_index=-1),
        "plain PyTorch, lean": lean_expression,
        "published loss": literal_port,
    }
    inputs = Inputs(problem, "cpu")
    arguments = inputs.next()
    clock, seconds, bytes_held = CpuClock(), {name: [] for name in contestants}, {}

    def call(name: str) -> None:
        arguments.features.grad = None
        contestants[name](*arguments).backward()

    for name in contestants:
        call(name)
        arguments.features.grad = None  # else the watched call would free what was allocated before
        bytes_held[name] = peak_extra_bytes(lambda name=name: call(name))
    for _ in range(rounds):
        for name in contestants:
            seconds[name] += clock.time([lambda name=name: call(name)])
    shape = " x ".join(map(str, problem.shape))
    table = Table(title=f"Forward + backward, {shape}, K = {problem.classes}")
    for title in ("", "time", "times ours", "memory"):
        table.add_column(title, justify="left" if not title else "right")
    ours = median(seconds["proac_cuda"])
    for name, values in seconds.items():
        own = median(values)
        table.add_row(name, f"{1000 * own:.1f} ms", f"{own / ours:.1f}", f"{bytes_held[name] / 2**20:.0f} MiB")
    return table


def run_demo(
    config: TrainConfig, load: Callable[[], Splits], output: Path, console: Console, sphere_steps: int = SPHERE_STEPS
) -> Runs:
    """All five phases; pictures and numbers go into ``output``."""
    with phase(1, "the data: satellite tiles, labelled with climate zones", console):
        data = load()
        counts = (len(part) for part in (data.train, data.validation, data.test))
        console.print("      {} training, {} validation and {} test images".format(*counts))
    runs: Runs = {}
    plain, lambda_ = replace(config, proac_weight=0.0), config.proac_weight
    with_proac = f"cross-entropy + {lambda_:g} ProAC"
    for number, (name, run_config) in enumerate(((BASELINE, plain), (with_proac, config)), start=2):
        with phase(number, f"{config.iterations} training steps of {name}", console):  # noqa: SIM117
            with progress_of(name, config.iterations, console) as on_step:
                runs[name] = [train(run_config, data, on_step)]
    output.mkdir(parents=True, exist_ok=True)
    with phase(4, "the pictures: predictions, and embeddings on a sphere", console):
        draw(runs, data, output / "predictions.png")
        sphere = sphere_of(runs[BASELINE][0], data, sphere_steps)
        draw_sphere(sphere, output / "sphere.png")
        save_animation(sphere, output / "sphere.gif")
        write_json(runs, data.train.class_names, output / "metrics.json")
    with phase(5, "the speed of the loss on this machine", console):
        speed = speed_table()

    images, labels = batch_of(data.test, 16, config.device)
    (run_with_proac,) = runs[with_proac]
    proac = run_with_proac.proac
    assert proac is not None
    found = {name: cosines(run, images, labels, proac.prototypes) for name, (run,) in runs.items()}
    console.print(score_table(runs, data.train.class_names))
    console.print(
        "One seed: the mean IoU of such short runs varies by some points from seed to seed, see docs/using/study.md."
    )
    console.print(cosine_table(found))
    console.print("Cross-entropy alone does not train the embeddings: its column is where they start.")
    console.print(speed)
    share = run_with_proac.typical("proac_seconds") / run_with_proac.typical("seconds")  # type: ignore[operator]
    console.print(f"Of a training step, the loss took {100 * share:.1f} %.")
    console.print(f"In {output}:")
    for name, what in (
        ("sphere.png", "a head of three dimensions before and after training by ProAC, held-out pixels"),
        ("sphere.gif", "the same, moving"),
        ("predictions.png", "test images, truth and predictions"),
        ("metrics.json", "every number"),
    ):
        console.print(f"  {name}: {what}")
    return runs
