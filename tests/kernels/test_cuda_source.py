"""The CUDA kernels' own source, compiled for the CPU, against the reference in float64 (spec: the table of accuracy)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import proac_cuda
from compare import assert_twin_of_trained_features
from label_positions import MODES, assert_reads_as_interpolate
from proac_cuda import stages
from stage_comparison import OPTIONS, make_case

if shutil.which("g++") is None:
    pytest.skip("g++ is not installed: the kernels' source cannot be compiled", allow_module_level=True)
pytest.importorskip("pybind11")
from cuda_comparison import ORDERS, compare  # noqa: E402
from cuda_on_cpu import stages as kernels  # noqa: E402

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("layout", ["planes", "channels_last", "slice"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels,num_classes", [(64, 19), (1, 2), (7, 5), (33, 1), (48, 150)])
def test_shapes_and_layouts(dtype: torch.dtype, layout: str, channels: int, num_classes: int) -> None:
    compare(make_case(dtype, channels, num_classes, layout=layout))


@pytest.mark.parametrize("dtype", TYPES)
def test_many_classes(dtype: torch.dtype) -> None:
    compare(make_case(dtype, 16, 1000, spatial=(31,), batch=1), learnable=dtype == torch.float32)


@pytest.mark.parametrize("spatial,batch", [((1,), 1), ((31,), 1), ((4097,), 1), ((3, 4, 5), 3), ((1, 1), 5)])
def test_pixel_counts(spatial: tuple[int, ...], batch: int) -> None:
    compare(make_case(torch.bfloat16, 8, 3, spatial=spatial, batch=batch))
    compare(make_case(torch.float32, 8, 3, spatial=spatial, batch=batch, layout="channels_last"))


@pytest.mark.parametrize(
    "first", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("dtype", TYPES[:3])
@pytest.mark.parametrize(
    "channels,num_classes,pixels",
    [(72, 19, 289), (70, 19, 130), (67, 40, 147), pytest.param(33, 150, 300, marks=pytest.mark.slow)],
)
def test_rows_that_begin_anywhere(
    dtype: torch.dtype, channels: int, num_classes: int, pixels: int, layout: str, first: int
) -> None:
    """Numbers of pixels or channels that are odd, or even but no whole 16 bytes; a base that is off by some elements; images
    that follow each other at an odd distance; NaN all around. Whole tiles, a last one, and a last stage of channels."""
    case = make_case(dtype, channels, num_classes, spatial=(pixels,), batch=2)
    x = case["features"]
    if layout == "channels_last":
        x = x.movedim(1, -1)
    around = torch.full((2, x[0].numel() + 5), torch.nan, dtype=dtype)
    inside = around[:, first : first + x[0].numel()].unflatten(1, x.shape[1:])
    inside.copy_(x)
    case["features"] = inside.movedim(-1, 1) if layout == "channels_last" else inside
    assert case["features"].data_ptr() % 16 == around.data_ptr() % 16 + first * x.element_size()
    compare(case)


LIMITS = [
    (227 << 10, 132),
    (163 << 10, 1),
    (99 << 10, 1),
]  # shared memory of sm_90, sm_80 and sm_86; blocks that take several tiles


@pytest.mark.parametrize("shared_limit,multiprocessors", LIMITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "channels,num_classes,pixels",
    [
        (256, 19, 400),
        (1000, 3, 40),
        *(
            pytest.param(*size, marks=pytest.mark.slow)
            for size in [(256, 256, 70), (1024, 40, 70), (520, 64, 50), (1024, 200, 70)]
        ),
    ],
)
def test_fast_tiles(
    dtype: torch.dtype, channels: int, num_classes: int, pixels: int, shared_limit: int, multiprocessors: int
) -> None:
    """Every size of tile, rings of prototypes and resident ones."""
    kernels.module.set_options(shared_limit=shared_limit, multiprocessors=multiprocessors)
    layout = "planes" if pixels == 70 else "channels_last"
    compare(make_case(dtype, channels, num_classes, spatial=(pixels,), batch=3, layout=layout, weights=True), alpha=0.2)


@pytest.mark.parametrize("num_classes,most", [(150, (1.2, 2.5)), (171, (1.4, 2.8))])
@pytest.mark.parametrize("dtype,pixels", [("bfloat16", 256), ("float32", 128)])
@pytest.mark.parametrize("machine", [80, 90, 100])
def test_plans_for_many_classes(
    machine: int, dtype: str, pixels: int, num_classes: int, most: tuple[float, float]
) -> None:
    """Tiles so large that prototypes are few bytes beside the features. K = 171 is read as 176."""
    from cuda_plans import plan

    for stage in (0, 1):
        row = plan(machine, dtype, 256, num_classes, stage)
        assert row["pixels"] == pixels and row["threads"] == 256 and row["prototypes"] <= most[stage], row


def test_plans_by_architecture() -> None:
    from cuda_plans import TILES, plan

    for (machine, dtype, num_classes), tiles in TILES.items():
        for stage, tile in enumerate(tiles):
            row = plan(machine, dtype, 256, num_classes, stage)
            assert (row["pixels"], row["blocks"]) == tile, (machine, dtype, num_classes, stage, row)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("machine", [80, 90, 120])
def test_the_fast_path_takes_every_size(machine: int, channels_last: bool) -> None:
    from cuda_plans import plan

    for dtype in ("float16", "bfloat16", "float32"):
        for num_classes in (19, 64, 150, 176, 256):
            for stage in (0, 1, 2):
                assert plan(machine, dtype, 1024, num_classes, stage, channels_last), (dtype, num_classes, stage)


def test_beyond_the_fast_path() -> None:
    for dtype in TYPES:
        compare(make_case(dtype, 1030, 3, spatial=(33,), batch=2))
        compare(make_case(dtype, 9, 257, spatial=(200,), batch=1, layout="channels_last"))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(dtype: torch.dtype, name: str) -> None:
    options: dict[str, Any] = dict(OPTIONS[name])
    make = {key: options.pop(key) for key in ("weights", "label_spatial") if key in options}
    compare(make_case(dtype, 24, 19, **make), **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "size, label_size",
    [((82,), (2,)), ((41,), (4,)), ((9, 12), (72, 96)), ((5, 13), (39, 103)), ((3, 5, 4), (6, 21, 4))],
)
def test_labels_are_read_as_interpolate_reads(size: tuple[int, ...], label_size: tuple[int, ...], mode: str) -> None:
    assert_reads_as_interpolate(kernels, size, label_size, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@given(sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_labels_are_read_as_interpolate_reads(mode: str, sizes: list[tuple[int, int]]) -> None:
    assert_reads_as_interpolate(kernels, *zip(*sizes, strict=True), mode)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int16, torch.int32])
def test_label_dtypes(label_dtype: torch.dtype) -> None:
    compare(make_case(torch.float32, 8, 19, label_dtype=label_dtype))


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_temperatures(dtype: torch.dtype, temperature: float) -> None:
    case = make_case(dtype, 24, 5, weights=True)
    compare(case, temperature=temperature, alpha=0.5)


@pytest.mark.parametrize("dtype", TYPES)
def test_norms(dtype: torch.dtype) -> None:
    """A zero vector, tiny and huge ones, and NaN or infinity where nobody looks."""
    case = make_case(dtype, 40, 3, batch=1, spatial=(40,))
    x, labels = case["features"], case["labels"]
    labels[:, :20] = torch.arange(20) % 3
    x[:, :, 0] = 0
    x[:, :, 1] *= 1e-6 if dtype == torch.float16 else 1e-9
    x[:, :, 2] = 60000.0 if dtype == torch.float16 else x[:, :, 2] * 1e25
    labels[:, 20:22] = 255
    x[:, :, 20], x[:, :, 21] = torch.nan, torch.inf
    compare(case)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_features_make_the_loss_nan(dtype: torch.dtype, value: float) -> None:
    case = make_case(dtype, 24, 3)
    case["labels"][0, 0, 0] = 1
    case["features"][0, 3, 0, 0] = value
    statistics, positive, _ = kernels.class_statistics(
        case["features"], case["labels"], None, case["prototypes"], None, None, 0.1, 255, True, True
    )
    sums = kernels.positive_sums(positive, case["labels"], None, statistics, 255, False)
    assert kernels.reduce_loss(statistics, sums, None, 0.0, stages.MEAN).isnan()
    assert statistics[stages.LOG_Z, [0, 2]].isnan().all() and statistics[stages.HARDEST_NEGATIVE, [0, 2]].isnan().all()


def test_invalid_values_are_counted() -> None:
    case = make_case(torch.float32, 8, 3, weights=True)
    case["labels"][1, 2, 3], case["labels"][1, 2, 4] = 99, -7
    case["labels"][0, 1, 1:4] = 1
    case["pixel_weight"][0, 1, 1:4] = torch.tensor([-1.0, torch.inf, torch.nan])
    compare(case)


@pytest.mark.parametrize("ignore_index", [1, -100])
def test_ignore_index(ignore_index: int) -> None:
    case = make_case(torch.float32, 8, 3)
    case["labels"][case["labels"] == 255] = ignore_index
    compare(case, ignore_index=ignore_index)
    case["labels"][:] = ignore_index
    compare(case, ignore_index=ignore_index)


@pytest.mark.slow
@pytest.mark.parametrize("order,seed", ORDERS)
@pytest.mark.parametrize("dtype", TYPES)
def test_thread_orders(dtype: torch.dtype, order: int, seed: int) -> None:
    """A barrier that is missing gives a wrong result in some order; the right ones are equal to the bit."""
    kernels.module.set_options(order=order, seed=seed, multiprocessors=1)
    case = make_case(dtype, 72, 19, spatial=(1200,), batch=1, weights=True)
    compare(case, num_negatives=20, alpha=0.2, learnable=True)


@pytest.mark.slow
def test_repeated_runs_are_equal_to_the_bit() -> None:
    for dtype in TYPES:
        case = make_case(dtype, 40, 19, spatial=(300,), weights=True)
        runs = []
        for order, seed in ORDERS[:3]:
            kernels.module.set_options(order=order, seed=seed)
            statistics, positive, first = kernels.class_statistics(
                case["features"],
                case["labels"],
                case["pixel_weight"],
                case["prototypes"],
                None,
                None,
                0.1,
                255,
                True,
                True,
            )
            sums = kernels.positive_sums(positive, case["labels"], case["pixel_weight"], statistics, 255, False)
            grad_loss = torch.ones((), dtype=positive.dtype)
            grads = kernels.loss_gradients(
                case["features"],
                case["labels"],
                case["pixel_weight"],
                case["prototypes"],
                None,
                None,
                statistics,
                sums,
                None,
                grad_loss,
                0.1,
                255,
                False,
                0.5,
                stages.MEAN,
                True,
                True,
            )
            runs.append((statistics, positive, sums, *grads))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.fixture
def public_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    from proac_cuda import backends
    from proac_cuda.stages import ops

    if not hasattr(torch.ops.proac_cuda_on_cpu, "class_statistics"):
        library = ops.define_stages("proac_cuda_on_cpu")
        ops.implement_stages(library, kernels, "CPU")
        ops.implement_forward(library, kernels.loss_forward, "CPU")
        public_backend_library.append(library)
    row = backends.Backend("cuda_on_cpu", "proac_cuda_on_cpu", "cpu", lambda device: None)
    monkeypatch.setitem(backends.BACKENDS, "cuda_on_cpu", row)
    return "cuda_on_cpu"


public_backend_library: list[Any] = []


def test_public_function_and_gradcheck(public_backend: str) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, 2, 4, generator=g, dtype=torch.float64, requires_grad=True)
    p = torch.randn(3, 3, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[[0, 1, 2, 0], [1, 255, 2, 1]]])

    def loss(features: Tensor, prototypes: Tensor) -> Tensor:
        return proac_cuda.proac_loss(
            features,
            labels,
            prototypes,
            backend=public_backend,
            temperature=0.5,
            pixel_anchor_weight=0.3,
            num_negatives=3,
            seed=2,
        )

    assert torch.autograd.gradcheck(loss, (x, p))
    assert torch.allclose(
        loss(x, p),
        proac_cuda.proac_loss(
            x, labels, p, backend="reference", temperature=0.5, pixel_anchor_weight=0.3, num_negatives=3, seed=2
        ),
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("classes", "channels", "temperature"),
    [(2, 64, 0.1), (19, 256, 0.05), (40, 64, 0.07), (150, 32, 0.05), (200, 24, 0.03), (300, 16, 0.02)],
)
def test_twin_of_trained_features(
    public_backend: str, classes: int, channels: int, temperature: float, dtype: torch.dtype
) -> None:
    """Each width of the fast path's kernels, and the generic ones."""
    backend = SimpleNamespace(name=public_backend, device=torch.device("cpu"))
    assert_twin_of_trained_features(backend, classes, channels, temperature, dtype)


def test_empty_inputs(public_backend: str) -> None:
    for batch, pixels in ((0, 4), (2, 0)):
        x = torch.randn(batch, 8, pixels, requires_grad=True)
        labels = torch.zeros(batch, pixels, dtype=torch.int64)
        loss = proac_cuda.proac_loss(x, labels, torch.eye(8)[:3], backend=public_backend)
        loss.backward()
        assert loss == 0 and x.grad is not None and x.grad.shape == x.shape


@pytest.mark.slow
def test_under_sanitizers() -> None:
    """A subset again, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    from cuda_on_cpu import build

    def library(name: str) -> str:
        command = ["g++", f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # With the C++ library behind it: the sanitizer has to find what throws exceptions before anything is thrown.
    runtime = f"{library('libasan.so')}:{library('libstdc++.so.6')}"
    module = build.build(sanitize=True)
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "PROAC_CUDA_ON_CPU": str(module),
    }
    chosen = "test_thread_orders and 2-3 or test_norms or test_options and twin or test_many"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--slow",
        "--capture=sys",  # a report ends the process: let it through
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        str(Path(__file__).resolve()),
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2]
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
