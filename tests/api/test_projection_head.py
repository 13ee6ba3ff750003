"""The projection head: its forms, its channels, and the optimizers that are made before it has any."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from proac_cuda import ProACRegularizer, ProjectionHead
from regularizer_models import Network, Says, batch, tokens_of


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("size", [(12,), (8, 10), (4, 6, 8)])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "tokens"])
def test_one_two_and_three_axes(size, head, layout):
    maps = torch.randn(2, 6, *size, requires_grad=True)
    labels = torch.randint(0, 5, (2, *(2 * length for length in size)))
    make = {"channels_first": lambda x: x, "channels_last": lambda x: x.movedim(1, -1), "tokens": tokens_of}[layout]
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
    with pytest.raises(ValueError, match=r"head: expected 6 channels .*pass features.movedim\(-1, 1\)"):
        head(torch.randn(2, 4, 5, 6))
    for arguments, error in (((0, 8), ValueError), (("6", 8), TypeError), ((6, 8.0), TypeError), ((6, -1), ValueError)):
        with pytest.raises(error, match="^(in_channels|embedding_dim): got"):
            ProjectionHead(*arguments)
    with pytest.raises(ValueError, match=r"head: expected a map .* got \(2, 6\)"):
        ProjectionHead(6, 8)(torch.randn(2, 6))


OPTIMIZERS = ["SGD", "Adam", "AdamW", "RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_an_optimizer_made_before_the_first_map_trains_the_head(name, head):
    model, (images, labels) = nn.Sequential(Says(lambda x: x)), batch()
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
    proac = ProACRegularizer(nn.Sequential(Says(lambda x: x)), "0", 5, embedding_dim=8)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises((ValueError, RuntimeError), match="uninitialized"):
            use(proac if use is DistributedDataParallel else proac.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("as_what", ["tensor", "tuple", "dict"])
def test_channels_of_an_example(as_what):
    """One dry pass, which leaves the model as it was."""
    model, (images, labels) = Network(), batch()
    model.backbone[2] = nn.Sequential(Says(lambda x: x.movedim(1, 3)))
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


def test_a_head_of_other_dimensions():
    model, (images, labels) = Network(), batch()
    proac = ProACRegularizer(model, "backbone", 5, embedding_dim=8, head=nn.Conv2d(12, 16, 1))
    model(images)
    with pytest.raises(ValueError, match=r"features: got shape \(2, 16, 8, 10\).*embedding_dim=8: .*embedding_dim=16"):
        proac(labels)
