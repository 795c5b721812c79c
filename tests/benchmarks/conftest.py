"""The benchmarks are scripts that import each other: their folder is on sys.path, as in `python benchmarks/codec.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
