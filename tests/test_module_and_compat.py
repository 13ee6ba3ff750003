"""The module's state, and the drop-in for the published class against its own answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import proac_cuda
from proac_cuda import ProACLoss
from proac_cuda.compat import PixelContrastLoss

GOLDEN = sorted((Path(__file__).parent / "data").glob("*.npz"))


def test_prototypes_are_a_float32_buffer_that_travels():
    module = ProACLoss(4, 8, prototype_seed=3, class_weight=torch.ones(4))
    assert set(module.state_dict()) == {"prototypes", "class_weight"} and not list(module.parameters())
    other = ProACLoss(4, 8, prototype_seed=4, class_weight=torch.zeros(4))
    assert not torch.equal(module.prototypes, other.prototypes)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module.prototypes, other.prototypes) and torch.equal(module.class_weight, other.class_weight)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_prototypes_stay_float32(learnable, cast):
    module = ProACLoss(4, 8, learnable=learnable, class_weight=torch.ones(4))
    expected = module.prototypes.detach().clone()
    getattr(module, cast)()
    assert module.prototypes.dtype == module.class_weight.dtype == torch.float32
    assert torch.equal(module.prototypes, expected)
    assert isinstance(module.prototypes, torch.nn.Parameter) == learnable
    assert module.to("meta").prototypes.device.type == "meta"


def test_given_prototypes_are_copied():
    prototypes = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    module = ProACLoss(3, 5, prototypes=prototypes)
    with torch.no_grad():
        prototypes.zero_()
    assert module.prototypes.abs().sum() > 0 and not module.prototypes.requires_grad


def test_default_prototypes_are_uniform():
    cosines = ProACLoss(19, 256).prototypes @ ProACLoss(19, 256).prototypes.T
    torch.testing.assert_close(cosines, torch.eye(19) * (19 / 18) - 1 / 18, atol=1e-6, rtol=0)


def test_repr_says_what_matters():
    assert "num_classes=19, embedding_dim=256, temperature=0.1" in repr(ProACLoss(19, 256))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_answers(path, backend, monkeypatch):
    """Loss to 2e-6 relative, gradient to 1e-5 relative L2, of what the authors' code gives."""
    monkeypatch.setenv("PROAC_BACKEND", backend.name)
    data = np.load(path)
    features = torch.tensor(data["features"], device=backend.device, requires_grad=True)
    labels, queue = (torch.tensor(data[name], device=backend.device) for name in ("labels", "prototypes"))
    loss = PixelContrastLoss()(features, labels, queue)
    loss.backward()
    assert abs(loss.item() - float(data["loss"])) <= 2e-6 * float(data["loss"])
    expected = torch.tensor(data["grad"])
    assert (features.grad.cpu() - expected).norm() <= 1e-5 * expected.norm()


def test_compat_takes_what_the_published_class_takes():
    features = torch.randn(2, 8, 4, 4)
    labels = torch.randint(0, 3, (2, 8, 8))
    queue = torch.randn(3, 1, 8, requires_grad=True)
    loss_function = PixelContrastLoss({"anything": 1})
    expected = proac_cuda.proac_loss(features, labels, queue.detach().view(3, 8))
    assert torch.equal(loss_function(features, labels.float(), queue), expected)
    assert torch.equal(loss_function(features, labels[:, None].float(), queue), expected)
    labels[0] = -5
    labels[1, :4] = 77
    some = loss_function(features, labels, queue)
    ignored = labels.masked_fill((labels < 0) | (labels > 2), 255)
    assert torch.equal(some, proac_cuda.proac_loss(features, ignored, queue.detach().view(3, 8)))
    assert not some.requires_grad


def test_compat_on_an_ignored_batch():
    features = torch.randn(1, 8, 4, 4, requires_grad=True)
    loss = PixelContrastLoss()(features, torch.full((1, 4, 4), 255), torch.randn(3, 8))
    loss.backward()
    assert loss.item() == 0 and (features.grad == 0).all()
