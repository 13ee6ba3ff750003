"""The comparison that the command `train` makes: cross-entropy alone, and with ProAC at one or several weights, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from .data import Splits
from .progress import progress_of
from .report import BASELINE, Runs, draw, print_report, write_json
from .train import TrainConfig, train


def compare(
    config: TrainConfig, weights: Sequence[float], seeds: Sequence[int], data: Splits, output: Path, console: Console
) -> Runs:
    """Train every loss with every seed; report, and return the results by loss, in the order of the seeds.

    Cross-entropy is trained once for each seed, whatever the number of weights. All losses of one seed come before the next
    seed, and the numbers are written after each run, so that whoever stops it keeps whole pairs.
    """
    configs = {BASELINE: replace(config, proac_weight=0.0)}
    configs |= {f"+ {weight:g} ProAC": replace(config, proac_weight=weight) for weight in weights}
    class_names = data.train.class_names
    runs: Runs = {name: [] for name in configs}
    for seed in seeds:
        for name, run_config in configs.items():
            title = f"{name}, seed {seed}"
            console.print(title)
            with progress_of(title, config.iterations, console) as on_step:
                result = train(replace(run_config, seed=seed), data, on_step)
            console.print(f"      {result.seconds:.0f} s, test mean IoU {100 * result.test.mean_iou:.1f} %")
            runs[name].append(result)
            output.mkdir(parents=True, exist_ok=True)
            write_json(runs, class_names, output / "metrics.json")
    draw(runs, data, output / "predictions.png")
    print_report(runs, class_names, console)
    console.print(f"Picture: {output / 'predictions.png'}\nNumbers: {output / 'metrics.json'}")
    return runs
