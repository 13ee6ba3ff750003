"""The CPU kernels as a program without PyTorch, against the reference: for Arm too, where a compiler and qemu are at hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cpu_program import stages as program
from stage_comparison import OPTIONS, compare, make_aligned_case, make_case

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=program.PROCESSORS)
def computed(request: pytest.FixtureRequest) -> Iterator[program.Program]:
    missing = program.missing(request.param)
    if missing:
        pytest.skip(f"not on the path: {', '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    found = program.Program(request.param)
    assert found.kernels == "baseline"  # 16 bytes: SSE2, or NEON
    yield found
    found.close()


@pytest.mark.parametrize("layout", ["planes", "channels_last", "slice"])
@pytest.mark.parametrize("dtype", TYPES)
# few of both (of one channel the gradient is 0, which has no relative error); one class; odd numbers; more channels than are
# summed at a time; more classes than vectors hold; float32 products large enough for a tile unit, with a tile to spare
@pytest.mark.parametrize("channels,num_classes", [(2, 2), (7, 5), (33, 1), (300, 19), (48, 150), (70, 65)])
def test_shapes_and_layouts(computed: Any, dtype: torch.dtype, layout: str, channels: int, num_classes: int) -> None:
    compare(computed, make_case(dtype, channels, num_classes, layout=layout))


@pytest.mark.parametrize("spatial,batch", [((1,), 1), ((31,), 1), ((4097,), 1), ((3, 4, 5), 3), ((1, 1), 5)])
def test_pixel_counts(computed: Any, spatial: tuple[int, ...], batch: int) -> None:
    compare(computed, make_case(torch.bfloat16, 8, 3, spatial=spatial, batch=batch))
    compare(computed, make_case(torch.float32, 8, 3, spatial=spatial, batch=batch, layout="channels_last"))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(computed: Any, dtype: torch.dtype, name: str) -> None:
    options: dict[str, Any] = dict(OPTIONS[name])
    make = {key: options.pop(key) for key in ("weights", "label_spatial") if key in options}
    compare(computed, make_case(dtype, 64, 70, **make), **options)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("noise", [0.3, 1.0])
@pytest.mark.parametrize("num_classes", [19, 150])
@pytest.mark.parametrize("learnable", [True, False])
def test_features_near_their_prototypes(
    computed: Any, dtype: torch.dtype, noise: float, num_classes: int, learnable: bool
) -> None:
    compare(computed, make_aligned_case(dtype, 256, num_classes, noise=noise), learnable=learnable)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_features_on_their_prototypes(computed: Any, dtype: torch.dtype, temperature: float) -> None:
    """Cosine 0.99995: a pixel's own class, whose dS is the largest by far, leaves less of the gradient than the others."""
    compare(computed, make_aligned_case(dtype, 256, 150, pixels=1024, noise=0.01), temperature=temperature)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int16, torch.int32])
def test_label_dtypes(computed: Any, label_dtype: torch.dtype) -> None:
    compare(computed, make_case(torch.float32, 8, 19, label_dtype=label_dtype))


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_temperatures(computed: Any, dtype: torch.dtype, temperature: float) -> None:
    compare(computed, make_case(dtype, 16, 5, weights=True), temperature=temperature)


def test_errors_come_back(computed: Any) -> None:
    case = make_case(torch.float32, 8, 3)
    with pytest.raises(RuntimeError, match="labels must be uint8"):
        options = (0.1, 255, False, True, False)
        computed.class_statistics(
            case["features"], case["labels"].float(), None, case["prototypes"], None, None, *options
        )
