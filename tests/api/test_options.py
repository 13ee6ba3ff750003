"""Every option of the loss does something, in the function and in the module, and no list of the tests leaves one out."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bad_input import TYPE_ERRORS, VALUE_ERRORS

import fuzz_problems
import oracle
import proac_cuda
from proac_cuda.stages.options import LOSS_OPTIONS

# A value that is not the default, with what else a call needs for it to matter.
CHANGES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.3},
    "ignore_index": {"ignore_index": 1},  # a class, with a warning
    "num_negatives": {"num_negatives": 3, "seed": 0},
    "negative_reduction": {"negative_reduction": "mean"},
    "pixel_anchor_weight": {"pixel_anchor_weight": 1.0},
    "label_sampling": {"label_sampling": "nearest-exact"},
    "seed": {"num_negatives": 3, "seed": 1},
    "reduction": {"reduction": "sum"},
}
ELSEWHERE = {"process_group"}  # needs ranks: test_distributed.py


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, 5, 7, generator=generator)
    return features, torch.randint(0, 3, (2, 10, 14), generator=generator), torch.randn(3, 6, generator=generator)


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_an_option_does_something(name):
    if name in ELSEWHERE:
        return
    features, labels, prototypes = problem()
    change = CHANGES[name]
    usual = {key: value for key, value in change.items() if key != name}
    if name == "seed":
        usual["seed"] = 0
    found, without = (proac_cuda.proac_loss(features, labels, prototypes, **options) for options in (change, usual))
    assert not torch.isclose(found, without), "the value did not reach the formula"
    module = proac_cuda.ProACLoss(3, 6, prototypes=prototypes, **change)
    assert torch.equal(module(features, labels), found)


@pytest.mark.parametrize("name", [name for name in LOSS_OPTIONS if name not in ELSEWHERE])
def test_an_option_is_tested(name):
    assert name in inspect.signature(oracle.loss).parameters
    assert f'"{name}"' in Path(fuzz_problems.__file__).read_text(), "drawn at random"
    rows = [arguments for arguments, _ in (*VALUE_ERRORS.values(), *TYPE_ERRORS.values())]
    assert any(name in arguments for arguments in rows), "bad values"
