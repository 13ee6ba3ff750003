"""The study: which runs there are, and how they are run, resumed and written down, one JSON line each."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .adapt import with_statistics_of
from .data import DataError, SegmentationDataset, Splits, to_tensor
from .measure import Scores, evaluate, predict
from .network import SegmentationNetwork
from .report import finite, telling_samples
from .stress import stress_scores
from .train import StepRecord, TrainConfig, Training, TrainResult, plain, train

# What a step with ProAC costs over one without, in processor time: python -m benchmarks.segmentation cost
PROAC_STEP_RATIO = 1.14

PROTOCOL = TrainConfig(iterations=250, batch_size=8, crop=(96, 128), widths=(16, 32, 64, 96), pyramid_width=48)
PROAC_WEIGHT = 0.5
SOURCE = "blue_marble"
TARGETS = ("shaded_relief", "halfway")  # styles of the same tiles
CURVE_EVERY = 10  # steps averaged into one point of a training curve
PICTURED_ARMS = (
    "cross_entropy",
    "proac",
    "twin",
    *(f"{t}-self_training{end}" for t in TARGETS for end in ("", "_proac")),
)
PICTURES = 4  # test images whose predictions are kept, of the first seed of these arms
STRESSED_PLANS = ("supervised", "stress")  # whose networks see changed test images, too
EMBEDDED_ARMS = ("cross_entropy", "proac")
EMBEDDED_PIXELS = 60  # of each class, for the projection


@dataclass(frozen=True)
class Arm:
    """A configuration that is run with several seeds, by what it changes in PROTOCOL."""

    name: str
    title: str
    plan: str  # "supervised", "adaptation" or "ablation"
    changes: dict[str, Any] = field(default_factory=dict)
    target: str | None = None  # one of TARGETS, where there is self-training

    def config(self, protocol: TrainConfig, seed: int) -> TrainConfig:
        """The configuration of one run."""
        changes = dict(self.changes)
        if "iterations_factor" in changes:
            changes["iterations"] = round(protocol.iterations * changes.pop("iterations_factor"))
        return replace(protocol, seed=seed, **changes)


def _arms() -> tuple[Arm, ...]:
    proac = {"proac_weight": PROAC_WEIGHT}
    rows: list[tuple[str, str, str, dict[str, Any]]] = [
        ("cross_entropy", "cross-entropy (CE)", "supervised", {}),
        ("class_weighted", "class-weighted CE", "supervised", {"class_weighted": True}),
        ("longer", "CE with ProAC's compute", "supervised", {"iterations_factor": PROAC_STEP_RATIO}),
        ("proac", "CE + ProAC", "supervised", proac),
        ("twin", "CE + pixel-anchored twin", "supervised", proac | {"anchors": "pixels"}),
        ("sampled", "CE + ProAC, 1024 negatives", "supervised", proac | {"num_negatives": 1024}),
        ("weight_0.1", "lambda 0.1", "ablation", {"proac_weight": 0.1}),
        ("weight_1", "lambda 1", "ablation", {"proac_weight": 1.0}),
        ("temperature_0.05", "temperature 0.05", "ablation", proac | {"temperature": 0.05}),
        ("temperature_0.3", "temperature 0.3", "ablation", proac | {"temperature": 0.3}),
        ("negatives_64", "64 negatives", "ablation", proac | {"num_negatives": 64}),
        ("head_none", "no head", "ablation", proac | {"head": "none"}),
        ("head_mlp", "two-layer head", "ablation", proac | {"head": "mlp"}),
        ("prototypes_random", "random prototypes", "ablation", proac | {"prototypes": "random"}),
        ("prototypes_learnable", "learnable prototypes", "ablation", proac | {"prototypes": "learnable"}),
    ]
    arms = [Arm(*row) for row in rows]
    adapt = {"self_training": True}
    sure = adapt | {"confidence_weighted": True}
    mixed = adapt | {"class_mix": True}
    adapted: list[tuple[str, str, dict[str, Any]]] = [
        ("self_training", "self-training", adapt),
        ("self_training_proac", "self-training + ProAC", adapt | proac),
        ("confident", "self-training, confidence weights", sure),
        ("confident_proac", "self-training, confidence weights + ProAC", sure | proac),
        ("class_mix", "self-training, class-mix", mixed),
        ("class_mix_proac", "self-training, class-mix + 0.1 ProAC", mixed | {"proac_weight": 0.1}),
    ]
    for target in TARGETS:
        arms += [Arm(f"{target}-{name}", title, "adaptation", changes, target) for name, title, changes in adapted]
    return tuple(arms)


ARMS = _arms()
PLANS = ("supervised", "adaptation", "ablation")
SEEDS = {"supervised": range(5), "adaptation": range(5), "ablation": range(3)}


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The finished runs of a log; a last line that was cut short is passed over, since its run is not finished."""
    if not path.is_file():
        return []
    runs = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number}, is not JSON: {error}") from error
    return runs


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process holds a lock that lasts until it ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _append(path: Path, line: str) -> None:
    """One line, on the disk when this returns; a line cut short by a kill is ended first."""
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                whole = Path(path).read_bytes()
                file.truncate(whole.rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def run_study(
    arms: list[Arm],
    seeds: Callable[[Arm], list[int]],
    data: Splits,
    targets: dict[str, Splits],
    output: Path,
    protocol: TrainConfig = PROTOCOL,
    on_step: Callable[[Arm, int, int, StepRecord], None] | None = None,
    on_end: Callable[[Arm, int, dict[str, Any] | None], None] | None = None,
    command: str = "study --arms {arm.name} --seeds {seed}",
) -> None:
    """Run what is not yet in output/runs.jsonl, each run from its checkpoint where there is one.

    Several processes may work on one folder: a run that another one has under way is passed over. All arms of one
    seed come before the next seed, so that an unfinished study holds whole pairs. ``command``: what runs one of them again.
    """
    commit()
    log = output / "runs.jsonl"
    pairs = sorted(((seed, number) for number, arm in enumerate(arms) for seed in seeds(arm)))
    for seed, number in pairs:
        arm = arms[number]
        config = arm.config(protocol, seed)
        name = f"{arm.name}-seed{seed}"
        checkpoint = output / "checkpoints" / f"{name}.pt"
        with _claimed(checkpoint.with_suffix(".lock")) as mine:
            if not mine:
                continue
            done = {(run["arm"], run["seed"]): recorded_config(run) for run in read_runs(log)}
            if (arm.name, seed) in done:
                if done[arm.name, seed] != plain(config):
                    raise DataError(f"{log} holds {name} with another configuration; choose another --output")
                if on_end:
                    on_end(arm, seed, None)
                continue
            record = run(arm, config, data, targets, output / "samples", checkpoint, on_step)
            again = command.format(arm=arm, seed=seed)
            record["command"] = f"python -m benchmarks.segmentation {again} --output results/again"
            _append(log, json.dumps(finite(record), allow_nan=False))
            checkpoint.unlink(missing_ok=True)
            if on_end:
                on_end(arm, seed, record)


def recorded_config(run: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a line of the log: options that it does not name are newer than it, and had their defaults."""
    return plain(TrainConfig()) | run["config"]


def run(
    arm: Arm,
    config: TrainConfig,
    data: Splits,
    targets: dict[str, Splits],
    samples: Path,
    checkpoint: Path,
    on_step: Callable[[Arm, int, int, StepRecord], None] | None = None,
) -> dict[str, Any]:
    """Train and score one run; what is returned is its line in the log, but for the command."""
    started = time.process_time()
    result = train(
        config,
        data,
        (lambda step, record: on_step(arm, config.seed, step, record)) if on_step else None,
        target=targets[arm.target].train if arm.target else None,
        checkpoint=checkpoint,
    )
    network, device = result.network, config.device
    scores = {"clean": result.test}
    # Domains are compared with the batch statistics of each, which need no label.
    domains = {arm.target: targets[arm.target]} if arm.target else targets if arm.plan == "supervised" else {}
    adapted = {
        name: with_statistics_of(network, part.train, config.batch_size, config.crop, device)
        for name, part in ({"clean": data} | domains if domains else {}).items()
    }
    for name, part in domains.items():
        scores[name] = evaluate(network, part.test, device)
        scores[f"{name}, own statistics"] = evaluate(adapted[name], part.test, device)
    if domains:
        scores["clean, own statistics"] = evaluate(adapted["clean"], data.test, device)
    if arm.plan in STRESSED_PLANS:
        scores |= stress_scores(network, data.test, device)
    if config.seed == 0 and arm.name in PICTURED_ARMS:
        samples.mkdir(parents=True, exist_ok=True)
        content = predictions(network, data.test, "clean", device)
        for name, part in domains.items():
            content |= predictions(adapted[name], part.test, name, device)
        if arm.name in EMBEDDED_ARMS:
            content |= embeddings(result, data.test)
        np.savez_compressed(samples / f"{arm.name}.npz", **content)
    return {
        "plan": arm.plan,
        "arm": arm.name,
        "title": arm.title,
        "seed": config.seed,
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "config": plain(config),
        "class_names": list(data.test.class_names),
        "validation": round(result.validation.mean_iou, 5),
        "scores": {name: _scores_dict(value) for name, value in scores.items()},
        "curves": curves(result.history),
        "probes": probes(result.history),
        "cpu_seconds": round(time.process_time() - started, 1),  # of this process: less where a run was resumed
        "step_seconds": _rounded(result.typical("seconds")),
        "proac_seconds": _rounded(result.typical("proac_seconds")),
        "proac_memory_bytes": result.memory and asdict(result.memory),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _scores_dict(scores: Scores) -> dict[str, Any]:
    return {"mean_iou": round(scores.mean_iou, 5), "iou": [round(value, 4) for value in scores.iou.tolist()]}


def curves(history: list[StepRecord]) -> dict[str, list[float | None]]:
    """Means over CURVE_EVERY steps of the losses, and of the pseudo labels' accuracy where there are any."""
    parts = [history[start : start + CURVE_EVERY] for start in range(0, len(history), CURVE_EVERY)]
    found: dict[str, list[float | None]] = {}
    for name in ("cross_entropy", "proac", "pseudo_label_accuracy"):
        values = [[getattr(record, name) for record in part if getattr(record, name) is not None] for part in parts]
        if any(values):
            found[name] = [round(mean(part), 4) if part else None for part in values]
    return found


def probes(history: list[StepRecord]) -> list[dict[str, float]]:
    """What Training.probe found before some of the steps."""
    return [
        {"step": step, **{name: round(value, 4) for name, value in record.probe.items()}}
        for step, record in enumerate(history)
        if record.probe is not None
    ]


@functools.cache
def commit() -> str:
    """The commit of this source tree, with "+" after it where tracked files but results differ; "unknown" outside of git.

    Looked up once, since the code that runs is the code that was there when the process started.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def predictions(
    network: SegmentationNetwork, dataset: SegmentationDataset, domain: str, device: str
) -> dict[str, np.ndarray]:
    """What a network makes of the images that the report shows."""
    return {f"{domain}_{i}": predict(network, dataset[i][0], device) for i in telling_samples(dataset, PICTURES)}


@torch.no_grad()
def embeddings(result: TrainResult, dataset: SegmentationDataset) -> dict[str, np.ndarray]:
    """Embeddings of EMBEDDED_PIXELS pixels of each class, their classes, and the prototypes where there are any.

    Without ProAC the embedding head is untrained, and the feature map that it reads stands for the embeddings.
    """
    network, device = result.network.eval(), result.config.device
    features, classes = [], []
    for index in range(len(dataset)):
        image, label = dataset[index]
        x = network.feature_map(to_tensor(image)[None].to(device))
        x = (x if result.proac is None else network.embedding(x))[0]
        features.append(x.flatten(1).T.cpu())
        nearest = F.interpolate(torch.from_numpy(label.copy())[None, None].float(), size=x.shape[1:], mode="nearest")
        classes.append(nearest.flatten().long())
    x, y = torch.cat(features), torch.cat(classes)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    picked = torch.cat([order[y[order] == k][:EMBEDDED_PIXELS] for k in range(len(dataset.class_names))])
    content = {"embeddings": F.normalize(x[picked]).half().numpy(), "classes": y[picked].to(torch.uint8).numpy()}
    if result.proac is not None:
        content["prototypes"] = result.proac.prototypes.detach().cpu().numpy()
    return content


def step_cost(data: Splits, protocol: TrainConfig = PROTOCOL, steps: int = 40) -> tuple[list[float], list[float]]:
    """Processor seconds of training steps without and with ProAC, taken in turns."""
    plain, with_proac = (
        Training(replace(protocol, proac_weight=weight, iterations=steps + 5), data) for weight in (0.0, PROAC_WEIGHT)
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    for step in range(steps + 5):
        for training, taken in zip((plain, with_proac), seconds, strict=True):
            start = time.process_time()
            training.step()
            if step >= 5:  # the first ones also fill the allocator
                taken.append(time.process_time() - start)
    return seconds
