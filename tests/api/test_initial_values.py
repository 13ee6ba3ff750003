"""Prototypes, class weights and seeds that a framework left unfilled: restored or an error, and nothing trained is lost."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from proac_cuda import ProACLoss, proac_loss, uniform_prototypes

FEATURES = torch.randn(2, 8, 6, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 5, (2, 6, 7), generator=torch.Generator().manual_seed(1))
GARBAGE = {
    "NaN": torch.full((5, 8), math.nan),
    "zeros": torch.zeros(5, 8),
    "bits of addresses": torch.full((5, 8), 4.58e-41),
    "huge": torch.full((5, 8), 1e19),
    "nearly unit": uniform_prototypes(5, 8) * 1.002,
}


@pytest.fixture
def garbage(monkeypatch, request):
    """What ``empty_like`` finds in memory, through which to_empty() and from_pretrained make tensors."""
    empty_like = torch.empty_like

    def filled(tensor, **options):
        made = empty_like(tensor, **options)
        if made.device.type == "meta":
            return made
        with torch.no_grad():
            if made.shape == (5, 8):
                return made.copy_(request.param)
            return made.fill_(77)

    monkeypatch.setattr(torch, "empty_like", filled)


def _garbage(*names):
    return pytest.mark.parametrize("garbage", [GARBAGE[name] for name in names], ids=names, indirect=True)


def _empty(module, way):
    """The ways in which modules lose their values: PyTorch's, and that of transformers' from_pretrained."""
    if way == "to_empty":
        return module.to_empty(device="cpu")
    if way == "meta":
        return module.to("meta").to_empty(device="cpu")
    for name, tensor in dict(module.state_dict(keep_vars=True)).items():  # of which the checkpoint has none
        empty = torch.empty_like(tensor.detach(), device="cpu")
        setattr(module, name, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty)
    for name in module._non_persistent_buffers_set:
        setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
    return module


def _make(way="", **options):
    with torch.device("meta" if way == "from_pretrained" else "cpu"):
        return ProACLoss(5, 8, **options)


WAYS = pytest.mark.parametrize("way", ["to_empty", "meta", "from_pretrained"])


@_garbage(*GARBAGE)
@WAYS
@pytest.mark.parametrize("learnable", [False, True])
def test_own_prototypes_come_back(garbage, way, learnable):
    expected = ProACLoss(5, 8)(FEATURES, LABELS)
    module = _empty(_make(way, learnable=learnable), way)
    with pytest.warns(UserWarning, match="nobody filled"):
        assert torch.equal(module(FEATURES, LABELS).detach(), expected)
    assert torch.equal(module.prototypes, uniform_prototypes(5, 8))
    assert isinstance(module.prototypes, nn.Parameter) == learnable


@_garbage(*GARBAGE)
@WAYS
def test_given_prototypes_raise(garbage, way):
    given = torch.randn(5, 8)
    module = _empty(_make(way, prototypes=given), way)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^prototypes: .*reset_parameters\(\)"):
            module(FEATURES, LABELS)
    module.reset_parameters()
    assert torch.equal(module(FEATURES, LABELS), ProACLoss(5, 8, prototypes=given)(FEATURES, LABELS))


@_garbage("huge")
@WAYS
@pytest.mark.parametrize("name", ["class_weight", "seed"])
def test_class_weights_and_seed_raise(garbage, way, name):
    value = {"class_weight": torch.arange(1.0, 6), "seed": torch.tensor(3)}[name]
    options = {"num_negatives": 4, "seed": 1, name: value}
    module = _empty(_make(way, **options), way)
    with pytest.raises(ValueError, match=rf"^{name}: .*reset_parameters\(\).*module\.{name}"):
        module(FEATURES, LABELS)
    expected = ProACLoss(5, 8, **options)(FEATURES, LABELS)
    other = copy.deepcopy(module)
    other.reset_parameters()
    assert torch.equal(other(FEATURES, LABELS), expected)
    setattr(module, name, value.clone())
    assert torch.equal(module(FEATURES, LABELS), expected)


@_garbage("huge")
@pytest.mark.parametrize("name", ["prototypes", "class_weight", "seed"])
def test_values_that_never_were(garbage, name):
    """Made on the meta device by the caller: there is nothing to go back to."""
    with torch.device("meta"):
        values = {"prototypes": torch.ones(5, 8), "class_weight": torch.ones(5), "seed": torch.tensor(3)}
        module = ProACLoss(5, 8, num_negatives=4, **{name: values[name]})
    module = _empty(module, "from_pretrained")
    for use in (lambda: module(FEATURES, LABELS), module.reset_parameters):
        with pytest.raises(ValueError, match=rf'^{name}: made on the meta device.*torch.device\("cpu"\)'):
            use()
    module.load_state_dict({name: torch.ones(values[name].shape)}, strict=False) if name != "seed" else None
    if name == "seed":
        module.seed = torch.tensor(3)
    assert module(FEATURES, LABELS).isfinite() and module._look_key == 0


@pytest.mark.parametrize("row", [math.nan, 0.0, 1e-13])
def test_given_rows_without_direction(row):
    prototypes = uniform_prototypes(5, 8)
    prototypes[3] *= row
    with pytest.raises(ValueError, match=r"^prototypes: row 3 has norm .*no direction"):
        ProACLoss(5, 8, prototypes=prototypes)


@_garbage("huge")
@pytest.mark.parametrize("learnable", [False, True])
def test_a_partial_checkpoint(garbage, learnable):
    """What is loaded counts as filled, of whatever norm; what is not, as before."""
    given = 3 * torch.randn(5, 8)
    module = _empty(_make(learnable=learnable), "meta")
    module.load_state_dict({"prototypes": given})
    assert torch.equal(module(FEATURES, LABELS).detach(), ProACLoss(5, 8, prototypes=given)(FEATURES, LABELS))
    module = _empty(_make(learnable=learnable), "meta")
    module.load_state_dict({}, strict=False)
    assert torch.equal(module(FEATURES, LABELS).detach(), ProACLoss(5, 8)(FEATURES, LABELS))


def _trained():
    module = ProACLoss(5, 8, learnable=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=5.0)
    module(FEATURES, LABELS).backward()
    optimizer.step()
    assert (module.prototypes.norm(dim=1) - 1).abs().max() > 0.05
    return module


def _resumed(module):
    other = ProACLoss(5, 8, learnable=True)
    other.load_state_dict(module.state_dict())
    return other


def _evaluated(module):
    other = ProACLoss(5, 8)
    other.load_state_dict(module.state_dict())
    return other


def _assigned(module):
    other = ProACLoss(5, 8, learnable=True).to("meta")
    other.load_state_dict(module.state_dict(), assign=True)
    return other


def _from_pretrained(module):
    other = _make("from_pretrained", learnable=True)
    loaded = nn.Parameter(module.prototypes.detach().clone())
    loaded._is_hf_initialized = True
    other.prototypes = loaded
    return other


def _averaged(module):
    average = AveragedModel(ProACLoss(5, 8, learnable=True))  # of a module that was never called
    average.update_parameters(module)
    average.update_parameters(module)
    return average.module


def _averaged_without_a_trace(module):
    average = copy.deepcopy(ProACLoss(5, 8, learnable=True))
    average.prototypes.data.mul_(0.0).add_(module.prototypes.data)
    return copy.deepcopy(average)


def _broadcast(module):
    other = ProACLoss(5, 8, learnable=True).to_empty(device="cpu")
    with torch.no_grad():
        other.prototypes.copy_(module.prototypes)
    return other


def _pickled(module):
    return pickle.loads(pickle.dumps(module))


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


JOURNEYS = [
    _resumed,
    _evaluated,
    _assigned,
    _from_pretrained,
    _averaged,
    _averaged_without_a_trace,
    _broadcast,
    _pickled,
    _saved,
    copy.deepcopy,
    lambda module: module.half(),
    lambda module: module.to(torch.float64),
    lambda module: module.share_memory(),
]


@pytest.mark.parametrize("journey", JOURNEYS)
def test_trained_prototypes_stay(journey):
    module = _trained()
    expected, values = module(FEATURES, LABELS).detach(), module.prototypes.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = journey(module)
        torch.testing.assert_close(moved(FEATURES, LABELS).detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(moved.prototypes.detach(), values, rtol=1e-6, atol=0)


def test_it_looks_once_after_each_event(monkeypatch):
    module = ProACLoss(5, 8, learnable=True)
    looks = []
    why_empty, history = type(module)._look, []
    monkeypatch.setattr(type(module), "_look", lambda self: (looks.append(1), why_empty(self))[1])
    for event in (lambda: None, lambda: module.load_state_dict(module.state_dict()), lambda: _empty(module, "meta")):
        event()
        for _ in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module(FEATURES, LABELS)
        history.append(len(looks))
    assert history == [1, 2, 3]
    with torch.no_grad():
        module.prototypes.mul_(7)  # an optimizer
    expected = module.prototypes.detach().clone()
    module.to(torch.float64)(FEATURES, LABELS)
    assert torch.equal(module.prototypes, expected)


def test_not_while_a_graph_is_captured(monkeypatch):
    """On a CUDA tensor whose stream is captured nothing is read; the look comes with the next call outside."""
    module = _empty(ProACLoss(5, 8, prototypes=torch.ones(5, 8)), "meta")
    module.prototypes.zero_()

    class Captured(torch.Tensor):
        is_cuda = True

    module._buffers["prototypes"] = module.prototypes.as_subclass(Captured)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    module._look()
    assert module._look_key
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(ValueError, match="reset_parameters"):
        module._look()


def test_functional_calls():
    """Tensors that torch.func puts in the module's place for one call are neither its own nor touched."""
    own = 3 * torch.randn(5, 8)
    expected = ProACLoss(5, 8, prototypes=own)(FEATURES, LABELS)
    module = ProACLoss(5, 8, learnable=True)
    assert torch.equal(torch.func.functional_call(module, {"prototypes": own}, (FEATURES, LABELS)), expected)
    for learnable in (True, False):
        module, before = ProACLoss(5, 8, learnable=learnable), own.clone()

        def loss(prototypes, module=module):
            return torch.func.functional_call(module, {"prototypes": prototypes}, (FEATURES, LABELS))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss(own)
        for key in (module._look_key, 0):  # the first call, and one of a module that was looked at
            module._look_key = key
            gradient, expected_gradient = (
                torch.autograd.grad(call(leaf := own.clone().requires_grad_()), leaf)[0]
                for call in (loss, lambda leaf: proac_loss(FEATURES, LABELS, leaf))
            )
            torch.testing.assert_close(gradient, expected_gradient)
        assert torch.equal(own, before)
        assert torch.equal(module(FEATURES, LABELS).detach(), ProACLoss(5, 8)(FEATURES, LABELS))


@_garbage("huge")
def test_under_compile(garbage):
    """The look is none of the graph's: no break, no second compilation."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    expected = ProACLoss(5, 8)(FEATURES, LABELS)
    module = ProACLoss(5, 8)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(FEATURES, LABELS), expected)
    assert len(graphs) == 1
    _empty(module, "meta")
    for _ in range(2):
        assert torch.equal(compiled(FEATURES, LABELS), expected)
    module = _empty(_make("from_pretrained"), "from_pretrained")
    assert torch.equal(torch.compile(module, backend=backend, fullgraph=True)(FEATURES, LABELS), expected)
    module = _empty(_make(prototypes=torch.randn(5, 8)), "meta")
    with pytest.raises(RuntimeError, match=r"reset_parameters\(\)"):
        torch.compile(module, backend=backend, fullgraph=True)(FEATURES, LABELS)


def test_rounded_by_a_loader():
    """from_pretrained(dtype=bfloat16) assigns bfloat16 tensors: float32 again, and to the bit where they are our own."""
    module = _make("from_pretrained")
    expected = module.prototypes.clone()
    module.prototypes = module.prototypes.bfloat16()
    module(FEATURES, LABELS)
    assert torch.equal(module.prototypes, expected)
    module = _make("from_pretrained", learnable=True)
    loaded = nn.Parameter((2 * module.prototypes).detach().bfloat16())
    loaded._is_hf_initialized = True
    module.prototypes = loaded
    module(FEATURES, LABELS)
    assert (
        module.prototypes is loaded and loaded.dtype == torch.float32 and torch.equal(loaded, loaded.bfloat16().float())
    )


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_another_number_of_classes(strict, assign):
    outer = nn.ModuleDict({"proac": ProACLoss(21, 8, class_weight=torch.ones(21))})
    state = nn.ModuleDict({"proac": ProACLoss(19, 8, class_weight=torch.ones(19))}).state_dict()
    with pytest.raises(
        RuntimeError, match=r"proac\.prototypes: .*\(19, 8\).*num_classes=21.*pop\('proac\.prototypes'\)"
    ):
        outer.load_state_dict(state, strict=strict, assign=assign)
    with pytest.raises(RuntimeError, match=r"proac\.class_weight: .*\(19,\)"):
        outer.load_state_dict(state, strict=strict, assign=assign)
    outer.load_state_dict({}, strict=False)
    assert torch.equal(outer["proac"].prototypes, uniform_prototypes(21, 8))


def test_from_pretrained_itself(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install '.[frameworks]'")

    class Config(transformers.PretrainedConfig):
        model_type = "proac_test"

        def __init__(self, options=None, **others):
            self.options = options
            super().__init__(**others)

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.body = nn.Conv2d(3, 8, 1)
            if config.options is not None:
                self.proac = ProACLoss(5, 8, **config.options)
            self.post_init()

    Model(Config()).save_pretrained(tmp_path / "without")
    for learnable in (False, True):
        config = Config({"learnable": learnable})
        junk = [torch.full((5, 8), 1e19) for _ in range(100)]  # memory to come
        del junk
        model = Model.from_pretrained(tmp_path / "without", config=config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(model.proac(FEATURES, LABELS).detach(), ProACLoss(5, 8)(FEATURES, LABELS))
        with torch.no_grad():
            model.proac.prototypes.mul_(2.5 if learnable else 1)
        model.save_pretrained(tmp_path / "with")
        again = Model.from_pretrained(tmp_path / "with", config=config)
        again.proac(FEATURES, LABELS)
        assert torch.equal(again.proac.prototypes, model.proac.prototypes)
