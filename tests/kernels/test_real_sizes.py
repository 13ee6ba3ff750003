"""The compiled kernels at sizes and memory layouts of real networks: on the CPU, and on a GPU where one is.

The truth is the reference in float64, on the same device. `compute_sanitizer.sh` runs the small calls of `test_every_path`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import proac_cuda
from compare import assert_gradient_close, assert_loss_close

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
LAYOUTS = ("planes", "channels_last")
#: Of the elements between two rows (channels, or pixels where the channels are contiguous), and before the first one.
#: The first is aligned to 16 bytes in every row, so that the kernels copy 16 bytes at a time; the others are not.
PLACES = {"aligned": (0, 0), "base off by one element": (0, 1), "odd stride": (1, 0), "both": (3, 1)}
EVERYTHING: dict[str, Any] = {
    "num_negatives": 200,
    "seed": 3,
    "pixel_anchor_weight": 0.3,
    "negative_reduction": "mean",
    "weights": True,
}


@dataclass
class Call:
    """One call. ``options`` may hold "weights", which makes weights of pixels and classes."""

    reason: str
    channels: int = 256
    classes: int = 19
    dtype: torch.dtype = BFLOAT16
    layout: str = "planes"
    place: str = "aligned"
    pixels: tuple[int, ...] = (2, 3072)  #: batch, pixels of an image
    learnable: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = (self.reason, f"D={self.channels}", f"K={self.classes}", str(self.dtype)[6:], self.layout, self.place)
        return "-".join(words).replace(" ", "-")


def place(values: Tensor, layout: str, extra: int, offset: int) -> Tensor:
    """The same values (B, D, P) with ``extra`` elements after each row, the first one ``offset`` elements into its memory."""
    rows = values if layout == "planes" else values.transpose(1, 2)
    batch, count, length = rows.shape
    memory = values.new_zeros(offset + batch * count * (length + extra))
    view = memory[offset:].view(batch, count, length + extra)[..., :length]
    view.copy_(rows)
    return view if layout == "planes" else view.transpose(1, 2)


def compare(call: Call, backend: str, device: str) -> None:
    """Loss and gradients against the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    batch, pixels = call.pixels
    values = torch.randn(batch, call.channels, pixels, generator=generator).to(device, call.dtype)
    x = place(values, call.layout, *PLACES[call.place]).requires_grad_()
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    p = (
        torch.randn(call.classes, call.channels, generator=generator, dtype=wide)
        .to(device)
        .requires_grad_(call.learnable)
    )
    labels = torch.randint(0, call.classes, (batch, pixels), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = -1
    labels = labels.to(device)
    options = {"ignore_index": -1, **call.options}
    if options.pop("weights", False):
        options["pixel_weight"] = torch.rand(batch, pixels, generator=generator).to(device)
        options["class_weight"] = torch.rand(call.classes, generator=generator).to(device)
    wanted = (x, p) if call.learnable else (x,)
    upstream = 1.7  # a gradient that ignored it would be off by much more than the tolerances
    loss = proac_cuda.proac_loss(x, labels, p, backend=backend, **options)
    found = torch.autograd.grad(loss * upstream, wanted)
    exact = tuple(t.detach().double().requires_grad_() for t in (x, p))
    truth = proac_cuda.proac_loss(exact[0], labels, exact[1], backend="reference", **options)
    expected = torch.autograd.grad(truth * upstream, exact[: len(wanted)])
    assert found[0].stride() == torch.empty_like(x).stride()
    assert_loss_close(loss, truth.cpu(), call.dtype, 0.1, call.channels)
    assert_gradient_close(found[0], expected[0].cpu(), 0.1)
    if call.learnable:
        error = (found[1].double() - expected[1]).norm() / expected[1].norm()
        assert error <= {torch.float64: 1e-12, FLOAT32: 4.1e-5}.get(call.dtype, 2e-4), error


def _each(**choices: Any) -> list[dict[str, Any]]:
    """All combinations."""
    combinations: list[dict[str, Any]] = [{}]
    for name, values in choices.items():
        combinations = [{**given, name: value} for given in combinations for value in values]
    return combinations


CALLS = [
    # Whether rows are copied 16 bytes at a time, and what that reads at their ends, depends on where they begin.
    *(Call("layout", **c) for c in _each(layout=LAYOUTS, place=PLACES, dtype=(BFLOAT16, FLOAT32, torch.float16))),
    # With many channels not all prototypes stay in shared memory, and a tile of pixels shrinks to what is left.
    *(Call("channels", **c) for c in _each(channels=(512, 768, 1024), layout=LAYOUTS, dtype=(BFLOAT16, FLOAT32))),
    # Kernels are compiled for up to so many classes: the last that one takes, and the first of the next.
    *(
        Call("classes", **c)
        for c in _each(classes=(24, 25, 64, 65, 256, 257), layout=LAYOUTS, dtype=(BFLOAT16, FLOAT32))
    ),
    # Without the prototypes' gradient other kernels run.
    *(Call("fixed prototypes", learnable=False, **c) for c in _each(classes=(19, 150), layout=LAYOUTS)),
    *(
        Call("options", options=EVERYTHING, **c)
        for c in _each(classes=(19, 150), layout=LAYOUTS, dtype=(BFLOAT16, FLOAT32))
    ),
]

#: Small, since a sanitizer makes them a hundred times slower: a tile and a part of one.
TILE = (1, 150)
PATHS = [
    Call("prototypes stay in shared memory", channels=64, pixels=TILE),
    Call("prototypes stay in shared memory", channels=64, pixels=TILE, learnable=False, layout="channels_last"),
    Call("prototypes pass through a ring", channels=1024, pixels=TILE),
    Call("prototypes pass through a ring", channels=512, dtype=FLOAT32, pixels=TILE, layout="channels_last"),
    Call("prototypes pass through a ring", classes=150, pixels=TILE, learnable=False),
    Call("prototypes pass through a ring", classes=256, dtype=FLOAT32, pixels=TILE),
    Call("sampled with twin and weights", channels=64, pixels=TILE, options=EVERYTHING | {"num_negatives": 20}),
    Call("unaligned", channels=61, pixels=TILE, place="both"),
    Call("beyond the fast path", channels=1030, dtype=FLOAT32, pixels=TILE),
    Call("beyond the fast path", channels=40, classes=260, pixels=TILE, layout="channels_last"),
    Call("double precision", channels=40, dtype=torch.float64, pixels=TILE),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_layouts_channels_and_classes(kernels: Any, call: Call) -> None:
    if kernels.device == "cpu":  # whose kernels have no such borders at many pixels
        call = dataclasses.replace(call, pixels=(2, 300))
    compare(call, kernels.name, kernels.device)


@pytest.mark.parametrize("call", PATHS, ids=str)
def test_every_path(kernels: Any, call: Call) -> None:
    compare(call, kernels.name, kernels.device)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [19, 150])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_a_batch_of_crops(kernels: Any, dtype: torch.dtype, layout: str, classes: int) -> None:
    """As many pixels as fill a GPU with blocks several times over, and prototypes that learn."""
    compare(Call("crops", classes=classes, dtype=dtype, layout=layout, pixels=(4, 16384)), kernels.name, kernels.device)
