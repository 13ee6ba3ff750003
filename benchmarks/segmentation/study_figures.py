"""The study's pictures, from the log of runs and the samples kept beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from .climate import load_climate
from .data import SegmentationDataset
from .report import paint
from .stress import CONDITIONS
from .study import ARMS, CURVE_EVERY, SOURCE, TARGETS
from .study_report import ByArm, by_arm, difference

matplotlib.use("Agg")  # draw into files; a machine without a display has no other backend
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

Samples = dict[str, dict[str, np.ndarray]]  # by arm

GREY, COLOURS = "#8a8f98", ("#0b5fa5", "#d9822b", "#2e8540", "#7a4fa3", "#b0413e")
ARM_COLOURS = {
    "cross_entropy": GREY,
    **dict(zip(("proac", "twin", "sampled", "class_weighted", "longer"), COLOURS, strict=True)),
}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 90,
}


def read_samples(folder: Path) -> Samples:
    """What the first seed's runs kept for the pictures; nothing where the folder is missing."""
    found: Samples = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as content:
            found[path.stem] = dict(content)
    return found


def drawn(records: list[dict[str, Any]], samples: Samples) -> dict[str, Callable[[], Figure]]:
    """The pictures for which there are data, in the order of the report: what draws each, by file name."""
    runs = by_arm(records)
    pictures: dict[str, Callable[[], Figure]] = {}
    if "cross_entropy" in runs:
        pictures["classes.png"] = lambda: class_bars(runs)
        if (found := difference(runs, "proac", "cross_entropy", "clean")) is not None and found.count > 1:
            pictures["differences.png"] = lambda: difference_lines(runs)
        pictures["curves.png"] = lambda: training_curves(runs)
    rows = {SOURCE: ("source.png", ("cross_entropy", "proac", "twin"), "clean")}
    for target in TARGETS:
        arms = ("cross_entropy", f"{target}-self_training", f"{target}-self_training_proac")
        rows[target] = (f"{target}.png", arms, target)
    for style, (name, arms, key) in rows.items():
        if all(arm in samples for arm in arms):
            pictures[name] = lambda style=style, arms=arms, key=key: prediction_grid(style, arms, key, samples)
    if all("embeddings" in samples.get(arm, {}) for arm in ("cross_entropy", "proac")):
        pictures["embeddings.png"] = lambda: projection(records[0]["class_names"], samples)
    return pictures


def draw_all(pictures: dict[str, Callable[[], Figure]], folder: Path) -> None:
    """Write the pictures as PNG files of few colours, since they are kept beside the source."""
    for name, draw in pictures.items():
        with plt.rc_context(STYLE):
            figure = draw()
            figure.savefig(folder / name, bbox_inches="tight")
            plt.close(figure)
        with Image.open(folder / name) as image:  # of the methods, this one keeps the rare colours of thin lines
            few = image.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(folder / name, optimize=True)


def _title(name: str) -> str:
    return next(arm.title for arm in ARMS if arm.name == name)


def class_bars(runs: ByArm) -> Figure:
    """IoU of every class, one bar for each supervised arm."""
    names = next(iter(runs["cross_entropy"].values()))["class_names"]
    arms = [name for name in ARM_COLOURS if name in runs]
    figure, axis = plt.subplots(figsize=(10, 3.6), layout="constrained")
    width = 0.84 / len(arms)
    for number, arm in enumerate(arms):
        ious = np.array([run["scores"]["clean"]["iou"] for run in runs[arm].values()], float) * 100
        means, deviations = np.nanmean(ious, 0), np.nanstd(ious, 0, ddof=1) if len(ious) > 1 else None
        at = np.arange(len(names)) + (number - (len(arms) - 1) / 2) * width
        bars = {"color": ARM_COLOURS[arm], "label": _title(arm), "error_kw": {"lw": 0.8, "ecolor": "#333333"}}
        axis.bar(at, means, 0.92 * width, yerr=deviations, **bars)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("IoU in %")
    axis.set_ylim(0, 100)
    axis.grid(axis="y", color="#e3e3e3")
    axis.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    return figure


def difference_lines(runs: ByArm) -> Figure:
    """ProAC, its twin and sampled negatives minus cross-entropy under every condition, with intervals."""
    conditions = ["clean", *CONDITIONS, *(f"{target}, own statistics" for target in TARGETS)]
    labels = [*conditions[: -len(TARGETS)], *(f"{target.replace('_', ' ')} style" for target in TARGETS)]
    arms = [arm for arm in ("proac", "sampled", "twin") if arm in runs]
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for number, arm in enumerate(arms):
        found = [difference(runs, arm, "cross_entropy", condition) for condition in conditions]
        places = [
            (row + 0.22 * (number - (len(arms) - 1) / 2), item) for row, item in enumerate(found) if item is not None
        ]
        axis.errorbar(
            [item.mean for _, item in places],
            [row for row, _ in places],
            xerr=[item.half_width if item.count > 1 else 0.0 for _, item in places],
            fmt="o",
            markersize=4,
            lw=1.4,
            capsize=2,
            color=ARM_COLOURS[arm],
            label=_title(arm),
        )
    axis.axvline(0, color="#333333", lw=0.9)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.grid(axis="x", color="#e3e3e3")
    axis.set_xlabel("test mIoU minus that of cross-entropy, in points")
    axis.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.1))
    return figure


def training_curves(runs: ByArm) -> Figure:
    """Cross-entropy and ProAC while training, and how many pseudo labels are right."""
    adapted = [arm for arm in ARMS if arm.plan == "adaptation" and arm.name in runs]
    figure, axes = plt.subplots(1, 3 if adapted else 2, figsize=(11 if adapted else 7.5, 3.2), layout="constrained")

    def line(axis: Any, arm: str, field: str, **options: Any) -> None:
        curves = [run["curves"][field] for run in runs[arm].values()]
        values = np.array([[np.nan if v is None else v for v in curve] for curve in curves], float)
        kept = np.isfinite(values).all(0)
        steps = (np.arange(values.shape[1]) + 0.5) * CURVE_EVERY
        axis.plot(steps[kept], values.mean(0)[kept], lw=1.5, **options)

    for arm in ("cross_entropy", "proac", "twin"):
        if arm in runs:
            line(axes[0], arm, "cross_entropy", color=ARM_COLOURS[arm], label=_title(arm))
    for arm in ("proac", "sampled", "twin"):
        if arm in runs:
            line(axes[1], arm, "proac", color=ARM_COLOURS[arm], label=_title(arm))
    axes[0].set_title("cross-entropy")
    axes[1].set_title("contrastive loss, before its weight")
    if adapted:
        for arm in adapted:
            colour = COLOURS[0] if arm.name.endswith("proac") else GREY
            dashes = "-" if arm.target == TARGETS[0] else "--"
            if "confident" not in arm.name:
                label = f"{arm.title}, {str(arm.target).replace('_', ' ')}"
                line(axes[2], arm.name, "pseudo_label_accuracy", color=colour, ls=dashes, label=label)
        axes[2].set_title("right among kept pseudo labels")
        axes[2].set_ylim(0, 1)
    for axis in axes:
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(color="#e3e3e3")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7.5)
    return figure


def prediction_grid(style: str, arms: tuple[str, ...], key: str, samples: Samples) -> Figure:
    """One test tile a row: image, truth, and what the arms predict."""
    test: SegmentationDataset = load_climate(style).test
    chosen = sorted(int(name.rpartition("_")[2]) for name in samples[arms[0]] if name.startswith(f"{key}_"))
    titles = [
        "image",
        "truth",
        *("source only" if key != "clean" and i == 0 else _title(a) for i, a in enumerate(arms)),
    ]
    size = (2.3 * len(titles), 1.75 * len(chosen) + 0.7)
    figure, axes = plt.subplots(len(chosen), len(titles), figsize=size, layout="constrained", squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        image, label = test[index]
        maps = [paint(classes, test.colours) for classes in (label, *(samples[arm][f"{key}_{index}"] for arm in arms))]
        for axis, panel in zip(row, [image, *maps], strict=True):
            axis.imshow(panel, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    handles = [
        Patch(facecolor=np.array(colour) / 255, edgecolor="black", lw=0.5, label=name)
        for name, colour in zip(test.class_names, test.colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def projection(class_names: list[str], samples: Samples) -> Figure:
    """Normalised embeddings and prototypes on the first two principal components of the embeddings."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    colours = load_climate(SOURCE).test.colours
    titles = {"cross_entropy": "CE: feature map", "proac": "CE + ProAC: embeddings, prototypes"}
    for axis, (arm, title) in zip(axes, titles.items(), strict=True):
        x, classes = torch.from_numpy(samples[arm]["embeddings"]).float(), samples[arm]["classes"]
        centre = x.mean(0)
        _, values, basis = torch.linalg.svd(x - centre, full_matrices=False)
        share = values[:2].square().sum() / values.square().sum()
        flat = ((x - centre) @ basis[:2].T).numpy()
        for k, name in enumerate(class_names):
            members = classes == k
            colour = np.array(colours[k]) / 255
            axis.scatter(*flat[members].T, s=9, color=colour, edgecolor="#555555", lw=0.15, label=name, rasterized=True)
            if "prototypes" in samples[arm]:
                anchor = ((torch.from_numpy(samples[arm]["prototypes"][k]) - centre) @ basis[:2].T).numpy()
                axis.scatter(*anchor, s=130, marker="*", color=colour, edgecolor="black", lw=1.0, zorder=3)
        axis.set_title(f"{title}\n{100 * share:.0f} % of the variance")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_aspect("equal", "datalim")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), markerscale=2)
    return figure
