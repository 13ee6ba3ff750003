#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1) takes an integer or a bool that a kernel converts to bfloat16 for the bits of the number.
#
# Versions: triton 3.8.0, torch 2.14.1; 3.6.0 and 3.9.0 print the same. No GPU needed.
# Seen: of 0 to 7, int32, .to(tl.bfloat16).to(tl.float32) gives [0, 0, 0, 5.9e-39, 0, 2.9e-39, 5.9e-39, 8.8e-39]; by way of float32 it
# gives 0 to 7, and so does float16 without it. A mask such as (i < 4).to(tl.bfloat16) is all zeros. Compiled kernels convert the values.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 triton==3.8.0 numpy
cat >"$folder/convert.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def convert(out, DTYPE: tl.constexpr, BY_FLOAT32: tl.constexpr):
    values = tl.arange(0, 8)
    if BY_FLOAT32:
        values = values.to(tl.float32)
    tl.store(out + tl.arange(0, 8), values.to(DTYPE).to(tl.float32))


found = {}
for dtype, by_float32 in ((tl.float16, False), (tl.bfloat16, False), (tl.bfloat16, True)):
    out = torch.empty(8)
    convert[(1,)](out, dtype, by_float32)
    found[str(dtype), by_float32] = out
    print(f"triton {triton.__version__}, int32 to {dtype}{' by float32' if by_float32 else ''}: {out.tolist()}")
right = torch.arange(8.0)
as_before = torch.equal(found["fp16", False], right) and torch.equal(found["bf16", True], right)
raise SystemExit(not (as_before and found["bf16", False].max() < 1e-30))
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/convert.py"
