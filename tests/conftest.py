"""Everything runs offline, on the CPU, from the project's root."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", CUDA_VISIBLE_DEVICES="")
os.chdir(ROOT)  # configs name tiny/ from here
sys.path.insert(0, str(ROOT))
# `pytest -n 2` runs two processes: each takes its share of the cores, also in the scripts it starts.
THREADS = max(1, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import torch  # noqa: E402

torch.set_flush_denormal(True)
