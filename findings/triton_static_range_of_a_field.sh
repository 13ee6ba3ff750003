#!/usr/bin/env bash
# A field of a NamedTuple that a kernel takes as tl.constexpr is a plain number to Triton 3.6: tl.static_range refuses it ("is not a
# constexpr"), although a quotient of two such fields, and the same field under a name with the annotation tl.constexpr, are taken. Later
# Tritons take all three, so that a kernel written with them fails to compile for users of PyTorch 2.10 alone.
#
# Versions: triton 3.6.0 and 3.8.0; no GPU needed. Seen: 3.6.0 raises CompilationError for the field and compiles the other two; 3.8.0
# compiles all three.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/field.py" <<'PYTHON'
import sys
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError


class Sizes(NamedTuple):
    BLOCKS: int
    ONE: int


@triton.jit
def of_a_field(out, SIZES: tl.constexpr):
    for block in tl.static_range(SIZES.BLOCKS):
        tl.store(out + block, block)


@triton.jit
def of_a_quotient(out, SIZES: tl.constexpr):
    for block in tl.static_range(SIZES.BLOCKS // SIZES.ONE):
        tl.store(out + block, block)


@triton.jit
def of_a_name(out, SIZES: tl.constexpr):
    BLOCKS: tl.constexpr = SIZES.BLOCKS
    for block in tl.static_range(BLOCKS):
        tl.store(out + block, block)


def compiles(kernel):
    source = ASTSource(kernel, {"out": "*i32", "SIZES": "constexpr"}, {"SIZES": Sizes(4, 1)})
    try:
        triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": True})
    except CompilationError as error:
        print(f"triton {triton.__version__}, {kernel.__name__}: {str(error).splitlines()[-1]}")
        return False
    print(f"triton {triton.__version__}, {kernel.__name__}: compiled")
    return True


sys.exit([compiles(of_a_field), compiles(of_a_quotient), compiles(of_a_name)] != [sys.argv[1] == "True", True, True])
PYTHON
for expected in 3.6.0:False 3.8.0:True; do
  version=${expected%:*}
  "${PYTHON:-python3}" -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "triton==$version"
  TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/field.py" "${expected#*:}"
done
