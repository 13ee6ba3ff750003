"""The module's state, and the drop-in for the published class against its own answers."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import proac_cuda
from proac_cuda import ProACLoss
from proac_cuda.compat import PixelContrastLoss
from proac_cuda.stages import validation

GOLDEN = sorted((Path(__file__).parents[1] / "data").glob("*.npz"))


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


@pytest.mark.parametrize("learnable", [False, True])
def test_prototypes_stay_float32_when_assigned(learnable):
    module = ProACLoss(4, 8, learnable=learnable, class_weight=torch.ones(4))
    state = {name: value.half() for name, value in ProACLoss(4, 8, class_weight=torch.zeros(4)).state_dict().items()}
    torch.nn.Sequential(module).load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=True)
    assert module.prototypes.dtype == module.class_weight.dtype == torch.float32
    assert torch.equal(module.prototypes, state["prototypes"].float()) and not module.class_weight.any()
    assert isinstance(module.prototypes, torch.nn.Parameter) == learnable == module.prototypes.requires_grad


@pytest.mark.parametrize("prototypes", [None, torch.randn(4, 8)], ids=["uniform", "given"])
@pytest.mark.parametrize("learnable", [False, True])
def test_reset_after_to_empty(learnable, prototypes):
    options = {"class_weight": torch.rand(4), "seed": torch.tensor(5), "num_negatives": 3}
    module = ProACLoss(4, 8, prototypes=prototypes, learnable=learnable, **options)
    expected = copy.deepcopy(module)
    module.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (module.prototypes, module.class_weight, module.seed):
            tensor.zero_()
    module.reset_parameters()
    for name in ("prototypes", "class_weight", "seed"):
        assert torch.equal(getattr(module, name), getattr(expected, name))


def test_a_seed_tensor_moves_and_is_not_saved():
    seed = torch.tensor(3)
    module = ProACLoss(4, 8, num_negatives=2, seed=seed)
    assert module.seed is seed, "advanced in place by the caller"
    assert set(module.state_dict()) == {"prototypes"} and module.half().seed.dtype == torch.int64
    assert module.to("meta").seed.device.type == "meta"


@pytest.mark.parametrize("kind", ["meta", "cpu", "cuda"])
def test_tensors_without_values(kind):
    """Meta tensors, and fake ones of a CPU and of a GPU: shapes and dtypes of the loss, the statistics and the gradient."""
    mode = contextlib.nullcontext() if kind == "meta" else FakeTensorMode()
    with mode, torch.device(kind):
        features, labels = (
            torch.empty(2, 8, 4, 5, dtype=torch.bfloat16, requires_grad=True),
            torch.empty(2, 8, 10).long(),
        )
        loss, stats = proac_cuda.proac_loss(
            features, labels, torch.empty(3, 8), num_negatives=4, class_weight=torch.ones(3), return_stats=True
        )
        if kind != "cuda" or torch.cuda.is_available():  # the autograd engine looks for the device itself
            loss.backward()
            assert features.grad.shape == features.shape and features.grad.dtype == torch.bfloat16
    assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == kind
    assert stats.log_z.shape == (3,)


def test_given_prototypes_are_copied():
    prototypes = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    module = ProACLoss(3, 5, prototypes=prototypes)
    with torch.no_grad():
        prototypes.zero_()
    assert module.prototypes.abs().sum() > 0 and not module.prototypes.requires_grad


def test_default_prototypes_are_uniform():
    cosines = ProACLoss(19, 256).prototypes @ ProACLoss(19, 256).prototypes.T
    torch.testing.assert_close(cosines, torch.eye(19) * (19 / 18) - 1 / 18, atol=1e-6, rtol=0)


def test_label_sampling_of_a_module():
    features, labels = torch.randn(2, 8, 4, 4), torch.randint(0, 3, (2, 12, 12))
    weight = torch.rand(labels.shape)
    exact = ProACLoss(3, 8, label_sampling="nearest-exact")
    exact.load_state_dict(ProACLoss(3, 8, prototype_seed=1).state_dict())
    plain = ProACLoss(3, 8, prototypes=exact.prototypes)
    middles = slice(None), slice(1, None, 3), slice(1, None, 3)
    assert torch.equal(exact(features, labels, weight), plain(features, labels[middles], weight[middles]))
    assert torch.equal(plain(features, labels), plain(features, labels[:, ::3, ::3]))
    assert "label_sampling='nearest-exact'" in repr(exact)
    with pytest.raises(ValueError, match="label_sampling.*bicubic"):
        ProACLoss(3, 8, label_sampling="bicubic")


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
    assert torch.equal(loss_function(features, labels.to(torch.uint16), queue), expected)
    assert torch.equal(loss_function(features, labels, queue), loss_function(features, labels[:, ::2, ::2], queue))
    labels[0] = -5
    labels[1, :4] = 77
    some = loss_function(features, labels, queue)
    ignored = labels.masked_fill((labels < 0) | (labels > 2), 255)
    assert torch.equal(some, proac_cuda.proac_loss(features, ignored, queue.detach().view(3, 8)))
    assert not some.requires_grad
    with pytest.raises(ValueError, match=r"queue: expected prototypes of 8 channels.*\(5, 17\)"):
        loss_function(features, labels, torch.randn(5, 17))


def test_channels_in_another_place_are_named():
    proac, labels = ProACLoss(5, 16), torch.randint(0, 5, (2, 8, 8))
    for shape, remedy in (
        ((2, 8, 8, 16), "movedim(-1, 1)"),
        ((2, 64, 16), "transpose(1, 2)"),
        ((16, 8, 8), "features[None]"),
    ):
        with pytest.raises(ValueError, match=f"features: got shape .*{re.escape(remedy)}"):
            proac(torch.randn(shape), labels)
    with pytest.raises(ValueError, match="8 channels .* embedding_dim=8"):
        proac(torch.randn(2, 8, 4, 4), labels)


def test_one_class_has_nothing_to_be_contrasted_with(monkeypatch):
    monkeypatch.setattr(validation, "_warned", set())
    with pytest.warns(UserWarning, match="num_classes=1: .* always 0"):
        ProACLoss(1, 16)


def test_compat_on_an_ignored_batch():
    features = torch.randn(1, 8, 4, 4, requires_grad=True)
    loss = PixelContrastLoss()(features, torch.full((1, 4, 4), 255), torch.randn(3, 8))
    loss.backward()
    assert loss.item() == 0 and (features.grad == 0).all()
