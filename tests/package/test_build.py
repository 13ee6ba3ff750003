"""The build: what it asks of PyTorch, and what is left of one that was stopped half way."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proac_cuda.backends import extension

ROOT = Path(__file__).parents[2]
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
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_interrupted_build(tmp_path):
    """Killed after half of the linker's output was written, then started again. The sources are compiled as if empty."""
    for name in ("csrc", "proac_cuda"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'for each; do shift; case "$each" in *.cpp) set -- "$@" -x c++ /dev/null;; *) set -- "$@" "$each";; esac; done\n'
        'g++ "$@" || exit 1\n'
        'case "$*" in *-shared*) [ -e finished ] && exit 0;; *) exit 0;; esac\n'
        'while [ "$1" != -o ]; do shift; done\n'
        'truncate -s 5000 "$2"; touch halfway; sleep 600\n'
    )
    compiler.chmod(0o755)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "CXX": str(compiler), "PROAC_NO_CUDA": "1", "PATH": path}
    build = _build(tmp_path, environment)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("build/**/halfway")):
        assert build.poll() is None and time.monotonic() < deadline, build.communicate()[0]
        time.sleep(0.2)
    os.killpg(build.pid, signal.SIGKILL)
    build.wait()
    assert not list(tmp_path.rglob("*.so")), "half of a library lies where it would be loaded"

    use = "from proac_cuda.backends import extension; print(extension.why_not_cpu())"
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
    (library,) = tmp_path.glob("proac_cuda/_C*.so")
    load = f"import ctypes, torch; ctypes.CDLL({str(library)!r})"
    subprocess.run([sys.executable, "-c", load], check=True)


def _setup(call: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A function of setup.py, called with setup itself left out, and printed."""
    code = (
        "import setuptools, runpy; setuptools.setup = lambda **options: None\n"
        f"print(runpy.run_path('setup.py', run_name='__main__')[{call.split('(')[0]!r}]({call.split('(', 1)[1]})"
    )
    environment = {**os.environ, "PROAC_NO_EXT": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "call, name, value, printed",
    [
        ("max_jobs()", "MAX_JOBS", "3", "3"),
        ("architectures_asked_for((80, 90, 120))", "PROAC_CUDA_ARCHITECTURES", "80,90", "((80, 90), 80)"),
        ("architectures_asked_for((80, 90, 120))", "PROAC_CUDA_ARCHITECTURES", "8.0;9.0", "((80, 90), 80)"),
        ("architectures_asked_for((80, 90, 120))", "PROAC_CUDA_ARCHITECTURES", "12.0 8.0", "((120, 80), 80)"),
        ("architectures_asked_for((75, 80, 90))", "PROAC_CUDA_ARCHITECTURES", "", "((80, 90), 80)"),
        ("flag('PROAC_NO_CUDA')", "PROAC_NO_CUDA", "true", "True"),
        ("flag('PROAC_NO_CUDA')", "PROAC_NO_CUDA", "OFF", "False"),
    ],
)
def test_build_variables(call, name, value, printed):
    ran = _setup(call, **{name: value}, PATH=_without_gpu())
    assert ran.returncode == 0 and ran.stdout.splitlines()[-1] == printed, ran.stdout + ran.stderr


def _without_gpu() -> str:
    """The path without nvidia-smi."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not os.path.exists(os.path.join(folder, "nvidia-smi")))


@pytest.mark.parametrize(
    "listed, printed",
    [
        ("9.0\\n9.0", "((90,), 80)"),
        ("8.6\\n12.1", "((80, 120), 80)"),  # machine code of 8.0 runs on 8.6
        ("11.0", "((80, 90, 100, 120), 80)"),  # PTX serves it
        ("7.5\\n10.0", "((100,), 80)"),
        ("[N/A]", "((80, 90, 100, 120), 80)"),
        ("Failed to initialize NVML: Driver/library version mismatch", "((80, 90, 100, 120), 80)"),
    ],
)
def test_gpus_of_this_machine(listed, printed, tmp_path):
    """Where no architecture is named, machine code is made for the GPUs that are there; PTX always begins with the oldest."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{listed}\\n'\n")
    smi.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ran = _setup("architectures_asked_for((75, 80, 90, 100, 120))", PATH=path, PROAC_CUDA_ARCHITECTURES="")
    assert ran.returncode == 0 and ran.stdout.splitlines()[-1] == printed, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "call, name, value, expected",
    [
        ("max_jobs()", "MAX_JOBS", "auto", "a number"),
        ("max_jobs()", "MAX_JOBS", "0", "1 or more"),
        ("architectures_asked_for((75, 80, 90))", "PROAC_CUDA_ARCHITECTURES", "90a", "without letters"),
        ("architectures_asked_for((75, 80, 90))", "PROAC_CUDA_ARCHITECTURES", "native", "such as 80,90"),
        ("architectures_asked_for((75, 80, 90))", "PROAC_CUDA_ARCHITECTURES", "75", "the kernels need 80"),
        ("architectures_asked_for((75, 80, 90))", "PROAC_CUDA_ARCHITECTURES", "9", "such as 80,90"),
        ("flag('PROAC_NO_CUDA')", "PROAC_NO_CUDA", "maybe", "1 or 0"),
        ("extensions()", "PROAC_NO_EXT", "please", "1 or 0"),
        ("compiler()", "CXX", "no-such-compiler -O2", "a C++ compiler on the path"),
    ],
)
def test_build_variables_that_cannot_be_read(call, name, value, expected):
    ran = _setup(call, **{name: value})
    assert ran.returncode == 1 and "Traceback" not in ran.stderr, ran.stderr
    assert name in ran.stderr and repr(value) in ran.stderr and expected in ran.stderr, ran.stderr


@pytest.mark.parametrize(
    "capability, built, runs",
    [
        ((8, 0), "sm_80,sm_90,compute_80", True),
        ((8, 9), "sm_80,compute_80", True),
        ((12, 1), "sm_80,sm_90,sm_100,sm_120,compute_80", True),
        ((10, 0), "sm_90,compute_90", True),  # by its PTX
        ((8, 0), "sm_90,compute_90", False),
        ((8, 0), "sm_86,compute_86", False),
        ((7, 5), "sm_80,compute_80", False),
    ],
)
def test_a_gpu_without_code_is_not_chosen(capability, built, runs):
    reason = extension.why_not_capability(capability, built)
    assert (reason is None) == runs
    assert runs or f"{capability[0]}.{capability[1]}" in reason


@pytest.mark.parametrize(
    "driver, runtime, runs",
    [
        ("13.0", "13.0", True),
        ("13.2", "13.0", True),
        ("13.0", "13.2", True),
        ("14.0", "13.0", True),
        ("12.8", "13.0", False),
    ],
)
def test_a_driver_older_than_the_cuda_runtime_is_named(driver, runtime, runs):
    """CUDA promises that a runtime runs on every driver of its major version, and on later ones."""
    reason = extension.why_not_driver(driver, runtime)
    assert (reason is None) == runs
    assert runs or ("12.8" in reason and "13.0" in reason and "newer driver" in reason)


@pytest.mark.parametrize(
    "capability, built, driver, runs",
    [
        ((9, 0), "sm_80,sm_90,compute_80", "13.0", True),
        ((8, 0), "sm_90,compute_80", "13.0", False),
        ((8, 0), "sm_90,compute_80", "13.2", True),
        ((11, 0), "sm_80,sm_90,sm_100,sm_120,compute_120", "13.1", False),
        ((8, 9), "sm_80,compute_80", "13.0", True),
    ],
)
def test_ptx_that_the_driver_is_too_old_for_is_named(capability, built, driver, runs):
    """CUDA's promise within a major version is for machine code: a driver compiles no PTX that is newer than itself."""
    reason = extension.why_not_ptx(capability, built, driver, "13.2")
    assert (reason is None) == runs
    assert runs or (driver in reason and "13.2" in reason and f"{capability[0]}.{capability[1]}" in reason)


def test_cuda_kernels_are_not_chosen_by_a_pytorch_without_cuda(monkeypatch):
    """One wheel serves every PyTorch; that for AMD's GPUs calls them CUDA devices, and gives them capabilities such as 9.0."""
    import torch

    built = {"cpu": "avx2", "cuda": "sm_90,compute_90", "runtime": "13.0", "driver": "0.0"}
    monkeypatch.setattr(extension, "_load_error", "")
    monkeypatch.setattr(extension, "build_info", lambda: built)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert extension.why_not_cuda(torch.device("cuda")) == "this PyTorch was built without CUDA"


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARIES, reason="the compiled extension is not built in this folder")
def test_a_source_folder_that_hides_the_installed_build_is_named(tmp_path):
    """As `pip install .` leaves it, and Python started in the clone."""
    installed, clone = tmp_path / "site-packages", tmp_path / "clone"
    for folder in (installed, clone):
        shutil.copytree(ROOT / "proac_cuda", folder / "proac_cuda", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    shutil.copy(LIBRARIES[0], installed / "proac_cuda")
    metadata = installed / "proac_cuda-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: proac_cuda\nVersion: 0.1.0\n")
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(*command, cwd=clone):
        return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)

    found = run(
        "-W", "ignore", "-c", "from proac_cuda.backends import extension; print(extension.is_shadowed())", cwd=tmp_path
    )
    assert found.stdout.strip() == "False", found.stderr
    call = run("-c", "import proac_cuda; print(proac_cuda.available_backends()['cpp'].reason)")
    for said in (call.stderr, call.stdout):
        assert f"source folder {clone}" in said and str(installed) in said and "--editable" in said, said
    check = run("-W", "ignore", "-m", "proac_cuda", "check")
    assert check.returncode == 1 and "was not checked" in check.stdout, check.stdout + check.stderr


def test_the_sources_use_no_macro_that_is_newer_than_the_oldest_pytorch():
    """Newer headers define more of them whatever TORCH_TARGET_VERSION says: these are those of 2.10 that are in use."""
    known = {"STABLE_TORCH_LIBRARY_FRAGMENT", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_BOX"}
    known |= {"TORCH_ERROR_CODE_CHECK"}
    for path in (ROOT / "csrc").rglob("*.cpp"):
        used = set(re.findall(r"\b(?:STABLE_|STD_)?TORCH_[A-Z_]+\b", path.read_text()))
        assert used <= known, (path, used - known)
