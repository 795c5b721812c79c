"""Averages."""

import doctest

from common import averages


def test_examples():
    assert doctest.testmod(averages).attempted == 1 and doctest.testmod(averages).failed == 0
