"""The study's pictures, from the log of runs and the samples kept beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .climate import load_climate
from .figures import difference_lines
from .report import prediction_grid
from .stress import CONDITIONS
from .study import CURVE_EVERY, SOURCE, TARGETS
from .study_report import BASELINE, FULL_TITLES, OWN, TITLES, WORDS, Record, class_table, difference, score_table

Samples = dict[str, dict[str, np.ndarray]]  # by arm

GREY, BLUE = "#8a8f98", "#0b5fa5"
ARM_COLOURS = {
    BASELINE: GREY, "proac": BLUE, "twin": "#d9822b", "sampled": "#2e8540", "class_weighted": "#7a4fa3", "longer": "#b0413e",
}  # fmt: skip


def read_samples(folder: Path) -> Samples:
    """What the first seed's runs kept for the pictures; nothing where the folder is missing."""
    found: Samples = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as content:
            found[path.stem] = dict(content)
    return found


def drawn(records: list[Record], samples: Samples) -> dict[str, Callable[[], Figure]]:
    """The pictures for which there are data, in the order of the report: what draws each, by file name."""
    scores = score_table(records)
    pictures: dict[str, Callable[[], Figure]] = {}
    if scores["clean", BASELINE].notna().any():
        pictures["classes.png"] = partial(class_bars, class_table(records))
        if difference(scores, "proac", BASELINE, "clean").count > 1:
            pictures["differences.png"] = partial(condition_differences, scores)
        pictures["curves.png"] = partial(training_curves, records)
    grids = {"source": (SOURCE, "clean", {arm: TITLES[arm] for arm in (BASELINE, "proac", "twin")})}
    for target in TARGETS:
        adapted = {arm: TITLES[arm] for arm in (f"{target}-self_training", f"{target}-self_training_proac")}
        grids[target] = (target, target, {BASELINE: "source only", **adapted})
    for name, (style, key, titles) in grids.items():
        if samples.keys() >= titles.keys():
            pictures[f"{name}.png"] = partial(predictions, style, key, titles, samples)
    if all("embeddings" in samples.get(arm, {}) for arm in (BASELINE, "proac")):
        pictures["embeddings.png"] = partial(projection, records[0]["class_names"], samples)
    return pictures


def class_bars(ious: pd.DataFrame) -> Figure:
    """IoU of every class, one bar for each supervised arm."""
    arms = [arm for arm in ARM_COLOURS if arm in ious.index]
    by_arm = (100 * ious.loc[arms]).rename(TITLES).groupby(level=0, sort=False)
    figure, axis = plt.subplots(figsize=(10, 3.6), layout="constrained")
    colours = [ARM_COLOURS[arm] for arm in arms]
    bars = {"yerr": by_arm.std().T, "error_kw": {"lw": 0.8, "ecolor": "#333333"}, "color": colours, "width": 0.84}
    by_arm.mean().T.plot.bar(ax=axis, rot=0, legend=False, **bars)
    axis.set(ylabel="IoU in %", ylim=(0, 100))
    axis.grid(visible=False, axis="x")
    figure.legend(ncols=3, loc="outside lower center")
    return figure


def condition_differences(scores: pd.DataFrame) -> Figure:
    """ProAC, sampled negatives and its twin minus cross-entropy under every condition, with intervals."""
    labels = {name: name for name in ("clean", *CONDITIONS)}
    labels |= {OWN[target]: f"{WORDS[target]} style" for target in TARGETS}
    arms = [arm for arm in ("proac", "sampled", "twin") if scores["clean", arm].notna().any()]
    found = {TITLES[arm]: [difference(scores, arm, BASELINE, condition) for condition in labels] for arm in arms}
    xlabel = "test mIoU minus that of cross-entropy, in points"
    return difference_lines(found, list(labels.values()), xlabel, [ARM_COLOURS[arm] for arm in arms])


def training_curves(records: list[Record]) -> Figure:
    """Cross-entropy and ProAC while training, and how many pseudo labels are right."""
    ran = {run["arm"] for run in records}
    looks = {arm: {"color": colour} for arm, colour in ARM_COLOURS.items()}
    for target, line in zip(TARGETS, ("-", "--"), strict=True):
        looks[f"{target}-self_training"] = {"color": GREY, "ls": line}
        looks[f"{target}-self_training_proac"] = {"color": BLUE, "ls": line}
    panels = {
        "cross_entropy": ("cross-entropy", [BASELINE, "proac", "twin"]),
        "proac": ("contrastive loss, before its weight", ["proac", "sampled", "twin"]),
        "pseudo_label_accuracy": ("right among kept pseudo labels", [arm for arm in looks if "self_training" in arm]),
    }
    if not any(arm in ran for arm in panels["pseudo_label_accuracy"][1]):
        del panels["pseudo_label_accuracy"]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.7 * len(panels), 3.2), layout="constrained")
    for axis, (field, (title, arms)) in zip(axes, panels.items(), strict=True):
        for arm in filter(ran.__contains__, arms):
            curves = pd.DataFrame([run["curves"][field] for run in records if run["arm"] == arm], dtype=float)
            mean = curves.mean(skipna=False).dropna()
            axis.plot((mean.index + 0.5) * CURVE_EVERY, mean, lw=1.5, label=FULL_TITLES[arm], **looks[arm])
        axis.set(title=title, xlabel="step", ylim=(0, 1 if field == "pseudo_label_accuracy" else None))
        if axis.lines:
            axis.legend(fontsize=7.5)
    return figure


def predictions(style: str, key: str, titles: dict[str, str], samples: Samples) -> Figure:
    """Test tiles of a style, and what the arms with these titles predict."""
    chosen = sorted(int(name.rpartition("_")[2]) for name in samples[BASELINE] if name.startswith(f"{key}_"))
    columns = {title: lambda index, arm=arm: samples[arm][f"{key}_{index}"] for arm, title in titles.items()}
    return prediction_grid(load_climate(style).test, chosen, columns)


def projection(class_names: list[str], samples: Samples) -> Figure:
    """Normalised embeddings and prototypes on the first two principal components of the embeddings."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    colours = np.array(load_climate(SOURCE).test.colours) / 255
    titles = {BASELINE: "CE: feature map", "proac": "CE + ProAC: embeddings, prototypes"}
    for axis, (arm, title) in zip(axes, titles.items(), strict=True):
        x, classes = samples[arm]["embeddings"].astype(np.float32), samples[arm]["classes"]
        centre = x.mean(0)
        _, values, basis = np.linalg.svd(x - centre, full_matrices=False)
        share = (values[:2] ** 2).sum() / (values**2).sum()
        for k, name in enumerate(class_names):
            points = (x[classes == k] - centre) @ basis[:2].T
            axis.scatter(*points.T, s=9, color=colours[k], edgecolor="#555555", lw=0.15, label=name)
            if "prototypes" in samples[arm]:
                anchor = (samples[arm]["prototypes"][k] - centre) @ basis[:2].T
                axis.scatter(*anchor, s=130, marker="*", color=colours[k], edgecolor="black", lw=1.0, zorder=3)
        axis.set(title=f"{title}\n{100 * share:.0f} % of the variance", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_aspect("equal", "datalim")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), markerscale=2)
    return figure
