"""What the contract promises beside numbers: edge cases, seeds, determinism, autocast, second derivatives, threads."""

from __future__ import annotations

import threading

import pytest
import torch

import oracle
import proac_cuda
from cases import Case
from compare import assert_gradient_close, assert_loss_close, leaf, run
from proac_cuda.backends import BACKENDS, stage_ops

CASE = Case("everything", (2, 16, 6, 7), 5, labels=(12, 14))


def _inputs(backend, dtype=torch.float32, case=CASE):
    features, labels, prototypes, options = case.tensors()
    return leaf(features, backend, dtype), labels, leaf(prototypes, backend, torch.float32).detach(), options


def test_all_ignored_is_zero_and_part_of_the_graph(backend):
    x, labels, p, _ = _inputs(backend)
    p.requires_grad_()
    loss, stats = run(backend, x, torch.full_like(labels, 255), p, {"pixel_anchor_weight": 1.0}, return_stats=True)
    assert loss.item() == 0 and loss.requires_grad
    loss.backward()
    assert (x.grad == 0).all() and (p.grad == 0).all()
    assert stats.weight.sum() == 0 and stats.mean_positive_cosine.isnan().all() and (stats.loss == 0).all()
    assert (stats.log_z == -torch.inf).all()


@pytest.mark.parametrize("options", [{}, {"num_negatives": 3, "seed": 0}, {"negative_reduction": "mean"}], ids=str)
def test_one_class_only(backend, options):
    x, labels, p, _ = _inputs(backend)
    loss, stats = run(backend, x, torch.full_like(labels, 3), p, options, return_stats=True)
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()
    assert stats.log_z[3] == -torch.inf and stats.hardest_negative_cosine[3].isnan()


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("shape", [(0, 16, 6, 7), (2, 16, 0, 7), (2, 16, 7, 0), (2, 16, 3, 0, 4)], ids=str)
def test_no_pixels(backend, shape, permuted):
    x = torch.zeros(shape, device=backend.device)
    if permuted:  # the strides of a tensor without elements mean nothing
        x = torch.zeros(shape[::-1], device=backend.device).permute(*range(len(shape))[::-1])
    x.requires_grad_()
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    loss = run(backend, x, labels, torch.eye(3, 16, device=backend.device), {})
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == x.shape


def test_no_rows(backend):
    x = torch.zeros(0, 4, device=backend.device, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    run(backend, x, labels, torch.eye(3, 4, device=backend.device), {"num_negatives": 2}).backward()
    assert x.grad.shape == (0, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_in_ignored_pixel_has_no_effect(backend, value):
    x, labels, p, _ = _inputs(backend, case=Case("full", (2, 16, 6, 7), 5))
    p.requires_grad_()
    labels[0, 2, 3] = 255
    options = {"pixel_anchor_weight": 0.5}
    clean = run(backend, x, labels, p, options)
    clean_grads = torch.autograd.grad(clean, (x, p))
    dirty_x = x.detach().clone()
    dirty_x[0, :, 2, 3] = value
    dirty_x.requires_grad_()
    dirty = run(backend, dirty_x, labels, p, options)
    dirty_grads = torch.autograd.grad(dirty, (dirty_x, p))
    assert torch.equal(clean, dirty)
    assert all(torch.equal(a, b) for a, b in zip(clean_grads, dirty_grads, strict=True))
    assert (clean_grads[0][0, :, 2, 3] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_non_finite_in_kept_pixel_is_nan(backend, value):
    x, labels, p, _ = _inputs(backend, case=Case("full", (2, 16, 6, 7), 5))
    labels[0, 2, 3] = 1
    x.data[0, :, 2, 3] = value  # 16 channels of 3e38 have a norm beyond float32
    loss = run(backend, x, labels, p, {})
    loss.backward()
    assert loss.isnan()


@pytest.mark.parametrize("dtype, value", [(torch.float32, 1e30), (torch.float32, 1e-9), (torch.float16, 6e4)], ids=str)
def test_extreme_norms_are_right(backend, dtype, value):
    """Squares that overflow or underflow float32, and a norm beyond float16."""
    features, labels, prototypes, _ = Case("full", (2, 16, 6, 7), 5).tensors()
    features[0] = features[0].sign() * value
    x, p = leaf(features, backend, dtype), leaf(prototypes, backend, torch.float32)
    truth_x = x.detach().cpu().double().requires_grad_()
    truth = oracle.loss(truth_x, labels, p.detach().cpu())
    truth.loss.backward()
    loss = run(backend, x, labels, p.detach(), {})
    loss.backward()
    assert_loss_close(loss, truth.loss, dtype, 0.1, 16)
    for image in (0, 1):
        if dtype == torch.float32:
            assert_gradient_close(x.grad[image], truth_x.grad[image], 0.1)


def test_vectors_of_no_length_have_no_direction(backend):
    x, labels, p, _ = _inputs(backend, case=Case("full", (2, 16, 6, 7), 5))
    labels[0, 2, 3] = 1
    x.data[0, :, 2, 3] = 0
    x.data[1, :, 2, 3] = 1e-14
    p[4] = 0
    p.requires_grad_()
    truth = oracle.loss(x.detach().cpu(), labels, p.detach().cpu())
    loss = run(backend, x, labels, p, {})
    loss.backward()
    assert_loss_close(loss, truth.loss, torch.float32, 0.1, 16)
    assert (x.grad[0, :, 2, 3] == 0).all() and (x.grad[1, :, 2, 3] == 0).all() and (p.grad[4] == 0).all()
    assert x.grad.isfinite().all() and p.grad.isfinite().all()


def test_tiny_weights_do_not_overflow(backend):
    x, labels, p, _ = _inputs(backend)
    weight = torch.full(labels.shape, 1e-30)
    weight[:, ::3] = 1e-36
    options = {"pixel_weight": weight, "negative_reduction": "mean"}
    truth_x = x.detach().cpu().double().requires_grad_()
    truth = oracle.loss(truth_x, labels, p.cpu(), **options)
    truth.loss.backward()
    loss = run(backend, x, labels, p, options)
    loss.backward()
    assert_loss_close(loss, truth.loss, torch.float32, 0.1, 16)
    assert_gradient_close(x.grad, truth_x.grad, 0.1)


@pytest.mark.parametrize("dtype, lost, kept", [(torch.float32, 1e-39, 1e-36), (torch.float64, 1e-310, 1e-39)], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_negatives": 7, "seed": 1}], ids=["all", "sampled"])
def test_weights_below_the_smallest_normal_number_count_as_zero(backend, dtype, lost, kept, options):
    """The inverse of their sum would be infinite: a finite loss with a gradient of NaN."""
    x, labels, p, _ = _inputs(backend, dtype, Case("labels at the features' size", (2, 16, 6, 7), 5))
    weight = torch.where(labels == 1, lost, torch.where(labels == 2, kept, 1.0)).to(dtype)
    loss = run(backend, x, labels, p, {"pixel_weight": weight, **options})
    (gradient,) = torch.autograd.grad(loss, x)
    ignored = run(backend, x, labels, p, {"pixel_weight": weight.masked_fill(labels == 1, 0), **options})
    assert torch.equal(loss, ignored) and torch.equal(gradient, torch.autograd.grad(ignored, x)[0])
    assert gradient.isfinite().all() and gradient.movedim(1, -1)[(labels == 1).to(x.device)].eq(0).all()
    stats = run(backend, x, labels, p, {"pixel_weight": weight, **options}, return_stats=True)[1]
    assert stats.weight[1] == 0 < stats.weight[2] and stats.invalid_labels == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_label_dtypes_and_strides(backend, dtype):
    x, labels, p, _ = _inputs(backend)
    expected = run(backend, x, labels, p, {})
    strided = torch.zeros(*labels.shape, 3, dtype=dtype)
    strided[..., 1] = labels.to(dtype)
    assert torch.equal(run(backend, x, strided[..., 1], p, {}), expected)
    flipped = labels.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(backend, x, flipped, p, {}), expected)


def test_negative_ignore_index(backend):
    x, labels, p, _ = _inputs(backend)
    expected = run(backend, x, labels, p, {})
    labels[labels == 255] = -100
    assert torch.equal(run(backend, x, labels, p, {"ignore_index": -100}), expected)


def test_same_answer_at_every_run(backend):
    # Several chunks: fewer in Triton's interpreter, where programs run one after another anyway.
    shape = (2, 16, 20, 31) if backend == ("triton", "cpu") else (2, 16, 90, 111)
    case = Case("several chunks", shape, 19, options={"num_negatives": 50, "seed": 3}, weighted=True)
    features, labels, prototypes, options = case.tensors()
    answers = []
    for _ in range(3):
        x, p = leaf(features, backend, torch.float32), leaf(prototypes, backend, torch.float32)
        loss = run(backend, x, labels, p, options)
        loss.backward()
        answers.append((loss.detach(), x.grad, p.grad))
    for answer in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], answer, strict=True))


def test_seeds(backend):
    x, labels, p, _ = _inputs(backend)

    def call(seed):
        return run(backend, x, labels, p, {"num_negatives": 4, "seed": seed}).item()

    assert call(5) == call(5) != call(6)
    assert call(torch.tensor(5)) == call(torch.tensor([5])) == call(5)
    assert call(2**63 + 1) == call(1 - 2**63)
    torch.manual_seed(0)
    first, second = call(None), call(None)
    torch.manual_seed(0)
    assert (first, second) == (call(None), call(None)) and first != second


def test_nothing_is_drawn_without_sampling(backend):
    x, labels, p, _ = _inputs(backend)
    torch.manual_seed(0)
    expected = torch.rand(1, device=backend.device)
    torch.manual_seed(0)
    run(backend, x, labels, p, {})
    assert torch.equal(torch.rand(1, device=backend.device), expected)


def test_seed_tensor_is_copied_at_the_call(backend):
    x, labels, p, _ = _inputs(backend)
    seed = torch.tensor(5, device=backend.device)
    expected = torch.autograd.grad(run(backend, x, labels, p, {"num_negatives": 4, "seed": 5}), x)[0]
    loss = run(backend, x, labels, p, {"num_negatives": 4, "seed": seed})
    seed += 1
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_sampled_sets_do_not_depend_on_dtype_or_layout(backend):
    features, labels, prototypes, _ = CASE.tensors()
    ops = stage_ops(BACKENDS[backend.name])
    thresholds = [
        ops.select_negatives(
            x.to(backend.device), labels.to(backend.device), None, state.to(backend.device), 20, 5, 255
        )
        for state in [torch.tensor([7, 0])]
        for x in (features, features.half(), features.to(memory_format=torch.channels_last))
    ]
    state = torch.tensor([7, 0])
    expected = torch.ops.proac_cuda_reference.select_negatives(features, labels, None, state, 20, 5, 255)
    assert all(torch.equal(t.cpu(), expected) for t in thresholds)


def test_gradients_of_16_bits_survive_loss_scaling(backend):
    """The upstream gradient multiplies before the one rounding: at this scale nothing is lost to zero."""
    features, labels, prototypes, _ = Case("many pixels", (1, 16, 64, 64), 5).tensors()
    p = leaf(prototypes, backend, torch.float32).detach()
    x = leaf(features, backend, torch.float16)
    (run(backend, x, labels, p, {}) * 2.0**16).backward()
    kept = (labels != 255)[0]
    truth_x = x.detach().cpu().float().requires_grad_()
    (proac_cuda.reference.proac_loss(truth_x, labels, p.cpu()) * 2.0**16).backward()
    lost = (x.grad[0, :, kept] == 0).cpu() & (truth_x.grad[0, :, kept].abs() > 2.0**-24)
    assert not lost.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivative_raises(backend, dtype):
    x, labels, p, _ = _inputs(backend, dtype)
    (gradient,) = torch.autograd.grad(run(backend, x, labels, p, {}), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.pow(2).sum().backward()
    penalty = torch.autograd.grad((run(backend, x, labels, p, {}) + x.pow(3).sum()), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        (penalty.pow(2).sum() + x.sum()).backward()


def test_autocast_has_no_effect(backend):
    x, labels, p, _ = _inputs(backend)
    expected = run(backend, x, labels, p, {})
    expected_gradient = torch.autograd.grad(expected, x)[0]
    with torch.autocast(torch.device(backend.device).type, dtype=torch.bfloat16):
        loss = run(backend, x, labels, p, {})
        gradient = torch.autograd.grad(loss, x)[0]
    assert loss.dtype == torch.float32 and torch.equal(loss, expected) and torch.equal(gradient, expected_gradient)


def test_nothing_is_spent_on_gradients_that_are_not_asked_for(backend):
    x, labels, p, _ = _inputs(backend)
    assert not run(backend, x.detach(), labels, p, {}).requires_grad
    q = p.clone().requires_grad_()
    run(backend, x.detach(), labels, q, {}).backward()
    run(backend, x, labels, p.clone().requires_grad_(), {}).backward()
    other = torch.autograd.grad(run(backend, x, labels, q, {}), q)[0]
    assert torch.equal(other, q.grad)


def test_module(backend):
    x, labels, p, _ = _inputs(backend)
    module = proac_cuda.ProACLoss(5, 16, prototypes=p.cpu(), backend=backend.name, pixel_anchor_weight=0.5)
    module = module.to(backend.device)
    expected = run(backend, x, labels, p, {"pixel_anchor_weight": 0.5})
    assert torch.equal(module(x, labels.to(backend.device)), expected)
    learnable = proac_cuda.ProACLoss(5, 16, learnable=True, backend=backend.name).to(backend.device)
    learnable(x, labels.to(backend.device)).backward()
    assert learnable.prototypes.grad.shape == (5, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    features, labels, prototypes, _ = CASE.tensors()
    device = backend.device
    x, y, p = features.to(device, dtype), labels.to(device), prototypes.to(device, torch.float32)
    w = torch.rand(labels.shape, device=device)
    state = torch.tensor([3, 0], device=device)
    ops = stage_ops(BACKENDS[backend.name])
    check = torch.library.opcheck
    select = (x, y, w, state, 6, 5, 255)
    check(ops.select_negatives.default, select)
    thresholds = ops.select_negatives(*select)
    first = (x, y, w, p, thresholds, state, 0.1, 255, True, True)
    check(ops.class_statistics.default, first)
    statistics, positive, _ = ops.class_statistics(*first)
    second = (positive, y, w, statistics, 255, True)
    check(ops.positive_sums.default, second)
    sums = ops.positive_sums(*second)
    check(ops.reduce_loss.default, (statistics, sums, p[:, 0].abs().contiguous(), 0.5, 1))
    check(ops.reduce_loss.default, (statistics, sums, None, 0.0, 0))
    for reduction in (0, 1):
        whole = (x, y, w, p, None, thresholds, state, 0.1, 255, True, 0.5 * reduction, reduction, True)
        check(ops.loss_forward.default, whole)
    by_stages = (ops.reduce_loss(statistics, sums, None, 0.5, 1), statistics, sums)
    assert all(map(torch.equal, ops.loss_forward(*whole), by_stages)), "equal to the bit"
    third = (x, y, w, p, thresholds, state, statistics, sums, None, torch.ones((), device=device))
    for needs in ((True, True), (True, False), (False, True)):
        check(ops.loss_gradients.default, (*third, 0.1, 255, True, 0.5, 1, *needs))


def test_threads_calling_at_once(backend):
    x, labels, p, _ = _inputs(backend)
    expected = torch.autograd.grad(run(backend, x, labels, p, {}), x)[0]
    results = []

    def work():
        for _ in range(5):
            results.append(torch.autograd.grad(run(backend, x, labels, p, {}), x)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20 and all(torch.equal(r, expected) for r in results)
