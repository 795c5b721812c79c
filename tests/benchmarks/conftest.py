"""The benchmarks are scripts that import each other: their folder is on sys.path, as in `python benchmarks/X.py`."""

import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import codec  # noqa: E402
import harness  # noqa: E402
import reward  # noqa: E402

measured_once = cache(harness.matmul_rate)  # takes a second or two


@pytest.fixture(autouse=True)
def one_measurement_of_the_matmul_rate(monkeypatch):
    for module in (codec, reward):
        monkeypatch.setattr(module, "matmul_rate", measured_once)
