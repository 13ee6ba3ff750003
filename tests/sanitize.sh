#!/usr/bin/env bash
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer in a folder of its own, and runs their tests.
# PYTHON names the interpreter of an environment with torch, pytest and ninja; arguments go to pytest.
# With "--fuzz SECONDS" in front, the fuzzer runs instead, for so long on each instruction set; arguments go to it.
set -euo pipefail
fuzz=
if [ "${1:-}" = --fuzz ]; then
  fuzz=$2
  shift 2
fi
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r csrc proac_cuda tests setup.py pyproject.toml README.md LICENSE "$work"
cd "$work"
rm -f proac_cuda/_C*
PATH="$(dirname "$python"):$PATH" PROAC_SANITIZE=1 PROAC_NO_CUDA=1 "$python" setup.py --quiet build_ext --inplace > build.log 2>&1 ||
  { tail -50 build.log; exit 1; }

preload="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)"
export LD_PRELOAD="$preload" PYTHONPATH="$work" PYTHONMALLOC=malloc
# Python and PyTorch leak at exit by design; what is looked for is access out of bounds and undefined behaviour.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
for isa in ${PROAC_SANITIZE_ISA:-baseline avx2 avx512 amx}; do
  if ! PROAC_CPU_ISA=$isa "$python" -c "from proac_cuda.backends import extension; extension.build_info()" 2> /dev/null; then
    echo "$isa: not on this CPU"
    continue
  fi
  echo "$isa"
  if [ -n "$fuzz" ]; then
    PROAC_CPU_ISA=$isa "$python" tests/fuzz.py --backend cpp --seconds "$fuzz" "$@"
    continue
  fi
  PROAC_CPU_ISA=$isa "$python" -m pytest -q -p no:cacheprovider --slow --backend cpp \
    -k "not memory and not instruction_set and not sanitizers" \
    "$@" tests/kernels/test_cpp_kernels.py tests/kernels/test_against_oracle.py tests/api/test_behaviour.py
done
