"""Everything worth knowing about the kernels on this machine's GPU, in about eight minutes.

    scripts/first_gpu.sh [--out FOLDER] [--wheels FOLDER]

builds the extension for this GPU, runs the GPU tests on every backend, NVIDIA's compute-sanitizer, Nsight Compute (ncu) and the
benchmarks beside their peers, each with a limit of time, and leaves at most 8 files of at most 16 MiB: summary.md, which has a
line for every step, all logs, the tests' outcomes, the benchmarks' results and ncu's report. Steps that fail do not end the
rest; the same command again takes up what has not passed yet. It needs Linux, Python with torch, nvcc, and no network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from gpu_tests import Journal
from steps import Drill, Step, last_line

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
TOTAL = 470  # seconds
# The most telling first: whoever runs out of time has seen those.
TESTS = [
    *(f"tests/kernels/test_{name}.py" for name in ("real_sizes", "gpu", "gpu_graphs", "against_oracle", "pixels")),
    "tests/api/test_behaviour.py",
]
MORE_TESTS = [
    *(f"tests/api/test_{name}.py" for name in ("bad_input", "module_and_compat", "workers", "compile")),
    *(f"tests/kernels/test_{name}.py" for name in ("properties", "fuzz")),
]
CPU_TESTS = [
    *(f"tests/kernels/test_{name}.py" for name in ("against_oracle", "cpp_kernels", "pixels")),
    "tests/api/test_behaviour.py",
]
#: Of each backend: its device's tests run in so many processes side by side. Triton compiles its kernels in them.
SHARDS = {"cuda": 2, "triton": 8, "reference": 1}

PROBE = """
import json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    found["triton"] = None
found["gpus"] = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    p = torch.cuda.get_device_properties(i)
    found["gpus"].append({"name": p.name, "capability": f"{p.major}{p.minor}", "gib": round(p.total_memory / 2**30, 1),
                          "multiprocessors": p.multi_processor_count, "l2_mib": p.L2_cache_size >> 20})
print(json.dumps(found))
"""


def probe() -> dict:
    """What Python, torch and GPU there are."""
    done = subprocess.run([PYTHON, "-W", "ignore", "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"first_gpu: {PYTHON} cannot import torch: {last_line(done.stderr)}. Name another with PYTHON=..."
        )
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


def journal(work: Path, step: str) -> Journal:
    """Where the outcomes of a step of tests are kept."""
    return Journal(work / "tests" / f"{step.replace(' ', '_').replace(',', '')}.jsonl")


def steps(options: argparse.Namespace, found: dict, work: Path) -> list[Step]:
    """What is done, in order: what tells most comes first, since time may run out."""
    gpu = found["gpus"][0] if found["gpus"] else None
    site, results, report = work / "site", work / "benchmarks", str(work / "kernels")
    paths = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    common = {"PYTHONPATH": paths, "PYTHON": PYTHON, "PYTHONUNBUFFERED": "1"}
    common |= {"TRITON_CACHE_DIR": str(work / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    on_one_core = common | {"OMP_NUM_THREADS": "1"}

    some = ["--some"] if gpu else []  # without one all of them are skipped, and rightly so

    def tests(name: str, arguments: list[str], shard: str, limit: float, group: str) -> Step:
        record = journal(work, name)
        run = [PYTHON, "scripts/gpu_tests.py", str(record.path), "--shard", shard, "--seconds", "90", *some, "--"]
        more = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        return Step(
            name, [*run, *arguments, *more], limit, group, environment=on_one_core, note=lambda _: record.summary()
        )

    def gpu_tests(name: str, files: list[str], limit: float, group: str) -> list[Step]:
        return [
            tests(f"{name}, {b} {i} of {n}", [*files, "-m", "gpu", "--slow", "--backend", b], f"{i}/{n}", limit, group)
            for b, n in SHARDS.items()
            for i in range(1, n + 1)
        ]

    pip = [
        PYTHON,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--upgrade",
        "--target",
        str(site),
    ]
    wheels = sorted(str(path.resolve()) for path in options.wheels.glob("*.whl")) if options.wheels else []
    build = [PYTHON, "setup.py", "build_ext", "--inplace", "--build-temp", str(work / "build")]
    build_for = {"PROAC_CUDA_ARCHITECTURES": gpu["capability"]} if gpu else {}
    machine = "nvidia-smi; nvcc --version; lscpu; free -g; ncu --version; compute-sanitizer --version; true"
    benchmark = ["--gpu", "--memory-cap", str(max(2, int(gpu["gib"] / 4)))] if gpu else ["--tiny", "--device", "cpu"]
    profile = [PYTHON, "scripts/profile_calls.py"]
    ncu = ["ncu", "--force-overwrite", "--export", report, "--set", "full", "--clock-control", "none"]
    ptx = [PYTHON, "-m", "pytest", "tests/kernels/test_gpu.py", "-k", "ptx", "-q", "--exhaustive"]
    sanitizer = "compute-sanitizer"
    return [
        Step("environment", ["bash", "-c", machine], 15, note=machine_note),
        *(
            [Step("wheels", [*pip, *wheels], 40, note=lambda _: ", ".join(Path(w).name.split("-")[0] for w in wheels))]
            if wheels
            else []
        ),
        Step(
            "build", build, options.build_limit, environment=common | build_for, note=lambda log: build_note(log, work)
        ),
        Step("check", [PYTHON, "-m", "proac_cuda", "check"], 40, environment=common),
        Step("kernels by time", profile, 30, needs_gpu=True, environment=common, note=profile_note),
        *gpu_tests("tests", TESTS, 110, "correctness"),
        tests("tests, cpp", [*CPU_TESTS, "--backend", "cpp"], "1/1", 110, "correctness"),
        *(
            Step(
                f"{sanitizer} {tool}",
                ["tests/compute_sanitizer.sh", tool],
                110,
                "correctness",
                True,
                sanitizer,
                common,
                sanitizer_note,
            )
            for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
        ),
        Step("ncu", [*ncu, "--profile-from-start", "off", *profile, "--ncu"], 45, "", True, "ncu", common, ncu_note),
        Step("ncu as text", ["ncu", "--import", f"{report}.ncu-rep", "--page", "details"], 10, "", True, "ncu"),
        Step(
            "benchmarks",
            [PYTHON, "-m", "benchmarks", *benchmark, "--output", str(results)],
            180,
            environment=common,
            note=lambda log: benchmark_note(log, results / "cuda.json"),
        ),
        *gpu_tests("more tests", MORE_TESTS, 150, "more"),
        Step("tests, PTX of 8.0 alone", ptx, 200, "more", needs_gpu=True, environment=common),
    ]


def machine_note(log: str) -> str:
    found = re.search(r"\|\s+\d+\s+(NVIDIA.*?)\s{2,}", log)
    driver = re.search(r"Driver Version: (\S+)", log)
    return f"{found[1]}, driver {driver[1]}" if found and driver else "nvidia-smi shows no GPU"


def build_note(log: str, work: Path) -> str:
    """The sources that took longest; or the first error."""
    ninja_log = work / "build" / ".ninja_log"
    error = next((line for line in log.splitlines() if "error" in line.lower() and "-c " not in line), "")
    rows = [line.split("\t") for line in ninja_log.read_text().splitlines()[1:]] if ninja_log.is_file() else []
    times = sorted(((int(end) - int(begin)) / 1e3, Path(name).stem) for begin, end, _, name, *_ in rows)
    longest = ", ".join(f"{Path(name).stem} {seconds:.0f} s" for seconds, name in times[::-1][:4])
    return error.strip()[:200] or f"longest: {longest}"


def sanitizer_note(log: str) -> str:
    """The tool's own count; where it refuses the machine, what it says."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    refusal = re.search(r".*(?:[Nn]ot supported|[Uu]nable to|LibraryNotLoaded|[Nn]o attachable).*", log)
    passed = re.findall(r"\d+ (?:passed|failed).*", log)
    if refusal and not passed:
        return f"it refuses this machine: {refusal[0].strip(' =')[:160]}"
    return "; ".join([*summary[-1:], *passed[-1:]])


def ncu_note(log: str) -> str:
    refusal = re.search(r"==ERROR== (.*)", log)
    if refusal:
        return f"it refuses this machine: {refusal[1][:160]}"
    return f"{len(re.findall(r'==PROF== Profiling', log))} kernels"


def profile_note(log: str) -> str:
    return "; ".join(re.findall(r"^== (.*)", log, re.MULTILINE)) or last_line(log)


def benchmark_note(log: str, path: Path) -> str:
    """The kernels' medians and their share of the roof."""
    if not path.is_file():
        return last_line(log)
    rows = [row for row in json.loads(path.read_text())["rows"] if row["contestant"] in ("cuda", "triton", "compiled")]
    return "; ".join(
        f"{row['name']} {row['dtype']} {row['contestant']} {row['both']['median_ms']:.3g} ms"
        + (f" ({100 * row['both']['share_of_roof']:.0f} % of the roof)" if row["contestant"] != "compiled" else "")
        for row in rows
        if row["mode"] == "graph"
    )


def archive(folder: Path, target: Path) -> Path:
    """A folder's files in one .tar.gz; nothing where it has none."""
    if folder.is_dir() and any(folder.iterdir()):
        with tarfile.open(target, "w:gz") as tar:
            tar.add(folder, arcname=folder.name)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    out = Path(os.environ.get("OUT") or ROOT / "results/first_gpu")
    option(
        "--out",
        type=Path,
        default=out,
        help="folder of the results; the environment variable OUT says so too (%(default)s)",
    )
    option(
        "--work",
        type=Path,
        default=ROOT / "build/first_gpu",
        help="folder of builds, logs, what has passed (%(default)s)",
    )
    option("--wheels", type=Path, help="folder of wheels to install for this run, such as pytorch-metric-learning's")
    option("--total", type=float, default=TOTAL, metavar="SECONDS", help="for everything (%(default)s)")
    option("--build-limit", type=float, default=200, metavar="SECONDS", help="for the build (%(default)s)")
    option(
        "--only",
        nargs="+",
        default=[],
        metavar="STEP",
        help="only steps whose names begin so, again if they have passed",
    )
    option("--fresh", action="store_true", help="forget what has passed, as after a change of the source")
    option("--list", action="store_true", help="name the steps and end")
    option("--rehearse", action="store_true", help="go on without a GPU, with the steps that need none")
    options = parser.parse_args()
    options.out, options.work = options.out.resolve(), options.work.resolve()
    found = probe()
    if not (found["gpus"] or options.rehearse or options.list):
        raise SystemExit("first_gpu: PyTorch sees no CUDA device. --rehearse runs the steps that need none.")
    todo = steps(options, found, options.work)
    if options.only:
        todo = [step for step in todo if step.name.startswith(tuple(options.only))]
    if options.list:
        print("\n".join(f"{step.limit:5.0f} s  {step.group:12} {step.name}" for step in todo))
        return 0
    if options.fresh:
        (options.work / "steps.json").unlink(missing_ok=True)
    for step in todo:
        if options.fresh or options.only:
            journal(options.work, step.name).path.unlink(missing_ok=True)
    drill = Drill(ROOT, options.work, options.out, options.total, bool(found["gpus"]))
    names = ", ".join(f"{g['name']} (compute capability {g['capability']}, {g['gib']} GiB)" for g in found["gpus"])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "cuda", "triton"))
    drill.title = [f"# {names or 'A rehearsal: no GPU'}", "", f"{versions}; commit {commit or 'unknown'}."]
    good = drill.run(todo, again=[step.name for step in todo] if options.only else ["environment", "build"])
    finish(drill)
    print((options.out / "summary.md").read_text())
    print(f"in {options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")
    return 0 if good else 1


def finish(drill: Drill) -> None:
    """Pack what the steps left."""
    tests = drill.work / "tests.jsonl"
    with tests.open("w") as all_tests:
        for path in sorted((drill.work / "tests").glob("*.jsonl")):
            for event in Journal(path).outcomes().values():
                all_tests.write(json.dumps({"run": path.stem, **event}) + "\n")
    files = {"tests.jsonl": tests}
    files["benchmarks.tar.gz"] = archive(drill.work / "benchmarks", drill.work / "benchmarks.tar.gz")
    if drill.gpu and shutil.which("ncu"):
        files["kernels.ncu-rep"] = drill.work / "kernels.ncu-rep"
    drill.pack(files)


if __name__ == "__main__":
    sys.exit(main())
