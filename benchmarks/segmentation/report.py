"""What a comparison of runs shows: a table on the terminal, a picture, and a JSON file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from .data import IGNORE_INDEX, Colour, SegmentationDataset, Splits
from .measure import predict
from .train import TrainResult

matplotlib.use("Agg")  # draw into files; a machine without a display has no other backend
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

IGNORED_COLOUR: Colour = (150, 150, 150)

Runs = dict[str, TrainResult]  # by the name they are shown under


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"


def _size(count: float) -> str:
    unit = "KiB" if count < 2**20 else "MiB"
    return f"{count / 2 ** (10 if unit == 'KiB' else 20):.1f} {unit}"


def score_table(runs: Runs, class_names: tuple[str, ...]) -> Table:
    """IoU of every class and their mean on the test images, one column a run."""
    table = Table(title="Test IoU in %", caption="A class without pixels has no IoU and is left out of the mean.")
    table.add_column("class")
    for name in runs:
        table.add_column(name, justify="right")
    for index, class_name in enumerate(class_names):
        table.add_row(class_name, *(_percent(run.test.iou[index]) for run in runs.values()))
    table.add_section()
    table.add_row("mean IoU", *(_percent(run.test.mean_iou) for run in runs.values()), style="bold")
    table.add_row("pixel accuracy", *(_percent(run.test.accuracy) for run in runs.values()))
    table.add_row("mean IoU, validation", *(_percent(run.validation.mean_iou) for run in runs.values()))
    return table


def cost_table(runs: Runs) -> Table:
    """Seconds and memory, one column a run; the caption says what the numbers mean."""
    table = Table(
        title="Cost",
        caption="Times are medians over the training steps; a loss is its forward and backward alone, without the "
        "embedding head. Memory is the most that PyTorch held at once beyond the loss's inputs while it ran "
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

    results = list(runs.values())
    add("whole run", [f"{run.seconds:.1f} s" for run in results])
    add("training step", [_milliseconds(run.typical("seconds")) for run in results])
    add("  cross-entropy", [_milliseconds(run.typical("cross_entropy_seconds")) for run in results])
    add("  ProAC", [_milliseconds(run.typical("proac_seconds")) for run in results])
    add("  ProAC, share of step", [share(run) for run in results])
    add("memory in ProAC", ["-" if run.memory is None else _size(run.memory.peak) for run in results])
    add("  of it the gradient", ["-" if run.memory is None else _size(run.memory.gradient) for run in results])
    return table


def print_report(runs: Runs, class_names: tuple[str, ...], console: Console) -> None:
    """Both tables, and a word on how far one seed can be trusted."""
    console.print(score_table(runs, class_names))
    console.print(cost_table(runs))
    seeds = sorted({run.config.seed for run in runs.values()})
    console.print(
        f"Seed {', '.join(map(str, seeds))}. From seed to seed the mean IoU of such short runs varies by a few "
        "points: try others with --seed before drawing conclusions."
    )


def write_json(runs: Runs, class_names: tuple[str, ...], path: Path) -> None:
    """Configurations, scores, costs and training curves of all runs."""
    content = finite({name: run.as_dict(class_names) for name, run in runs.items()})
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


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


def draw(runs: Runs, data: Splits, path: Path, count: int = 4) -> None:
    """A picture with one test image a row: the image, the truth, and the prediction of each run."""
    test = data.test
    chosen = telling_samples(test, count)
    titles = [
        "image",
        "truth",
        *(f"{name}\nmean IoU {_percent(run.test.mean_iou)} %" for name, run in runs.items()),
    ]
    figure, axes = plt.subplots(
        len(chosen), len(titles), figsize=(3.4 * len(titles), 2.6 * len(chosen) + 1.6), squeeze=False
    )
    seen: set[int] = set()
    for row, index in zip(axes, chosen, strict=True):
        image, label = test[index]
        predictions = [predict(run.network, image, run.config.device) for run in runs.values()]
        panels = [image, *(paint(classes, test.colours) for classes in (label, *predictions))]
        for axis, panel in zip(row, panels, strict=True):
            axis.imshow(panel, interpolation="nearest")
            axis.set_axis_off()
        seen.update(*(np.unique(classes).tolist() for classes in (label, *predictions)))
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=16)
    classes = [(*entry, k in seen) for k, entry in enumerate(zip(test.colours, test.class_names, strict=True))]
    entries = [*classes, (IGNORED_COLOUR, "ignored", IGNORE_INDEX in seen)]
    handles = [
        Patch(facecolor=f"#{red:02x}{green:02x}{blue:02x}", edgecolor="black", label=name)
        for (red, green, blue), name, shown in entries
        if shown
    ]
    figure.tight_layout(rect=(0, 1.0 / figure.get_figheight(), 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=min(5, len(handles)), fontsize=14, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
