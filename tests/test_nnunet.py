"""examples/trainer_nnunet.py within nnU-Net itself: planned, trained for three steps, resumed; read by plain nnU-Net."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nnunetv2", reason="pip install '.[frameworks]'")

HERE = Path(__file__).parent


@pytest.mark.slow
def test_nnunet_trains_resumes_and_predicts(tmp_path):
    ran = subprocess.run(
        [sys.executable, HERE / "nnunet_steps.py", HERE.parent / "examples" / "trainer_nnunet.py", tmp_path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
