"""The gradient survives what takes a model apart: export, make_fx, torch.func, also compiled; or an error names the tool."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import proac_cuda
from proac_cuda.stages import autograd

OPTIONS = {"num_negatives": 6, "seed": 3, "negative_reduction": "mean", "pixel_anchor_weight": 0.3}


class _Problem:
    def __init__(self, backend, **options):
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(2, 16, 6, 7, generator=generator)
        labels = torch.randint(0, 5, (2, 12, 14), generator=generator)
        prototypes = torch.randn(5, 16, generator=generator)
        self.features, self.labels, self.prototypes = (x.to(backend.device) for x in (features, labels, prototypes))
        self.options = {"backend": backend.name, **options}

        def loss(features):  # a function: make_fx takes no bound methods
            return proac_cuda.proac_loss(features, self.labels, self.prototypes, **self.options)

        self.loss = loss
        self.expected = self.gradient_through(loss)

    def gradient_through(self, function):
        leaf = self.features.clone().requires_grad_()
        function(leaf).backward()
        return leaf.grad

    def check(self, gradient):
        assert self.expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient, self.expected, rtol=1e-5, atol=1e-7)


class _Model(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, features):
        return self.loss(features * self.scale)


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
def test_make_fx(backend, options):
    problem = _Problem(backend, **options)
    for pre_dispatch in (False, True):
        problem.check(problem.gradient_through(make_fx(problem.loss, pre_dispatch=pre_dispatch)(problem.features)))

    def gradient(features):
        features = features.detach().requires_grad_()
        return torch.autograd.grad(problem.loss(features), features)[0]

    problem.check(make_fx(gradient)(problem.features)(problem.features))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_export(backend, strict):
    problem = _Problem(backend, **OPTIONS)
    model = _Model(problem.loss).to(backend.device)
    program = torch.export.export(model, (problem.features,), strict=strict)
    for exported in (program.module(), program.run_decompositions().module()):
        problem.check(problem.gradient_through(exported))
        (scale,) = exported.parameters()
        torch.testing.assert_close(scale.grad, (problem.expected * problem.features).sum(), rtol=1e-4, atol=1e-5)
        scale.grad = None


def test_jit_trace(backend):
    problem = _Problem(backend)
    problem.check(problem.gradient_through(torch.jit.trace(problem.loss, (problem.features,), check_trace=False)))


@pytest.mark.parametrize("trace", [lambda m, x: make_fx(m)(*x), torch.jit.trace], ids=["make_fx", "jit.trace"])
def test_module_at_its_first_call(trace):
    """It looks at its prototypes then, which is no part of the program."""
    loss, inputs = proac_cuda.ProACLoss(5, 8), (torch.randn(2, 8, 6, 6), torch.randint(0, 5, (2, 6, 6)))
    traced = trace(loss, inputs)
    assert "equal" not in str(traced.graph)
    torch.testing.assert_close(traced(*inputs), loss(*inputs))


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
def test_func(backend, options):
    problem = _Problem(backend, **options)
    problem.check(torch.func.grad(problem.loss)(problem.features))
    loss, vjp = torch.func.vjp(problem.loss, problem.features)
    problem.check(vjp(torch.ones_like(loss))[0])
    problem.check(torch.func.jacrev(problem.loss)(problem.features))
    problem.check(make_fx(torch.func.grad(problem.loss))(problem.features)(problem.features))


@pytest.mark.slow
def test_compiled_func(backend):
    problem = _Problem(backend, **OPTIONS)
    compile = {"backend": "aot_eager", "fullgraph": True}
    problem.check(torch.compile(torch.func.grad(problem.loss), **compile)(problem.features))

    def vjp(features):
        loss, pull_back = torch.func.vjp(problem.loss, features)
        return pull_back(torch.ones_like(loss))[0]

    problem.check(torch.compile(vjp, **compile)(problem.features))


def test_func_within_func(backend):
    """The features belong to the outer level: its gradient passes through the loss at the inner one."""
    problem = _Problem(backend)

    def outer(features):
        return torch.func.grad(lambda factor: factor * problem.loss(features))(torch.ones((), device=features.device))

    problem.check(torch.func.grad(outer)(problem.features))


def test_vmap_is_a_loop(backend):
    problem = _Problem(backend)
    many = torch.stack([problem.features, problem.features.flip(0)])
    expected = [problem.loss(features) for features in many]
    torch.testing.assert_close(torch.func.vmap(problem.loss)(many), torch.stack(expected))
    problem.check(torch.func.vmap(torch.func.grad(problem.loss))(many)[0])


def test_forward_mode_raises(backend):
    problem = _Problem(backend)
    one = problem.features
    with pytest.raises(RuntimeError, match="no forward-mode derivative.*reverse mode"):
        torch.func.jvp(problem.loss, (one,), (one,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        problem.loss(torch.autograd.forward_ad.make_dual(one, one))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.compile(lambda x: torch.func.jvp(problem.loss, (x,), (x,))[1], backend="aot_eager")(one)


@pytest.mark.parametrize("compile_backend", ["eager", "aot_eager"])
def test_second_derivative_raises(backend, compile_backend):
    problem = _Problem(backend)
    leaf = problem.features.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(lambda x: torch.func.grad(problem.loss)(x).pow(2).sum())(leaf.detach())
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="second derivative|double backward"):
        loss = torch.compile(problem.loss, backend=compile_backend)(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        gradient.pow(2).sum().backward()


def test_a_stage_alone_has_no_derivative(backend):
    """What a tool that took the loss apart all the same would come to."""
    problem = _Problem(backend)
    ops = proac_cuda.backends.stage_ops(proac_cuda.backends.BACKENDS[backend.name])
    arguments = problem.labels, None, problem.prototypes, None, None, 0.1, 255, False, False
    ops.class_statistics(problem.features, *arguments)
    with pytest.raises(RuntimeError, match="has no derivative of its own"):
        ops.class_statistics(problem.features.clone().requires_grad_(), *arguments)


def test_subclasses_are_unwrapped(backend):
    """As MONAI's MetaTensor and torchvision's Mask: subclasses that refuse each other and mark what they touch."""

    class Marked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            if not all(issubclass(kind, cls) or kind is torch.Tensor for kind in types):
                return NotImplemented
            return super().__torch_function__(function, types, arguments, options or {})

    class Mask(Marked):
        pass

    class Image(Marked):
        pass

    problem = _Problem(backend)
    leaf = problem.features.clone().requires_grad_()
    weight = torch.ones(problem.labels.shape, device=leaf.device).as_subclass(Image)
    labels = problem.labels.as_subclass(Mask)
    loss, stats = proac_cuda.proac_loss(
        leaf.as_subclass(Image), labels, problem.prototypes, pixel_weight=weight, return_stats=True, **problem.options
    )
    assert type(loss) is torch.Tensor and all(type(value) is torch.Tensor for value in stats)
    loss.backward()
    problem.check(leaf.grad.as_subclass(torch.Tensor))
    compiled = torch.compile(
        lambda x: proac_cuda.proac_loss(x, labels, problem.prototypes, **problem.options), backend="aot_eager"
    )
    problem.check(problem.gradient_through(compiled))


def test_nothing_watches_an_ordinary_call() -> None:
    """Else each call would go through the dispatcher twice more: right, and slower. Autocast is ordinary."""
    assert torch._C._dispatch_tls_local_include_set() == autograd._UNWATCHED
    with torch.autocast("cpu"), torch.no_grad():
        assert torch._C._dispatch_tls_local_include_set() == autograd._UNWATCHED
    with FakeTensorMode():
        assert torch._C._dispatch_tls_local_include_set() != autograd._UNWATCHED
