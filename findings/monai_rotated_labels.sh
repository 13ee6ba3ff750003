#!/usr/bin/env bash
# MONAI's Rotated and RandRotated, as they are, turn a label map of one single class into two: .long() of the class 3 gives 2 in places.
#
# Versions: monai 1.6.1, torch 2.14.1, CPU.
# Seen: a map that holds 3 everywhere, turned by 30 degrees. The default mode "bilinear" holds for every key, labels too, and its weights add
# up to a little less than 1: values down to 2.9999998, so that 4 % of the pixels are 2 after .long(); 3 everywhere after round(). The
# dtype becomes float32, and corners repeat the border. With mode="nearest" all pixels are 3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 monai==1.6.1 numpy
cat >"$folder/turn.py" <<'PYTHON'
import math

import monai
import torch
from monai.transforms import Rotated

found = {}
for mode in ("bilinear", "nearest"):
    options = {} if mode == "bilinear" else {"mode": mode}
    labels = torch.full((1, 40, 40), 3, dtype=torch.int64)
    turned = torch.as_tensor(Rotated("label", math.pi / 6, **options)({"label": labels})["label"])
    found[mode] = str(turned.dtype), turned.long().unique().tolist(), turned.round().unique().tolist()
    print(f"monai {monai.__version__}, {mode}: {found[mode]}, {(turned.long() != 3).float().mean():.1%} of another class")
raise SystemExit(
    found != {"bilinear": ("torch.float32", [2, 3], [3.0]), "nearest": ("torch.float32", [3], [3.0])}
)
PYTHON
"$folder/venv/bin/python" "$folder/turn.py" 2>/dev/null
