"""The regularizer on a model's layer: passes, copies, exports, checkpoints, ranks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import proac_cuda
from proac_cuda import ProACRegularizer, ProjectionHead
from ranks import run_ranks
from regularizer_models import Network, batch


def test_three_lines():
    torch.manual_seed(0)
    model, (images, labels) = Network(), batch()
    keys = set(model.state_dict())
    proac = ProACRegularizer(model, layer="backbone", num_classes=5, embedding_dim=8)
    optimizer = torch.optim.SGD([*model.parameters(), *proac.parameters()], lr=0.5)
    values = []
    for _ in range(20):
        logits = model(images)
        term = proac(labels)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(nn.functional.interpolate(logits, (16, 20)), labels) + 0.1 * term).backward()
        optimizer.step()
        values.append(term.item())
    assert values[-1] < values[0]
    assert set(model.state_dict()) == keys, "the model's checkpoint stays what it was"
    assert model.backbone[0].weight.grad.abs().sum() > 0


def test_it_is_the_loss_of_the_projected_layer():
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8, head="mlp", temperature=0.2)
    model(images)
    expected = proac_cuda.proac_loss(
        proac.head(model.eval().train().backbone(images)), labels, proac.loss.prototypes, temperature=0.2
    )
    torch.testing.assert_close(proac(labels), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"in_channels": 0}, "in_channels: got 0"),
        ({"in_channels": 8.0}, "in_channels: got 8.0"),
        ({"embedding_dim": -1}, "embedding_dim: got -1"),
        ({"select": "out"}, "select: expected a function"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_one_that_cannot_be_made_leaves_the_model_as_it_was(options, message):
    model = Network()
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        ProACRegularizer(model, "backbone", 5, **options)
    assert not model.backbone._forward_hooks


def test_a_regularizer_whose_model_is_gone_says_so():
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone", 5)
    model = copy.deepcopy(model)
    model(images)
    with pytest.raises(RuntimeError, match="the model that it was made for is gone"):
        proac(labels)


def test_a_call_without_a_batch_says_so():
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone", 5)
    with pytest.raises(RuntimeError, match="has not run"):
        proac(labels)
    with torch.no_grad():
        model(images)
    with pytest.raises(RuntimeError, match="gradients enabled"):
        proac(labels)
    model(images)
    proac(labels)
    with pytest.raises(RuntimeError, match="once for each"):
        proac(labels)
    model(images)
    proac.remove()
    with pytest.raises(RuntimeError, match="has not run"):  # an activation of before is gone, too
        proac(labels)
    model(images)
    with pytest.raises(RuntimeError, match="has not run"):
        proac(labels)


def test_model_on_the_meta_device():
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8).to("meta")
    model.to("meta")(images.to("meta"))
    loss = proac(labels.to("meta"))
    assert loss.device.type == "meta" and loss.shape == ()


@pytest.mark.parametrize("select", [None, lambda output: output[:, :6], lambda output: output.unsqueeze(0)[0]])
def test_output_changed_in_place(select):
    """The head would see what the next module made of it."""
    model, (images, labels) = Network(), batch()
    model.backbone[2] = nn.ReLU(inplace=True)
    channels = 6 if select is not None and select(torch.empty(1, 12)).shape == (1, 6) else 12
    proac = ProACRegularizer(model, "backbone.1", 5, embedding_dim=8, select=select, in_channels=channels)
    model(images)
    with pytest.raises(RuntimeError, match=r"'backbone.1' was changed in place.*ReLU\(inplace=False\)"):
        proac(labels)
    model.backbone[2] = nn.ReLU()
    model(images)
    proac(labels).backward()
    with torch.inference_mode():  # such tensors do not count
        model(images)
        assert proac(labels) > 0


def test_frozen_layer_trains_the_head():
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    model.backbone.requires_grad_(False)
    model(images)
    proac(labels).backward()
    assert proac.head[0].weight.grad.abs().sum() > 0


def test_validation_gives_the_same_number_without_gradients():
    model, (images, labels) = Network().eval(), batch()
    proac = ProACRegularizer(model, "backbone", 5)
    model(images)
    expected = proac(labels)
    proac.eval()
    with torch.no_grad():
        model(images)
        value = proac(labels)
    assert torch.equal(value, expected.detach()) and not value.requires_grad


def _run_twice(model, images):
    model(images)
    model(images.flip(0))


def test_two_passes_before_a_call():
    """The loss would be of the last one alone; what was discarded, or whose backward pass is over, does not count."""
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    first = model(images)
    second = model(images.flip(0))
    with pytest.raises(RuntimeError, match="has run 2 times with gradients .*discard()"):
        proac(labels)
    with pytest.raises(RuntimeError, match="has not run"):
        proac(labels)
    del first, second
    model(images)
    expected = proac(labels)
    kept = [model(images.flip(0))]
    proac.discard()
    kept.append(model(images))
    torch.testing.assert_close(proac(labels), expected)
    for _ in range(3):  # steps that do without the term: a warm-up
        loss = model(images).mean()
        loss.backward()
    model(images)
    torch.testing.assert_close(proac(labels), expected)
    for _ in range(3):  # validation that left gradients on
        logits = model(images)
    torch.testing.assert_close(proac(labels), expected)
    assert logits is not None
    both = [model(images), proac(labels), model(images), proac(labels)]  # two views, as it should be
    torch.testing.assert_close(both[1], both[3])
    model.backbone.requires_grad_(False)
    _run_twice(model, images)  # of a frozen layer nothing tells whether a pass is over
    with pytest.raises(RuntimeError, match="has run 2 times"):
        proac(labels)


def test_a_pass_without_gradients_in_between():
    """A teacher that shares the model, or logging: the loss is that of the pass with gradients."""
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    model(images)
    expected = proac(labels)
    expected_gradient = torch.autograd.grad(expected, model.backbone[0].weight)[0]
    for mode, other_mode in ((True, True), (False, True), (False, False)):
        model.train()
        model(images)
        model.train(mode)
        proac.train(other_mode)
        with torch.no_grad():
            model(images.flip(0))
        model.train()
        proac.train()
        value = proac(labels)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, model.backbone[0].weight)[0], expected_gradient)
    model.train()
    model(images).mean().backward()  # a step without the term, and then a pass that cannot train
    with torch.no_grad():
        model(images)
    with pytest.raises(RuntimeError, match=r"no gradient.*torch.no_grad\(\)"):
        proac(labels)
    model(images)
    with torch.no_grad():  # the latest pass where no gradient is asked for
        model(images.flip(0))
        torch.testing.assert_close(proac(labels.flip(0)), expected.detach())


def test_a_layer_that_was_replaced():
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone.1", 5, embedding_dim=8)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.backbone[1] = nn.Identity()  # which runs without a GPU
    model(images)
    with pytest.raises(RuntimeError, match="has another module in its place.*convert_sync_batchnorm"):
        proac(labels)
    model = Network()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # within the layer: no matter
    assert proac._tap in model.backbone._forward_hooks.values()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda proac: pickle.loads(pickle.dumps(proac))])
def test_a_copy_without_its_model(make):
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    model(images)
    copied = make(proac)
    with pytest.raises(RuntimeError, match="copy or was unpickled.*together with its model.*state_dict"):
        copied(labels)
    value = proac(labels)
    other = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    other.load_state_dict(copied.state_dict())
    model(images)
    torch.testing.assert_close(other(labels), value)


def test_evaluation_keeps_no_map():
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    model.eval()
    with torch.no_grad():
        model(images)
        assert proac._tap.is_empty
        with pytest.raises(RuntimeError, match=r"in evaluation mode and without gradients.*its eval\(\)"):
            proac(labels)
        proac.eval()
        model(images)
        assert proac(labels) > 0 and proac._tap.is_empty
        model(images)
        proac.train()
        assert proac._tap.is_empty, "what evaluation left goes when training goes on"


def test_exports_leave_nothing():
    model, (images, labels) = Network().eval(), batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    for strict in (False, True):
        torch.export.export(model, (images,), strict=strict)
        assert proac._tap.is_empty
    torch.jit.trace(model, (images,))
    assert proac._tap.is_empty
    model(images)
    assert proac(labels).isfinite()


def test_onnx_export_leaves_nothing(tmp_path):
    pytest.importorskip("onnxscript")
    model, (images, labels) = Network().eval(), batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True)
    assert proac._tap.is_empty
    model(images)
    assert proac(labels).isfinite()


class _Checkpointed(Network):
    reentrant = False

    def forward(self, images):
        return self.classifier(checkpoint(self.backbone, images.requires_grad_(), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant, layer", [(False, "backbone"), (False, "backbone.0"), (True, "backbone")])
def test_checkpointed_layer(reentrant, layer):
    model, (images, labels) = _Checkpointed(), batch()
    model.reentrant = reentrant
    proac = ProACRegularizer(model, layer, 5, embedding_dim=8)
    (model(images).mean() + proac(labels)).backward()
    assert proac._tap.is_empty, "what runs again in backward is of a step that is over"
    gradient = model.backbone[0].weight.grad.clone()
    model.zero_grad()
    (model.classifier(model.backbone(images)).mean() + proac(labels)).backward()
    torch.testing.assert_close(gradient, model.backbone[0].weight.grad)


def test_layer_within_a_reentrant_checkpoint():
    model, (images, labels) = _Checkpointed(), batch()
    model.reentrant = True
    proac = ProACRegularizer(model, "backbone.0", 5, embedding_dim=8)
    logits = model(images)
    with pytest.raises(RuntimeError, match="no gradient.*use_reentrant=False"):
        proac(labels)
    logits.mean().backward()
    with pytest.raises(RuntimeError, match="has not run"):
        proac(labels)


@pytest.mark.slow
def test_wrapped_and_compiled_models():
    model, (images, labels) = Network(), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    parallel = nn.Sequential()
    parallel.module = compiled
    for outer, layer in (
        (model, "module.backbone"),
        (compiled, "backbone"),
        (compiled, "_orig_mod.backbone"),
        (parallel, "backbone"),
    ):
        proac = ProACRegularizer(outer, layer, 5, embedding_dim=8)
        compiled(images)
        expected = proac.loss(proac.head(model.backbone(images)), labels)
        proac.discard()
        torch._dynamo.reset()
        for _ in range(3):
            compiled(images)
            term = proac(labels)
            torch.testing.assert_close(term, expected)
        term.backward()
        assert model.backbone[0].weight.grad.abs().sum() > 0
        proac.remove()


@pytest.mark.slow
def test_a_whole_step_compiles():
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)

    def step():
        return model(images).mean() + 0.1 * proac(labels)

    expected = step()
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(), expected)


def test_model_under_autocast_and_loss_outside():
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone.0", 5, embedding_dim=8)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
        inside = proac(labels)
        model(images)
    outside = proac(labels)
    assert inside.dtype == outside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-2, atol=0)


def test_copies_hold_no_activations():
    both, (images, labels) = nn.Module(), batch()
    both.model = Network()
    both.proac = ProACRegularizer(both.model, "backbone", 5, embedding_dim=8)
    both.model(images)
    average = copy.deepcopy(both.model)  # an averaged model; not at an activation's expense
    assert all(hook.is_empty for hook in average.backbone._forward_hooks.values())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(both)))
    copied.model(images)
    expected = both.proac(labels)
    torch.testing.assert_close(copied.proac(labels), expected)


def test_data_parallel_is_refused():
    model, (images, _) = Network(), batch()
    ProACRegularizer(model, "backbone", 5)
    model.backbone._is_replica = True
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model(images)


def _train(model, proac, images, labels):
    optimizer = torch.optim.SGD([*model.parameters(), *proac.parameters()], lr=0.1)
    for _ in range(2):
        logits = nn.functional.interpolate(model(images), labels.shape[1:])
        optimizer.zero_grad()
        (nn.functional.cross_entropy(logits, labels) + 0.1 * proac(labels)).backward()
        optimizer.step()


def _make(process_group=None):
    torch.manual_seed(0)
    model = Network()
    model.backbone[1] = nn.Identity()  # batch statistics are each rank's own
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8, in_channels=12, process_group=process_group)
    return model, proac


def _rank(rank, address, images, labels, path):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    part = slice(rank * 2, rank * 2 + 2)
    model, proac = _make(dist.group.WORLD)
    _train(DistributedDataParallel(model), DistributedDataParallel(proac), images[part], labels[part])
    torch.save([model.state_dict(), proac.state_dict()], f"{path}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_train_as_one_process(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 16, 20, generator=generator)
    labels = torch.randint(0, 5, (4, 16, 20), generator=generator)
    run_ranks(_rank, (f"file://{tmp_path}/rendezvous", images, labels, tmp_path), 2)
    model, proac = _make()
    _train(model, proac, images, labels)
    for rank in range(2):
        for module, state in zip((model, proac), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(dict(state), dict(module.state_dict()), rtol=1e-4, atol=1e-5)


def test_errors_of_the_constructor():
    with pytest.raises(ValueError, match="no module 'backbones'.*backbone"):
        ProACRegularizer(Network(), "backbones", 5)
    with pytest.raises(ValueError, match="layout: .*'NCHW'"):
        ProACRegularizer(Network(), "backbone", 5, layout="NCHW")
    with pytest.raises(ValueError, match="'conv'"):
        ProjectionHead(4, 8, kind="conv")
    with pytest.raises(ValueError, match="head: .*'conv'"):
        ProACRegularizer(Network(), "backbone", 5, head="conv")
    with pytest.raises(TypeError, match="head: .*int"):
        ProACRegularizer(Network(), "backbone", 5, head=256)
    with pytest.raises(TypeError, match="layer: .*NoneType"):
        ProACRegularizer(Network(), None, 5)
