#!/usr/bin/env bash
# Triton 3.6's interpreter (TRITON_INTERPRET=1) cannot loop to a kernel's argument under NumPy 2.4: it turns arrays of one number into
# Python numbers, which NumPy has deprecated since 1.25 and refuses since 2.4. torch 2.10 brings Triton 3.6 and takes any NumPy.
#
# Versions: triton 3.6.0 and torch 2.10.0 with numpy 2.4.6 and 2.3.5. No GPU needed. Triton 3.8.0 runs under 2.4.6.
# Seen: with 2.4.6 InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars'); with 2.3.5 the sum.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.10.0 triton==3.6.0 numpy==2.4.6
cat >"$folder/loop.py" <<'PYTHON'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def add_up(values, out, length):
    total = tl.zeros((1,), tl.float32)
    for i in range(0, length):
        total += tl.load(values + i)
    tl.store(out + tl.arange(0, 1), total)


out = torch.empty(1)
try:
    add_up[(1,)](torch.arange(5.0), out, 5)
    print(f"triton {triton.__version__}, numpy {numpy.__version__}: {out.item()}")
except triton.runtime.errors.InterpreterError as error:
    print(f"triton {triton.__version__}, numpy {numpy.__version__}: {error}")
PYTHON
first=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/loop.py")
"$folder/venv/bin/pip" install --quiet numpy==2.3.5
second=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/loop.py")
printf '%s\n' "$first" "$second"
[[ $first == *"only 0-dimensional arrays"* && $second == *": 10.0" ]]
