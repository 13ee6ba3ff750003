#!/usr/bin/env bash
# torch.nn.functional.interpolate reads other pixels of a label map in float64 than in float32, in both nearest modes.
#
# Versions: torch 2.14.1, CPU. Sizes that do not divide, or whose quotient float32 does not hold.
# Seen: 104 pixels to 22, mode "nearest": output 11 reads input 51 in float32 and uint8, and 52 in float64, which is 11 * 104 / 22.
# 26 pixels to 11, mode "nearest-exact": output 5 reads input 12 in float32 and uint8, and 13 in float64. Of all pairs of sizes up to
# 64, 73 differ in one mode or the other. A label map that one part of a pipeline resizes as float64 (NumPy's default) and another as
# float32 is therefore not the same map.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/try.py" <<'PYTHON'
import torch


def reads(size, wanted, mode, dtype):
    index = torch.arange(size).to(dtype)[None, None]
    return torch.nn.functional.interpolate(index, size=wanted, mode=mode)[0, 0].long()


dtypes = (torch.float32, torch.uint8, torch.float64)
first = [reads(104, 22, "nearest", dtype)[11].item() for dtype in dtypes]
second = [reads(26, 11, "nearest-exact", dtype)[5].item() for dtype in dtypes]
differ = {
    (size, wanted)
    for size in range(1, 65)
    for wanted in range(1, 65)
    for mode in ("nearest", "nearest-exact")
    if not torch.equal(reads(size, wanted, mode, torch.float32), reads(size, wanted, mode, torch.float64))
}
print(torch.__version__, first, second, len(differ))
assert first == [51, 51, 52] and second == [12, 12, 13] and len(differ) == 73
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
