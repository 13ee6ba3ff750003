#!/usr/bin/env bash
# The CUDA kernels under NVIDIA's compute-sanitizer, one tool after the other. Needs a GPU and the CUDA toolkit.
# PYTHON names the interpreter of the environment in which the package is installed; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the path (it comes with the CUDA toolkit)" >&2; exit 1; }
"$python" -c 'import torch; assert torch.cuda.is_available(), "PyTorch sees no CUDA device"'

# Memory from cudaMalloc itself: inside PyTorch's cached blocks an access past the end of a tensor would go unseen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck synccheck initcheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all --kernel-name-exclude kernel_substring=at:: \
    "$python" -m pytest tests/test_against_oracle.py -m gpu --backend cuda -q -x -p no:cacheprovider "$@"
done
