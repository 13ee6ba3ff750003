#!/usr/bin/env bash
# Several float32 products with input_precision="tf32x3" in one loop body, each for a total of its own: both the product and the total stay
# in registers until the end of the body, because the last step of tf32x3, the addition to the total, is put behind all of the
# products. A loop of one turn around each product, which the compiler cannot see through, saves a quarter of the registers and all spills.
#
# Versions: triton 3.9.0 with its own ptxas; no GPU needed. Seen, of the kernel below (8 totals of 16 x 64, two warps), registers and
# instructions that access local memory: sm_80 255 and 10 for the products as they are, 218 and 0 with the loops; sm_90 255 and 16, 218 and
# 0; sm_120 255 and 10, 221 and 0. On sm_90 and sm_120 the additions stand behind the last product in the PTX already; on sm_80
# ptxas puts them there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.9.0
cat >"$folder/totals.py" <<'PYTHON'
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@triton.jit
def eight_products(a, b, out, length, turns, LOOPED: tl.constexpr):
    row = tl.arange(0, 16)
    term = tl.arange(0, 16)
    column = tl.program_id(0) * 64 + tl.arange(0, 64)
    totals = ()
    for block in tl.static_range(8):
        totals = totals + (tl.zeros((16, 64), tl.float32),)
    for first in range(0, length, 16):
        right = tl.load(b + (first + term)[:, None] * 4096 + column[None, :])
        grown = ()
        for block in tl.static_range(8):
            left = tl.load(a + (block * 16 + row)[:, None] * 1024 + (first + term)[None, :])
            total = totals[block]
            if LOOPED:
                for _ in range(turns):
                    total = tl.dot(left, right, total, input_precision="tf32x3")
            else:
                total = tl.dot(left, right, total, input_precision="tf32x3")
            grown = grown + (total,)
        totals = grown
    for block in tl.static_range(8):
        tl.store(out + (block * 16 + row)[:, None] * 4096 + column[None, :], totals[block])


def compiled(architecture, looped):
    types = {"a": "*fp32", "b": "*fp32", "out": "*fp32", "length": "i32", "turns": "i32", "LOOPED": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(eight_products, types, {"LOOPED": looped}, aligned)
    options = {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm


def facts(asm):
    """Registers, and instructions that access local memory."""
    Path("kernel.cubin").write_bytes(asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    sass = subprocess.run([TOOLS / "nvdisasm", "-c", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1]), len(re.findall(r"\b(?:STL|LDL)\b", sass))


def additions_before_the_last_product(ptx):
    steps = re.findall(r"^\s*(mma|add\.(?:rn\.)?f32)", ptx, re.M)
    last = max(place for place, step in enumerate(steps) if step == "mma")
    return sum(step != "mma" for step in steps[:last])


held = True
for architecture in (80, 90, 120):
    plain, looped = compiled(architecture, False), compiled(architecture, True)
    (registers, accesses), (fewer, none) = facts(plain), facts(looped)
    before = additions_before_the_last_product(plain["ptx"])
    print(f"triton {triton.__version__}, sm_{architecture}: {registers} registers, {accesses} accesses of local memory; "
          f"in loops {fewer}, {none}; additions before the last product in the PTX: {before}")
    held &= registers == 255 and accesses > 0 and fewer < 230 and none == 0 and (before > 0) == (architecture == 80)
sys.exit(not held)
PYTHON
cd "$folder"
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" totals.py
