"""Files of prototypes: they come back whatever device wrote them, and say what is wrong with them."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from proac_cuda.prototypes import load_prototypes, save_prototypes, uniform_prototypes


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.numpy().tobytes() == right.numpy().tobytes()


def as_if_saved_from_a_gpu(file: Path) -> None:
    """Change the place of the storage that the pickle in the file names from 'cpu' to 'cuda:0'."""
    here, there = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    if not zipfile.is_zipfile(file):
        content = file.read_bytes()
        assert here in content
        file.write_bytes(content.replace(here, there))
        return
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in records if name.endswith("data.pkl")]
    assert here in records[name]
    records[name] = records[name].replace(here, there)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("parameter", [True, False])
@pytest.mark.parametrize("shape", [(19, 256), (19, 1, 256), (1, 19, 256), (1, 256), (1, 1, 256)])
def test_a_tensor_saved_from_a_gpu_loads(tmp_path: Path, shape: tuple[int, ...], parameter: bool, zipped: bool) -> None:
    values = torch.randn(shape)
    saved = torch.nn.Parameter(values) if parameter else values.clone().requires_grad_()
    torch.save(saved, tmp_path / "prototypes.pth", _use_new_zipfile_serialization=zipped)
    as_if_saved_from_a_gpu(tmp_path / "prototypes.pth")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "prototypes.pth")
    found = load_prototypes(tmp_path / "prototypes.pth")
    assert type(found) is torch.Tensor
    assert found.device.type == "cpu"
    assert not found.requires_grad
    assert same_bits(found, values.reshape(-1, 256))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".npy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_saved_prototypes_come_back(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    rows = uniform_prototypes(19, 64, dtype=dtype).requires_grad_()
    save_prototypes(str(tmp_path / f"prototypes{suffix}"), rows)
    found = load_prototypes(str(tmp_path / f"prototypes{suffix}"))
    expected = rows.detach() if dtype == torch.float64 else rows.detach().float()
    assert same_bits(found, expected)
    assert not found.requires_grad
    assert len(list(tmp_path.glob("*prototypes*"))) == 1


def test_a_view_is_saved_without_the_storage_behind_it(tmp_path: Path) -> None:
    save_prototypes(tmp_path / "prototypes.pth", torch.randn(10_000, 64)[:4])
    assert (tmp_path / "prototypes.pth").stat().st_size < 10_000


@pytest.mark.parametrize(
    "saved",
    [
        {"prototypes": torch.eye(3), "epoch": 4, "weight": torch.zeros(2, 2)},
        {"loss.prototypes": torch.eye(3), "loss.weight": torch.zeros(2, 2)},
        {"anything": torch.eye(3), "epoch": 4, "bias": torch.zeros(3)},
        {"anything": torch.eye(3).unsqueeze(1)},
    ],
)
def test_dicts(tmp_path: Path, saved: dict) -> None:
    torch.save(saved, tmp_path / "prototypes.pt")
    assert torch.equal(load_prototypes(tmp_path / "prototypes.pt"), torch.eye(3))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
def test_numpy_files(tmp_path: Path, dtype: str) -> None:
    numpy.save(tmp_path / "prototypes.npy", numpy.asfortranarray(numpy.arange(6).reshape(2, 3)).astype(dtype))
    found = load_prototypes(tmp_path / "prototypes.npy")
    assert found.dtype == (torch.float64 if dtype.endswith("8") else torch.float32)
    assert found.is_contiguous()
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]


class NotATensor:
    pass


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (torch.ones(4), "found shape (4,), expected (K, D)"),
        (torch.ones(2, 3, 4), "found shape (2, 3, 4)"),
        (torch.ones(2, 3, 1), "found shape (2, 3, 1)"),
        (torch.ones(1, 1, 3, 4), "found shape (1, 1, 3, 4)"),
        (torch.ones(0, 4), "found shape (0, 4)"),
        (torch.ones(2, 3, dtype=torch.int64), "torch.int64"),
        (torch.ones(2, 3).to_sparse(), "torch.sparse_coo"),
        (torch.tensor([[1.0, math.nan]]), "found NaN or infinity"),
        ([torch.ones(2, 3)], "found a list"),
        ({"prototypes": 3}, "found a int"),
        ({}, "found a dict with 0 tensors that can be prototypes and the keys []"),
        (
            {"a": torch.ones(2, 3), "b": torch.ones(2, 3)},
            "a dict with 2 tensors that can be prototypes and the keys [a, b]",
        ),
        ({"a.prototypes": torch.ones(2, 3), "b.prototypes": torch.ones(2, 3)}, "keys [a.prototypes, b.prototypes]"),
        (NotATensor(), "cannot be read as prototypes (UnpicklingError"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, saved: object, message: str) -> None:
    file = tmp_path / "prototypes.pth"
    torch.save(saved, file)
    with pytest.raises(ValueError) as caught:
        load_prototypes(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".npy"])
@pytest.mark.parametrize("content", [b"", b"not prototypes at all"])
def test_damaged_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"prototypes{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_prototypes(file)
    assert str(caught.value).startswith(f"{file}: cannot be read")


def test_numpy_files_never_run_code(tmp_path: Path) -> None:
    numpy.save(tmp_path / "prototypes.npy", numpy.array([NotATensor()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as prototypes"):
        load_prototypes(tmp_path / "prototypes.npy")


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_prototypes(tmp_path / "missing.pth")
    with pytest.raises(FileNotFoundError):
        load_prototypes(tmp_path / "missing.npy")
    for function in (load_prototypes, lambda path: save_prototypes(path, torch.eye(2))):
        with pytest.raises(ValueError, match=r"found the suffix '\.txt', expected one of \.pth, \.pt, \.npy"):
            function(tmp_path / "prototypes.txt")


def test_save_checks_what_it_is_given(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="prototypes: got list"):
        save_prototypes(tmp_path / "prototypes.pth", [[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prototypes: found shape"):
        save_prototypes(tmp_path / "prototypes.pth", torch.ones(3))
    assert not (tmp_path / "prototypes.pth").exists()
