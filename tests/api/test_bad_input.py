"""The table of bad input, row by row: the error, its type, and that it names what came."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import proac_cuda
from proac_cuda.stages import validation

X = torch.randn(2, 8, 4, 4)
Y = torch.randint(0, 3, (2, 8, 8))
P = torch.randn(3, 8)
W = torch.ones(2, 8, 8)


def _call(features=X, labels=Y, prototypes=P, **options):
    return proac_cuda.proac_loss(features, labels, prototypes, backend="reference", **options)


VALUE_ERRORS = {
    "features of rank 1": ({"features": torch.randn(8)}, r"features.*\(8,\)"),
    "features of rank 6": ({"features": torch.randn(1, 8, 1, 1, 1, 1)}, "features"),
    "labels of the wrong rank": ({"labels": Y[0]}, r"labels.*\(2, 8, 4, 4\).*\(8, 8\)"),
    "labels with a channel axis": ({"labels": Y[:, None]}, r"\(2, 1, 8, 8\).*squeeze\(1\)"),
    "labels with a last axis of one": ({"labels": Y[..., None]}, r"\(2, 8, 8, 1\); pass labels.squeeze\(-1\)$"),
    "transposed prototypes": ({"prototypes": P.t()}, r"prototypes.*\(8, 3\); pass prototypes.t\(\)$"),
    "pixel_weight with a channel axis": ({"pixel_weight": W[:, None]}, r"pass pixel_weight.squeeze\(1\)$"),
    "pixel_weight as coarse as features": ({"pixel_weight": W[:, ::2, ::2]}, r"\(2, 4, 4\); bring it.*interpolate$"),
    "batch mismatch": ({"labels": Y[:1]}, r"\(1, 8, 8\).*\(2, 8, 4, 4\)"),
    "rows mismatch": ({"features": X[:, :, 0, 0], "labels": Y[0, 0, :5]}, "labels"),
    "empty label axis": ({"labels": Y[:, :0]}, r"\(2, 0, 8\).*\(2, 8, 4, 4\)"),
    "prototypes of rank 1": ({"prototypes": P[0]}, r"prototypes.*\(8,\)"),
    "D mismatch": ({"prototypes": torch.randn(3, 7)}, r"\(2, 8, 4, 4\).*\(3, 7\)"),
    "no prototypes": ({"prototypes": torch.randn(0, 8)}, "prototypes"),
    "K mismatch of class_weight": ({"class_weight": torch.ones(4)}, r"\(3, 8\).*\(4,\)"),
    "pixel_weight of another shape": ({"pixel_weight": torch.ones(2, 4, 4)}, r"\(2, 8, 8\).*\(2, 4, 4\)"),
    "temperature 0": ({"temperature": 0.0}, "temperature.*0.0"),
    "temperature negative": ({"temperature": -1}, "temperature.*-1"),
    "temperature NaN": ({"temperature": math.nan}, "temperature.*nan"),
    "temperature infinite": ({"temperature": math.inf}, "temperature.*inf"),
    "num_negatives 0": ({"num_negatives": 0}, "num_negatives.*0"),
    "pixel_anchor_weight negative": ({"pixel_anchor_weight": -0.5}, "pixel_anchor_weight.*-0.5"),
    "pixel_anchor_weight NaN": ({"pixel_anchor_weight": math.nan}, "pixel_anchor_weight.*nan"),
    "pixel_anchor_weight without a scalar": (
        {"pixel_anchor_weight": 0.5, "reduction": "none"},
        "pixel_anchor_weight.*none",
    ),
    "num_negatives beyond 64 bits": ({"num_negatives": 2**63}, "num_negatives: got 9223372036854775808"),
    "ignore_index beyond 64 bits": ({"ignore_index": -(2**70)}, "ignore_index: got -1180591620717411303424"),
    "unknown reduction": ({"reduction": "avg"}, "reduction.*avg"),
    "a list of reductions": ({"reduction": ["mean"]}, r"reduction.*\[.mean.\]"),
    "unknown label_sampling": ({"label_sampling": "bilinear"}, 'label_sampling.*"nearest-exact".*bilinear'),
    "no label_sampling": ({"label_sampling": None}, "label_sampling.*None"),
    "unknown negative_reduction": ({"negative_reduction": "max"}, "negative_reduction.*max"),
    "seed of two elements": ({"num_negatives": 2, "seed": torch.tensor([1, 2])}, "seed.*(2,)"),
    "seed beyond 64 bits": ({"num_negatives": 2, "seed": 2**64}, "seed"),
    "pixel_weight with a gradient": ({"pixel_weight": W.clone().requires_grad_()}, "pixel_weight.*detach"),
    "class_weight with a gradient": (
        {"class_weight": torch.ones(3, requires_grad=True)},
        "class_weight.*detach",
    ),
    "labels on another device": ({"labels": Y.to("meta")}, "labels.*meta.*cpu"),
    "prototypes on another device": ({"prototypes": P.to("meta")}, "prototypes.*meta.*cpu"),
    "a label beyond K": ({"labels": Y.clone().fill_(3)}, "labels: 3 "),
    "a negative label": ({"labels": Y.clone().fill_(-7)}, "labels: -7 "),
    "labels that mark ignored pixels otherwise": (
        {"labels": Y.clone().fill_(-100)},
        "labels: -100 .*ignore_index=-100",
    ),
    "labels that mark ignored pixels by -1": ({"labels": Y.clone().fill_(-1)}, "labels: -1 .*ignore_index=-1$"),
    "class ids from 1": ({"labels": Y + 1}, "labels: 3 .*K, the number of prototypes, is 3.*labels - 1"),
    "one class with labels 0 and 1": ({"labels": Y.clamp(max=1), "prototypes": P[:1]}, "labels: 1 .*two classes.*be 2"),
    "one-hot labels": ({"labels": torch.nn.functional.one_hot(Y, 3).movedim(-1, 1)}, r"labels.*argmax\(1\)"),
    "one-hot labels at the end": ({"labels": torch.nn.functional.one_hot(Y, 3)}, r"labels.*argmax\(-1\)"),
    "labels in colours": (
        {"labels": torch.zeros(2, 3, 8, 8).long(), "prototypes": torch.randn(4, 8)},
        "labels.*colours",
    ),
    "channels at the end": (
        {"features": X.movedim(1, -1)},
        r"features.*\(2, 4, 4, 8\).*pass features.movedim\(-1, 1\)",
    ),
    "tokens": ({"features": torch.randn(2, 16, 8), "labels": Y[:, 0]}, r"features.*pass features.transpose\(1, 2\)"),
    "no batch axis": (
        {"features": X[0], "labels": Y[0]},
        r"features.*\(8, 4, 4\).*features\[None\] and labels\[None\]",
    ),
    "a negative pixel weight": ({"pixel_weight": -2.5 * W}, "pixel_weight.*-2.5"),
    "an infinite pixel weight": ({"pixel_weight": W * math.inf}, "pixel_weight.*inf"),
    "a NaN pixel weight": ({"pixel_weight": W * math.nan}, "pixel_weight.*nan"),
    "a pixel weight beyond float32": ({"pixel_weight": 1e39 * W.double()}, "pixel_weight.*finite in float32, got inf"),
    "a class weight beyond float32": (
        {"class_weight": torch.tensor([1e39, 1, 1], dtype=torch.float64)},
        "class_weight.*finite in float32, got inf",
    ),
    "a negative class weight": ({"class_weight": torch.tensor([1.0, -3.0, 1.0])}, "class_weight.*-3"),
    "a NaN class weight": ({"class_weight": torch.tensor([1.0, math.nan, 1.0])}, "class_weight.*nan"),
}

TYPE_ERRORS = {
    **{
        f"{dtype} labels": ({"labels": Y.to(dtype)}, rf"labels.*{dtype}.*pass labels.long\(\)$")
        for dtype in (torch.bool, torch.int8, torch.uint16)
    },
    "labels that ToTensor divided": ({"labels": Y / 255}, r"float32 .*pass labels.long\(\); where .* divided by 255"),
    "float labels with a channel axis": (
        {"labels": Y[:, None].float()},
        r"\(2, 1, 8, 8\); pass labels.squeeze\(1\).long\(\); where .* divided by 255",
    ),
    "probabilities as labels": (
        {"labels": torch.rand(2, 3, 8, 8)},
        r"labels.*float32.*\(2, 3, 8, 8\); pass labels.argmax\(1\)",
    ),
    "probabilities at the end as labels": (
        {"labels": torch.rand(2, 8, 8, 3)},
        r"\(2, 8, 8, 3\); pass labels.argmax\(-1\)",
    ),
    "a dict of maps": ({"features": {"out": X}}, r"features.*got dict; pass one of its tensors, features\['out'\]"),
    "a bool pixel_weight": ({"pixel_weight": W > 0}, r"pixel_weight.*torch.bool; pass pixel_weight.float\(\)$"),
    "a list of maps": ({"features": [X, X]}, "features.*list of 2 tensors.*deep supervision.*once for each"),
    "a tuple of labels": ({"labels": (Y, Y)}, "labels.*tuple of 2 tensors"),
    "sparse features": ({"features": X.to_sparse()}, r"features.*sparse.*features.to_dense\(\)"),
    "sparse labels": ({"labels": Y.to_sparse()}, r"labels.*sparse.*labels.to_dense\(\)"),
    "mkldnn features": ({"features": X.to_mkldnn()}, r"features.*mkldnn.*features.to_dense\(\)"),
    "nested features": ({"features": torch.nested.nested_tensor(list(X))}, "features.*nested.*to_padded_tensor"),
    "masked features": ({"features": torch.masked.masked_tensor(X, X > 0)}, r"features.*masked.*get_data\(\)"),
    "integer features": ({"features": X.long()}, "features.*torch.int64"),
    "complex features": ({"features": X.to(torch.complex64)}, "features.*torch.complex64"),
    "integer prototypes": ({"prototypes": P.long()}, "prototypes.*torch.int64"),
    "integer pixel_weight": ({"pixel_weight": W.long()}, "pixel_weight.*torch.int64"),
    "a tensor as temperature": ({"temperature": torch.tensor(0.1)}, "temperature.*torch.float32"),
    "a string as temperature": ({"temperature": "warm"}, "temperature.*str"),
    "a float as num_negatives": ({"num_negatives": 4.0}, "num_negatives.*float"),
    "a bool as num_negatives": ({"num_negatives": True}, "num_negatives.*bool"),
    "a NumPy float as ignore_index": ({"ignore_index": np.float64(255)}, "ignore_index.*float64"),
    "a float as seed": ({"num_negatives": 4, "seed": 1.0}, "seed.*float"),
    "a float tensor as seed": ({"num_negatives": 4, "seed": torch.tensor(1.0)}, "seed.*torch.float32"),
    "an array as features": ({"features": X.numpy()}, r"features.*ndarray; pass torch.as_tensor\(features\)"),
    "a list as class_weight": ({"class_weight": [1.0, 1.0, 1.0]}, "class_weight.*list"),
    "no labels": ({"labels": None}, "labels.*NoneType$"),
    "a name as process_group": ({"process_group": "nccl"}, "process_group.*ProcessGroup or None, got str$"),
}


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_value_errors(name):
    arguments, message = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        _call(**arguments)


@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_type_errors(name):
    arguments, message = TYPE_ERRORS[name]
    with pytest.raises(TypeError, match=message):
        _call(**arguments)


def test_a_list_of_backends():
    with pytest.raises(ValueError, match=r'backend: expected "auto".*got \[.cpp.\]'):
        proac_cuda.proac_loss(X, Y, P, backend=["cpp"])


def _on(backend, tensor):
    return tensor.to(backend.device)


def test_bad_values_of_each_backend(backend, monkeypatch):
    """CPU: ValueError with the first bad value. CUDA: ignored and counted, and ValueError only where asked to look."""
    x, p = _on(backend, X), _on(backend, P)
    labels = Y.clone()
    labels[0, 4, 4], labels[1, 2, 2] = 300, -1
    weight = torch.ones(Y.shape)
    weight[1, 6, 6], weight[0, 2, 2] = math.inf, -0.25

    def with_labels():
        return proac_cuda.proac_loss(x, _on(backend, labels), p, backend=backend.name, return_stats=True)

    def with_weight():
        options = {"pixel_weight": _on(backend, weight), "return_stats": True}
        return proac_cuda.proac_loss(x, _on(backend, Y), p, backend=backend.name, **options)

    if backend.device == "cuda":
        ignored = labels.clone()
        ignored[0, 4, 4] = ignored[1, 2, 2] = 255
        expected = proac_cuda.proac_loss(x, _on(backend, ignored), p, backend=backend.name)
        monkeypatch.setattr(validation, "_looked", True)  # as after the first call of a process
        loss, stats = with_labels()
        assert torch.equal(loss, expected) and stats.invalid_labels.item() == 2
        assert with_weight()[1].invalid_labels.item() == 2
        monkeypatch.setenv("PROAC_CHECKS", "1")
    with pytest.raises(ValueError, match=r"labels: 300 .*pixels like that: 2"):
        with_labels()
    with pytest.raises(ValueError, match=r"pixel_weight.*-0.25 \(pixels like that: 2\)"):
        with_weight()


def test_labels_outside_the_sampled_grid_are_not_looked_at(backend):
    labels = Y.clone()
    labels[:, 1::2] = 99  # features are half the size: the nearest rule reads the even rows and columns
    loss = proac_cuda.proac_loss(_on(backend, X), _on(backend, labels), _on(backend, P), backend=backend.name)
    expected = proac_cuda.proac_loss(_on(backend, X), _on(backend, Y), _on(backend, P), backend=backend.name)
    assert torch.equal(loss, expected)


def test_bad_weight_of_an_ignored_pixel_has_no_effect(backend):
    labels, weight = Y.clone(), torch.ones(Y.shape)
    labels[0, 2, 2], weight[0, 2, 2] = 255, math.nan
    x, p = _on(backend, X), _on(backend, P)
    options = {"pixel_weight": _on(backend, weight)}
    loss = proac_cuda.proac_loss(x, _on(backend, labels), p, backend=backend.name, **options)
    assert torch.equal(loss, proac_cuda.proac_loss(x, _on(backend, labels), p, backend=backend.name))


def test_ignored_class_warns_once():
    with pytest.warns(UserWarning, match="ignore_index=1.*never present") as caught:
        for _ in range(3):
            _call(ignore_index=1)
    assert len(caught) == 1


def test_copied_features_warn_once():
    strided = X.transpose(2, 3)
    with pytest.warns(UserWarning, match="copied") as caught:
        for _ in range(3):
            _call(features=strided, labels=Y.transpose(1, 2))
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at the caller"
    module = proac_cuda.ProACLoss(3, 8, prototypes=P)
    validation._warned.clear()
    with pytest.warns(UserWarning, match="copied") as caught:
        module(strided, Y.transpose(1, 2))
    assert caught[0].filename == __file__, "also through a module"


@pytest.mark.parametrize(
    "features, labels",
    [
        ((2, 8, 16, 32), (2, 128, 64)),  # transposed labels
        ((2, 8, 8, 4), (2, 8, 8)),  # (B, H, W, D) with H = D
        ((1, 8, 4, 8, 16), (1, 16, 8, 4)),  # a volume's axes the other way round
        ((1, 8, 64, 32), (1, 8, 16)),  # labels coarser than features, transposed
    ],
)
def test_proportions_that_differ_warn_once(features, labels):
    with pytest.warns(UserWarning, match=r"proportions.*transposed.*channels-last") as caught:
        for _ in range(2):
            _call(features=torch.randn(features), labels=torch.zeros(labels, dtype=torch.int64))
    assert len(caught) == 1
    assert str(features) in str(caught[0].message) and str(labels) in str(caught[0].message)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16, 32])
def test_strides_of_networks_do_not_warn(stride):
    """Crops whose sizes do not divide, each halving rounded up, as padded convolutions do, or down."""
    for height, width in [(769, 769), (1024, 2048), (129, 257), (97, 131), (33, 1025), (360, 480), (64, 32)]:
        for halve in (lambda n: (n + 1) // 2, lambda n: max(1, n // 2)):
            h, w = height, width
            for _ in range(stride.bit_length() - 1):
                h, w = halve(h), halve(w)
            features, labels = torch.empty(1, 8, h, w), torch.empty(1, height, width, dtype=torch.int64)
            validation.check_tensors(features, labels, P, None, None, None)
            validation.check_tensors(
                torch.empty(1, 8, height, width), torch.empty_like(labels)[:, :h, :w], P, *[None] * 3
            )


def test_values_are_looked_at_once_on_a_gpu(monkeypatch):
    """The first call of a process, whatever the device; none while a CUDA graph is captured."""
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(validation, "_looked", False)
    monkeypatch.delenv("PROAC_CHECKS", raising=False)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    looks = validation.looks_at_values
    assert not looks(gpu)
    capturing = False
    assert [looks(cpu), looks(cpu), looks(gpu), looks(gpu), looks(torch.device("cuda", 1))] == [True] * 3 + [False] * 2
    for value, expected in (("1", True), ("yes", True), ("0", False), ("off", False), ("", False)):
        monkeypatch.setenv("PROAC_CHECKS", value)
        monkeypatch.setattr(validation, "_looked", value == "")
        assert looks(gpu) == expected and looks(cpu)
    monkeypatch.setenv("PROAC_CHECKS", "sometimes")
    with pytest.raises(ValueError, match="PROAC_CHECKS.*'sometimes'.*1 or 0"):
        looks(gpu)


@pytest.mark.filterwarnings("error")
def test_layouts_read_in_place_do_not_warn():
    _call(features=X.to(memory_format=torch.channels_last))
    _call(features=torch.randn(2, 16, 4, 4)[:, 8:])
    _call(features=torch.randn(4, 8, 4, 4)[::2])
    _call(features=torch.randn(2, 8, 4, 4)[:, :, :2], labels=Y[:, :4])
    _call(features=torch.randn(32, 16)[:, 8:], labels=torch.zeros(32, dtype=torch.int64))
    _call(features=torch.randn(2, 8, 5, 1)[..., :1], labels=Y[:, :5, :1])


def test_numpy_numbers_are_numbers():
    assert torch.equal(_call(temperature=np.float32(0.5)), _call(temperature=0.5))
    assert torch.equal(_call(pixel_anchor_weight=np.float64(0.5)), _call(pixel_anchor_weight=0.5))
    module = proac_cuda.ProACLoss(3, 8, prototypes=P, backend="reference", temperature=np.float16(0.5))
    assert torch.equal(module(X, Y), _call(temperature=0.5))


def test_numpy_integers_are_integers():
    options = {"num_negatives": 5, "seed": 7, "ignore_index": 1}
    of_numpy = {name: np.int32(value) for name, value in options.items()}
    with pytest.warns(UserWarning, match="ignore_index=1"):
        assert torch.equal(_call(**of_numpy), _call(**options))
    module = proac_cuda.ProACLoss(3, 8, prototypes=P, backend="reference", **of_numpy)
    assert torch.equal(module(X, Y), _call(**options))


def test_unknown_backend():
    with pytest.raises(ValueError, match='backend.*"auto".*"reference".*\'cudnn\''):
        proac_cuda.proac_loss(X, Y, P, backend="cudnn")


def test_backend_that_cannot_run_says_why(monkeypatch):
    with pytest.raises(RuntimeError, match='backend="cuda" cannot run here: .*CUDA'):
        proac_cuda.proac_loss(X, Y, P, backend="cuda")
    monkeypatch.setenv("PROAC_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match='backend="cuda" cannot run here.*PROAC_BACKEND=cuda asks for it: unset it'):
        proac_cuda.proac_loss(X, Y, P)
    monkeypatch.setenv("PROAC_BACKEND", "fast")
    with pytest.raises(ValueError, match="PROAC_BACKEND.*'fast'"):
        proac_cuda.proac_loss(X, Y, P)
    monkeypatch.setenv("PROAC_BACKEND", "reference")
    assert proac_cuda.proac_loss(X, Y, P).item() == _call().item()


def test_reference_module_takes_the_same_arguments():
    assert proac_cuda.reference.proac_loss(X, Y, P, temperature=0.2).item() == _call(temperature=0.2).item()
    with pytest.raises(ValueError, match="cpp"):
        proac_cuda.reference.proac_loss(X, Y, P, backend="cpp")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prototypes": torch.randn(3, 9)}, r"\(3, 8\).*\(3, 9\)"),
        ({"class_weight": torch.ones(2)}, r"\(3,\).*\(2,\)"),
        ({"temperature": -1.0}, "temperature"),
        ({"reduction": "max"}, "reduction"),
        ({"backend": "cudnn"}, "backend.*'cudnn'"),
        ({"class_weight": torch.tensor([1.0, -3.0, 1.0])}, "class_weight.*-3"),
        ({"class_weight": torch.ones(3, requires_grad=True)}, "class_weight.*detach"),
    ],
)
def test_module_checks_when_it_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        proac_cuda.ProACLoss(3, 8, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_weight": [1.0, 1.0, 1.0]}, r"class_weight.*list; pass torch.as_tensor\(class_weight\)"),
        ({"prototypes": P.tolist()}, "prototypes.*list"),
        ({"prototypes": P.numpy()}, "prototypes.*ndarray"),
        ({"prototypes": P.long()}, "prototypes.*int64"),
        ({"process_group": 3}, "process_group.*int"),
    ],
)
def test_module_checks_types_when_it_is_made(arguments, message):
    with pytest.raises(TypeError, match=message):
        proac_cuda.ProACLoss(3, 8, **arguments)
