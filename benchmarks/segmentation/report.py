"""What a comparison of runs shows: a table on the terminal, a picture, and a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from .data import IGNORE_INDEX, Colour, SegmentationDataset, Splits
from .intervals import Estimate, estimate, paired
from .measure import predict
from .train import TrainResult

matplotlib.use("Agg")  # draw into files; a machine without a display has no other backend
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

IGNORED_COLOUR: Colour = (150, 150, 150)

Runs = dict[str, list[TrainResult]]  # by the name they are shown under, one for each seed
BASELINE = "cross-entropy"  # what the others are compared with


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _over_seeds(values: list[float]) -> str:
    """The mean in %, and with several seeds the half width of its 95 % interval; of the seeds that have a value."""
    found = estimate(values)
    return _percent(found.mean) + (f" \u00b1 {_percent(found.half_width)}" if found.count > 1 else "")


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"


def _size(count: float) -> str:
    unit = "KiB" if count < 2**20 else "MiB"
    return f"{count / 2 ** (10 if unit == 'KiB' else 20):.1f} {unit}"


def score_table(runs: Runs, class_names: tuple[str, ...]) -> Table:
    """IoU of every class and their mean on the test images, one column a loss."""
    caption = "A class without pixels has no IoU and is left out of the mean."
    if any(len(results) > 1 for results in runs.values()):
        caption += " Means over the seeds, \u00b1 half of the 95 % interval."
    table = Table(title="Test IoU in %", caption=caption)
    table.add_column("class")
    for name in runs:
        table.add_column(name, justify="right")
    for index, class_name in enumerate(class_names):
        table.add_row(class_name, *(_over_seeds([run.test.iou[index] for run in some]) for some in runs.values()))
    table.add_section()
    table.add_row("mean IoU", *(_over_seeds([r.test.mean_iou for r in some]) for some in runs.values()), style="bold")
    table.add_row("pixel accuracy", *(_over_seeds([r.test.accuracy for r in some]) for some in runs.values()))
    validation = (_over_seeds([r.validation.mean_iou for r in some]) for some in runs.values())
    table.add_row("mean IoU, validation", *validation)
    return table


def differences(runs: Runs) -> dict[str, dict[str, Estimate]]:
    """Of each loss minus cross-entropy, paired by seed: the mean IoU of the test and the validation images."""
    parts = ("test", "validation")

    def means(name: str, part: str) -> dict[int, float]:
        return {run.config.seed: getattr(run, part).mean_iou for run in runs[name]}

    found: dict[str, dict[str, Estimate]] = {}
    for name in runs:
        pairs = {part: paired(means(name, part), means(BASELINE, part)) for part in parts if name != BASELINE}
        found[name] = {part: pair for part, pair in pairs.items() if pair.count}
    return {name: pairs for name, pairs in found.items() if pairs}


def difference_table(runs: Runs) -> Table:
    """`differences`, with their intervals and what can be said of them."""
    table = Table(
        title=f"Mean IoU minus that of {BASELINE}, in points",
        caption="Paired by seed: both losses start from the same weights and see the same batches. 95 % intervals.",
        min_width=60,
    )
    for column in ("", "test", "validation", "seeds", "on test images"):
        table.add_column(column, justify="left" if column in ("", "on test images") else "right")
    for name, pairs in differences(runs).items():
        cells = [f"{100 * pair.mean:+.2f} \u00b1 {100 * pair.half_width:.2f}" for pair in pairs.values()]
        table.add_row(name, *cells, str(pairs["test"].count), pairs["test"].verdict)
    return table


def cost_table(runs: Runs) -> Table:
    """Seconds and memory, one column a loss; the caption says what the numbers mean."""
    table = Table(
        title="Cost",
        caption="Times are medians over the training steps of the first seed; a loss is its forward and backward alone, "
        "without the embedding head. Memory is the most that PyTorch held at once beyond the loss's inputs while it ran "
        "forward and backward on a training batch; the gradient it returns, as large as the embeddings, is part of it.",
        min_width=60,
    )
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")

    def add(label: str, cells: list[str]) -> None:
        table.add_row(label, *cells)

    def share(run: TrainResult) -> str:
        proac, step = run.typical("proac_seconds"), run.typical("seconds")
        return "-" if proac is None or step is None else f"{_percent(proac / step)} %"

    results = [some[0] for some in runs.values()]
    add("whole run", [f"{run.seconds:.1f} s" for run in results])
    add("training step", [_milliseconds(run.typical("seconds")) for run in results])
    add("  cross-entropy", [_milliseconds(run.typical("cross_entropy_seconds")) for run in results])
    add("  ProAC", [_milliseconds(run.typical("proac_seconds")) for run in results])
    add("  ProAC, share of step", [share(run) for run in results])
    add("memory in ProAC", ["-" if run.memory is None else _size(run.memory.peak) for run in results])
    add("  of it the gradient", ["-" if run.memory is None else _size(run.memory.gradient) for run in results])
    return table


def print_report(runs: Runs, class_names: tuple[str, ...], console: Console) -> None:
    """All tables, and a word on how far one seed can be trusted."""
    console.print(score_table(runs, class_names))
    console.print(cost_table(runs))
    if all(len(some) > 1 for some in runs.values()):
        console.print(difference_table(runs))
        return
    console.print(
        f"Seed {runs[BASELINE][0].config.seed} alone. From seed to seed the mean IoU of such short runs varies by a few "
        "points: --seeds 0-4 trains five, and says which differences are beyond that.",
        soft_wrap=True,
    )


def write_json(runs: Runs, class_names: tuple[str, ...], path: Path) -> None:
    """Configurations, scores, costs and training curves of all runs, and the paired differences."""
    content = {
        "runs": {name: [run.as_dict(class_names) for run in some] for name, some in runs.items()},
        "differences": {
            name: {part: asdict(pair) for part, pair in pairs.items()} for name, pairs in differences(runs).items()
        },
    }
    path.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def finite(value: object) -> object:
    """A JSON value without NaN and infinity."""
    # JSON has no NaN or infinity (a class without pixels has no IoU, a run may diverge): null instead.
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def paint(label: np.ndarray, colours: tuple[Colour, ...]) -> np.ndarray:
    """Class indices (H, W) as a picture (H, W, 3); ignored pixels are grey."""
    table = np.full((256, 3), IGNORED_COLOUR, np.uint8)
    table[: len(colours)] = colours
    table[IGNORE_INDEX] = IGNORED_COLOUR
    return np.take(table, label, axis=0)


def telling_samples(dataset: SegmentationDataset, count: int) -> list[int]:
    """Samples with many classes, spread over the data set: the richest of each of `count` equal stretches.

    The choice looks at the labels alone, so it favours no run.
    """

    def richness(index: int) -> float:
        label = dataset[index][1]
        shares = np.bincount(label[label != IGNORE_INDEX], minlength=256) / label.size
        shares = shares[shares > 0]
        return float(-(shares * np.log(shares)).sum())

    stretches = np.array_split(np.arange(len(dataset)), min(count, len(dataset)))
    return [int(max(stretch, key=richness)) for stretch in stretches]


def prediction_grid(
    dataset: SegmentationDataset, chosen: Sequence[int], predictions: dict[str, Callable[[int], np.ndarray]]
) -> Figure:
    """One image a row: itself, the truth, and what each network says, by its title; the legend has the classes in sight."""
    titles = ["image", "truth", *predictions]
    size = (2.3 * len(titles), 1.75 * len(chosen) + 0.7)
    figure, axes = plt.subplots(len(chosen), len(titles), figsize=size, layout="constrained", squeeze=False)
    seen: set[int] = set()
    for row, index in zip(axes, chosen, strict=True):
        image, label = dataset[index]
        maps = [label, *(predict_one(index) for predict_one in predictions.values())]
        seen.update(*(np.unique(classes).tolist() for classes in maps))
        for axis, panel in zip(row, [image, *(paint(classes, dataset.colours) for classes in maps)], strict=True):
            axis.imshow(panel, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    entries = dict(enumerate(zip(dataset.class_names, dataset.colours, strict=True)))
    entries[IGNORE_INDEX] = ("ignored", IGNORED_COLOUR)
    handles = [
        Patch(facecolor=np.array(colour) / 255, edgecolor="black", lw=0.5, label=name)
        for k, (name, colour) in entries.items()
        if k in seen
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False)
    return figure


def draw(runs: Runs, data: Splits, path: Path, count: int = 4) -> None:
    """`prediction_grid` of test images, with the networks of the first seed."""
    predictions = {
        f"{name}\nmean IoU {_percent(run.test.mean_iou)} %": lambda index, run=run: predict(
            run.network, data.test[index][0], run.config.device
        )
        for name, (run, *_) in runs.items()
    }
    figure = prediction_grid(data.test, telling_samples(data.test, count), predictions)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
