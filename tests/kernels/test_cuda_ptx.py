"""nvcc's PTX of the CUDA kernels in an interpreter: right, without races, and with the memory traffic that they claim."""

from __future__ import annotations

import pytest
import torch

import ptx_replay

if ptx_replay.why_not():
    pytest.skip(str(ptx_replay.why_not()), allow_module_level=True)
from cuda_on_cpu import stages as kernels  # noqa: E402
from ptx_call import Call  # noqa: E402
from stage_comparison import (  # noqa: E402
    make_aligned_case,
    make_case,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels,num_classes", [(64, 19), (40, 50), (48, 150)])
def test_right_and_without_races(dtype: torch.dtype, layout: str, channels: int, num_classes: int) -> None:
    case = make_case(dtype, channels, num_classes, spatial=(200,), batch=1, layout=layout, weights=True)
    call = Call(case, alpha=0.3, learnable=num_classes > 19)
    call.check()
    assert call.forward_launches == 3 and call.backward_launches == 2 + (num_classes > 19)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sampled_and_learnable(dtype: torch.dtype) -> None:
    case = make_case(dtype, 24, 5, spatial=(150,), batch=2)
    call = Call(case, num_negatives=9, learnable=True)
    call.check()
    assert call.forward_launches == 3 and call.backward_launches == 3
    stage_by_stage = Call(case, num_negatives=9, learnable=True, by_stages=True)
    stage_by_stage.check()
    for name, values in stage_by_stage.out.items():
        assert torch.equal(values, call.out[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merges_of_groups(dtype: torch.dtype) -> None:
    """So many blocks that the last ones of groups merge first, both of stage (i) and of stage (ii)."""
    call = Call(make_case(dtype, 8, 5, spatial=(4400,), batch=1, weights=True))
    call.check()
    blocks = [counters.blocks for name, counters, _ in call.replay.counters[1:3]]
    assert min(blocks) > 16, blocks


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unaligned_rows(dtype: torch.dtype, layout: str) -> None:
    """Each copy is aligned, and none reads beside the features; forward takes few instructions more than for whole rows."""
    Call(make_case(dtype, 33, 7, spatial=(7, 11), batch=3, layout=layout)).check()
    instructions = []
    for pixels, channels in ((256, 64), (255, 64) if layout == "planes" else (256, 63)):
        call = Call(make_case(dtype, channels, 7, spatial=(pixels,), batch=1, layout=layout))
        call.check()
        (forward,) = (counters for name, counters, _ in call.replay.counters if "fast_statistics" in name)
        instructions.append(forward.warp_instructions)
    assert instructions[1] <= (1.2 if layout == "planes" else 1.4) * instructions[0], instructions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_path(dtype: torch.dtype) -> None:
    Call(make_case(dtype, 8, 260, spatial=(70,), batch=1), alpha=0.5).check()


@pytest.mark.parametrize(
    ("dtype", "channels", "layout", "noise", "mode"),
    [
        (torch.bfloat16, 256, "planes", 0.3, "truncate"),
        (torch.float32, 256, "channels_last", 0.3, "truncate"),
        *(
            pytest.param(
                *(dtype, channels, layout, noise, mode),
                marks=()
                if mode == "truncate"
                and noise == 0.01
                and layout == "planes"
                and dtype != torch.float16
                # the size of the authors' features, and the most channels: the longest sums
                and channels in (256, 1024)
                else pytest.mark.exhaustive,
            )
            for mode in ("truncate", "exact")
            for noise in (0.01, 1.0)
            for dtype in (torch.float16, torch.bfloat16, torch.float32)
            for channels in (64, 256, 512, 768, 1024)
            for layout in ("planes", "channels_last")
        ),
    ],
)
def test_tensor_cores_that_truncate(dtype: torch.dtype, channels: int, layout: str, noise: float, mode: str) -> None:
    """The contract's table for features near their prototypes, in both models of the tensor cores' sums: real ones lie between
    them."""
    Call(make_aligned_case(dtype, channels, noise=noise, layout=layout), learnable=True, tensor_core=mode).check()


def traffic(
    dtype: torch.dtype,
    layout: str,
    num_classes: int,
    pixels: int = 4096,
    channels: int = 256,
    learnable: bool = False,
    multiprocessors: int = 132,
) -> dict[str, dict[str, float]]:
    """Bytes per array over the features' bytes, for the two kernels that read the features."""
    case = make_case(dtype, channels, num_classes, spatial=(pixels,), batch=1, layout=layout)
    call = Call(case, hardest=False, learnable=learnable, nbytes=1 << 29, multiprocessors=multiprocessors)
    call.check()
    size = case["features"].numel() * case["features"].element_size()
    out = {}
    for name, counters, arrays in call.replay.counters:
        if "fast_" not in name:
            continue
        stage = "forward" if "statistics" in name else "backward"
        x, grad = (
            arrays["features"],
            arrays.get("grad", {"write_sectors": 0, "read_footprint": 0, "write_footprint": 0}),
        )
        total = counters.global_read_footprint + counters.global_write_footprint
        named = [v for key, v in arrays.items() if key not in ("features", "grad")]
        sectors_of_named = sum(v["read_sectors"] + v["write_sectors"] for v in named)
        rest = (
            counters.global_read_sectors
            + counters.global_write_sectors
            - x["read_sectors"]
            - grad["write_sectors"]
            - sectors_of_named
        )
        out[stage] = {
            "features read": x["read_sectors"] * 32 / size,
            "gradient written": grad["write_sectors"] * 32 / size,
            "other footprint": (total - x["read_footprint"] - grad["write_footprint"]) * 32 / size,
            "workspace sectors": rest * 32 / size,  # prototypes and partial sums
            "shared wavefronts": counters.bank_conflict_ratio,
        }
    return out


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
@pytest.mark.parametrize(
    ("num_classes", "dtype"),
    [
        (19, torch.bfloat16),
        (19, torch.float32),
        (150, torch.bfloat16),
        (150, torch.float32),
    ],
)
def test_traffic(dtype: torch.dtype, layout: str, num_classes: int) -> None:
    few = num_classes == 19
    # Two multiprocessors for 1,024 pixels are what 132 are for 65,536: a resident block takes two tiles.
    size = {"pixels": 1024, "multiprocessors": 2} if few else {"pixels": 4096}
    for stage, row in traffic(dtype, layout, num_classes, **size).items():
        assert row["features read"] <= 1.05, (stage, row)
        assert row["gradient written"] <= 1.02, (stage, row)
        assert row["shared wavefronts"] <= 1.15, (stage, row)
        if few:
            assert row["workspace sectors"] <= 0.4, (stage, row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_traffic_of_learnable_prototypes(dtype: torch.dtype) -> None:
    row = traffic(dtype, "planes", 19, pixels=1024, learnable=True)["backward"]
    assert row["features read"] <= 1.05 and row["gradient written"] <= 1.02 and row["shared wavefronts"] <= 1.15, row


@pytest.mark.parametrize(
    ("dtype", "channels", "num_classes", "pixels"),
    [
        (torch.bfloat16, 1000, 40, 32),
        (torch.bfloat16, 1020, 250, 16),
        (torch.float32, 300, 19, 32),
        (torch.float32, 1000, 19, 16),
    ],
)
def test_small_tiles_of_planes(dtype: torch.dtype, channels: int, num_classes: int, pixels: int) -> None:
    """Rows shorter than all banks, which GPUs of 99 KB take for many channels: right, and without bank conflicts."""
    from cuda_plans import plan

    assert plan(120, str(dtype).removeprefix("torch."), channels, num_classes, 0)["pixels"] == pixels
    case = make_case(dtype, channels, num_classes, spatial=(64,), batch=1)
    call = Call(case, hardest=False, shared_limit=99 << 10)
    call.check()
    for name, counters, _ in call.replay.counters:
        if "fast_" in name:
            assert counters.bank_conflict_ratio <= 1.05, (name, counters)


# Warp instructions for 16 pixels, forward and backward (tests/instruction_counts.py). Lower them with the kernels.
INSTRUCTIONS = {
    (torch.bfloat16, 19): (1860, 3720),
    (torch.float32, 19): (3590, 6580),
    (torch.bfloat16, 150): (5610, 9790),
    (torch.float32, 150): (11880, 23520),
}


@pytest.mark.parametrize(
    ("dtype", "num_classes"),
    [
        (torch.bfloat16, 19),
        (torch.float32, 19),
        (torch.bfloat16, 150),
        (torch.float32, 150),
    ],
)
def test_instructions(dtype: torch.dtype, num_classes: int) -> None:
    """No more than csrc/README.md says, and no bank conflicts."""
    from instruction_counts import counts

    found = counts(dtype, num_classes)
    for stage, most in zip(("forward", "backward"), INSTRUCTIONS[dtype, num_classes], strict=True):
        assert found[stage].instructions <= most, (stage, found[stage])
        assert found[stage].wavefronts <= 1.05 * found[stage].ideal_wavefronts, (stage, found[stage])


def test_bytes_between_arguments_are_no_pointers() -> None:
    """A launch is recorded with zeros there: bytes like an array's address would be moved, and a flag beside them be set."""
    pointer = 0x7F12345678AB00
    kernels.module.take_launches()
    kernels.module.launch_padded(pointer)
    ((_, _, _, _, arguments),) = kernels.module.take_launches()
    assert arguments == pointer.to_bytes(8, "little") + bytes(8)


if __name__ == "__main__":
    for classes in (19, 150):
        for feature_type in (torch.bfloat16, torch.float32):
            for order in ("planes", "channels_last"):
                for stage, row in traffic(feature_type, order, classes).items():
                    print(
                        f"K={classes} {feature_type} {order} {stage}: "
                        + ", ".join(f"{k} {v:.3f}" for k, v in row.items()),
                        flush=True,
                    )
