"""The example for Hugging Face's Trainer: on one process and on two, with accumulation; and resumed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="pip install '.[frameworks]'")
pytest.importorskip("accelerate", reason="pip install '.[frameworks]'")

HERE = Path(__file__).parents[1]
EXAMPLE = HERE.parent / "examples" / "segformer_transformers.py"


def _run(script, *arguments, folder, ranks=1):
    """Run it on that many processes of a gloo group; an error with what they printed if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
    }
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    running = [
        subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            cwd=folder,
            env={**shared, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else shared,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    printed = [process.communicate(timeout=600)[0] for process in running]
    assert not any(process.returncode for process in running), "\n".join(printed)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, accumulation", [(1, 2), (2, 1), (2, 2)])
def test_lambda_is_that_of_the_mean_over_all_batches(ranks, accumulation, tmp_path):
    """A step is the mean gradient of cross-entropy + 0.1 ProAC, whatever the number of ranks and of accumulated batches."""
    _run(HERE / "trainer_steps.py", EXAMPLE, tmp_path, accumulation, folder=tmp_path, ranks=ranks)
    changes, means = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)), strict=True)
    for name in means[0]:
        expected = sum(mean[name] for mean in means) / ranks
        for change in changes:
            error = (change[name] - expected).norm().item()
            assert error <= 1e-4 * expected.norm().item() + 1e-6, name
    assert any("proac" in name for name in means[0])


@pytest.mark.slow
def test_resumed_as_the_page_says(tmp_path):
    _run(HERE / "trainer_resume.py", EXAMPLE, tmp_path, folder=tmp_path)
