#!/usr/bin/env bash
# The oldest Triton that the package takes, and the newest that pip gives: the kernels compiled under both, run from their PTX under
# the first, and the interpreter's suite under the second. Each goes into a folder of its own, without its dependencies: the environment
# stays as it is. PYTHON names that environment's interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
oldest=3.6.0 # PyTorch 2.10's
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# run_under VERSION WHAT PYTEST-ARGUMENTS...
run_under() {
  local version=$1 what=$2
  shift 2
  if ! "$python" -m pip install --quiet --no-deps --target "$folder/$version" "triton==$version"; then
    echo "NOT RUN: $what under Triton $version, which pip could not install (its error is above)"
    return
  fi
  echo "$what under Triton $version, beside the installed $installed"
  PYTHONPATH="$folder/$version${PYTHONPATH:+:$PYTHONPATH}" TRITON_CACHE_DIR="$folder/cache" OMP_WAIT_POLICY=PASSIVE \
    "$python" -m pytest -q --slow --numprocesses auto "$@"
}

installed=$("$python" -c 'import triton; print(triton.__version__)')
compiled=tests/kernels/test_triton_compiled.py
run_under "$oldest" "The kernels compiled" "$compiled::test_no_spills[sm_80]" \
  "$compiled::test_no_spills_of_many_classes_in_float32[sm_80-False]" \
  "$compiled::test_ptx_forward_is_four_launches_and_equal_to_the_stages"

version_of_report='import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])'
if ! newest=$("$python" -m pip install --quiet --dry-run --ignore-installed --no-deps --report - triton \
  | "$python" -c "$version_of_report"); then
  echo "NOT RUN: the tests under the newest Triton, which pip could not find (its error is above)"
elif [ "$newest" = "$installed" ]; then
  echo "Triton $installed is the newest that pip gives, and the suite has run under it"
else
  run_under "$newest" "The interpreter's suite, and the kernels compiled," tests/kernels/test_triton_interpreter.py \
    "$compiled::test_no_spills_with_every_option[sm_86]"
fi
