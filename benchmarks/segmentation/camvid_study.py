"""The study on CamVid with a pretrained network: its runs. What is compared stands in camvid_protocol.md."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .camvid import load_camvid, load_domains
from .data import Splits
from .study import Arm, run_study
from .train import TrainConfig

PROTOCOL = TrainConfig(
    backbone="lite0",
    pyramid_width=64,
    embedding_dim=256,
    iterations=300,
    crop=(192, 256),
    enlarge=1.5,
    learning_rate=1e-3,
)
AUTHORS = {"proac_weight": 0.1}  # with temperature 0.1, D = 256, uniform prototypes and all negatives, the defaults
BASELINE = "cross_entropy"

#: Seeds of each part. Those of the main comparison were never trained with before it.
SEEDS = {
    "main": range(100, 112), "choices": range(4), "chosen": range(100, 112), "supervised": range(100, 106),
    "stress": range(100, 106), "prototypes": range(100, 103), "adaptation_trial": range(2),
    "adaptation": range(100, 106),
}  # fmt: skip
#: The part that trains the cross-entropy which a part is compared with, where that is another one.
BASELINE_PART = {"chosen": "main", "supervised": "main", "prototypes": "main"}
# What a step with ProAC costs over one without, in processor time of one thread: study.step_cost(load_camvid(root), PROTOCOL)
PROAC_STEP_RATIO = 1.07
PROBED = AUTHORS | {"probe_every": 33}  # ten times in 300 steps

CHOICES: dict[str, dict[str, Any]] = {
    "lambda 0.03": {"proac_weight": 0.03},
    "lambda 0.1": {},
    "lambda 0.3": {"proac_weight": 0.3},
    "lambda 1": {"proac_weight": 1.0},
    "temperature 0.05": {"temperature": 0.05},
    "temperature 0.3": {"temperature": 0.3},
    "D = 64": {"embedding_dim": 64},
    "nearest-exact": {"label_sampling": "nearest-exact"},
    "mean over negatives": {"negative_reduction": "mean"},
    "two-layer head": {"head": "mlp"},
    "random prototypes": {"prototypes": "random"},
    "learnable prototypes": {"prototypes": "learnable"},
}
ADAPTATION = ("adaptation_trial", "adaptation")  # parts with a target domain
TARGET = "dusk"  # the name of the target domain
SOURCE_ONLY = "source_only"
SELF_TRAINED = {"self_training": True}
MIXED = SELF_TRAINED | {"class_mix": True}
ON_VALIDATION = ("choices", "adaptation_trial")  # parts that are scored on validation images alone

#: Of each option what was best on the validation images, where that is not the authors' setting.
CHOSEN = "lambda 0.3", "temperature 0.05", "D = 64", "mean over negatives", "learnable prototypes"


def _arms() -> dict[str, list[Arm]]:
    baseline = ("cross-entropy", {})
    chosen = AUTHORS | {option: value for name in CHOSEN for option, value in CHOICES[name].items()}
    parts = {
        "main": {BASELINE: baseline, "proac": ("+ 0.1 ProAC", AUTHORS)},
        "choices": {BASELINE: baseline, **{name: (f"ProAC, {name}", AUTHORS | more) for name, more in CHOICES.items()}},
        "chosen": {"chosen": ("ProAC, the best of each option", chosen)},
        "supervised": {
            "class_weighted": ("class-weighted cross-entropy", {"class_weighted": True}),
            "longer": ("cross-entropy with ProAC's compute", {"iterations_factor": PROAC_STEP_RATIO}),
            "focal": ("focal loss", {"supervised": "focal"}),
            "dice": ("cross-entropy + Dice", {"supervised": "dice"}),
            "twin": ("+ 0.1 pixel-anchored twin", AUTHORS | {"anchors": "pixels"}),
        },
        "stress": {BASELINE: baseline, "proac": ("+ 0.1 ProAC", PROBED)},
        "prototypes": {
            kind: (f"+ 0.1 ProAC, {kind} prototypes", PROBED | {"prototypes": kind}) for kind in ("random", "learnable")
        },
        "adaptation_trial": {
            SOURCE_ONLY: ("source only", {}),
            "class_mix": ("self-training, class-mix", MIXED),
            "class_mix_proac": ("self-training, class-mix, + 0.1 ProAC", MIXED | AUTHORS),
            "self_training": ("self-training", SELF_TRAINED),
        },
        "adaptation": {
            SOURCE_ONLY: ("source only", {}),
            "self_training": ("self-training", SELF_TRAINED),
            "self_training_proac": ("self-training, + 0.1 ProAC", SELF_TRAINED | AUTHORS),
            "class_mix": ("self-training, class-mix", MIXED),
            "class_mix_proac": ("self-training, class-mix, + 0.1 ProAC", MIXED | AUTHORS),
        },
    }
    return {
        part: [
            Arm(name.replace(" ", "_"), title, part, changes, TARGET if part in ADAPTATION else None)
            for name, (title, changes) in arms.items()
        ]
        for part, arms in parts.items()
    }


ARMS = _arms()


def parts_of(data: Splits, part: str) -> Splits:
    """What a part's runs are scored on: some see the validation images in the test images' place, and never these."""
    return replace(data, test=data.validation) if part in ON_VALIDATION else data


def run_part(
    part: str, root: Path, output: Path, seeds: list[int] | None = None, jobs: int = 1, protocol: TrainConfig = PROTOCOL
) -> None:
    """Train what ``output``/part/runs.jsonl lacks, in ``jobs`` processes of one thread each, which share the runs."""
    arguments = part, root, output, list(SEEDS[part]) if seeds is None else seeds, protocol
    if jobs == 1:
        _job(*arguments)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for future in [pool.submit(_job, *arguments) for _ in range(jobs)]:
            future.result()


def _job(part: str, root: Path, output: Path, seeds: list[int], protocol: TrainConfig) -> None:
    torch.set_num_threads(1)

    def on_end(arm: Arm, seed: int, record: dict[str, Any] | None) -> None:
        if record is not None:
            score = 100 * record["scores"]["clean"]["mean_iou"]
            print(f"{arm.title}, seed {seed}: mean IoU {score:.2f} %, {record['cpu_seconds']:.0f} s", flush=True)

    again = "camvid --root CamVid --part {arm.plan} --seeds {seed}"
    domains = load_domains(root) if part in ADAPTATION else [load_camvid(root)]
    data, *others = (parts_of(domain, part) for domain in domains)
    targets = {TARGET: others[0]} if others else {}
    run_study(ARMS[part], lambda arm: seeds, data, targets, output / part, protocol, None, on_end, again)
