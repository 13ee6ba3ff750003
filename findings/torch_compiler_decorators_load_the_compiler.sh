#!/usr/bin/env bash
# torch.compiler.disable and assume_constant_result load the whole compiler where they decorate a function, compiled or not.
#
# Versions: torch 2.14.1; 2.10.0 and 2.15.0 do the same. No GPU needed.
# Seen: `import torch` leaves torch._dynamo out, and so do torch.compiler.is_compiling, torch.utils.checkpoint and torch.export. One function
# decorated with torch.compiler.disable, assume_constant_result or allow_in_graph brings more than 800 modules in, torch._dynamo,
# torch._inductor and sympy among them: 0.6 to 0.8 of the processor time of `import torch`. A library that decorates at the top
# of a module makes everybody who imports it pay. nested_compile_region and torch.library.custom_op do not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat >"$folder/modules.py" <<'PYTHON'
import subprocess
import sys

STATEMENTS = {
    "torch.compiler.is_compiling()": False,
    "import torch.utils.checkpoint, torch.export": False,
    "torch.compiler.nested_compile_region(identity)": False,
    "torch.library.custom_op('finding::twice', mutates_args=())(twice)": False,
    "torch.compiler.disable(identity)": True,
    "torch.compiler.assume_constant_result(identity)": True,
    "torch.compiler.allow_in_graph(identity)": True,
}
PROGRAM = """
import sys
import time
began = time.process_time()
import torch
took = time.process_time() - began
def identity(x):
    return x
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
before, began = len(sys.modules), time.process_time()
{}
more = time.process_time() - began
print(torch.__version__, len(sys.modules) - before, f"{{more / took:.2f}}", all(name in sys.modules for name in ("torch._dynamo", "torch._inductor", "sympy")))
"""
as_before = True
for statement, loads in STATEMENTS.items():
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(statement)], capture_output=True, text=True, check=True)
    version, modules, share, compiler = run.stdout.split()
    print(f"torch {version}, {statement}: {modules} modules, {share} of the time of `import torch`, the compiler: {compiler}")
    as_before = as_before and (compiler == "True") == loads and (int(modules) > 800) == loads
raise SystemExit(not as_before)
PYTHON
"$folder/venv/bin/python" "$folder/modules.py"
