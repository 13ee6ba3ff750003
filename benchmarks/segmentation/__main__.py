"""Command line: `python -m benchmarks.segmentation demo` and `... train` on one's own images."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

# On the CPU, PyTorch's threads busily wait for each other; where another process holds one of two cores, that made
# a step 20 times slower. Threads that sleep while they wait do not mind. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .climate import STYLES, load_climate
from .data import DataError, Splits, folder_splits, read_class_names
from .report import Runs, draw, print_report, write_json
from .train import StepRecord, TrainConfig, train

DEFAULTS = TrainConfig()


def parser() -> argparse.ArgumentParser:
    """The two commands and their options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.segmentation", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    option = common.add_argument
    option("--iterations", type=_positive, default=DEFAULTS.iterations, help="steps of each run (%(default)s)")
    option("--batch-size", type=_positive, default=DEFAULTS.batch_size, help="(%(default)s)")
    option("--learning-rate", type=_above_zero, default=DEFAULTS.learning_rate, help="(%(default)s)")
    option(
        "--proac-weight",
        type=_above_zero,
        default=0.5,
        help="lambda of cross-entropy + lambda * ProAC (%(default)s)",
    )
    option("--temperature", type=_above_zero, default=DEFAULTS.temperature, help="of ProAC (%(default)s)")
    option("--embedding-dim", type=_positive, default=DEFAULTS.embedding_dim, help="(%(default)s)")
    option("--seed", type=int, default=DEFAULTS.seed, help="initial weights, data order (%(default)s)")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="satellite tiles and climate zones, with and without ProAC",
        description="Train twice on satellite tiles labelled with climate zones, with and without ProAC.",
    )
    demo.add_argument("--style", choices=STYLES, default="blue_marble", help="how the Earth is drawn (%(default)s)")
    demo.add_argument("--output", type=Path, default=Path("results/demo"), help="folder (%(default)s)")

    own = commands.add_parser(
        "train",
        parents=[common],
        help="your own folder of images and masks, with and without ProAC",
        description="Train twice on your own images, with and without ProAC. A mask has the name of its image, and "
        "its pixels are class indices; 255 is ignored.",
    )
    own.add_argument("--images", type=Path, required=True, help="folder of images")
    own.add_argument("--masks", type=Path, required=True, help="folder of single-channel or palette PNG masks")
    own.add_argument("--classes", type=Path, required=True, help="text file of class names, one a line, from index 0")
    own.add_argument("--held-out", type=float, default=0.2, help="share for validation, and for test (%(default)s)")
    own.add_argument(
        "--crop", type=_positive, nargs=2, metavar=("HEIGHT", "WIDTH"), default=(256, 256), help="(256 256)"
    )
    own.add_argument("--output", type=Path, default=Path("results/train"), help="folder (%(default)s)")
    return top


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _above_zero(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def compare(config: TrainConfig, data: Splits, output: Path, console: Console) -> Runs:
    """Train with cross-entropy alone and with config.proac_weight; report both and return them."""
    configs = {"cross-entropy": replace(config, proac_weight=0.0), "cross-entropy + ProAC": config}
    columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs: Runs = {}
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
        bars = {name: progress.add_task(name, total=config.iterations, loss="", start=False) for name in configs}
        for name, run_config in configs.items():
            bar = bars[name]
            progress.start_task(bar)

            def on_step(step: int, record: StepRecord, bar: TaskID = bar) -> None:
                extra = "" if record.proac is None else f", ProAC {record.proac:.1f}"
                progress.update(bar, completed=step + 1, loss=f"CE {record.cross_entropy:.2f}{extra}")

            runs[name] = train(run_config, data, on_step)
    output.mkdir(parents=True, exist_ok=True)
    class_names = data.train.class_names
    write_json(runs, class_names, output / "metrics.json")
    draw(runs, data, output / "predictions.png")
    print_report(runs, class_names, console)
    console.print(f"Picture: {output / 'predictions.png'}\nNumbers: {output / 'metrics.json'}")
    return runs


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 is returned where the data are at fault."""
    args = parser().parse_args(arguments)
    console = Console()
    config = TrainConfig(
        proac_weight=args.proac_weight,
        temperature=args.temperature,
        embedding_dim=args.embedding_dim,
        iterations=args.iterations,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        device=args.device,
    )
    try:
        if args.command == "demo":
            data = load_climate(args.style)
        else:
            config = replace(config, crop=tuple(args.crop))
            names = read_class_names(args.classes)
            data = folder_splits(args.images, args.masks, names, held_out=args.held_out)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = (len(part) for part in (data.train, data.validation, data.test))
    console.print("{} training, {} validation and {} test images".format(*counts))
    compare(config, data, args.output, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
