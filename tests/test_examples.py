"""The examples, run as a user runs them: each in a process of its own, for a few steps, where its packages are installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "unet_smp": ["segmentation_models_pytorch"],
    "deeplab_torchvision": ["torchvision"],
    "segformer_transformers": ["transformers", "accelerate"],
    "unet_lightning": ["lightning", "segmentation_models_pytorch"],
    "unet3d_monai": ["monai", "ignite", "nibabel"],
    "trainer_nnunet": ["nnunetv2"],
    "yolo_ultralytics": ["ultralytics"],
    "head_mmsegmentation": ["mmseg", "mmcv._ext"],
}
RUN_ELSEWHERE = {"trainer_nnunet"}  # a class for a framework's own commands: test_nnunet.py


def _missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # of the package around it
        return True


def test_each_example_is_here_and_short():
    examples = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    assert examples.keys() == PACKAGES.keys()
    assert all(len(path.read_text().splitlines()) < 50 for path in examples.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_example_runs(name, tmp_path):
    missing = [package for package in PACKAGES[name] if _missing(package)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; pip install '.[frameworks]'")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if name not in {*RUN_ELSEWHERE, "head_mmsegmentation"}:
        assert "loss" in ran.stdout and "nan" not in ran.stdout
