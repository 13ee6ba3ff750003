#!/usr/bin/env bash
# The whole suite: linters, then every test that this machine can run, slow ones included.
# PYTHON names the interpreter of the environment in which the package is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

"$python" -m proac_cuda info
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' '*.cc' | xargs -r "$("$python" -c 'import sys; print(sys.prefix)')/bin/clang-format" --dry-run --Werror
"$python" -m proac_cuda check
# Threads sleep while they wait: those of several processes would else keep each other from working.
OMP_WAIT_POLICY=PASSIVE "$python" -m pytest tests --slow --durations=25 --numprocesses auto --dist worksteal "$@"
