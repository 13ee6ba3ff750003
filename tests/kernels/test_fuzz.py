"""A few of the fuzzer's cases; for more, ``python tests/fuzz.py --seconds 3600``."""

from __future__ import annotations

import math

import pytest

import fuzz


def test_some_cases(backend, monkeypatch):
    if backend.name == "reference":
        pytest.skip("the reference is what the fuzzer compares with")
    monkeypatch.setenv("PROAC_CHECKS", "1")
    cases = 3 if (backend.name, backend.device) == ("triton", "cpu") else 120  # its interpreter takes seconds for each
    assert fuzz.run(math.inf, seed=0, backends=[backend.name], cases=cases) == 0
