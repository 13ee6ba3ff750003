"""The study's report: Markdown from the log of runs, and from nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

from .intervals import Estimate, estimate, paired
from .stress import CONDITIONS
from .study import ARMS, PLANS, TARGETS, Arm

Record = dict[str, Any]
ByArm = dict[str, dict[int, Record]]  # arm's name, seed

STRESS_MEAN = "mean of the stress tests"
TARGET_TITLES = {
    "shaded_relief": "The shaded relief",
    "halfway": "Halfway: the mean of Blue Marble and shaded relief, pixel by pixel",
}


def by_arm(records: Iterable[Record]) -> ByArm:
    """The runs of each arm by their seed."""
    grouped: ByArm = {}
    for record in records:
        grouped.setdefault(record["arm"], {})[record["seed"]] = record
    return grouped


def values(runs: ByArm, arm: str, condition: str) -> dict[int, float]:
    """Mean IoU in % of an arm under a condition, or the mean over the stress tests, by seed."""
    if condition == STRESS_MEAN:
        each = [values(runs, arm, name) for name in CONDITIONS]
        return {seed: fmean(scores[seed] for scores in each) for seed in each[0]}
    found = runs.get(arm, {}).items()
    return {seed: 100 * run["scores"][condition]["mean_iou"] for seed, run in found if condition in run["scores"]}


def difference(runs: ByArm, arm: str, baseline: str, condition: str) -> Estimate | None:
    """Paired difference in points of mean IoU."""
    return paired(values(runs, arm, condition), values(runs, baseline, condition))


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def paragraph(text: str) -> list[str]:
    """Prose in lines of at most 120 characters, and an empty one."""
    return [*textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), ""]


def _score(scores: dict[int, float]) -> str:
    if not scores:
        return "-"
    found = estimate(list(scores.values()))
    return f"{found.mean:.1f}" if found.count == 1 else f"{found.mean:.1f} +- {found.deviation:.1f}"


def _interval(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:+.1f}" if found.count == 1 else f"{found.mean:+.1f} +- {found.half_width:.1f}"


def _present(runs: ByArm, plan: str) -> list[Arm]:
    return [arm for arm in ARMS if arm.plan == plan and arm.name in runs]


def _words(target: str) -> str:
    return target.replace("_", " ")


def _full_title(arm: Arm) -> str:
    return f"{arm.title}, {_words(arm.target)}" if arm.target else arm.title


class Report:
    """The parts of the report in their order; it counts the differences that were looked at."""

    def __init__(self, records: list[Record], pictures: list[str]):
        self.records, self.runs, self.pictures = records, by_arm(records), pictures
        self.judged: list[tuple[str, Estimate]] = []

    def markdown(self) -> str:
        """The whole report."""
        parts = [self.supervised(), self.stress(), self.adaptation(), self.ablations(), self.cost()]
        # The summary comes first, but judges what the parts have looked at.
        lines = [*self.opening(), *self.summary(), *self.protocol()]
        lines += [line for part in parts for line in part] + self.pictures_part() + self.commands()
        return "\n".join(lines).rstrip() + "\n"

    def _judge(self, what: str, arm: str, baseline: str, condition: str) -> Estimate | None:
        found = difference(self.runs, arm, baseline, condition)
        if found is not None and found.count > 1:
            self.judged.append((what, found))
        return found

    def opening(self) -> list[str]:
        return [
            "# What the loss does for a segmentation network",
            "",
            *paragraph(
                f"From {len(self.records)} runs in `runs.jsonl`; written by `python -m benchmarks.segmentation report`. "
                "Scores are mean IoU in % on test images, mean and standard deviation over seeds. Differences are paired by "
                "seed (the same initial weights, batches and schedule), in points, with their 95 % interval (Student's t)."
            ),
        ]

    def summary(self) -> list[str]:
        """What was found to differ, and what was not; every difference in the tables below is counted."""
        clear = [(what, found) for what, found in self.judged if found.verdict in ("higher", "lower")]
        lines = ["## In short", "", *self._headlines()]
        lines += paragraph(
            f"{len(self.judged)} paired differences were looked at; {len(clear)} have an interval that excludes zero. By "
            f"chance alone about {len(self.judged) / 20:.0f} would, as each interval covers 95 %: a single one says little."
        )
        for verdict in ("higher", "lower"):
            lines += [f"- {verdict}: {what}, {_interval(found)}" for what, found in clear if found.verdict == verdict]
        rest = len(self.judged) - len(clear)
        return [*lines, f"- no measurable difference: the other {rest}, listed in the tables", ""]

    def _headlines(self) -> list[str]:
        """What ProAC does where it was meant to help, whatever came out."""
        asked = [
            ("ProAC beside cross-entropy, clean", "proac", "cross_entropy", "clean"),
            ("ProAC beside cross-entropy, mean of the stress tests", "proac", "cross_entropy", STRESS_MEAN),
        ]
        for target in TARGETS:
            for name, title in (
                ("self_training", "self-training"),
                ("confident", "self-training with confidence weights"),
            ):
                arm, condition = f"{target}-{name}", f"{target}, own statistics"
                asked.append((f"{title} beside source only, {_words(target)}", arm, "cross_entropy", condition))
                asked.append((f"ProAC in {title}, {_words(target)}", f"{arm}_proac", arm, condition))
        lines = []
        for what, arm, baseline, condition in asked:
            found = difference(self.runs, arm, baseline, condition)
            if found is not None:
                seeds = f"{found.count} seeds" if found.count > 1 else "1 seed"
                lines.append(f"- {what}: {_interval(found)} points ({seeds}): {found.verdict}")
        return [*lines, ""]

    def protocol(self) -> list[str]:
        config = next(iter(self.runs.get("cross_entropy", {0: self.records[0]}).values()))["config"]
        height, width = config["crop"]
        return [
            "## Protocol",
            "",
            *paragraph(
                "Images are tiles of the globe of 120 x 160 pixels, labels climate zones of 8 classes, split by columns of "
                "longitude: 161 tiles for training, 45 for validation, 63 for testing. The source style is NASA's Blue Marble. "
                f"The network is the demo's with stages of {', '.join(map(str, config['widths']))} channels; AdamW, one-cycle "
                f"learning rate up to {config['learning_rate']:g}; {config['iterations']} steps of {config['batch_size']} "
                f"random crops of {height} x {width} with flips, no other augmentation. ProAC has weight "
                f"{self._proac_weight()}, temperature 0.1, D = {config['embedding_dim']}, all negatives, a linear head and "
                "uniform prototypes, unless said otherwise. These settings were fixed before the runs, and no run was left "
                "out. Such short runs on small data say little about large ones: for those, see what the authors report."
            ),
        ]

    def _proac_weight(self) -> str:
        found = self.runs.get("proac", {})
        return f"{next(iter(found.values()))['config']['proac_weight']:g}" if found else "-"

    def supervised(self) -> list[str]:
        """Losses on clean images of the source style."""
        rows = []
        for arm in _present(self.runs, "supervised"):
            clean = values(self.runs, arm.name, "clean")
            found = None
            if arm.name != "cross_entropy":
                found = self._judge(f"{arm.title} against CE, clean", arm.name, "cross_entropy", "clean")
            rows.append([arm.title, str(len(clean)), _score(clean), _interval(found), found.verdict if found else ""])
        head = ["loss", "seeds", "test mIoU", "against CE", "verdict"]
        lines = ["## Supervised", "", *table(head, rows)]
        classes = self.records[0]["class_names"]
        rows = []
        for arm in _present(self.runs, "supervised"):
            runs = self.runs[arm.name].values()
            columns = zip(*(run["scores"]["clean"]["iou"] for run in runs), strict=True)
            ious = [[value for value in column if value is not None] for column in columns]
            rows.append([arm.title, *(f"{100 * sum(v) / len(v):.1f}" if v else "-" for v in ious)])
        return [*lines, "IoU of every class, mean over the seeds:", "", *table(["loss", *classes], rows)]

    def stress(self) -> list[str]:
        """The same networks on changed test images."""
        arms = _present(self.runs, "supervised")
        others = [arm for arm in arms if arm.name != "cross_entropy"]
        rows, differences = [], []
        for condition in ("clean", *CONDITIONS, STRESS_MEAN):
            rows.append([condition, *(_score(values(self.runs, arm.name, condition)) for arm in arms)])
            cells = []
            for arm in others:
                if condition == "clean":  # judged above
                    found = difference(self.runs, arm.name, "cross_entropy", condition)
                else:
                    found = self._judge(f"{arm.title} against CE, {condition}", arm.name, "cross_entropy", condition)
                cells.append(_interval(found))
            differences.append([condition, *cells])
        return [
            "## Under stress",
            "",
            *paragraph(
                "The networks of the supervised part on test images that were changed; training never saw such changes. "
                "Resolutions are of the image that the network gets; masked patches are grey, and still count in the score."
            ),
            *table(["test images", *(arm.title for arm in arms)], rows),
            "Differences to cross-entropy:",
            "",
            *table(["test images", *(arm.title for arm in others)], differences),
        ]

    def adaptation(self) -> list[str]:
        """Scores in the target styles; every network gets the target's batch statistics, which need no label."""
        if not (arms := _present(self.runs, "adaptation")):
            return []
        config = next(iter(self.runs[arms[0].name].values()))["config"]
        lines = [
            "## Domain adaptation",
            "",
            *paragraph(
                "Labels of the source style and pseudo labels of the target style go through one ProAC call, concatenated "
                f"along the batch. The teacher is a moving average of the network (momentum {config['teacher_momentum']}); "
                f"of the pixels that it takes for a class, the {100 * config['keep_share']:.0f} % it is surest of get a "
                f"label. Target images join after {100 * config['adapt_from']:.0f} % of the steps. With confidence weights, "
                "the teacher's confidence is the weight of a pixel in both losses."
            ),
            *paragraph(
                "Each style passes through the network by itself, with its own batch statistics; that was decided after a "
                'trial without, in which self-training on the shaded relief fell below its start. "Own statistics" are those '
                "of the training images of the style that is tested; they need no label, all rows get them, and differences "
                "are of these scores."
            ),
        ]
        for target in TARGETS:
            lines += self._adaptation_to(target)
        return lines

    def _adaptation_to(self, target: str) -> list[str]:
        own = f"{target}, own statistics"
        rows, quality = [], []

        def add(name: str, title: str, baselines: dict[str, str]) -> None:
            """A row with the differences to source only and to the same training without ProAC, where named."""
            scores = [values(self.runs, name, condition) for condition in ("clean, own statistics", target, own)]
            cells = []
            for column in ("source only", "without ProAC"):
                found = None
                if baseline := baselines.get(column):
                    found = self._judge(f"{title} against {column}, {_words(target)}", name, baseline, own)
                cells.append(_interval(found))
            rows.append([title, str(len(scores[-1])), *map(_score, scores), *cells])

        add("cross_entropy", "source only", {})
        if "proac" in self.runs:
            add("proac", "source only + ProAC", {"without ProAC": "cross_entropy"})
        for arm in _present(self.runs, "adaptation"):
            if arm.target != target:
                continue
            baselines = {"source only": "cross_entropy"}
            if (plain := arm.name.removesuffix("_proac")) != arm.name:
                baselines["without ProAC"] = plain
            add(arm.name, arm.title, baselines)
            ends = [run["curves"]["pseudo_label_accuracy"][-1] for run in self.runs[arm.name].values()]
            quality.append(f"{arm.title} {100 * sum(ends) / len(ends):.0f} %")
        if not quality:
            return []
        scored = ["source, own statistics", "target", "target, own statistics"]
        head = ["training", "seeds", *scored, "against source only", "against the same without ProAC"]
        return [
            f"### {TARGET_TITLES[target]}",
            "",
            *table(head, rows),
            *paragraph(f"Right among the pseudo labels that were kept, at the end: {'; '.join(quality)}."),
        ]

    def ablations(self) -> list[str]:
        """One option of ProAC changed at a time."""
        if not (arms := _present(self.runs, "ablation")):
            return []
        seeds = {seed for arm in arms for seed in self.runs[arm.name]}
        base = {seed: value for seed, value in values(self.runs, "proac", "clean").items() if seed in seeds}
        rows = [["CE + ProAC (the base)", str(len(base)), _score(base), "", ""]]
        if "sampled" in self.runs:
            arms = [next(arm for arm in ARMS if arm.name == "sampled"), *arms]
        for arm in arms:
            clean = {s: v for s, v in values(self.runs, arm.name, "clean").items() if s in seeds}
            found = paired(clean, base)
            if found is not None and found.count > 1:
                self.judged.append((f"{arm.title} against the base of the ablations, clean", found))
            rows.append([arm.title, str(len(clean)), _score(clean), _interval(found), found.verdict if found else ""])
        return ["## Ablations", "", *table(["change", "seeds", "test mIoU", "against the base", "verdict"], rows)]

    def cost(self) -> list[str]:
        """Iterations and processor time as the runs noted them."""
        rows = []
        for plan in PLANS:
            for arm in _present(self.runs, plan):
                runs = list(self.runs[arm.name].values())
                memory = [run["proac_memory_bytes"]["peak"] for run in runs if run["proac_memory_bytes"]]
                shares = [run["proac_seconds"] / run["step_seconds"] for run in runs if run["proac_seconds"]]
                rows.append(
                    [
                        _full_title(arm),
                        str(runs[0]["config"]["iterations"]),
                        f"{median(run['cpu_seconds'] for run in runs):.0f} s",
                        f"{100 * median(shares):.1f} %" if shares else "-",
                        f"{median(memory) / 2**20:.1f} MiB" if memory else "-",
                    ]
                )
        head = ["arm", "steps", "processor time", "ProAC, share of a step", "memory in ProAC"]
        return [
            "## Cost",
            "",
            *paragraph(
                "Medians over the runs, which shared their machine with other work: read them as sizes. Processor time "
                "includes all scores. The share of a step is ProAC's forward and backward without the embedding head. With "
                f"the head, a step took {self._longer():.2f} times as long (`python -m benchmarks.segmentation cost`), and "
                'the arm "CE with ProAC\'s compute" runs as many more steps. '
                "Memory is the most that ProAC holds beyond its inputs, the gradient included."
            ),
            *table(head, rows),
        ]

    def _longer(self) -> float:
        counts = [
            next(iter(self.runs[name].values()))["config"]["iterations"] if name in self.runs else 1
            for name in ("longer", "cross_entropy")
        ]
        return counts[0] / counts[1]

    def pictures_part(self) -> list[str]:
        """The pictures that were drawn."""
        captions = {
            "classes.png": "IoU of every class, clean test images; bars are means, lines standard deviations over seeds",
            "differences.png": "Differences to cross-entropy, paired by seed, with 95 % intervals; styles with own statistics",
            "curves.png": "Training curves, means over seeds",
            "source.png": "Test tiles of the source style, seed 0; chosen by their labels alone",
            "shaded_relief.png": "Test tiles of the shaded relief, seed 0, with its batch statistics",
            "halfway.png": "Test tiles halfway between the styles, seed 0, with their batch statistics",
            "embeddings.png": "Pixel embeddings of test tiles, seed 0, on their first two principal components",
        }
        lines = ["## Pictures", ""] if self.pictures else []
        for name in self.pictures:
            lines += [f"![{captions[name]}]({name})", "", captions[name] + ".", ""]
        return lines

    def commands(self) -> list[str]:
        """How to get every run again."""
        rows = []
        for plan in PLANS:
            for arm in _present(self.runs, plan):
                seeds = " ".join(map(str, sorted(self.runs[arm.name])))
                rows.append([_full_title(arm), f"`study --arms {arm.name} --seeds {seeds}`"])
        commits = sorted({record["commit"][:10] for record in self.records})
        threads = sorted({record["threads"] for record in self.records})
        return [
            "## Commands",
            "",
            *paragraph(
                "Each after `python -m benchmarks.segmentation`; `runs.jsonl` has the command, configuration and commit of "
                f"every single run. Commits: {', '.join(commits)}. Threads: {', '.join(map(str, threads))}; another number "
                "of threads, or another processor, changes the last digits of a step, and with them a run's end within the "
                "spread of the seeds."
            ),
            *table(["arm", "command"], rows),
        ]


def report_text(records: list[Record], pictures: list[str]) -> str:
    """The report of a log that is not empty."""
    return Report(records, pictures).markdown()
