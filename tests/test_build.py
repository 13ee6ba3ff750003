"""The build: what it asks of PyTorch, and what is left of one that was stopped half way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proac_cuda import extension

ROOT = Path(__file__).parent.parent
LIBRARIES = sorted((ROOT / "proac_cuda").glob("_C*.so"))


@pytest.mark.skipif(not LIBRARIES, reason="the compiled extension is not built in this folder")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils)")
def test_library_asks_only_for_the_stable_interface():
    script = [sys.executable, ROOT / "scripts" / "check_symbols.py"]
    ran = subprocess.run([*script, *LIBRARIES], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    import torch

    unstable = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    if unstable.exists():  # the check finds what it looks for
        assert subprocess.run([*script, unstable], capture_output=True).returncode == 1


@pytest.mark.parametrize(
    "without, remedy",
    [
        ("import sys; sys.modules['ninja'] = None", "pip install ninja"),
        ("import setuptools; setuptools.__version__ = '65.5.0'", 'pip install "setuptools>=77"'),
    ],
)
def test_missing_build_tools_are_named_with_the_remedy(without, remedy, tmp_path):
    build = f"import runpy, sys; sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}]"
    environment = {**os.environ, "CXX": sys.executable, "PATH": str(tmp_path), "PROAC_NO_CUDA": "1"}
    environment.pop("PROAC_NO_EXT", None)
    ran = subprocess.run(
        [sys.executable, "-c", f"{without}\n{build}\nrunpy.run_path('setup.py', run_name='__main__')"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1 and remedy in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


def _build(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(extension.why_not_cpu() is not None, reason="the kernels are not built here, or cannot be")
def test_interrupted_build(tmp_path):
    """Killed after half of the linker's output was written, then started again."""
    for name in ("csrc", "proac_cuda"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'g++ "$@" || exit 1\n'
        'case "$*" in *-shared*) [ -e finished ] && exit 0;; *) exit 0;; esac\n'
        'while [ "$1" != -o ]; do shift; done\n'
        'truncate -s 50000 "$2"; touch halfway; sleep 600\n'
    )
    compiler.chmod(0o755)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "CXX": str(compiler), "CXXFLAGS": "-O0", "PROAC_NO_CUDA": "1", "PATH": path}
    build = _build(tmp_path, environment)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("build/**/halfway")):
        assert build.poll() is None and time.monotonic() < deadline, build.communicate()[0]
        time.sleep(0.2)
    os.killpg(build.pid, signal.SIGKILL)
    build.wait()
    assert not list(tmp_path.rglob("*.so")), "half of a library lies where it would be loaded"

    use = "from proac_cuda import extension; print(extension.why_not_cpu())"
    environment["PYTHONPATH"] = str(tmp_path)
    ran = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "not installed" in ran.stdout

    for folder in tmp_path.glob("build/temp*"):
        (folder / "finished").touch()
    again = _build(tmp_path, environment)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    assert output.count("-c ") == 0, "what was compiled before is not compiled again"
    assert not list(tmp_path.rglob("*.part"))
    ran = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.stdout.strip() == "None", ran.stdout + ran.stderr
