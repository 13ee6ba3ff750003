#!/usr/bin/env bash
# Everything worth knowing about the kernels on this machine's GPU, in about eight minutes: builds them for it, tests them, looks
# for memory errors and races, profiles and times them. `scripts/first_gpu.sh --help` says more. PYTHON names the interpreter.
exec "${PYTHON:-python3}" "$(dirname "$0")/first_gpu.py" "$@"
