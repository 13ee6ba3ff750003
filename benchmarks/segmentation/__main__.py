"""Command line, `python -m benchmarks.segmentation`: the demo, training on one's own images, and the study."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

# On the CPU, PyTorch's threads busily wait for each other; where another process holds one of two cores, that made
# a step 20 times slower. Threads that sleep while they wait do not mind. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, reports that there is no GPU

import torch
from rich.console import Console

from .adapters import ADAPTERS
from .camvid_study import SEEDS as CAMVID_PARTS
from .climate import STYLES, load_climate
from .compare import compare
from .data import DataError, ResizedDataset, Splits, folder_splits, read_class_names
from .demo import run_demo
from .study import ARMS, PLANS, PROTOCOL, SEEDS, SOURCE, TARGETS, Arm, read_runs, run_study, step_cost
from .train import StepRecord, TrainConfig

DEFAULTS = TrainConfig()
DEMO_ITERATIONS = 120
LAMBDA = "lambda of cross-entropy + lambda * ProAC"


def parser() -> argparse.ArgumentParser:
    """The two commands and their options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.segmentation", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        parents=[_common(DEMO_ITERATIONS)],
        help="satellite tiles and climate zones, with and without ProAC",
        description="Train twice on satellite tiles labelled with climate zones, with and without ProAC; look at the "
        "embeddings on a sphere; time the loss on this machine.",
    )
    demo.add_argument("--seed", type=int, default=DEFAULTS.seed, help="initial weights, data order (%(default)s)")
    demo.add_argument("--proac-weight", type=_above_zero, default=0.1, help=f"{LAMBDA} (%(default)s)")
    demo.add_argument("--style", choices=STYLES, default="blue_marble", help="how the Earth is drawn (%(default)s)")
    demo.add_argument("--output", type=Path, default=Path("results/demo"), help="folder (%(default)s)")

    own = commands.add_parser(
        "train",
        parents=[_common(DEFAULTS.iterations)],
        help="your own images and masks, or a published data set, with and without ProAC",
        description="Train with and without ProAC, with each seed: on your own folder (--images, --masks, --classes; a mask "
        "has the name of its image, and its pixels are class indices; 255 is ignored), or on a published data set that "
        "lies unpacked on your disk (--dataset, --root). docs/using/own_data.md shows the folders' layouts.",
    )
    own.add_argument("--seeds", type=_seeds, nargs="+", default=[[0]], help="such as 0-4, or 0 3 7 (0)")
    own.add_argument(
        "--proac-weight", type=_above_zero, nargs="+", default=[0.1], help=f"{LAMBDA}; several are compared (0.1)"
    )
    own.add_argument("--num-negatives", type=_positive, help="of each class, drawn anew at each step (all)")
    own.add_argument("--negative-reduction", choices=("sum", "mean"), default="sum", help="(%(default)s)")
    own.add_argument(
        "--label-sampling",
        choices=("nearest", "nearest-exact"),
        default="nearest",
        help="how ProAC reads labels at the features' resolution (%(default)s)",
    )
    own.add_argument("--dataset", choices=sorted(ADAPTERS), help="a published data set, in the folder --root")
    own.add_argument("--root", type=Path, help="where its archive is unpacked, as for torchvision's classes")
    own.add_argument("--images", type=Path, help="folder of images")
    own.add_argument("--masks", type=Path, help="folder of single-channel or palette PNG masks")
    own.add_argument("--classes", type=Path, help="text file of class names, one a line, from index 0")
    own.add_argument("--void", type=_mask_value, nargs="+", default=[], help="more mask values that are ignored")
    own.add_argument("--lists", type=Path, help="folder of train.txt, val.txt and test.txt, a name of an image a line")
    own.add_argument(
        "--held-out", type=float, default=0.2, help="without them, share of each of the last two (%(default)s)"
    )
    own.add_argument(
        "--resize", type=_positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of all images and masks (as they are)"
    )
    own.add_argument(
        "--crop", type=_positive, nargs=2, metavar=("HEIGHT", "WIDTH"), default=(256, 256), help="(256 256)"
    )
    own.add_argument("--output", type=Path, default=Path("results/train"), help="folder (%(default)s)")

    study = commands.add_parser(
        "study",
        help="all losses, domain adaptation and ablations, with several seeds",
        description="Train what is not yet in OUTPUT/runs.jsonl. It can be stopped at any point and started again, and "
        "started several times at once on one folder, to use more cores.",
    )
    study.add_argument("--plans", choices=PLANS, nargs="+", default=list(PLANS), help="(all)")
    study.add_argument("--arms", choices=[arm.name for arm in ARMS], nargs="+", help="these alone (all of the plans)")
    study.add_argument("--seeds", type=int, nargs="+", help="(0 to 4; 0 to 2 for ablations)")
    study.add_argument("--threads", type=_positive, default=1, help="of each process (%(default)s)")
    study.add_argument("--device", default="cpu", help="(%(default)s)")
    study.add_argument("--output", type=Path, default=Path("results/study"), help="folder (%(default)s)")

    street = commands.add_parser(
        "camvid",
        help="street scenes and a pretrained network, with enough seeds",
        description="Train what is not yet in OUTPUT, and write OUTPUT/report.md. What is compared was fixed before: "
        "camvid_protocol.md. It can be stopped at any point and started again.",
    )
    street.add_argument("--root", type=Path, required=True, help="the folder CamVid; camvid.py says how to get it")
    street.add_argument("--part", choices=CAMVID_PARTS, default="main", help="(%(default)s)")
    street.add_argument("--seeds", type=_seeds, nargs="+", help="such as 100-103 (those of the protocol)")
    street.add_argument("--jobs", type=_positive, default=1, help="processes of one thread each (%(default)s)")
    street.add_argument("--output", type=Path, default=Path("results/camvid"), help="folder (%(default)s)")

    report = commands.add_parser("report", help="Markdown and pictures from a study's log")
    report.add_argument("--runs", type=Path, default=Path("results/study"), help="folder of the study (%(default)s)")
    report.add_argument("--output", type=Path, help="folder to write into (that of the study)")
    commands.add_parser("cost", help="processor time of a training step with ProAC over one without")
    return top


def _common(iterations: int) -> argparse.ArgumentParser:
    """The options of training, for a command's parents."""
    common = argparse.ArgumentParser(add_help=False)
    option = common.add_argument
    option("--iterations", type=_positive, default=iterations, help="steps of each run (%(default)s)")
    option("--batch-size", type=_positive, default=DEFAULTS.batch_size, help="(%(default)s)")
    option("--learning-rate", type=_above_zero, default=DEFAULTS.learning_rate, help="(%(default)s)")
    option("--temperature", type=_above_zero, default=DEFAULTS.temperature, help="of ProAC (%(default)s)")
    option("--embedding-dim", type=_positive, default=DEFAULTS.embedding_dim, help="(%(default)s)")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return common


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _seeds(text: str) -> list[int]:
    first, dash, last = text.partition("-")
    found = list(range(int(first), int(last if dash else first) + 1))
    if not found:
        raise argparse.ArgumentTypeError(f"{text} holds no seed")
    return found


def _distinct(groups: list[list[int]]) -> list[int]:
    """Each of the seeds once, in their order."""
    return list(dict.fromkeys(seed for group in groups for seed in group))


def _mask_value(text: str) -> int:
    if not 0 <= (value := int(text)) <= 255:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 255")
    return value


def _above_zero(text: str) -> float:
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def study(args: argparse.Namespace, console: Console) -> None:
    """The command `study`: a line for each run as it ends, and the step of the one under way."""
    torch.set_num_threads(args.threads)
    arms = [arm for arm in ARMS if (arm.name in args.arms if args.arms else arm.plan in args.plans)]
    data, targets = load_climate(SOURCE), {style: load_climate(style) for style in TARGETS}
    with console.status("") as status:

        def on_step(arm: Arm, seed: int, step: int, record: StepRecord) -> None:
            status.update(f"{arm.title}, seed {seed}: step {step + 1}, CE {record.cross_entropy:.2f}")

        def on_end(arm: Arm, seed: int, record: dict[str, Any] | None) -> None:
            if record is None:
                return
            scores = ", ".join(f"{name} {100 * value['mean_iou']:.1f}" for name, value in record["scores"].items())
            console.print(
                f"{arm.name}, seed {seed} ({record['cpu_seconds']:.0f} s of processor time), mIoU in %: {scores}"
            )

        seeds = (lambda arm: args.seeds) if args.seeds else (lambda arm: list(SEEDS[arm.plan]))
        protocol = replace(PROTOCOL, device=args.device)
        run_study(arms, seeds, data, targets, args.output, protocol, on_step, on_end)


def report(args: argparse.Namespace, console: Console) -> None:
    """The command `report`."""
    from .figures import draw_all
    from .study_figures import drawn, read_samples  # which loads pandas, as the other commands need not
    from .study_report import report_text

    if not (records := read_runs(args.runs / "runs.jsonl")):
        raise DataError(f"{args.runs / 'runs.jsonl'} holds no finished run; write one with the command study")
    output = args.output or args.runs
    output.mkdir(parents=True, exist_ok=True)
    pictures = drawn(records, read_samples(args.runs / "samples"))
    (output / "report.md").write_text(report_text(records, list(pictures)), encoding="utf-8")
    draw_all(pictures, output)
    console.print(f"{output / 'report.md'}: {len(records)} runs, {len(pictures)} pictures")


def camvid(args: argparse.Namespace, console: Console) -> None:
    """The command `camvid`."""
    from .camvid_report import draw, report
    from .camvid_study import run_part

    seeds = None if args.seeds is None else _distinct(args.seeds)
    run_part(args.part, args.root, args.output, seeds, args.jobs)
    draw(args.output)
    text = report(args.output)
    (args.output / "report.md").write_text(text, encoding="utf-8")
    console.print(text, soft_wrap=True)


def cost(console: Console) -> None:
    """The command `cost`."""
    torch.set_num_threads(1)
    plain, with_proac = (median(seconds) for seconds in step_cost(load_climate()))
    console.print(
        f"processor time of a step: {1000 * plain:.1f} ms without ProAC, {1000 * with_proac:.1f} ms with it, "
        f"ratio {with_proac / plain:.3f}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 2 is returned where the data are at fault."""
    args = parser().parse_args(arguments)
    console = Console()
    try:
        if args.command == "study":
            study(args, console)
        elif args.command == "report":
            report(args, console)
        elif args.command == "camvid":
            camvid(args, console)
        elif args.command == "cost":
            cost(console)
        else:
            demo_or_own(args, console)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def demo_or_own(args: argparse.Namespace, console: Console) -> None:
    """The commands `demo` and `train`: losses compared on one data set."""
    config = TrainConfig(
        temperature=args.temperature,
        embedding_dim=args.embedding_dim,
        iterations=args.iterations,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        device=args.device,
    )
    if args.command == "demo":
        config = replace(config, seed=args.seed, proac_weight=args.proac_weight)
        run_demo(config, lambda: load_climate(args.style), args.output, console)
        return
    config = replace(
        config,
        crop=tuple(args.crop),
        num_negatives=args.num_negatives,
        negative_reduction=args.negative_reduction,
        label_sampling=args.label_sampling,
    )
    data = own_data(args)
    if args.resize:
        data = Splits(*(ResizedDataset(part, tuple(args.resize)) for part in (data.train, data.validation, data.test)))
    counts = (len(part) for part in (data.train, data.validation, data.test))
    console.print("{} training, {} validation and {} test images".format(*counts))
    seeds = _distinct(args.seeds)
    compare(config, list(dict.fromkeys(args.proac_weight)), seeds, data, args.output, console)


def own_data(args: argparse.Namespace) -> Splits:
    """What the command `train` is to train on."""
    if args.dataset is not None:
        if args.root is None:
            raise DataError("--dataset needs --root, the folder that the data set lies in")
        if args.lists or args.void:
            raise DataError(
                "--lists and --void are for your own folder; a published data set has its own parts and void value"
            )
        return ADAPTERS[args.dataset](args.root)
    if None in (args.images, args.masks, args.classes):
        raise DataError("name --images, --masks and --classes, or --dataset and --root")
    names = read_class_names(args.classes)
    return folder_splits(args.images, args.masks, names, held_out=args.held_out, lists=args.lists, void=args.void)


if __name__ == "__main__":
    sys.exit(main())
