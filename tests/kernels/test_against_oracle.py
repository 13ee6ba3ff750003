"""Every backend against the float64 loop: loss, gradient, diagnostics, over dtypes, layouts and options."""

from __future__ import annotations

import pytest
import torch

import oracle
from cases import CASES, LAYOUTS, Case, with_layout
from compare import (
    assert_gradient_close,
    assert_loss_close,
    assert_twin_of_trained_features,
    gradient_tolerance,
    leaf,
    run,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACCURACY = Case("features of a real head", (2, 64, 12, 11), 19, labels=(24, 22))


def _compare(backend, case, dtype, layout="contiguous", eager=False):
    features, labels, prototypes, options = case.tensors()
    temperature = options.get("temperature", 0.1)
    prototype_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x = leaf(with_layout(features, layout), backend, dtype)
    p = leaf(prototypes, backend, prototype_dtype)
    truth_x = x.detach().cpu().double().requires_grad_()
    truth_p = p.detach().cpu().double().requires_grad_()
    truth = oracle.loss(truth_x, labels, truth_p, **options)
    truth.loss = truth.loss + 0 * (truth_x.sum() + truth_p.sum())  # in the graph also where nothing is contrasted
    loss, stats = run(backend, x, labels, p, options, return_stats=True)

    upstream = torch.randn(truth.loss.shape, generator=torch.Generator().manual_seed(1)).double()
    (truth.loss * upstream).sum().backward()
    (loss * upstream.to(loss)).sum().backward()

    assert loss.dtype == prototype_dtype and x.grad.dtype == dtype
    assert x.grad.stride() == torch.empty_like(x).stride(), "the gradient has the features' layout"
    channels = features.shape[1]
    assert_loss_close(loss, truth.loss, dtype, temperature, channels)
    for name in ("loss", "log_z", "mean_positive_cosine", "hardest_negative_cosine"):
        expected = truth.class_loss if name == "loss" else getattr(truth, name)
        scale = 1.0 if "cosine" in name else temperature
        assert_loss_close(getattr(stats, name), expected, dtype, scale, channels)
    torch.testing.assert_close(stats.weight.cpu().double(), truth.weight, rtol=1e-6, atol=0)
    assert stats.invalid_labels.item() == 0

    truth_grads = truth_x.grad, truth_p.grad
    if channels == 1:  # a unit vector of one channel has no direction to turn to: 0, to the rounding of its terms
        assert (truth_grads[0].abs() < 1e-14).all()
        assert (x.grad.abs() <= gradient_tolerance(dtype, temperature)).all()
        return
    plain = None
    if eager:
        eager_x = x.detach().cpu().requires_grad_()
        (oracle.eager(eager_x, labels, p.detach().cpu(), temperature=temperature) * upstream).sum().backward()
        plain = eager_x.grad
    assert_gradient_close(x.grad, truth_grads[0], temperature, plain)
    if dtype in (torch.float64, torch.float32):
        assert_gradient_close(p.grad, truth_grads[1], temperature)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cases(backend, case, dtype):
    _compare(backend, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:features of shape")
def test_dtypes_and_layouts_against_eager(backend, dtype, layout):
    _compare(backend, ACCURACY, dtype, layout, eager=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 4, 8, 8), (8, 96, 8, 1)), ((2, 4, 8, 8), (32, 1, 32, 4)), ((2, 4, 4, 3, 2), (6, 36, 6, 2, 1))],
    ids=["planes", "channels last", "volumes"],
)
def test_features_that_overlap(backend, shape, strides, dtype):
    """Windows of a map, one row apart: `empty_like` puts the batch between their rows and columns."""
    base = torch.randn(384, generator=torch.Generator().manual_seed(3)).to(backend.device, dtype)
    windows = base.as_strided(shape, strides).requires_grad_()
    labels = torch.randint(0, 5, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(4))
    prototypes = torch.eye(5, 4)
    found = []
    for x in (windows, windows.detach().contiguous().requires_grad_()):
        loss = run(backend, x, labels, prototypes.to(backend.device), {})
        found.append(torch.autograd.grad(loss, x)[0])
    assert found[0].stride() == torch.empty_like(windows).stride() != found[1].stride()
    truth = windows.detach().cpu().double().requires_grad_()
    oracle.loss(truth, labels, prototypes.double()).loss.backward()
    for gradient in found:
        assert_gradient_close(gradient, truth.grad, 0.1)


def test_precision_of_matrix_products(backend):
    """`torch.set_float32_matmul_precision` is for the network; "medium" are products of bfloat16, where there are some."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        _compare(backend, Case("large enough to be worth it", (1, 256, 32, 33), 19), torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_sixteen_bits_with_few_channels(backend, dtype, temperature):
    case = Case("few channels", (1, 24, 9, 7), 7, options={"temperature": temperature})
    _compare(backend, case, dtype, eager=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("classes", "channels", "temperature"),
    [(2, 64, 0.1), (19, 256, 0.05), pytest.param(40, 64, 0.07, marks=pytest.mark.slow), (300, 16, 0.02)],
)
def test_twin_of_trained_features(backend, classes, channels, temperature, dtype):
    """In CUDA and Triton 2 and 19 classes take one program, 40 blocks of classes, 300 kernels of their own."""
    assert_twin_of_trained_features(backend, classes, channels, temperature, dtype)


@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 0.024, 0.026, 0.5, 1e3])
def test_temperatures(backend, temperature):
    for dtype in (torch.float32, torch.float64):
        _compare(backend, Case("any temperature", (1, 64, 9, 7), 7, options={"temperature": temperature}), dtype)


@pytest.mark.parametrize("num_negatives", [1, 2, 30, 130, 10**9])
def test_sampled_sets_equal_brute_force(backend, num_negatives):
    """The sets show in log Z: with D = K and one-hot prototypes, every member adds its own number to it."""
    case = Case("one hot", (2, 6, 9, 8), 6, options={"num_negatives": num_negatives, "seed": 77}, weighted=True)
    _compare(backend, case, torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(o, marks=pytest.mark.slow)
            for o in ({"num_negatives": 4, "seed": 1}, {"pixel_anchor_weight": 1.0})
        ),
    ],
    ids=str,
)
def test_gradcheck(backend, options):
    features, labels, prototypes, _ = Case("gradcheck", (2, 5, 3, 4), 4, labels=(7, 9)).tensors()
    weights = {
        "pixel_weight": torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(0)),
        "class_weight": torch.tensor([0.3, 0.0, 2.0, 1.0]),
    }
    reductions = ["mean", "sum"] + ([] if options.get("pixel_anchor_weight") else ["none"])
    for reduction in reductions:
        for negative_reduction in ("sum", "mean"):
            everything = {**options, **weights, "reduction": reduction, "negative_reduction": negative_reduction}
            inputs = [leaf(v, backend, torch.float64) for v in (features, prototypes)]
            assert torch.autograd.gradcheck(
                lambda x, p, everything=everything: run(backend, x, labels, p, {**everything, "temperature": 0.3}),
                inputs,
                fast_mode=backend == ("triton", "cpu"),  # the interpreter takes tenths of a second for a call
            )
