"""The loss inside what PyTorch does to a training step: torch.compile, autocast, checkpointing."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import proac_cuda
from proac_cuda.stages.tracing import constant_while_tracing

OPTIONS = [
    {},
    {
        "num_negatives": 6,
        "seed": 3,
        "negative_reduction": "mean",
        "pixel_anchor_weight": 0.3,
        "label_sampling": "nearest-exact",
    },
]


class _Model(torch.nn.Module):
    def __init__(self, backend, options):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 16, 1)
        self.proac = proac_cuda.ProACLoss(5, 16, learnable=True, backend=backend.name, **options)

    def forward(self, images, labels, pixel_weight=None):
        return self.proac(self.convolution(images), labels, pixel_weight)


def _problem(backend, options, height=6, label_height=12):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = _Model(backend, options).to(backend.device)
    images = torch.randn(2, 3, height, 7, generator=generator).to(backend.device)
    labels = torch.randint(0, 5, (2, label_height, 14), generator=generator).to(backend.device)
    return model, images, labels


def _assert_same_gradients(model, other):
    for (name, parameter), compiled in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(compiled.grad, parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_model_has_the_right_gradient(backend, options):
    model, images, labels = _problem(backend, options)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    model(images, labels).backward()
    compiled(images, labels).backward()
    _assert_same_gradients(model, compiled)


@pytest.mark.slow
def test_bad_values_in_a_compiled_graph(backend):
    model, images, labels = _problem(backend, {})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images, labels)
    labels[0, 0, 0] = 77
    if backend.device == "cuda":
        compiled(images, labels)  # ignored and counted, as in eager mode: looking would synchronise
    else:
        with pytest.raises(RuntimeError, match="labels: 77 is neither"):
            compiled(images, labels)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic, graphs", [(None, 4), (True, 2)])
def test_sizes_that_change_do_not_recompile_every_time(backend, dynamic, graphs):
    model, *_ = _problem(backend, OPTIONS[1])
    count = 0

    def counting(graph, example_inputs):
        nonlocal count
        count += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counting)
    for height, label_height in [(6, 12), (6, 13), (6, 20), (6, 31), (7, 31), (8, 40), (9, 9)]:
        _, images, labels = _problem(backend, {}, height, label_height)
        torch.testing.assert_close(compiled(images, labels), model(images, labels))
    assert count <= graphs


@pytest.mark.slow
def test_a_compiled_step_draws_anew(backend):
    model, images, labels = _problem(backend, {"num_negatives": 4})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = compiled(images, labels).item(), compiled(images, labels).item()
    torch.manual_seed(3)
    assert first == compiled(images, labels).item() != second


@pytest.mark.slow
def test_int_seeds_that_change_draw_the_sets_of_eager_mode(backend):
    _, _, labels = _problem(backend, {})
    features, prototypes = (torch.randn(*shape, device=backend.device) for shape in ((2, 16, 6, 7), (5, 16)))

    def loss(seed):
        return proac_cuda.proac_loss(features, labels, prototypes, num_negatives=4, seed=seed, backend=backend.name)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for seed in (0, 1, 7, 2**40, -5, 2**63 - 1, -(2**63)):
        torch.testing.assert_close(compiled(seed), loss(seed))


@pytest.mark.slow
def test_compiled_under_autocast(backend):
    model, images, labels = _problem(backend, {})
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    device_type = torch.device(backend.device).type
    for each in (model, compiled):
        with torch.autocast(device_type, dtype=torch.bfloat16):
            loss = each(images, labels)
        assert loss.dtype == torch.float32
        loss.backward()
    _assert_same_gradients(model, compiled)


def test_gradient_scaler(backend):
    model, images, labels = _problem(backend, {})
    device_type = torch.device(backend.device).type
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device_type, init_scale=2.0**12)
    before = model.convolution.weight.detach().clone()
    with torch.autocast(device_type, dtype=torch.float16):
        loss = model(images, labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert model.convolution.weight.isfinite().all() and not torch.equal(model.convolution.weight, before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend, use_reentrant):
    """The sets are drawn again when the forward pass is run again: checkpoint restores the generator."""
    model, images, labels = _problem(backend, {"num_negatives": 4})
    images.requires_grad_()
    torch.manual_seed(5)
    (expected,) = torch.autograd.grad(model(images, labels), images)
    torch.manual_seed(5)
    checkpoint(model, images, labels, use_reentrant=use_reentrant).backward()
    assert torch.equal(images.grad, expected)


def test_deterministic_algorithms(backend):
    model, images, labels = _problem(backend, OPTIONS[1])
    torch.use_deterministic_algorithms(True)
    try:
        model(images, labels).backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_dtensor_is_refused_with_the_remedy():
    class LooksLikeDTensor(torch.Tensor):
        placements = ()

        def to_local(self):
            return self

    features = torch.randn(4, 8).as_subclass(LooksLikeDTensor)
    labels, prototypes = torch.zeros(4, dtype=torch.int64), torch.randn(3, 8)
    with pytest.raises(TypeError, match="to_local.*process_group"):
        proac_cuda.proac_loss(features, labels, prototypes)
    with pytest.raises(TypeError, match=r"prototypes.full_tensor\(\)"):
        proac_cuda.proac_loss(features.as_subclass(torch.Tensor), labels, prototypes.as_subclass(LooksLikeDTensor))


def test_a_program_that_does_not_compile_never_waits_for_the_compiler():
    """Importing torch._dynamo takes nearly as long as importing torch."""
    program = (
        "import sys, torch, proac_cuda\n"
        "x = torch.randn(1, 4, 2, 2, requires_grad=True)\n"
        "proac_cuda.ProACLoss(3, 4)(x, torch.zeros(1, 2, 2, dtype=torch.int64)).backward()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stdout + done.stderr


def test_a_constant_is_marked_as_pytorch_marks_it():
    ours, theirs = (lambda: 1), (lambda: 1)
    torch.compiler.assume_constant_result(theirs)
    assert vars(constant_while_tracing(ours)) == vars(theirs) != {}
