"""What must hold for any input, over shapes, strides and options drawn by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from cases import LAYOUTS, with_layout
from compare import leaf, run

SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def problems(draw):
    """features, labels, prototypes and options, float64 on the CPU, and a layout."""
    spatial = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    batch, channels, classes = draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(1, 6))
    size = tuple(draw(st.integers(1, 9)) for _ in spatial)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = torch.randn(batch, channels, *spatial, generator=generator, dtype=torch.float64)
    prototypes = torch.randn(classes, channels, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, classes, (batch, *size), generator=generator)
    options = {
        "ignore_index": -1,
        "temperature": draw(st.sampled_from([0.02, 0.1, 1.0])),
        "num_negatives": draw(st.sampled_from([None, 1, 3, 20])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "negative_reduction": draw(st.sampled_from(["sum", "mean"])),
        "pixel_anchor_weight": draw(st.sampled_from([0.0, 0.5])),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "label_sampling": draw(st.sampled_from(["nearest", "nearest-exact"])),
    }
    if draw(st.booleans()):
        weight = torch.rand(batch, *size, generator=generator)
        options["pixel_weight"] = weight.masked_fill(weight < 0.2, 0)
        options["class_weight"] = torch.rand(classes, generator=generator)
    return features, labels, prototypes, options, draw(st.sampled_from(LAYOUTS))


def _gradient(backend, features, labels, prototypes, options):
    x = leaf(features, backend, torch.float64)
    loss = run(backend, x, labels, prototypes.to(backend.device), options)
    loss.backward()
    return loss.detach().cpu(), x.grad.cpu()


@given(problem=problems())
@SETTINGS
def test_any_problem_equals_the_loop(backend, problem):
    features, labels, prototypes, options, layout = problem
    loss, gradient = _gradient(backend, with_layout(features, layout), labels, prototypes, options)
    x = features.clone().requires_grad_()
    truth = oracle.loss(x, labels, prototypes, **options)
    (truth.loss + 0 * x.sum()).backward()
    torch.testing.assert_close(loss, truth.loss.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient, x.grad, rtol=1e-10, atol=1e-12)


@given(problem=problems(), scale=st.floats(1e-3, 1e3))
@SETTINGS
def test_length_of_features_does_not_matter(backend, problem, scale):
    """cosines: scaling a pixel changes no loss, and the gradient stands at right angles to the pixel"""
    features, labels, prototypes, options, _ = problem
    loss, gradient = _gradient(backend, features, labels, prototypes, options)
    scaled, scaled_gradient = _gradient(backend, features * scale, labels, prototypes, options)
    torch.testing.assert_close(loss, scaled, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient, scaled_gradient * scale, rtol=1e-9, atol=1e-11)
    assert ((features * gradient).sum(1).abs() < 1e-9).all()


@given(problem=problems())
@SETTINGS
def test_classes_may_be_renamed(backend, problem):
    features, labels, prototypes, options, _ = problem
    order = torch.randperm(len(prototypes), generator=torch.Generator().manual_seed(0))
    renamed = torch.where(labels >= 0, order.argsort()[labels.clamp(min=0)], labels)
    moved = {**options}
    if "class_weight" in options:
        moved["class_weight"] = options["class_weight"][order]
    loss, gradient = _gradient(backend, features, labels, prototypes, options)
    other, other_gradient = _gradient(backend, features, renamed, prototypes[order], moved)
    torch.testing.assert_close(loss, other, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-9, atol=1e-12)


@given(problem=problems())
@SETTINGS
def test_a_pixel_twice_is_a_pixel_of_weight_two(backend, problem):
    features, labels, prototypes, options, _ = problem
    options = {**options, "num_negatives": None}
    options.pop("pixel_weight", None)
    loss, _ = _gradient(
        backend, features, labels, prototypes, {**options, "pixel_weight": 2 * torch.ones(labels.shape)}
    )
    twice, _ = _gradient(backend, torch.cat([features, features]), torch.cat([labels, labels]), prototypes, options)
    torch.testing.assert_close(loss, twice, rtol=1e-11, atol=1e-13)


@given(problem=problems())
@SETTINGS
def test_ignored_pixels_get_exactly_zero(backend, problem):
    features, labels, prototypes, options, _ = problem
    _, gradient = _gradient(backend, features, labels, prototypes, options)
    size, mode = features.shape[2:], options["label_sampling"]
    ignored = torch.nn.functional.interpolate(labels.float()[:, None], size=size, mode=mode) == -1
    assert (gradient[ignored.expand_as(gradient)] == 0).all()
    assert gradient.isfinite().all()
