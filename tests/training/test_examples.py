"""The examples, run as a user runs them: each in a process of its own, for a few steps, where its packages are installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "deeplab_torchvision": ["torchvision"],
    "head_mmsegmentation": ["mmseg", "mmcv", "ftfy", "regex"],
    "segformer_transformers": ["transformers", "accelerate"],
    "trainer_nnunet": ["nnunetv2", "nibabel"],
    "unet3d_monai": ["monai", "ignite", "nibabel"],
    "unet_lightning": ["lightning", "segmentation_models_pytorch"],
    "unet_smp": ["segmentation_models_pytorch"],
    "unet_torchgeo": ["torchgeo", "rasterio"],
    "yolo_ultralytics": ["ultralytics"],
}
# classes for a framework that is configured elsewhere: run by one of these
STEPS = {"head_mmsegmentation": "mmseg_steps", "trainer_nnunet": "nnunet_steps"}


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
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "YOLO_CONFIG_DIR": str(tmp_path)}
    environment.pop("PYTEST_CURRENT_TEST", None)  # where it stands ultralytics writes into its own folder
    command = [ROOT / "examples" / f"{name}.py"]
    if name in STEPS:
        command = [ROOT / "tests" / f"{STEPS[name]}.py", *command, tmp_path]
    ran = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "loss" in ran.stdout + ran.stderr and "nan" not in ran.stdout
    if name == "yolo_ultralytics":
        checkpoints = list(tmp_path.rglob("last.pt"))
        assert checkpoints and all(b"proac_cuda" not in path.read_bytes() for path in checkpoints)
