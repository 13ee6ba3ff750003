"""The projection head, the regularizer on a model's layer, and the pictures of what the loss sees."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import proac_cuda
from proac_cuda import ProACRegularizer, ProjectionHead, diagnostics


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.classifier = nn.Conv2d(12, 5, 1)

    def forward(self, images):
        return self.classifier(self.backbone(images))


def _batch():
    return torch.randn(2, 3, 16, 20), torch.randint(0, 5, (2, 16, 20))


def test_three_lines():
    torch.manual_seed(0)
    model, (images, labels) = _Network(), _batch()
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
    model, (images, labels) = _Network(), _batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8, head="mlp", temperature=0.2)
    model(images)
    expected = proac_cuda.proac_loss(
        proac.head(model.eval().train().backbone(images)), labels, proac.loss.prototypes, temperature=0.2
    )
    torch.testing.assert_close(proac(labels), expected)


def test_a_call_without_a_batch_says_so():
    model, (images, labels) = _Network(), _batch()
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
    model, (images, labels) = _Network(), _batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8).to("meta")
    model.to("meta")(images.to("meta"))
    loss = proac(labels.to("meta"))
    assert loss.device.type == "meta" and loss.shape == ()


@pytest.mark.parametrize("select", [None, lambda output: output[:, :6], lambda output: output.unsqueeze(0)[0]])
def test_output_changed_in_place(select):
    """The head would see what the next module made of it."""
    model, (images, labels) = _Network(), _batch()
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
    model, (images, labels) = _Network(), _batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    model.backbone.requires_grad_(False)
    model(images)
    proac(labels).backward()
    assert proac.head[0].weight.grad.abs().sum() > 0


def test_validation_gives_the_same_number_without_gradients():
    model, (images, labels) = _Network().eval(), _batch()
    proac = ProACRegularizer(model, "backbone", 5)
    model(images)
    expected = proac(labels)
    proac.eval()
    with torch.no_grad():
        model(images)
        value = proac(labels)
    assert torch.equal(value, expected.detach()) and not value.requires_grad


class _Says(nn.Module):
    """Gives whatever it is told to make of a map (B, 6, H, W)."""

    def __init__(self, make):
        super().__init__()
        self.convolution, self.make = nn.Conv2d(3, 6, 1), make

    def forward(self, images):
        return self.make(self.convolution(images))


def _tokens(x):
    return x.flatten(2).transpose(1, 2)


def _with_prefix(x, count):
    return torch.cat([x.new_zeros(len(x), count, x.shape[1]), _tokens(x)], 1)


OUTPUTS = {
    "a map": lambda x: x,
    "channels at the end": lambda x: x.movedim(1, 3),
    "a dict": lambda x: {"aux": x[:, :3], "out": x},
    "a Hugging Face output": lambda x: {"last_hidden_state": _tokens(x), "hidden_states": (x, x)},
    "a backbone's output": lambda x: {"feature_maps": (x[:, :2], x)},
    "maps of all stages": lambda x: [x[:, :2, ::2], x[:, :3], x],
    "tokens": _tokens,
    "tokens beside numbers": lambda x: (_tokens(x), 16, 20),
    "tokens after a class token": lambda x: (_with_prefix(x, 1), None),
    "tokens after a class token and four registers": lambda x: _with_prefix(x, 5),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_layers_give(name):
    model, (images, labels) = nn.Sequential(_Says(OUTPUTS[name])), _batch()
    proac = ProACRegularizer(model, "0", 5, embedding_dim=8)
    model(images)
    expected = proac.loss(proac.head(model[0].convolution(images)), labels)
    torch.testing.assert_close(proac(labels), expected)


def test_tokens_of_patches_that_cross_the_border():
    model, images = nn.Sequential(nn.Conv2d(3, 6, 4, 4, padding=2), nn.Flatten(2)), torch.randn(2, 3, 16, 34)
    proac = ProACRegularizer(model, "1", 5, in_channels=6, select=lambda x: x.transpose(1, 2))
    model(images)  # 5 x 9 patches, for labels in proportions of 8 : 17
    assert proac(torch.randint(0, 5, (2, 16, 34))).item() > 0


def test_outputs_that_need_select():
    model, (images, labels) = nn.Sequential(_Says(lambda x: {"deep": x})), _batch()
    proac = ProACRegularizer(model, "0", 5)
    model(images)
    with pytest.raises(TypeError, match="got dict; pass select="):
        proac(labels)
    proac = ProACRegularizer(model, "0", 5, select=lambda output: output["deep"])
    model(images)
    assert proac(labels).item() > 0
    proac = ProACRegularizer(model, "0", 5, in_channels=7, select=lambda output: output["deep"])
    model(images)
    with pytest.raises(ValueError, match=r"\(B, 7, H, W\), got \(2, 6, 16, 20\); pass in_channels="):
        proac(labels)
    proac = ProACRegularizer(model, "0", 5, select=lambda output: _tokens(output["deep"])[:, 7:])
    model(images)
    with pytest.raises(ValueError, match=r"313 tokens.*\(2, 16, 20\); pass select="):
        proac(labels)


class _Checkpointed(_Network):
    reentrant = False

    def forward(self, images):
        return self.classifier(checkpoint(self.backbone, images.requires_grad_(), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant, layer", [(False, "backbone"), (False, "backbone.0"), (True, "backbone")])
def test_checkpointed_layer(reentrant, layer):
    model, (images, labels) = _Checkpointed(), _batch()
    model.reentrant = reentrant
    proac = ProACRegularizer(model, layer, 5, embedding_dim=8)
    (model(images).mean() + proac(labels)).backward()
    assert proac._tap.output is None, "what runs again in backward is of a step that is over"
    gradient = model.backbone[0].weight.grad.clone()
    model.zero_grad()
    (model.classifier(model.backbone(images)).mean() + proac(labels)).backward()
    torch.testing.assert_close(gradient, model.backbone[0].weight.grad)


def test_layer_within_a_reentrant_checkpoint():
    model, (images, labels) = _Checkpointed(), _batch()
    model.reentrant = True
    proac = ProACRegularizer(model, "backbone.0", 5, embedding_dim=8)
    logits = model(images)
    with pytest.raises(RuntimeError, match="no gradient.*use_reentrant=False"):
        proac(labels)
    logits.mean().backward()
    with pytest.raises(RuntimeError, match="has not run"):
        proac(labels)


def test_wrapped_and_compiled_models():
    model, (images, labels) = _Network(), _batch()
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
        proac._tap.output = None
        torch._dynamo.reset()
        for _ in range(3):
            compiled(images)
            term = proac(labels)
            torch.testing.assert_close(term, expected)
        term.backward()
        assert model.backbone[0].weight.grad.abs().sum() > 0
        proac.remove()


def test_a_whole_step_compiles():
    model, (images, labels) = _Network(), _batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)

    def step():
        return model(images).mean() + 0.1 * proac(labels)

    expected = step()
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(), expected)


def test_model_under_autocast_and_loss_outside():
    model, (images, labels) = _Network(), _batch()
    proac = ProACRegularizer(model, "backbone.0", 5, embedding_dim=8)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
        inside = proac(labels)
        model(images)
    outside = proac(labels)
    assert inside.dtype == outside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-2, atol=0)


def test_copies_hold_no_activations():
    both, (images, labels) = nn.Module(), _batch()
    both.model = _Network()
    both.proac = ProACRegularizer(both.model, "backbone", 5, embedding_dim=8)
    both.model(images)
    average = copy.deepcopy(both.model)  # an averaged model; not at an activation's expense
    assert all(hook.output is None for hook in average.backbone._forward_hooks.values())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(both)))
    copied.model(images)
    expected = both.proac(labels)
    torch.testing.assert_close(copied.proac(labels), expected)


def test_data_parallel_is_refused():
    model, (images, _) = _Network(), _batch()
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
    model = _Network()
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
    mp.spawn(_rank, (f"file://{tmp_path}/rendezvous", images, labels, tmp_path), nprocs=2)
    model, proac = _make()
    _train(model, proac, images, labels)
    for rank in range(2):
        for module, state in zip((model, proac), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(dict(state), dict(module.state_dict()), rtol=1e-4, atol=1e-5)


def test_errors_of_the_constructor():
    with pytest.raises(ValueError, match="no module 'backbones'.*backbone"):
        ProACRegularizer(_Network(), "backbones", 5)
    with pytest.raises(ValueError, match="pass in_channels="):
        ProACRegularizer(nn.Sequential(nn.ReLU()), "0", 5)
    with pytest.raises(ValueError, match="'conv'"):
        ProjectionHead(4, 8, kind="conv")
    with pytest.raises(ValueError, match="head: .*'conv'"):
        ProACRegularizer(_Network(), "backbone", 5, head="conv")
    with pytest.raises(TypeError, match="head: .*int"):
        ProACRegularizer(_Network(), "backbone", 5, head=256)
    with pytest.raises(TypeError, match="layer: .*NoneType"):
        ProACRegularizer(_Network(), None, 5)


def test_history_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    history = diagnostics.History(["road", "sky", "tree"])
    prototypes = proac_cuda.uniform_prototypes(3, 8)
    with pytest.raises(ValueError, match="nothing"):
        history.save_picture(tmp_path / "empty.png")
    for step in range(4):
        labels = torch.randint(0, 3 if step else 2, (2, 6, 6))  # the third class is absent at first
        _, stats = proac_cuda.proac_loss(torch.randn(2, 8, 6, 6), labels, prototypes, return_stats=True)
        history.add(step, stats)
    table = history.values("log_z")
    assert table.shape == (4, 3) and table[0, 2].isnan() and table[1:].isfinite().all()
    history.save_picture(tmp_path / "history.png")
    history.class_names = ["$road_$", "sky", "a $"]  # no formulas
    history.save_picture(tmp_path / "dollars.png")
    diagnostics.save_cosine_matrix(prototypes, tmp_path / "dollars.png", history.class_names)
    first = diagnostics.History()
    first.add(5, stats)
    first.save_picture(tmp_path / "one_step.png")
    diagnostics.save_cosine_matrix(prototypes, tmp_path / "cosines.png")
    assert (tmp_path / "history.png").stat().st_size > 1000 and (tmp_path / "cosines.png").stat().st_size > 1000


def test_long_history_is_thinned(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    prototypes = proac_cuda.uniform_prototypes(3, 8)
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[0, 0] = 1
    _, stats = proac_cuda.proac_loss(torch.randn(1, 8, 4, 4), labels, prototypes, return_stats=True)
    history = diagnostics.History()
    for step in range(5000):
        history.add(step, stats)
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    history.save_picture(tmp_path / "long.png")
    curves = [line for axis in drawn[0].axes for line in axis.lines]
    assert curves and all(100 < len(line.get_xdata()) < 1000 for line in curves)
    median = drawn[0].axes[0].lines[0]
    assert median.get_xdata()[0] < 10 and median.get_xdata()[-1] > 4990
    monkeypatch.undo()
    pyplot.close(drawn[0])


def test_tensorboard_gets_the_classes_that_are_there():
    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, tag, value, step):
            self.scalars[tag] = value, step

    features, labels = torch.randn(1, 8, 5, 5), torch.zeros(1, 5, 5, dtype=torch.int64)
    labels[0, 0] = 2
    _, stats = proac_cuda.proac_loss(features, labels, proac_cuda.uniform_prototypes(3, 8), return_stats=True)
    writer = Writer()
    diagnostics.log_to_tensorboard(writer, stats, 7, ["road", "sky", "tree"])
    assert writer.scalars["proac/log_z/tree"] == (stats.log_z[2].item(), 7)
    assert not any(tag.endswith("sky") for tag in writer.scalars)


def test_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    features, labels = torch.randn(1, 8, 5, 5), torch.randint(0, 3, (1, 5, 5))
    _, stats = proac_cuda.proac_loss(features, labels, proac_cuda.uniform_prototypes(3, 8), return_stats=True)
    with SummaryWriter(tmp_path) as writer:
        diagnostics.log_to_tensorboard(writer, stats, 7)
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("proac/mean_positive_cosine/1")
    assert event.step == 7 and event.value == stats.mean_positive_cosine[1].item()
    assert len(events.Tags()["scalars"]) == 4 * 3
