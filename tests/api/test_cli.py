"""`python -m proac_cuda`, as a user types it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from proac_cuda import load_prototypes
from proac_cuda.__main__ import main


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("proac_cuda", "torch", "cpp", "cuda", "triton", "reference", "7.5", 'backend="auto" on cpu tensors'):
        assert word in text


def test_info_names_an_override(capsys, monkeypatch):
    monkeypatch.setenv("PROAC_BACKEND", "reference")
    main(["info"])
    assert "PROAC_BACKEND=reference" in capsys.readouterr().out


@pytest.mark.parametrize("name, why", [("cuda", "CUDA tensors, not cpu"), ("fast", "'fast'")])
def test_info_says_where_an_override_cannot_run(name, why, capsys, monkeypatch):
    monkeypatch.setenv("PROAC_BACKEND", name)
    assert main(["info"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('backend="auto" on cpu')]
    assert "none" in line and why in line and "PROAC_BACKEND" in line


@pytest.mark.parametrize(
    "gpu, architecture",
    [("T4", "sm_75"), ("Tesla T4", "sm_75"), ("A10", "sm_86"), ("NVIDIA A100-SXM4-80GB", "sm_80"), ("sm_90", "sm_90"),
     ("NVIDIA GeForce RTX 4090", "sm_89")],
)  # fmt: skip
def test_tiles(gpu, architecture, capsys):
    assert main(["tiles", gpu, "--num-classes", "150", "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert f"({architecture}), bfloat16, D = 256, K = 150" in text and "prototype_gradient" in text


def test_tiles_says_what_150_classes_read(capsys):
    """The figures that the PTX interpreter counts: test_triton_compiled.py."""
    main(["tiles", "A100", "--num-classes", "150"])
    lines = {line.split()[1]: line.split("│")[6:8] for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert [cell.strip() for cell in lines["class_statistics"]] == ["1.00x", "2.50x"]
    assert [cell.strip() for cell in lines["gradient_by_classes"]] == ["1.00x", "3.75x"]


@pytest.mark.parametrize("arguments, message", [(["Voodoo"], "'Voodoo'"), ([], "name one")])
def test_tiles_errors(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tiles", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_check(capsys):
    assert main(["check"]) == 0
    text = capsys.readouterr().out
    assert "WRONG" not in text and "no process group" in text


def test_info_for_machines(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__ and set(found["backends"]) == {"cpp", "cuda", "triton", "reference"}
    assert found["backends"]["reference"] == {"can_run": True, "reason": ""} and found["auto"]["cpu"] in (
        "cpp",
        "reference",
    )


@pytest.mark.slow
def test_check_for_machines(capsys):
    assert main(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(row["good"] for row in found["rows"]) and "no process group" in found["scope"]
    checked = {row["backend"] for row in found["rows"]}
    assert "reference" in checked and not checked & set(found["not checked"])


def test_certificate_for_machines(capsys, tmp_path):
    path = tmp_path / "anchors.npy"
    assert main(["prototypes", "5", "8", "--json", "--output", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_classes"], found["embedding_dim"]) == (5, 8) and found["largest_cosine"] == pytest.approx(-0.25)
    assert found["saved to"] == str(path) and np.load(path).shape == (5, 8)


def test_prototypes(capsys, tmp_path):
    path = tmp_path / "anchors.npy"
    assert main(["prototypes", "--num-classes", "5", "--embedding-dim", "8", "--output", str(path)]) == 0
    assert "-0.25" in capsys.readouterr().out
    assert np.load(path).shape == (5, 8)
    assert main(["prototypes", "--load", str(path)]) == 0
    assert "5 prototypes of 8 dimensions" in capsys.readouterr().out


def test_prototypes_by_position_with_their_certificate(capsys):
    assert main(["prototypes", "24", "4"]) == 0
    text = capsys.readouterr().out
    assert "arrangement: 24-cell" in text and "best published 0.500000" in text and "best lower bound known" in text


def test_prototypes_searched_for_seconds(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prototypes", "11", "4", "--seconds", "0.5"]) == 0
    captured = capsys.readouterr()
    assert "Ctrl-C ends the search and keeps the best" in captured.err
    assert "saved to prototypes-11-4.pth" in captured.out
    assert load_prototypes("prototypes-11-4.pth").shape == (11, 4)


@pytest.mark.slow
def test_prototypes_interrupted_are_kept(tmp_path):
    """Ctrl-C, as a terminal sends it, in the middle of a search that would go on for an hour."""
    path = tmp_path / "kept.npy"
    command = [sys.executable, "-m", "proac_cuda", "prototypes", "70", "12", "--seconds", "3600", "--output", str(path)]

    def takes_ctrl_c() -> None:
        """A process that a shell has put into the background ignores it, and so would its children."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=takes_ctrl_c) as process:
        assert "Ctrl-C ends the search" in process.stderr.readline()
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "saved to" in out and "kept.npy" in out.replace("\n", "")
    assert np.load(path).shape == (70, 12)


def test_prototypes_errors(capsys, tmp_path):
    assert main(["prototypes"]) == 2
    assert main(["prototypes", "--load", str(tmp_path / "absent.npy")]) == 2
    assert main(["prototypes", "--num-classes", "3", "--embedding-dim", "1"]) == 2
    assert "absent.npy" in capsys.readouterr().err
