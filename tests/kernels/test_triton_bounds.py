"""No Triton kernel reads or writes beside its arrays; accesses that do are found."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton_bounds  # noqa: E402
from proac_cuda.backends.triton import (  # noqa: E402
    backward,
    forward,
    launch,
    loss,
    merge_statistics,
    prepare,
    prototype_gradient,
    selection,
    tiles,
)
from proac_cuda.backends.triton import gradient_by_classes as by_classes  # noqa: E402

MODULES = forward, merge_statistics, loss, backward, by_classes, prepare, prototype_gradient, selection
KERNELS = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
BACKWARD = {
    "held": {"DO": 32, "HELD": 16},
    "rows": {"DO": 32, "HELD": 32, "PIXEL_ROWS": True},
    "streamed": {"DO": 16},
    "kept": {"KEPT": 16},
}
CLASSES, CHANNELS = 18, 20  # both beyond one block of 16, and ragged


def _step(bounds, monkeypatch, backward_sizes, channels_last=False, prototype_channels=16):
    """A step with every option through all stages: pixels, classes, channels, chunks ragged."""
    monkeypatch.setattr(launch, "run", bounds.run)
    monkeypatch.setattr(tiles, "MAX_CHUNKS", 2)
    monkeypatch.setattr(tiles, "PROTOTYPE_PROGRAMS", 8)
    monkeypatch.setattr(tiles, "forward_tiles", lambda *_: tiles.Tiles(16, 16, 16, 4, 1, BLOCKS=1))
    monkeypatch.setattr(tiles, "backward_tiles", lambda *_: tiles.Tiles(16, 32, 16, 4, 1, **backward_sizes))
    monkeypatch.setattr(tiles, "prototype_tiles", lambda *_: tiles.Tiles(16, 16, 16, 4, 1, DO=prototype_channels))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, CHANNELS, 3, 7, generator=generator)
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    labels = torch.randint(-1, CLASSES + 1, (2, 5, 9), generator=generator)
    weight = torch.rand(labels.shape, generator=generator)
    prototypes = torch.randn(CLASSES, CHANNELS, generator=generator)
    class_weight, rng_state = torch.rand(CLASSES, generator=generator), torch.tensor([4, 0])
    pixels = features, labels, weight
    thresholds = launch.select_negatives(*pixels, rng_state, 9, CLASSES, 255)
    sets = thresholds, rng_state
    statistics, positive, _ = launch.class_statistics(*pixels, prototypes, *sets, 0.1, 255, True, True)
    sums = launch.positive_sums(positive, labels, weight, statistics, 255, True)
    launch.reduce_loss(statistics, sums, class_weight, 0.5, 1)
    launch.loss_gradients(
        *pixels, prototypes, *sets, statistics, sums, class_weight, torch.ones(()), 0.1, 255, True, 0.5, 1, True, True
    )


def test_every_kernel_stays_within_its_arrays(monkeypatch):
    bounds = triton_bounds.Bounds()
    for sizes in BACKWARD.values():
        _step(bounds, monkeypatch, sizes)
    _step(bounds, monkeypatch, BACKWARD["kept"], channels_last=True, prototype_channels=32)
    assert bounds.kernels == KERNELS


FAULTS = [
    ("forward", "tl.sum(own_s, 0), mask=inside & ours)", "tl.sum(own_s, 0), mask=ours)"),
    ("merge_statistics", "HARDEST_NEGATIVE * K + k, hardest, mask=k < K)", "HARDEST_NEGATIVE * K + k, hardest)"),
    ("loss", "s = tl.load(positive + index, mask=inside, other=0.0)", "s = tl.load(positive + index)"),
    ("forward", "top + tl.log(total), mask=inside)", "top + tl.log(total))"),
    ("backward", "mask=(d < CASE.D)[:, None] & inside[None, :],", "mask=(d >= 0)[:, None] & inside[None, :],"),
    ("prepare", "tl.store(norms + k, norm, mask=k < K)", "tl.store(norms + k, norm)"),
    (
        "loss",
        "mask = (c < chunks)[:, None] & (k < K)[None, :]",
        "mask = (c < chunks + 1)[:, None] & (k < K)[None, :]",
    ),
    ("prototype_gradient", "mask=(k < K)[:, None] & (d < D)[None, :]", "mask=(k < K)[:, None]"),
    ("prototype_gradient", "* D + d, mask=d < D, other=0.0) * inverse", "* D + d) * inverse"),
    ("selection", "tl.load(thresholds + 2 * k, mask=k < K, other=-1)", "tl.load(thresholds + 2 * k)"),
    ("selection", "mask=kept, sem", "mask=inside, sem"),
]


@pytest.mark.parametrize("module, right, wrong", FAULTS, ids=lambda value: value[:40])
def test_planted_faults_are_found(module, right, wrong, monkeypatch, tmp_path):
    """A mask left out in a copy of a kernel file."""
    source = Path(getattr(launch, module).__file__).read_text()
    assert right in source
    path = tmp_path / f"{module}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"proac_cuda.backends.triton.wrong_{module}", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    monkeypatch.setattr(launch, module, copy)
    with pytest.raises(Exception, match="lie in no array"):
        _step(triton_bounds.Bounds(), monkeypatch, BACKWARD["kept"])
