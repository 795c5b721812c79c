"""What the tests of the benchmarks share."""

from functools import cache

import pytest

from benchmarks import codec, harness, reward

measured_once = cache(harness.matmul_rate)  # takes a second or two


@pytest.fixture(autouse=True)
def one_measurement_of_the_matmul_rate(monkeypatch):
    for module in (codec, reward):
        monkeypatch.setattr(module, "matmul_rate", measured_once)
