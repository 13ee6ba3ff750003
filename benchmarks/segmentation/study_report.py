"""The study's report: Markdown from the log of runs, and from nothing else; its prose is in study_report_template.md."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from .intervals import Estimate, estimate
from .markdown import fill_in, markdown_table
from .stress import CONDITIONS
from .study import ARMS, PLANS, TARGETS

BASELINE = "cross_entropy"
STRESS_MEAN = "mean of the stress tests"
STRESSED = ["clean", *CONDITIONS, STRESS_MEAN]
OWN = {style: f"{style}, own statistics" for style in ("clean", *TARGETS)}
WORDS = {target: target.replace("_", " ") for target in TARGETS}
TITLES = {arm.name: arm.title for arm in ARMS}
FULL_TITLES = {arm.name: f"{arm.title}, {WORDS[arm.target]}" if arm.target else arm.title for arm in ARMS}
TARGET_TITLES = {
    "shaded_relief": "The shaded relief",
    "halfway": "Halfway: the mean of Blue Marble and shaded relief, pixel by pixel",
}
CAPTIONS = {
    "classes.png": "IoU of every class, clean test images; bars are means, lines standard deviations over seeds",
    "differences.png": "Differences to cross-entropy, paired by seed, with 95 % intervals; styles with own statistics",
    "curves.png": "Training curves, means over seeds",
    "source.png": "Test tiles of the source style, seed 0; chosen by their labels alone",
    "shaded_relief.png": "Test tiles of the shaded relief, seed 0, with its batch statistics",
    "halfway.png": "Test tiles halfway between the styles, seed 0, with their batch statistics",
    "embeddings.png": "Pixel embeddings of test tiles, seed 0, on their first two principal components",
}

Record = dict[str, Any]  # a line of the log


def score_table(records: list[Record]) -> pd.DataFrame:
    """Mean IoU in %: a row for each seed, a column for each (condition, arm) of the study; NaN where there is none."""
    rows = {}
    for run in records:
        row = {condition: 100 * found["mean_iou"] for condition, found in run["scores"].items()}
        if CONDITIONS.keys() <= row.keys():
            row[STRESS_MEAN] = fmean(row[condition] for condition in CONDITIONS)
        rows[run["seed"], run["arm"]] = row
    columns = pd.MultiIndex.from_product([[*STRESSED, *TARGETS, *OWN.values()], TITLES])
    return pd.DataFrame.from_dict(rows, orient="index").unstack().reindex(columns=columns)


def class_table(records: list[Record]) -> pd.DataFrame:
    """IoU of every class on clean images: a row for each (arm, seed); NaN for a class without pixels."""
    columns = {(run["arm"], run["seed"]): run["scores"]["clean"]["iou"] for run in records}
    return pd.DataFrame(columns, index=records[0]["class_names"], dtype=float).T


def difference(scores: pd.DataFrame, arm: str, baseline: str | None, condition: str) -> Estimate:
    """In points of mean IoU, paired by seed; of no seed where there is nothing to compare with."""
    return estimate(scores[condition, arm] - scores[condition, baseline] if baseline else [])


def _cell(form: str, *values: float) -> str:
    return "-" if pd.isna(values[0]) else form.format(*values)


def _score(scores: pd.Series) -> str:
    return estimate(scores).spread()


def _class_mean(ious: pd.Series) -> str:
    known = ious.dropna().tolist()
    return f"{100 * sum(known) / len(known):.1f}" if known else "-"


def _compared(arm: str, scores: pd.Series, gain: Estimate) -> list[Any]:
    return [TITLES[arm], scores.count(), _score(scores), gain.interval(), gain.verdict]


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    return markdown_table(head, rows, "---:")


class Report:
    """The parts of the report; the differences that its tables show are kept, to be counted."""

    def __init__(self, records: list[Record]):
        self.runs = pd.DataFrame(records).drop_duplicates(["arm", "seed"], keep="last").set_index("arm")
        self.configs = self.runs["config"].groupby("arm").first()
        self.arms = {
            plan: [arm.name for arm in ARMS if arm.plan == plan and arm.name in self.configs] for plan in PLANS
        }
        self.scores = score_table(records)
        self.means = self.scores.apply(_score).unstack()  # a row for each condition, a column for each arm
        self.judged: dict[str, Estimate] = {}

    def judge(self, what: str, arm: str, baseline: str | None, condition: str, seeds: Any = slice(None)) -> Estimate:
        """A difference that a table shows."""
        found = self.judged[what] = difference(self.scores.loc[seeds], arm, baseline, condition)
        return found

    def headlines(self) -> str:
        """What ProAC does where it was meant to help, whatever came out."""
        conditions = ("clean", STRESS_MEAN)
        asked = [(f"ProAC beside cross-entropy, {name}", "proac", BASELINE, name) for name in conditions]
        trainings = {
            "self_training": "self-training",
            "confident": "self-training with confidence weights",
            "class_mix": "self-training with class-mix",
        }
        for target, (name, title) in product(TARGETS, trainings.items()):
            arm, words, own = f"{target}-{name}", WORDS[target], OWN[target]
            asked.append((f"{title} beside source only, {words}", arm, BASELINE, own))
            asked.append((f"ProAC in {title}, {words}", f"{arm}_proac", arm, own))
        found = [(what, difference(self.scores, *between)) for what, *between in asked]
        return "\n".join(
            f"- {what}: {gain.interval()} points ({gain.count} seed{'s' * (gain.count > 1)}): {gain.verdict}"
            for what, gain in found
            if gain.count
        )

    def findings(self) -> dict[str, Any]:
        """What was found to differ, and what was not; every difference in the tables is counted, if it has an interval."""
        judged = {what: found for what, found in self.judged.items() if found.count > 1}
        lines = [
            f"- {verdict}: {what}, {found.interval()}"
            for verdict, (what, found) in product(("higher", "lower"), judged.items())
            if found.verdict == verdict
        ]
        rest = f"- no measurable difference: the other {len(judged) - len(lines)}, listed in the tables"
        counts = {"judged": len(judged), "clear": len(lines), "chance": len(judged) / 20}
        return counts | {"findings": "\n".join([*lines, rest])}

    def supervised(self, ious: pd.DataFrame) -> dict[str, str]:
        """Losses on clean images of the source style, and the same networks on changed ones."""
        arms = self.arms["supervised"]
        others = [arm for arm in arms if arm != BASELINE]
        gains = {
            (condition, arm): self.judge(f"{TITLES[arm]} against CE, {condition}", arm, BASELINE, condition)
            for condition, arm in product(STRESSED, others)
        }
        rows = [_compared(arm, self.scores["clean", arm], gains.get(("clean", arm), estimate([]))) for arm in arms]
        classes = ious.groupby(level=0).agg(_class_mean).loc[arms].rename(TITLES)
        means = self.means.loc[STRESSED, arms].rename(columns=TITLES)
        differences = [[name, *(gains[name, arm].interval() for arm in others)] for name in STRESSED]
        return {
            "supervised": _table(["loss", "seeds", "test mIoU", "against CE", "verdict"], rows),
            "classes": _table(["loss", *classes], classes.itertuples(name=None)),
            "stress": _table(["test images", *means], means.itertuples(name=None)),
            "stress_differences": _table(["test images", *map(TITLES.get, others)], differences),
        }

    def adaptation(self, target: str) -> str:
        """Scores in a target style; every network gets the target's batch statistics, which need no label."""
        arms = [arm for arm in self.arms["adaptation"] if arm.startswith(f"{target}-")]
        if not arms:
            return ""
        own = OWN[target]
        titles = TITLES | {BASELINE: "source only", "proac": "source only + ProAC"}
        plain = {"proac": BASELINE} | {arm: arm.removesuffix("_proac") for arm in arms if arm.endswith("_proac")}
        rows = []
        for arm in [BASELINE, *(["proac"] if "proac" in self.configs else []), *arms]:
            what, words = f"{titles[arm]} against", WORDS[target]
            gain = self.judge(f"{what} source only, {words}", arm, BASELINE if arm in arms else None, own)
            of_proac = self.judge(f"{what} without ProAC, {words}", arm, plain.get(arm), own)
            scores = self.means.loc[[OWN["clean"], target, own], arm]
            rows.append([titles[arm], self.scores[own, arm].count(), *scores, gain.interval(), of_proac.interval()])
        scored = ["source, own statistics", "target", "target, own statistics"]
        head = ["training", "seeds", *scored, "against source only", "against the same without ProAC"]
        ends = self.runs["curves"].map(lambda curves: curves.get("pseudo_label_accuracy", [math.nan])[-1])
        right = "; ".join(f"{TITLES[arm]} {100 * sum(ends[[arm]]) / ends[[arm]].size:.0f} %" for arm in arms)
        text = f"Right among the pseudo labels that were kept, at the end: {right}."
        return f"### {TARGET_TITLES[target]}\n\n{_table(head, rows)}\n\n{text}"

    def ablations(self) -> str:
        """One option of ProAC changed at a time, with the seeds of these runs alone."""
        clean = self.scores["clean"].dropna(how="all", subset=self.arms["ablation"])
        rows = [["CE + ProAC (the base)", clean["proac"].count(), _score(clean["proac"]), "", ""]]
        for arm in [*(["sampled"] if "sampled" in self.configs else []), *self.arms["ablation"]]:
            what = f"{TITLES[arm]} against the base of the ablations, clean"
            rows.append(_compared(arm, clean[arm], self.judge(what, arm, "proac", "clean", clean.index)))
        return _table(["change", "seeds", "test mIoU", "against the base", "verdict"], rows)

    def costs(self) -> dict[str, Any]:
        """Iterations and processor time as the runs noted them, and how to get every run again."""
        runs = pd.DataFrame(
            {
                "steps": [config["iterations"] for config in self.runs["config"]],
                "seconds": self.runs["cpu_seconds"],
                "share": 100 * self.runs["proac_seconds"].astype(float) / self.runs["step_seconds"],
                "memory": [
                    memory["peak"] / 2**20 if memory else math.nan for memory in self.runs["proac_memory_bytes"]
                ],
            }
        ).groupby("arm")
        steps, medians = runs["steps"].first(), runs[["seconds", "share", "memory"]].median()
        forms = ("{:.0f} s", "{:.1f} %", "{:.1f} MiB")
        cost, commands = [], []
        for arm in (arm for plan in PLANS for arm in self.arms[plan]):
            cost.append([FULL_TITLES[arm], steps[arm], *map(_cell, forms, medians.loc[arm])])
            seeds = " ".join(map(str, sorted(self.runs.loc[[arm], "seed"])))
            commands.append([FULL_TITLES[arm], f"`study --arms {arm} --seeds {seeds}`"])
        return {
            "longer": steps.get("longer", 1) / steps.get(BASELINE, 1),
            "cost": _table(["arm", "steps", "processor time", "ProAC, share of a step", "memory in ProAC"], cost),
            "commands": _table(["arm", "command"], commands),
        }


def report_text(records: list[Record], pictures: list[str]) -> str:
    """The report of a log that is not empty."""
    report = Report(records)
    config = report.configs.get(BASELINE, records[0]["config"])
    adapted = next((report.configs[arm] for arm in report.arms["adaptation"]), config)
    parts = {
        "runs": len(records),
        "config": config,
        "widths": ", ".join(map(str, config["widths"])),
        "weight": f"{report.configs['proac']['proac_weight']:g}" if "proac" in report.configs else "-",
        "headlines": report.headlines(),
        **report.supervised(class_table(records)),
        "momentum": adapted["teacher_momentum"],
        "keep": 100 * adapted["keep_share"],
        "start": 100 * adapted["adapt_from"],
        "adaptation": "\n\n".join(map(report.adaptation, TARGETS)) if report.arms["adaptation"] else None,
        "ablations": report.ablations() if report.arms["ablation"] else None,
        **report.costs(),
        "pictures": "\n\n".join(f"![{CAPTIONS[name]}]({name})\n\n{CAPTIONS[name]}." for name in pictures) or None,
        "commits": ", ".join(sorted({run["commit"][:10] for run in records})),
        "threads": ", ".join(map(str, sorted({run["threads"] for run in records}))),
    }
    template = Path(__file__).with_name("study_report_template.md").read_text(encoding="utf-8")
    return fill_in(template, parts | report.findings())  # which come last, since they count what the others show
