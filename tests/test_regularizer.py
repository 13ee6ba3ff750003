"""The projection head, the regularizer on a model's layer, and the pictures of what the loss sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
    proac.remove()
    model(images)
    with pytest.raises(RuntimeError, match="has not run"):
        proac(labels)


def test_outputs_that_are_no_tensors():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 6, 1)

        def forward(self, images):
            return {"out": self.inner(images)}

    model, (images, labels) = nn.Sequential(Wrapped()), _batch()
    proac = ProACRegularizer(model, "0", 5)
    model(images)
    with pytest.raises(TypeError, match="got dict; pass select="):
        proac(labels)
    proac = ProACRegularizer(model, "0", 5, select=lambda output: output["out"])
    model(images)
    assert proac(labels).item() > 0


def test_errors_of_the_constructor():
    with pytest.raises(ValueError, match="no module 'backbones'.*backbone"):
        ProACRegularizer(_Network(), "backbones", 5)
    with pytest.raises(ValueError, match="pass in_channels="):
        ProACRegularizer(nn.Sequential(nn.ReLU()), "0", 5)
    with pytest.raises(ValueError, match="'conv'"):
        ProjectionHead(4, 8, kind="conv")


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
    diagnostics.save_cosine_matrix(prototypes, tmp_path / "cosines.png")
    assert (tmp_path / "history.png").stat().st_size > 1000 and (tmp_path / "cosines.png").stat().st_size > 1000


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
