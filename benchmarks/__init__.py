"""Benchmarks of speed, memory and gradient noise; each is a script, run as `python benchmarks/X.py`."""
