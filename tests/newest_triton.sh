#!/usr/bin/env bash
# The interpreter's suite under the newest Triton that pip gives, so that the next release is met here first. It goes into a folder
# of its own, without its dependencies: the environment stays as it is. PYTHON names that environment's interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

version_of_report='import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])'
if ! newest=$("$python" -m pip install --quiet --dry-run --ignore-installed --no-deps --report - triton \
  | "$python" -c "$version_of_report"); then
  echo "NOT RUN: the interpreter's suite under the newest Triton, which pip could not find (its error is above)"
  exit 0
fi
installed=$("$python" -c 'import triton; print(triton.__version__)')
if [ "$newest" = "$installed" ]; then
  echo "Triton $installed is the newest that pip gives, and the suite has run under it"
  exit 0
fi
"$python" -m pip install --quiet --no-deps --target "$folder" "triton==$newest"
export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
echo "The interpreter's suite under Triton $("$python" -c 'import triton; print(triton.__version__)'), beside the installed $installed"
OMP_WAIT_POLICY=PASSIVE "$python" -m pytest -q tests/kernels/test_triton_interpreter.py --slow --numprocesses auto
