"""What the study on CamVid found: a table, a picture, and Markdown, from the logs of its runs and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from .camvid import CLASS_NAMES, RARE
from .camvid_study import ARMS, BASELINE
from .intervals import Estimate, paired
from .markdown import markdown_table
from .study import read_runs

COLUMNS = ["mean", "rare", *CLASS_NAMES]  # of a table of differences
PICTURE = "differences.png"


def scores(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean IoU and every class's in %, one row a run; the index is (arm's title, seed)."""
    rows = [
        {
            "arm": run["title"],
            "seed": run["seed"],
            "mean": run["scores"]["clean"]["mean_iou"],
            **dict(zip(CLASS_NAMES, run["scores"]["clean"]["iou"], strict=True)),  # None for a class without pixels
        }
        for run in records
    ]
    return 100 * pd.DataFrame(rows).set_index(["arm", "seed"]).sort_index().astype(float)


def differences(found: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, dict[str, Estimate]]:
    """Of each arm minus the baseline, paired by seed: points of the mean, of the rare classes' mean, and of every class."""
    with_rare, base = (frame.assign(rare=frame[list(RARE)].mean(axis=1)) for frame in (found, baseline))
    arms = with_rare.groupby(level="arm", sort=False)
    pairs = {
        str(arm): {column: paired(runs.loc[arm, column], base[column]) for column in COLUMNS} for arm, runs in arms
    }
    return {arm: row for arm, row in pairs.items() if row["mean"].count}


def against_baseline(logs: dict[str, list[dict[str, Any]]], part: str) -> dict[str, dict[str, Estimate]] | None:
    """A part's arms minus cross-entropy, which the supervised part takes from the main one; None where it has no run."""
    baseline = logs["main" if part == "supervised" else part]
    if not any(run["arm"] == BASELINE for run in baseline):
        return None
    title = next(run["title"] for run in baseline if run["arm"] == BASELINE)
    found = scores(logs[part]).drop(index=title, level="arm", errors="ignore")
    return differences(found, scores(baseline).loc[title])


def read_logs(output: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs of each part."""
    return {part: read_runs(output / part / "runs.jsonl") for part in ARMS}


def report(output: Path) -> str:
    """Markdown of what the parts' logs hold: means over seeds, and differences to cross-entropy with 95 % intervals."""
    logs = read_logs(output)
    lines = ["# CamVid with a pretrained network", ""]
    if (output / PICTURE).exists():
        lines += [f"![Differences to cross-entropy, paired by seed, with 95 % intervals]({PICTURE})", ""]
    for part, records in logs.items():
        if not records:
            continue
        where = "validation" if part == "choices" else "test"
        found = scores(records).groupby(level="arm", sort=False)
        means = found.mean().round(2)
        means.insert(0, "seeds", found.size())
        lines += [
            f"## {part}: mean IoU on {where} images, in %",
            "",
            markdown_table(["arm", *means], means.astype(object).itertuples(name=None)),
            "",
        ]
        compared = against_baseline(logs, part)
        if compared is None:
            lines += ["Not compared yet: cross-entropy is of the part main, which has no run.", ""]
            continue
        rows = [
            [arm, row["mean"].count, *(pair.interval(2, "±") for pair in row.values())] for arm, row in compared.items()
        ]
        lines += [
            "Minus cross-entropy, paired by seed, in points (mean and 95 % interval, Student's t):",
            "",
            markdown_table(["arm", "seeds", *COLUMNS], rows),
            "",
        ]
    return "\n".join(lines)


def draw(output: Path) -> None:
    """``output``/differences.png: the test part's differences of the mean, the rare classes and every class."""
    import matplotlib

    matplotlib.use("Agg")  # draw into files; a machine without a display has no other backend
    from matplotlib import pyplot

    logs = read_logs(output)
    found = {
        arm: row
        for part in ("main", "supervised")
        if logs[part]
        for arm, row in (against_baseline(logs, part) or {}).items()
        if row["mean"].count > 1
    }
    if not found:
        return
    figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.28 * len(COLUMNS) * max(1, len(found) / 2)))
    names = {"mean": "mean of all classes", "rare": f"mean of {', '.join(RARE)}"}
    step = 0.7 / len(found)
    for number, (arm, row) in enumerate(found.items()):
        places = [place + step * (number - (len(found) - 1) / 2) for place in range(len(COLUMNS))]
        pairs = [row[column] for column in COLUMNS]
        axes.errorbar(
            [pair.mean for pair in pairs], places, xerr=[pair.half_width if pair.count > 1 else 0 for pair in pairs],
            fmt="o", capsize=2, label=f"{arm} ({row['mean'].count} seeds)",
        )  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axhline(1.5, color="#c0c0c0", linewidth=0.8)
    axes.set_yticks(range(len(COLUMNS)), [names.get(column, column) for column in COLUMNS])
    axes.invert_yaxis()
    axes.set_xlabel("points of IoU above cross-entropy alone, test images")
    axes.legend(loc="best")
    figure.savefig(output / PICTURE, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
