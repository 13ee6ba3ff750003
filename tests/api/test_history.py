"""The history of a training, and the pictures and records that are made of it."""

from __future__ import annotations

import pytest
import torch

import proac_cuda
from proac_cuda import diagnostics


@pytest.mark.slow
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
