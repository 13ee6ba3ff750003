#!/usr/bin/env bash
# OpenCV 5 has a 64-bit integer type, and still takes int64 arrays as int32, without a word: 2^31 comes back negative, 2^40 + 7 as 7.
#
# Versions: opencv-python-headless 5.0.0.93, numpy 2.4.6.
# Seen: resize, warpAffine, flip and copyMakeBorder of an int64 array give int32, and the low 32 bits; uint32 stays uint32. Classes keep their
# values, but what is built on it hands int64 masks on as int32 (AlbumentationsX 2.5.1), which PyTorch's cross_entropy does not take.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 opencv-python-headless==5.0.0.93
cat >"$folder/maps.py" <<'PYTHON'
import cv2
import numpy as np

calls = {
    "resize": lambda a: cv2.resize(a, (2, 2), interpolation=cv2.INTER_NEAREST),
    "warpAffine": lambda a: cv2.warpAffine(a, np.eye(2, 3), (4, 4), flags=cv2.INTER_NEAREST),
    "flip": lambda a: cv2.flip(a, 1),
    "copyMakeBorder": lambda a: cv2.copyMakeBorder(a, 0, 0, 0, 0, cv2.BORDER_CONSTANT),
}
found = {}
for name, call in calls.items():
    results = [call(np.full((4, 4), value, np.int64)) for value in (2**31, 2**40 + 7)]
    found[name] = results[0].dtype.name, [int(result[0, 0]) for result in results]
    print(f"OpenCV {cv2.__version__}, {name} of int64: {found[name]}")
raise SystemExit(any(value != ("int32", [-(2**31), 7]) for value in found.values()))
PYTHON
"$folder/venv/bin/python" "$folder/maps.py"
