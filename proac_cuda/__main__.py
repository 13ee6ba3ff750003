"""``python -m proac_cuda info | check | tiles | prototypes``: what is built, does it work here, how, and making prototypes."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import proac_loss
from .backends import BACKENDS, ENVIRONMENT_VARIABLE, available_backends, choose_backend, extension
from .backends import triton as triton_kernels
from .backends.triton.report import architecture_of, reports
from .prototypes import (
    load_prototypes,
    prototype_certificate,
    save_prototypes,
    search_prototypes,
    uniform_prototypes,
)
from .version import __version__


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver(version: str) -> str:
    return "none" if version == "0.0" else f"up to {version}"


def info(as_json: bool = False) -> int:
    """Versions, what is built, which backend would run where, and why not the others."""
    built = extension.build_info()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    choices = {}
    for device in ["cpu", "cuda"] if devices else ["cpu"]:
        try:
            choices[device] = choose_backend("auto", torch.device(device)).name
        except (RuntimeError, ValueError) as error:  # what the environment variable asks for
            choices[device] = f"none. {error}"
    found = {
        "proac_cuda": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version_of("triton"),
        "extension": built or extension.why_not_cpu(),
        "threads": torch.get_num_threads(),
        "gpus": devices,
        "backends": {name: status._asdict() for name, status in available_backends().items()},
        ENVIRONMENT_VARIABLE: override,
        "auto": choices,
    }
    if as_json:
        print(json.dumps(found, indent=1))
        return 0

    console = _console()
    console.print(f"proac_cuda {__version__}   Python {found['python']}   {found['platform']}")
    console.print(f"torch {torch.__version__} (CUDA {torch.version.cuda or 'no'})   triton {found['triton']}")
    if built:
        kernels = ", ".join(f"{key} kernels for {built[key]}" for key in ("cpu", "cuda") if key in built)
        versions = f" (CUDA runtime {built['runtime']}, driver {_driver(built['driver'])})" if "cuda" in built else ""
        console.print(f"extension: {kernels}{versions}", soft_wrap=True)
    else:
        console.print(f"extension: {found['extension']}", soft_wrap=True)
    console.print(f"devices: CPU ({found['threads']} threads)" + "".join(f", {name}" for name in devices))
    table = Table("backend", "tensors on", "can run", "why not", title="Backends")
    for name, status in available_backends().items():
        home = "any device" if name == "reference" else BACKENDS[name].home
        table.add_row(name, home, "[green]yes[/green]" if status.can_run else "[yellow]no[/yellow]", status.reason)
    console.print(table)
    console.print(
        "The CUDA and Triton kernels were proved without a GPU so far (docs/using/speed.md says what was run on what): "
        "where there is one, run python -m proac_cuda check first.",
        soft_wrap=True,
    )
    console.print(f"Triton kernels: {triton_kernels.GPUS}", soft_wrap=True)
    if override:
        console.print(f'{ENVIRONMENT_VARIABLE}={override} stands in for backend="auto"')
    for device, choice in choices.items():
        console.print(f'backend="auto" on {device} tensors: {choice}', soft_wrap=True)
    return 0


_CHECKS: dict[str, dict[str, Any]] = {
    "all negatives": {},
    "sampled negatives": {"num_negatives": 500, "seed": 1},
    "weights, mean, twin": {"negative_reduction": "mean", "pixel_anchor_weight": 0.5, "weighted": True},
    "temperature 0.01": {"temperature": 0.01},
}


_NOT_TESTED = (
    "one shape (2 x 64 channels x 32 x 32 pixels, 19 classes), contiguous; no other layout, no learnable prototypes, no "
    "torch.compile, no process group, no speed: those are the test suite's"
)


def check(as_json: bool = False) -> int:
    """Every backend that can run here, against the reference in float64, as a table. 1 where one disagrees, or is hidden."""
    rows = list(_compared())
    unchecked = {name: status.reason for name, status in available_backends().items() if not status.can_run}
    hidden = extension.is_shadowed()
    failures = sum(not row["good"] for row in rows)
    if as_json:
        print(
            json.dumps({"rows": rows, "not checked": unchecked, "hidden build": hidden, "scope": _NOT_TESTED}, indent=1)
        )
        return 1 if failures or hidden else 0
    table = Table("backend", "device", "dtype", "case", "loss error", "gradient error", "ms", "verdict")
    for row in rows:
        table.add_row(
            *(row[key] for key in ("backend", "device", "dtype", "case")),
            *(f"{row[key]:.1e}" for key in ("loss error", "gradient error")),
            f"{row['ms']:.1f}",
            "[green]good[/green]" if row["good"] else "[bold red]WRONG[/bold red]",
        )
    console = _console()
    console.print(table)
    for name, reason in unchecked.items():
        console.print(f'Not checked: "{name}" ({reason})', soft_wrap=True)
    console.print(f"Looked at: {_NOT_TESTED}.", soft_wrap=True)
    if hidden:
        console.print("The compiled extension is installed, and was not checked: see above.", style="bold")
    return 1 if failures or hidden else 0


def _compared() -> Iterator[dict[str, Any]]:
    """A row for each backend that can run, device, dtype and case."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 64, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 20, (2, 64, 64), generator=generator)
    labels[labels == 19] = 255
    prototypes = uniform_prototypes(19, 64, dtype=torch.float64)
    weight = torch.rand(labels.shape, generator=generator)
    statuses = available_backends()
    for name, backend in BACKENDS.items():
        any_device = {backend.home, "cuda" if torch.cuda.is_available() else "cpu"}
        devices = sorted(any_device if name == "reference" else {backend.home}) if statuses[name].can_run else []
        dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for device, dtype, (case, settings) in itertools.product(devices, dtypes, _CHECKS.items()):
            x = features.to(dtype)
            options = dict(settings)
            if options.pop("weighted", False):
                options["pixel_weight"] = weight
            truth = _loss_and_gradient(x.double(), labels, prototypes, "reference", "cpu", options)
            start = time.perf_counter()
            answer = _loss_and_gradient(x, labels, prototypes, name, device, options)
            milliseconds = (time.perf_counter() - start) * 1e3
            loss_error = ((answer[0] - truth[0]) / truth[0]).abs().item()
            gradient_error = ((answer[1] - truth[1]).norm() / truth[1].norm()).item()
            temperature = options.get("temperature", 0.1)
            # 16-bit gradients carry their one final rounding beside the error of the computation
            limit = {
                torch.float64: 1e-12,
                torch.float32: 1e-6 + 4e-6 / temperature,
                torch.bfloat16: 2e-4 + 2.0**-8,
                torch.float16: 2e-4 + 2.0**-6,  # part of these gradients is subnormal in float16
            }[dtype]
            yield {
                "backend": name,
                "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "case": case,
                "loss error": loss_error,
                "gradient error": gradient_error,
                "ms": milliseconds,
                "good": loss_error <= 2e-6 + 5e-6 / temperature and gradient_error <= limit,
            }


def _loss_and_gradient(
    features: torch.Tensor,
    labels: torch.Tensor,
    prototypes: torch.Tensor,
    backend: str,
    device: str,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    x = features.to(device).requires_grad_()
    moved: dict[str, Any] = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    loss = proac_loss(x, labels.to(device), prototypes.to(device), backend=backend, **moved)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach().cpu().double(), gradient.cpu().double()


def tiles(arguments: argparse.Namespace) -> int:
    """Which tiles the Triton kernels take on a GPU, what they read, and what a thread holds."""
    gpu = arguments.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    if gpu is None:
        raise ValueError('PyTorch sees no GPU here: name one, such as "A100" or "sm_80"')
    architecture = architecture_of(gpu)
    console = _console()
    table = Table(
        "kernel", "classes", "pixels", "channels", "warps", "features read", "prototypes read", "numbers a thread holds",
        title=f"{gpu} ({architecture}), {arguments.dtype}, D = {arguments.embedding_dim}, K = {arguments.num_classes}",
    )  # fmt: skip
    for row in reports(
        architecture,
        getattr(torch, arguments.dtype),
        arguments.embedding_dim,
        arguments.num_classes,
        arguments.more_options,
    ):
        tile = row.tile
        table.add_row(
            row.kernel, str(tile.KB) if tile.BLOCKS == 1 else f"{tile.BLOCKS} x {tile.KB}", str(tile.BM), str(tile.BD),
            str(tile.num_warps), f"{row.features:.2f}x", f"{row.prototypes:.2f}x", str(row.numbers),
        )  # fmt: skip
    console.print(table)
    console.print(
        "By calculation: reads over the features' bytes, from caches or memory. prototype_gradient runs only where prototypes "
        "require a gradient.",
        soft_wrap=True,
    )
    return 0


def prototypes(arguments: argparse.Namespace) -> int:
    """Make prototypes, or load them; print their certificate; save them."""
    num_classes = arguments.K if arguments.num_classes is None else arguments.num_classes
    embedding_dim = arguments.D if arguments.embedding_dim is None else arguments.embedding_dim
    if arguments.load:
        values = load_prototypes(arguments.load)
    elif num_classes is None or embedding_dim is None:
        print("prototypes: give K and D (numbers of classes and dimensions), or --load FILE", file=sys.stderr)
        return 2
    elif arguments.seconds is not None:
        arguments.output = arguments.output or Path(f"prototypes-{num_classes}-{embedding_dim}.pth")
        groups = {"groups": arguments.groups} if arguments.groups else {}
        values = search_prototypes(num_classes, embedding_dim, arguments.seconds, seed=arguments.seed, **groups)
    else:
        values = uniform_prototypes(num_classes, embedding_dim, seed=arguments.seed)
    certificate = prototype_certificate(values)
    if arguments.json:
        if arguments.output:
            save_prototypes(arguments.output, values)
        shape = {"num_classes": values.shape[0], "embedding_dim": values.shape[1]}
        saved = arguments.output and str(arguments.output)
        print(json.dumps({**shape, **certificate._asdict(), "saved to": saved}, indent=1))
        return 0
    console = _console()
    console.print(f"{values.shape[0]} prototypes of {values.shape[1]} dimensions")
    if certificate.arrangement:
        console.print(f"arrangement: {certificate.arrangement}")
    console.print(f"largest cosine {certificate.largest_cosine:.6f}")
    if certificate.best_known is not None:
        console.print(f"best published {certificate.best_known:.6f} ({certificate.source})", soft_wrap=True)
    console.print(
        f"best lower bound known {certificate.lower_bound:.6f} ({certificate.bound}), gap {certificate.gap:.2e}"
    )
    if certificate.remark:
        console.print(certificate.remark, soft_wrap=True, markup=False)
    if arguments.output:
        save_prototypes(arguments.output, values)
        console.print(f"saved to {arguments.output}; use it as prototypes=load_prototypes({str(arguments.output)!r})")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m proac_cuda", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    subparsers = [
        commands.add_parser(name, help=function.__doc__) for name, function in (("info", info), ("check", check))
    ]
    of_gpu = commands.add_parser("tiles", help=tiles.__doc__)
    of_gpu.add_argument("gpu", nargs="?", help='a name such as "A100", or "sm_80"; default: the GPU here')
    of_gpu.add_argument("--num-classes", type=_positive, default=19, metavar="K")
    of_gpu.add_argument("--embedding-dim", type=_positive, default=256, metavar="D")
    of_gpu.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32", "float64"])
    of_gpu.add_argument(
        "--more-options", action="store_true", help="as with weights, sampled sets, the twin or statistics"
    )
    make = commands.add_parser("prototypes", help=prototypes.__doc__)
    make.add_argument("K", type=int, nargs="?", help="number of classes")
    make.add_argument("D", type=int, nargs="?", help="dimensions of the embedding")
    make.add_argument("--num-classes", type=int, metavar="K")
    make.add_argument("--embedding-dim", type=int, metavar="D")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="search for a better arrangement than the default for so long, and save it; Ctrl-C keeps the best so far",
    )
    make.add_argument(
        "--groups",
        nargs="+",
        metavar="G",
        help="with --seconds: try arrangements of these symmetries: Z12, D6, A5, Z2xS3, ...",
    )
    make.add_argument("--load", type=Path, metavar="FILE", help="certify the prototypes of a .pth or .npy file")
    make.add_argument("--output", type=Path, metavar="FILE", help="save to a .pth or .npy file")
    for subparser in (*subparsers, make):
        subparser.add_argument("--json", action="store_true", help="for machines: JSON on stdout")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "prototypes":
            return prototypes(arguments)
        if arguments.command == "tiles":
            return tiles(arguments)
        return (info if arguments.command == "info" else check)(arguments.json)
    except (ValueError, OSError) as error:
        print(f"proac_cuda {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
