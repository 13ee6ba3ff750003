"""What the study on CamVid found: a table, a picture, and Markdown, from the logs of its runs and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from .camvid import CLASS_NAMES, RARE
from .camvid_study import ADAPTATION, ARMS, BASELINE, BASELINE_PART, ON_VALIDATION, SEEDS, SOURCE_ONLY, TARGET
from .figures import difference_lines, draw_all
from .intervals import Estimate, estimate, paired
from .markdown import markdown_table
from .stress import CONDITIONS
from .study import read_runs

PICTURE = "differences.png"
PICTURED = "main", "chosen", "supervised"
PROBES = {"gradient_ratio": "gradients", "own": "own pixels", "hardest": "hardest other"}


def scores(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean IoU in %, of the rare classes, of every class, and on validation images, one row a run: (arm's title, seed)."""
    rows = {
        (run["title"], run["seed"]): {
            "mean": run["scores"]["clean"]["mean_iou"],
            **dict(zip(CLASS_NAMES, run["scores"]["clean"]["iou"], strict=True)),  # None for a class without pixels
            "validation": run["validation"],
        }
        for run in records
    }
    table = 100 * pd.DataFrame.from_dict(rows, orient="index").astype(float)
    table.index = pd.MultiIndex.from_tuples(rows, names=["arm", "seed"])
    table.insert(1, "rare", table[list(RARE)].mean(axis=1))
    return table


def differences(found: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, dict[str, Estimate]]:
    """Of each arm minus the baseline, paired by seed: points of each column, for arms with a seed of the baseline."""
    pairs = {
        str(arm): {str(column): paired(runs.loc[arm, column], baseline[column]) for column in found}
        for arm, runs in found.groupby(level="arm", sort=False)
    }
    return {arm: row for arm, row in pairs.items() if row["mean"].count}


def against_baseline(logs: dict[str, list[dict[str, Any]]], part: str) -> dict[str, dict[str, Estimate]]:
    """A part's arms minus cross-entropy, which some parts take from the main one; none where it has no run."""
    baseline = [run for run in logs[BASELINE_PART.get(part, part)] if run["arm"] == BASELINE]
    others = [run for run in logs[part] if run["arm"] != BASELINE]
    if not baseline or not others:
        return {}
    return differences(scores(others), scores(baseline).droplevel("arm"))


def read_logs(output: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs of each part."""
    return {part: read_runs(output / part / "runs.jsonl") for part in ARMS}


def report(output: Path) -> str:
    """Markdown of what the parts' logs hold: means over seeds, and differences to cross-entropy with 95 % intervals."""
    logs = read_logs(output)
    lines = [
        "# CamVid with a pretrained network",
        "",
        "Mean IoU in %, mean and standard deviation over seeds; differences to cross-entropy are paired by seed, in points,",
        f"with their 95 % interval (Student's t). Rare classes are {', '.join(RARE)}. The protocol is in `camvid_protocol.md`.",
        "",
    ]
    for part, records in logs.items():
        if records and part in ADAPTATION:
            lines += _adaptation(part, records)
        elif records:
            lines += _part(part, scores(records), against_baseline(logs, part))
            if part == "stress":
                lines += _stress(logs)
            lines += _probes(records)
            if part == "main" and (output / PICTURE).exists():
                lines += [f"![Differences to cross-entropy, paired by seed, with 95 % intervals]({PICTURE})", ""]
    return "\n".join(lines)


def _part(part: str, found: pd.DataFrame, compared: dict[str, dict[str, Estimate]]) -> list[str]:
    none = dict.fromkeys(found, estimate([]))
    where = "validation" if part in ON_VALIDATION else "test"
    rows, classes = [], []
    for arm, runs in found.groupby(level="arm", sort=False):
        gain = compared.get(str(arm), none)
        mean, rare = (estimate(runs[column]) for column in ("mean", "rare"))
        cells = [mean.spread(2), gain["mean"].interval(2), gain["mean"].verdict]
        others = [rare.spread(2), gain["rare"].interval(2), gain["validation"].interval(2)]
        rows.append([arm, mean.count, *cells, *others[: 2 if part in ON_VALIDATION else 3]])
        classes.append([arm, *(estimate(runs[name]).value(1) for name in CLASS_NAMES)])
        if gain is not none:
            classes.append(["... against CE", *(gain[name].interval(1) for name in CLASS_NAMES)])
    head = ["loss", "seeds", f"{where} mIoU", "against CE", "verdict", "rare classes", "against CE"]
    head += [] if part in ON_VALIDATION else ["validation, against CE"]
    missing = [] if compared else ["Not compared yet: cross-entropy is of the part main, which has no run.", ""]
    return [
        f"## {part}",
        "",
        *missing,
        *_unfinished(part, found),
        markdown_table(head, rows, "---:"),
        "",
        "IoU of every class:",
        "",
        markdown_table(["loss", *CLASS_NAMES], classes, "---:"),
        "",
    ]


def _unfinished(part: str, found: pd.DataFrame) -> list[str]:
    planned = {(arm.title, seed) for arm in ARMS[part] for seed in SEEDS[part]}
    done = planned.intersection(found.index)
    if done == planned:
        return []
    return [f"Not finished, and nothing follows from it yet: {len(done)} of {len(planned)} runs.", ""]


def _condition_scores(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean IoU in %, a column for each condition or domain, one row a run: (arm's title, seed)."""
    rows = {
        (run["title"], run["seed"]): {name: score["mean_iou"] for name, score in run["scores"].items()}
        for run in records
    }
    table = 100 * pd.DataFrame.from_dict(rows, orient="index").astype(float)
    table.index = pd.MultiIndex.from_tuples(rows, names=["arm", "seed"])
    return table


def _adaptation(part: str, records: list[dict[str, Any]]) -> list[str]:
    """Scores by day and at dusk; the differences are of networks with the target's batch statistics, which need no label."""
    found, own = _condition_scores(records), f"{TARGET}, own statistics"
    titles = {arm.name: arm.title for arm in ARMS[part]}
    arms = [name for name, title in titles.items() if title in found.index]

    def gain(arm: str, other: str) -> str:
        if arm == other or other not in arms:
            return "-"
        return paired(found.loc[titles[arm], own], found.loc[titles[other], own]).interval(2)

    rows = []
    for arm in arms:
        runs = found.loc[titles[arm]]
        scored = (estimate(runs[column]).spread(2) for column in ("clean", TARGET, own))
        rows.append([titles[arm], len(runs), *scored, gain(arm, SOURCE_ONLY), gain(arm, arm.removesuffix("_proac"))])
    where = "validation" if part in ON_VALIDATION else "test"
    head = ["training", "seeds", f"day, {where}", f"dusk, {where}", "with dusk's statistics", "against source only"]
    return [
        f"## {part}",
        "",
        *_unfinished(part, found),
        markdown_table([*head, "against the same without ProAC"], rows, "---:"),
        "",
    ]


def _stress(logs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Every loss whose networks saw the changed test images, minus the cross-entropy that did."""
    table = _condition_scores([*logs["stress"], *logs["supervised"]])
    table["mean"] = table[list(CONDITIONS)].mean(axis=1)
    title = next(arm.title for arm in ARMS["stress"] if arm.name == BASELINE)
    if title not in table.index:
        return []
    baseline = table.loc[title]
    found = differences(table.drop(title, level="arm"), baseline)
    rows = [
        [
            "mean of the eight changes" if name == "mean" else name,
            estimate(baseline[name]).spread(2),
            *(row[name].interval(2) for row in found.values()),
        ]
        for name in table
    ]
    return [
        "Changed test images, mean IoU; of the other losses (with seeds) the difference to cross-entropy:",
        "",
        markdown_table(
            ["test images", title, *(f"{arm} ({row['mean'].count})" for arm, row in found.items())], rows, "---:"
        ),
        "",
    ]


def _probes(records: list[dict[str, Any]]) -> list[str]:
    """Of the arms that were looked at during training: means over seeds, a row for each step."""
    found = [{"arm": run["title"], **probe} for run in records for probe in run.get("probes", [])]
    if not found:
        return []
    means = pd.DataFrame(found).groupby(["step", "arm"], sort=False).mean().unstack("arm")
    head = ["before step", *(f"{PROBES[quantity]}, {arm}" for quantity, arm in means)]
    rows = [[step, *(f"{value:.2f}" for value in row)] for step, *row in means.itertuples()]
    told = (
        "norm of ProAC's gradient over cross-entropy's; cosine with the prototype of own and of the hardest other pixel"
    )
    return [f"During training, means over seeds: {told}.", "", markdown_table(head, rows, "---:"), ""]


def draw(output: Path) -> None:
    """``output``/differences.png: the test part's differences of the mean, the rare classes and every class."""
    logs = read_logs(output)
    found = {
        f"{arm} ({row['mean'].count} seeds)": [row[column] for column in ("mean", "rare", *CLASS_NAMES)]
        for part in PICTURED
        for arm, row in against_baseline(logs, part).items()
        if row["mean"].count > 1
    }
    if found:
        names = ["mean of all classes", f"mean of {', '.join(RARE)}", *CLASS_NAMES]
        xlabel = "points of IoU above cross-entropy alone, test images"
        draw_all({PICTURE: lambda: difference_lines(found, names, xlabel)}, output)
