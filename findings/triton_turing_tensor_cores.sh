#!/usr/bin/env bash
# tl.dot on float16, compiled for sm_75 (T4, RTX 20), whose tensor cores multiply float16, becomes scalar multiply-adds, without a word.
#
# Versions: triton 3.8.0, no GPU needed.
# Seen: for a product of 64 x 64 matrices, 0 mma.sync and 2048 fma.rn.f32 in the PTX for sm_75; 32 mma.sync and 0 fma.rn.f32 from the
# same source for sm_80. A kernel tuned on one GPU is thus correct on the other, and may spill registers or compile for a minute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.8.0
cat >"$folder/product.py" <<'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, out, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(out + i * N + j, tl.dot(tl.load(a + i * N + j), tl.load(b + i * N + j)))


counts = {}
for capability in (75, 80):
    source = ASTSource(product, {"a": "*fp16", "b": "*fp16", "out": "*fp32", "N": "constexpr"}, {"N": 64})
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    counts[capability] = ptx.count("mma.sync"), ptx.count("fma.rn.f32")
    print(f"triton {triton.__version__}, sm_{capability}: {counts[capability][0]} mma.sync, {counts[capability][1]} fma.rn.f32")
raise SystemExit(not (counts[75][0] == 0 and counts[75][1] > 0 and counts[80][0] > 0))
PYTHON
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/product.py"
