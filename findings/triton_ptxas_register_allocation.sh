#!/usr/bin/env bash
# Triton from 3.8 on gives ptxas an option that its help does not name, --regAllocOptLevel=2, under which kernels near 255 registers spill
# that fit without it. So registers and spills of Triton's kernels are not what ptxas alone says of their PTX.
#
# Versions: triton 3.8.0 (ptxas 13.3.33 for sm_100); 3.9.0 (13.4.59) gives the option, too, 3.6.0 (12.9.86) does not. No GPU needed.
# Seen, of the kernel below for sm_100, instructions that access local memory: 8 as Triton compiles it; 0 of the same PTX by the same
# ptxas without options, and 0 with ptx_options="--regAllocOptLevel=4". The compiler's source calls it a workaround for a bug.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet triton==3.8.0
cat >"$folder/spills.py" <<'PYTHON'
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@triton.jit
def six_products(a, b, out, scale, length, N: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.arange(0, 32)
    term = tl.arange(0, 32)
    column = tl.program_id(0) * N + tl.arange(0, N)
    sums = ()
    for block in tl.static_range(BLOCKS):
        sums = sums + (tl.zeros((32, N), tl.float32),)
    for first in range(0, length, 32):
        right = tl.load(b + (first + term)[:, None] * 4096 + column[None, :])
        grown = ()
        for block in tl.static_range(BLOCKS):
            left = tl.load(a + (block * 32 + row)[:, None] * 1024 + (first + term)[None, :])
            grown = grown + (tl.dot(left, right, sums[block]),)
        sums = grown
    for block in tl.static_range(BLOCKS):
        scaled = sums[block] * tl.load(scale + column)[None, :]
        tl.store(out + (block * 32 + row)[:, None] * 4096 + column[None, :], scaled.to(tl.bfloat16))


def compiled(**options):
    types = {"a": "*bf16", "b": "*bf16", "out": "*bf16", "scale": "*fp32", "length": "i32", "N": "constexpr", "BLOCKS": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(six_products, types, {"N": 64, "BLOCKS": 6}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 100, 32), options={"num_warps": 2, "num_stages": 1, **options}).asm


def local_accesses(cubin):
    sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"\b(?:STL|LDL)\b", sass))


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    found = {}
    for title, options in (("as Triton compiles it", {}), ("--regAllocOptLevel=4", {"ptx_options": "--regAllocOptLevel=4"})):
        asm = compiled(**options)
        (folder / "kernel.cubin").write_bytes(asm["cubin"])
        found[title] = local_accesses(folder / "kernel.cubin")
    (folder / "kernel.ptx").write_text(asm["ptx"])
    ptxas = [TOOLS / "ptxas-blackwell", "--gpu-name=sm_100a", "kernel.ptx", "-o", "alone.cubin"]
    subprocess.run(ptxas, cwd=folder, check=True)
    found["ptxas alone"] = local_accesses(folder / "alone.cubin")
print(f"triton {triton.__version__}, instructions that access local memory: {found}")
raise SystemExit(not (found["as Triton compiles it"] > 0 == found["--regAllocOptLevel=4"] == found["ptxas alone"]))
PYTHON
export TRITON_CACHE_DIR="$folder/cache"
"$folder/venv/bin/python" "$folder/spills.py"
