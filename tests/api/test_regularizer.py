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


OUTPUTS = {  # and the layout that has to be said
    "a map": (lambda x: x, None),
    "a map of which this is said": (lambda x: x, "channels_first"),
    "channels at the end": (lambda x: x.movedim(1, 3), "channels_last"),
    "a dict": (lambda x: {"aux": x[:, :3], "out": x}, None),
    "a Hugging Face output": (lambda x: {"last_hidden_state": _tokens(x), "hidden_states": (x, x)}, None),
    "a Hugging Face output of maps": (lambda x: {"last_hidden_state": x, "hidden_states": (x, x)}, None),
    "a backbone's output": (lambda x: {"feature_maps": (x[:, :2], x)}, None),
    "maps of all stages": (lambda x: [x[:, :2, ::2], x[:, :3], x], None),
    "tokens": (_tokens, "tokens"),
    "tokens, said otherwise": (_tokens, "channels_last"),
    "tokens beside numbers": (lambda x: (_tokens(x), 16, 20), "tokens"),
    "tokens after a class token": (lambda x: (_with_prefix(x, 1), None), "tokens"),
    "tokens after a class token and four registers": (lambda x: _with_prefix(x, 5), "tokens"),
}


@pytest.mark.parametrize("channels", [None, 6])
@pytest.mark.parametrize("name", OUTPUTS)
def test_what_layers_give(name, channels):
    make, layout = OUTPUTS[name]
    model, (images, labels) = nn.Sequential(_Says(make)), _batch()
    proac = ProACRegularizer(model, "0", 5, embedding_dim=8, layout=layout, in_channels=channels)
    model(images)
    value = proac(labels)
    torch.testing.assert_close(value, proac.loss(proac.head(model[0].convolution(images)), labels))
    assert proac.in_channels == 6


@pytest.mark.parametrize(
    "name", [name for name, (_, layout) in OUTPUTS.items() if layout not in (None, "channels_first")]
)
def test_a_layout_that_nobody_said(name):
    """Channels that were said tell nothing of the layout."""
    for channels in (None, 6, 16, 320):
        model, (images, labels) = nn.Sequential(_Says(OUTPUTS[name][0])), _batch()
        proac = ProACRegularizer(model, "0", 5, embedding_dim=8, in_channels=channels)
        model(images)
        with pytest.raises(ValueError, match=r"layer '0': .*layout="):
            proac(labels)


def test_a_map_that_could_be_either():
    """(B, 64, 64, 64): a convolution's is known; of another layer's, the layout has to be said, once."""
    images, labels = torch.randn(2, 3, 16, 16), torch.randint(0, 5, (2, 16, 16))
    convolution = nn.Conv2d(3, 16, 1)
    proac = ProACRegularizer(nn.Sequential(convolution, nn.ReLU()), "", 5, embedding_dim=8)
    convolution(images)
    model = nn.Sequential(_Says(lambda x: convolution(x[:, :3])))
    for layout in (None, "channels_first", "channels_last"):
        proac = ProACRegularizer(model, "0", 5, embedding_dim=8, layout=layout)
        model(images)
        if layout is None:
            with pytest.raises(ValueError, match=r'\(2, 16, 16, 16\).*layout="channels_last"'):
                proac(labels)
            continue
        features = convolution(model[0].convolution(images)[:, :3])
        value = proac(labels)
        expected = features if layout == "channels_first" else features.movedim(3, 1)
        torch.testing.assert_close(value, proac.loss(proac.head(expected), labels))
    proac = ProACRegularizer(model, "0", 5, embedding_dim=8)
    model(images[:, :, :12])
    proac(labels[:, :12])
    model(images)
    assert proac(labels) > 0, "clear at one size, and so at another"


def test_a_wrong_guess_of_old():
    """A layer whose last registered part has other channels than it gives (yolo26m-sem's model.16: 64, and 256 on 64 x 64)."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(32, 32, 1)
            self.inner = nn.Conv2d(3, 8, 8, 8)  # registered last, run first

        def forward(self, images):
            x = self.inner(images)
            return self.last(torch.cat([x] * 4, 1))

    model, images, labels = nn.Sequential(Block()), torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    proac = ProACRegularizer(model, "0", 5, embedding_dim=16)
    model(images)
    value = proac(labels)  # (2, 32, 8, 8), whose width is what was guessed
    assert proac.head[0].weight.shape == (16, 32, 1, 1)
    torch.testing.assert_close(value, proac.loss(proac.head(model(images)), labels))
    proac.discard()
    proac = ProACRegularizer(model, "0", 5, in_channels=8)
    model(images)
    with pytest.raises(ValueError, match=r"\(B, 8, H, W\), got \(2, 32, 8, 8\); pass in_channels=32"):
        proac(labels)


KINDS = {
    "convolution": (nn.Conv2d(6, 4, 1), 4),
    "transposed convolution": (nn.ConvTranspose2d(6, 4, 1), 4),
    "norm and activation": (nn.Sequential(nn.Conv2d(6, 7, 1), nn.BatchNorm2d(7), nn.ReLU(), nn.Dropout2d()), 7),
    "group norm": (nn.GroupNorm(2, 6), 6),
}


@pytest.mark.parametrize("name", KINDS)
def test_layers_whose_channels_are_known(name):
    layer, channels = KINDS[name]
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5, embedding_dim=8)
    assert proac.in_channels == channels and proac.head[0].weight.shape == (8, channels, 1, 1)


class _Normed(nn.LayerNorm):
    """As in several libraries: a LayerNorm of maps with channels first."""

    def forward(self, x):
        return super().forward(x.movedim(1, 3)).movedim(3, 1)


@pytest.mark.parametrize(
    "layer, ndim",
    [
        (nn.Linear(6, 6), 4),
        (nn.Linear(6, 6), 3),
        (nn.LayerNorm(6), 4),
        (nn.LayerNorm(6), 3),
        (nn.Sequential(nn.Linear(6, 6), nn.GELU()), 4),
        (nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), 3),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), 1), 3),
        (_Normed(6), 0),
    ],
)
def test_layers_known_to_have_channels_at_the_end(layer, ndim):
    maps, labels = torch.randn(2, 6, 8, 10), torch.randint(0, 5, (2, 16, 20))
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5, embedding_dim=8)
    given = {0: maps, 3: _tokens(maps), 4: maps.movedim(1, 3)}[ndim]
    output = layer(given)
    value = proac(labels)
    expected = output if ndim == 0 else output.reshape(2, 8, 10, 6).movedim(-1, 1)
    torch.testing.assert_close(value, proac.loss(proac.head(expected), labels))


def test_tokens_of_sequence_first_encoders_are_not_known():
    layer = nn.TransformerEncoderLayer(6, 2, 8)  # (N, B, C)
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5)
    layer(torch.randn(80, 2, 6))
    with pytest.raises(ValueError, match='layout="tokens"'):
        proac(torch.randint(0, 5, (2, 16, 20)))


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("size", [(12,), (8, 10), (4, 6, 8)])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "tokens"])
def test_one_two_and_three_axes(size, head, layout):
    maps = torch.randn(2, 6, *size, requires_grad=True)
    labels = torch.randint(0, 5, (2, *(2 * length for length in size)))
    make = {"channels_first": lambda x: x, "channels_last": lambda x: x.movedim(1, -1), "tokens": _tokens}[layout]
    layer = nn.Identity()
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5, embedding_dim=8, head=head, layout=layout)
    layer(make(maps))
    value = proac(labels)
    value.backward()
    torch.testing.assert_close(value, proac.loss(proac.head(maps), labels))
    assert all(parameter.grad.abs().sum() > 0 for parameter in proac.head.parameters() if parameter.ndim == 4)
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)](6, 8, 1)
    if head == "linear":
        weight = proac.head[0].weight.detach()
        convolution.load_state_dict(
            {"weight": weight.view(convolution.weight.shape), "bias": proac.head[0].bias.detach()}
        )
        torch.testing.assert_close(proac.head(maps), convolution(maps))


def test_three_dimensional_network():
    model = nn.Sequential(nn.Conv3d(1, 6, 3, 2, 1), nn.BatchNorm3d(6), nn.ReLU())
    proac = ProACRegularizer(model, "2", 3, embedding_dim=8)
    model(torch.randn(1, 1, 8, 12, 16))
    assert proac(torch.randint(0, 3, (1, 8, 12, 16))) > 0


def test_head_checkpoints_of_before():
    """Names and shapes of the state dicts are those of nn.Sequential of nn.Conv2d."""
    for kind, layers in (
        ("linear", [nn.Conv2d(6, 8, 1)]),
        ("mlp", [nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1)]),
    ):
        old, maps = nn.Sequential(*layers), torch.randn(2, 6, 4, 5)
        for channels in (6, None):
            head = ProjectionHead(channels, 8, kind)
            head.load_state_dict(old.state_dict())
            torch.testing.assert_close(head(maps), old(maps))
            assert {name: value.shape for name, value in head.state_dict().items()} == {
                name: value.shape for name, value in old.state_dict().items()
            }
            assert head[0].in_channels == 6
    with pytest.raises(ValueError, match=r"head: expected 6 channels .* in_channels=7"):
        head(torch.randn(2, 7, 4, 5))
    with pytest.raises(ValueError, match=r"head: expected a map .* got \(2, 6\)"):
        ProjectionHead(6, 8)(torch.randn(2, 6))


OPTIMIZERS = ["SGD", "Adam", "AdamW", "RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_an_optimizer_made_before_the_first_map_trains_the_head(name, head):
    model, (images, labels) = nn.Sequential(_Says(lambda x: x)), _batch()
    proac = ProACRegularizer(model, "0", 5, embedding_dim=8, head=head)
    assert proac.in_channels is None
    optimizer = getattr(torch.optim, name)([*model.parameters(), *proac.parameters()], lr=0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    with torch.inference_mode():  # validation before training
        model(images)
        proac(labels)
    before = [parameter.detach().clone() for parameter in proac.parameters()]
    model(images)
    optimizer.zero_grad()
    proac(labels).backward()
    nn.utils.clip_grad_norm_([*model.parameters(), *proac.parameters()], 1e9)
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, proac.parameters(), strict=True))
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in proac.parameters()} <= held


@pytest.mark.parametrize("use", [torch.optim.Adagrad, DistributedDataParallel, nn.utils.parameters_to_vector])
def test_what_cannot_wait_for_the_first_map_says_so(use, tmp_path):
    proac = ProACRegularizer(nn.Sequential(_Says(lambda x: x)), "0", 5, embedding_dim=8)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises((ValueError, RuntimeError), match="uninitialized"):
            use(proac if use is DistributedDataParallel else proac.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("as_what", ["tensor", "tuple", "dict"])
def test_channels_of_an_example(as_what):
    """One dry pass, which leaves the model as it was."""
    model, (images, labels) = _Network(), _batch()
    model.backbone[2] = nn.Sequential(_Says(lambda x: x.movedim(1, 3)))
    model.backbone[2][0].convolution = nn.Identity()
    model.classifier = nn.Linear(12, 5)
    model.backbone[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    example = {"tensor": images, "tuple": (images,), "dict": {"images": images}}[as_what]
    proac = ProACRegularizer(model, "backbone.2", 5, embedding_dim=8, layout="channels_last", example=example)
    assert proac.in_channels == 12 and proac.head[0].weight.shape == (8, 12, 1, 1) and proac._tap.is_empty
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and model.backbone[0].training and not model.backbone[1].training
    model(images)
    assert proac(labels) > 0


def test_tokens_of_patches_that_cross_the_border():
    model, images = nn.Sequential(nn.Conv2d(3, 6, 4, 4, padding=2), nn.Flatten(2)), torch.randn(2, 3, 16, 34)
    proac = ProACRegularizer(model, "1", 5, layout="tokens", select=lambda x: x.transpose(1, 2))
    model(images)  # 5 x 9 patches, for labels in proportions of 8 : 17
    assert proac(torch.randint(0, 5, (2, 16, 34))).item() > 0


def test_tokens_that_could_be_two_grids():
    """Nine tokens are 3 x 3, or 2 x 2 after a class token and four registers."""
    layer = nn.Linear(6, 6)
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5)
    layer(torch.randn(2, 9, 6))
    with pytest.raises(ValueError, match=r"9 tokens.*\(3, 3\) after 0.*\(2, 2\) after 5.*select="):
        proac(torch.randint(0, 5, (2, 24, 24)))


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
    proac = ProACRegularizer(model, "0", 5, layout="tokens", select=lambda output: _tokens(output["deep"])[:, 7:])
    model(images)
    with pytest.raises(ValueError, match=r"313 tokens.*\(2, 16, 20\); pass select="):
        proac(labels)
    proac = ProACRegularizer(model, "0", 5, layout="tokens", select=lambda output: output["deep"])
    model(images)
    with pytest.raises(ValueError, match=r"expected tokens \(B, N, C\), got an output \(2, 6, 16, 20\)"):
        proac(labels)


def test_a_list_of_maps():
    """Deep supervision: the regularizer takes the last; the loss says how to have all."""
    maps = [torch.randn(2, 6, 8, 10), torch.randn(2, 6, 16, 20)]
    layer, labels = nn.Identity(), _batch()[1]
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5, embedding_dim=8)
    layer(maps)
    torch.testing.assert_close(proac(labels), proac.loss(proac.head(maps[1]), labels))
    proac = ProACRegularizer(nn.Sequential(layer), "0", 5, layout="tokens")
    layer([_tokens(part) for part in maps])
    with pytest.raises(TypeError, match="list of 2 tensors.*pass select="):
        proac(labels)
    for given in (maps, tuple(maps)):
        with pytest.raises(TypeError, match="features: .* of 2 tensors.*call the loss once for each"):
            proac.loss(given, labels)
    layer(maps)
    with pytest.raises(TypeError, match="labels: .*list"):
        proac([labels, labels])


def _run_twice(model, images):
    model(images)
    model(images.flip(0))


def test_two_passes_before_a_call():
    """The loss would be of the last one alone; what was discarded, or whose backward pass is over, does not count."""
    model, (images, labels) = _Network(), _batch()
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
    model, (images, labels) = _Network(), _batch()
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
    model, (images, labels) = _Network(), _batch()
    proac = ProACRegularizer(model, "backbone.1", 5, embedding_dim=8)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.backbone[1] = nn.Identity()  # which runs without a GPU
    model(images)
    with pytest.raises(RuntimeError, match="has another module in its place.*convert_sync_batchnorm"):
        proac(labels)
    model = _Network()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # within the layer: no matter
    assert proac._tap in model.backbone._forward_hooks.values()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda proac: pickle.loads(pickle.dumps(proac))])
def test_a_copy_without_its_model(make):
    model, (images, labels) = _Network(), _batch()
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
    model, (images, labels) = _Network(), _batch()
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
    model, (images, labels) = _Network().eval(), _batch()
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
    model, (images, labels) = _Network().eval(), _batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True)
    assert proac._tap.is_empty
    model(images)
    assert proac(labels).isfinite()


def test_a_head_of_other_dimensions():
    model, (images, labels) = _Network(), _batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8, head=nn.Conv2d(12, 16, 1))
    model(images)
    with pytest.raises(ValueError, match=r"features: got shape \(2, 16, 8, 10\).*embedding_dim=8: .*embedding_dim=16"):
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
    assert proac._tap.is_empty, "what runs again in backward is of a step that is over"
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
        proac.discard()
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
    assert all(hook.is_empty for hook in average.backbone._forward_hooks.values())
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
    with pytest.raises(ValueError, match="layout: .*'NCHW'"):
        ProACRegularizer(_Network(), "backbone", 5, layout="NCHW")
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


def test_history_says_what_looks_wrong():
    """The third class never comes, the second does not move, the first one does; and two prototypes fall together."""
    prototypes = proac_cuda.uniform_prototypes(3, 8)
    labels = torch.zeros(1, 1, 8, dtype=torch.int64)
    labels[..., 4:] = 1
    start = torch.nn.functional.normalize(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    history = diagnostics.History(["road", "sky", "tree"])
    for step in range(120):
        rows = start.clone()
        rows[:4] += step / 40 * prototypes[0]
        _, stats = proac_cuda.proac_loss(rows.t().reshape(1, 8, 1, 8), labels, prototypes, return_stats=True)
        history.add(step, stats)
        if step == 50:
            assert history.hints(prototypes) == []  # too early to tell
    hints = history.hints(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.1, 1, 0]]))
    assert [hint.split(":")[0] for hint in hints[:2]] == ["class sky", "class tree"]
    assert "has not risen" in hints[0] and "no pixel in the last 100 steps" in hints[1]
    assert len(hints) == 3 and "sky and tree have come together" in hints[2]


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
