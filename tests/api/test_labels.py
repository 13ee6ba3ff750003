"""Where labels and features meet: what a call does not see, and where the features of real kinds of networks lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import proac_cuda
from label_positions import MODES, interpolated
from proac_cuda.diagnostics import History, LabelsRead, labels_read, log_to_tensorboard
from proac_cuda.stages.pixels import nearest_index


@pytest.mark.parametrize("mode", MODES)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.int64]),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_the_pixels_that_interpolate_reads(mode, sizes, seed, dtype):
    """Each label pixel counts once, whether one feature reads it or several; those that count for nothing never do."""
    label_size, size = zip(*sizes, strict=True)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 7, (2, *label_size), generator=generator)
    labels[labels == 6] = 250  # an invalid one
    number = torch.arange(labels.numel()).reshape(labels.shape)
    read = labels.flatten()[interpolated(number, size, mode).unique()]
    found = labels_read(labels.to(dtype), size, 5, ignore_index=3, label_sampling=mode)  # 5 is invalid too
    for k in range(5):
        expected = [0, 0] if k == 3 else [int((labels == k).sum()), int((read == k).sum())]
        assert [found.labels[k].item(), found.read[k].item()] == expected
        share = found.share[k].item()
        assert share != share if expected[0] == 0 else share == pytest.approx(expected[1] / expected[0])


def test_a_class_that_a_stride_loses_shows():
    labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    labels[0, :, 3] = 1  # a pole one pixel wide, between the columns that "nearest" reads at stride 4
    labels[0, :, 10] = 2  # and one in the middle of a cell
    shares = {mode: labels_read(labels, (8, 8), 4, label_sampling=mode).share.tolist() for mode in MODES}
    assert shares["nearest"][1:3] == [0, 0] and shares["nearest-exact"][1:3] == [0, 0.25]
    assert np.isnan(shares["nearest"][3])


def test_bad_arguments():
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="label_sampling.*'area'"):
        labels_read(labels, (4, 4), 3, label_sampling="area")
    with pytest.raises(ValueError, match=r"size: expected 2 numbers.*\(1, 8, 8\), got \(4,\)"):
        labels_read(labels, (4,), 3)
    with pytest.raises(TypeError, match="labels: .*float32"):
        labels_read(labels.float(), (4, 4), 3)


@pytest.mark.slow
def test_shares_are_drawn_and_logged(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    labels = torch.zeros(2, 12, 12, dtype=torch.int64)
    labels[:, :, 1], labels[:, :6, 6:] = 1, 2  # the first of which no feature at stride 3 reads
    history, counts = History(["road", "pole", "sky", "none"]), labels_read(labels, (4, 4), 4)
    _, stats = proac_cuda.proac_loss(torch.randn(2, 8, 4, 4), labels, torch.randn(4, 8), return_stats=True)
    history.add(0, stats)
    history.add(1, stats, counts)
    shares = history.values("label_share")
    assert shares[0].isnan().all() and shares[1, 1] == 0 and shares[1, 3].isnan()
    assert torch.equal(shares[1, :3], counts.share[:3])
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    history.save_picture(tmp_path / "history.png")
    monkeypatch.undo()
    assert "share of a class's label pixels that features read" in [axis.get_title() for axis in drawn[0].axes]
    pyplot.close(drawn[0])

    class Writer:
        scalars = {}

        def add_scalar(self, tag, value, step):
            self.scalars[tag] = value

    log_to_tensorboard(Writer(), stats, 0, history.class_names, LabelsRead(counts.labels, counts.read))
    assert Writer.scalars["proac/label_share/pole"] == 0 and "proac/label_share/none" not in Writer.scalars


# ---- Where features lie, along one axis: the centre of what they see, from the gradient by the image. -------------------


def _even(network):
    """All weights alike, so that the gradient of a feature weighs its receptive field as the layers' geometry does."""
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1.0 if parameter.ndim > 1 else 0.0)
    return network.double()


def _padded(stride, kernels):
    layers = [nn.Conv2d(1, 1, k, stride=s, padding=k // 2, bias=False) for k, s in zip(kernels, stride, strict=True)]
    return _even(nn.Sequential(*layers))


def _disjoint(*strides):
    return _even(nn.Sequential(*(nn.Conv2d(1, 1, s, stride=s, bias=False) for s in strides)))


NETWORKS = {  # stride, network, does it lie at s i?
    # 7 x 7, a pooling of 3 x 3 (averages here: which of its pixels a maximum takes depends on the image), 3 x 3 and 1 x 1
    "ResNet": (32, _padded((2, 2, 2, 1, 2, 2), (7, 3, 3, 3, 3, 3)), True),
    "EfficientNet, MobileNet": (16, _padded((2, 2, 1, 2, 2), (3, 3, 5, 5, 3)), True),
    "SegFormer": (32, _padded((4, 2, 2, 2), (7, 3, 3, 3)), True),
    "ViT": (16, _disjoint(16), False),
    "Swin": (32, _disjoint(4, 2, 2, 2), False),
    "ConvNeXt": (
        16,
        nn.Sequential(_disjoint(4), _padded((1,), (7,)), _disjoint(2), _padded((1,), (7,)), _disjoint(2)),
        False,
    ),
}


def _centre_of(weights):
    return ((weights * torch.arange(len(weights))).sum() / weights.sum()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_where_the_features_of_a_network_lie(name):
    stride, network, at_corner = NETWORKS[name]
    image = torch.ones(1, 1, 16 * stride, 16 * stride, dtype=torch.float64, requires_grad=True)
    features = network(image)
    assert features.shape[-1] == 16
    (gradient,) = torch.autograd.grad(features[0, 0, 8, 8], image)
    centre = _centre_of(gradient[0, 0].sum(0))
    assert centre == pytest.approx(8 * stride + (0 if at_corner else (stride - 1) / 2))
    # the rule that the documentation names for it reads the pixel there, or the one half a pixel beside it
    mode = "nearest" if at_corner else "nearest-exact"
    read = nearest_index(16 * stride, 16, torch.device("cpu"), mode == "nearest-exact")[8].item()
    assert abs(read - centre) <= 0.5


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_where_upsampled_logits_put_the_features(stride):
    """Cross-entropy on them pulls feature i with the labels around s i + (s - 1) / 2, whatever its receptive field is."""
    features = torch.zeros(1, 1, 16, dtype=torch.float64, requires_grad=True)
    logits = nn.functional.interpolate(features, 16 * stride, mode="linear", align_corners=False)
    weights = [torch.autograd.grad(logit, features, retain_graph=True)[0][0, 0, 8] for logit in logits[0, 0]]
    assert _centre_of(torch.stack(weights)) == pytest.approx(8 * stride + (stride - 1) / 2)


@pytest.mark.slow
def test_what_real_label_maps_lose():
    """The documentation's table, from a part of its label maps, and with strides that lose more the larger they are."""
    pytest.importorskip("scipy")
    from benchmarks.segmentation import climate, label_rules

    try:
        maps = label_rules.climate_maps()[::9]
    except climate.DataError as error:
        pytest.skip(str(error))
    seen = [label_rules.measure(maps, len(climate.CLASS_NAMES), stride) for stride in (2, 4, 8)]
    lost = [[part.lost[rule].sum() / part.components.sum() for rule in label_rules.RULES] for part in seen]
    for part, expected, differ in zip(seen, (0.35, 0.65, 0.81), (0.042, 0.066, 0.101), strict=True):
        for rule in label_rules.RULES:
            assert part.lost[rule].sum() / part.components.sum() == pytest.approx(expected, abs=0.05)
            assert part.read[rule].sum() * part.stride**2 == part.pixels.sum()
            assert part.read[rule] * part.stride**2 / part.pixels == pytest.approx(1, abs=0.1), "of every class"
        assert part.differ / part.features == pytest.approx(differ, abs=0.015)
    assert all(abs(nearest - exact) < 0.03 for nearest, exact in lost), "neither rule keeps small components better"
