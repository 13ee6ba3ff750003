#!/usr/bin/env bash
# The CUDA kernels under NVIDIA's compute-sanitizer, one tool after the other, each to its end whatever the others found.
#
#     tests/compute_sanitizer.sh [TOOL ...] [-- PYTEST ARGUMENT ...]
#
# TOOL: memcheck, racecheck, synccheck, initcheck; without, all four. The tests are one call of every path of the kernels, or
# what the pytest arguments say, for example `-- tests/kernels/test_against_oracle.py`. Fails if any tool finds something or cannot run.
# Needs a GPU and the CUDA toolkit. PYTHON names the interpreter of the environment in which the package is installed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the path (it comes with the CUDA toolkit)" >&2; exit 1; }
"$python" -c 'import torch; assert torch.cuda.is_available(), "PyTorch sees no CUDA device"' || exit 1

tools=()
while [[ $# -gt 0 && $1 != -- ]]; do tools+=("$1"); shift; done
[[ ${#tools[@]} -gt 0 ]] || tools=(memcheck racecheck synccheck initcheck)
shift || true
tests=("$@")
[[ ${#tests[@]} -gt 0 ]] || tests=(tests/kernels/test_real_sizes.py -k test_every_path)

# Memory from cudaMalloc itself: inside PyTorch's cached blocks an access past the end of a tensor would go unseen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
failed=()
for tool in "${tools[@]}"; do
  echo "== $tool"
  # Names are compared as they are mangled (_ZN4proac4cuda...). Only initcheck looks at PyTorch's kernels too: it has to see
  # what they initialise.
  only=(--kernel-name kernel_substring=proac)
  [[ $tool == initcheck ]] && only=()
  compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all "${only[@]}" \
    "$python" -m pytest "${tests[@]}" -m gpu --backend cuda -q -p no:cacheprovider || failed+=("$tool")
done
[[ ${#failed[@]} -eq 0 ]] || { echo "compute-sanitizer: ${failed[*]} failed" >&2; exit 1; }
