#!/usr/bin/env bash
# OneCycleLR(total_steps=10, pct_start=0.1) divides by zero as soon as it is made, and so does every pair whose first phase has exactly
# one step (20 and 0.05); with 9 or 11 steps, or another share, it works. The error names neither of the two arguments.
#
# Versions: torch 2.14.1 (CPU).
# Seen: ZeroDivisionError at (10, 0.1) and (20, 0.05); none at (9, 0.1), (11, 0.1), (10, 0.2).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat >"$folder/schedule.py" <<'PYTHON'
import torch
from torch.optim.lr_scheduler import OneCycleLR

seen = {}
for steps, share in ((10, 0.1), (20, 0.05), (9, 0.1), (11, 0.1), (10, 0.2)):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    try:
        OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=share)
        seen[steps, share] = "works"
    except ZeroDivisionError as error:
        seen[steps, share] = f"ZeroDivisionError: {error}"
    print(f"torch {torch.__version__}, total_steps={steps}, pct_start={share}: {seen[steps, share]}")
fails = [key for key, text in seen.items() if text != "works"]
raise SystemExit(fails != [(10, 0.1), (20, 0.05)])
PYTHON
"$folder/venv/bin/python" "$folder/schedule.py"
