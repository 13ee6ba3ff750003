"""``python -m proac_cuda info | check | tiles | prototypes``: what is built, does it work here, how, and making prototypes."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import extension, proac_loss
from . import triton as triton_kernels
from .backends import BACKENDS, ENVIRONMENT_VARIABLE, available_backends, choose_backend
from .prototypes import (
    load_prototypes,
    prototype_certificate,
    save_prototypes,
    search_prototypes,
    uniform_prototypes,
)
from .triton.report import architecture_of, reports
from .version import __version__


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> int:
    """Versions, what is built, which backend would run where, and why not the others."""
    console = _console()
    console.print(f"proac_cuda {__version__}   Python {platform.python_version()}   {platform.platform()}")
    console.print(f"torch {torch.__version__} (CUDA {torch.version.cuda or 'no'})   triton {_version_of('triton')}")
    built = extension.build_info()
    if built:
        console.print("extension: " + ", ".join(f"{key} kernels for {value}" for key, value in built.items()))
    else:
        console.print(f"extension: {extension.why_not_cpu()}", soft_wrap=True)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    console.print(f"devices: CPU ({torch.get_num_threads()} threads)" + "".join(f", {name}" for name in devices))

    table = Table("backend", "tensors on", "can run", "why not", title="Backends")
    for name, status in available_backends().items():
        home = "any device" if name == "reference" else BACKENDS[name].home
        table.add_row(name, home, "yes" if status.can_run else "no", status.reason)
    console.print(table)
    console.print(
        "The CUDA and Triton kernels were proved without a GPU so far (see the README, what was run on what): where there "
        "is one, run python -m proac_cuda check first.",
        soft_wrap=True,
    )
    console.print(f"Triton kernels: {triton_kernels.GPUS}", soft_wrap=True)
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if override:
        console.print(f'{ENVIRONMENT_VARIABLE}={override} stands in for backend="auto"')
    for device in ["cpu", "cuda"] if devices else ["cpu"]:
        try:
            choice = choose_backend("auto", torch.device(device)).name
        except (RuntimeError, ValueError) as error:  # what the environment variable asks for
            choice = f"none. {error}"
        console.print(f'backend="auto" on {device} tensors: {choice}', soft_wrap=True)
    return 0


_CHECKS: dict[str, dict[str, Any]] = {
    "all negatives": {},
    "sampled negatives": {"num_negatives": 500, "seed": 1},
    "weights, mean, twin": {"negative_reduction": "mean", "pixel_anchor_weight": 0.5, "weighted": True},
    "temperature 0.01": {"temperature": 0.01},
}


def check() -> int:
    """Every backend that can run here, against the reference in float64, as a table. 1 where one disagrees, or is hidden."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 64, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 20, (2, 64, 64), generator=generator)
    labels[labels == 19] = 255
    prototypes = uniform_prototypes(19, 64, dtype=torch.float64)
    weight = torch.rand(labels.shape, generator=generator)

    table = Table("backend", "device", "dtype", "case", "loss error", "gradient error", "ms", "verdict")
    failures = 0
    statuses = available_backends()
    for name, backend in BACKENDS.items():
        devices = (
            {backend.home, "cuda" if torch.cuda.is_available() else "cpu"} if name == "reference" else {backend.home}
        )
        for device in sorted(devices):
            if not statuses[name].can_run:
                table.add_row(name, device, "", "", "", "", "", "cannot run: see info")
                continue
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                x = features.to(dtype)
                for case, settings in _CHECKS.items():
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
                    good = loss_error <= 2e-6 + 5e-6 / temperature and gradient_error <= limit
                    failures += not good
                    table.add_row(
                        name,
                        device,
                        str(dtype).removeprefix("torch."),
                        case,
                        f"{loss_error:.1e}",
                        f"{gradient_error:.1e}",
                        f"{milliseconds:.1f}",
                        "good" if good else "WRONG",
                    )
    console = _console()
    console.print(table)
    for name, status in statuses.items():
        if not status.can_run:
            console.print(f'Not checked: "{name}" ({status.reason})', soft_wrap=True)
    if extension.is_shadowed():
        console.print("The compiled extension is installed, and was not checked: see above.", style="bold")
        return 1
    return 1 if failures else 0


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
        values = search_prototypes(num_classes, embedding_dim, arguments.seconds, seed=arguments.seed)
    else:
        values = uniform_prototypes(num_classes, embedding_dim, seed=arguments.seed)
    certificate = prototype_certificate(values)
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
    parser = argparse.ArgumentParser(prog="python -m proac_cuda", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=info.__doc__)
    commands.add_parser("check", help=check.__doc__)
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
    make.add_argument("--load", type=Path, metavar="FILE", help="certify the prototypes of a .pth or .npy file")
    make.add_argument("--output", type=Path, metavar="FILE", help="save to a .pth or .npy file")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "prototypes":
            return prototypes(arguments)
        if arguments.command == "tiles":
            return tiles(arguments)
        return info() if arguments.command == "info" else check()
    except (ValueError, OSError) as error:
        print(f"proac_cuda {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
