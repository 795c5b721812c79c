"""Everything runs offline, on the CPU, from the project's root."""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # read when trackio is imported
os.chdir(ROOT)  # configs name tiny/ from here
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the project's modules, and what tests share (tests/fake_*.py)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_flush_denormal(True)
torch.set_num_threads(1)  # the models are too small for two to pay, and `make test` runs two processes


@pytest.fixture(scope="session")
def whisper_tiny_en() -> str:
    """OpenAI's Whisper tiny.en, a folder in CTranslate2's format; tests that need it are skipped without it."""
    folder = Path("build/whisper-tiny.en")
    if not (folder / "model.bin").is_file():
        pytest.skip(f"Whisper's weights are not there: python -m tiny.whisper_weights tiny.en {folder}")
    return str(folder)


# --- A small Llasa of 64 codes, where a test has none of its own ------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from fake_llasa import TEXT

    from speech.tokens import prepare_tokenizer
    from tiny.llasa import new_tokenizer

    tokenizer = new_tokenizer([TEXT], num_codes=64)
    prepare_tokenizer(tokenizer)
    return tokenizer


@pytest.fixture
def model(tokenizer):
    from tiny.llasa import new_model

    return new_model(tokenizer, seed=0, hidden=48, layers=1)


@pytest.fixture
def tokens(tokenizer):
    from speech.tokens import prepare_tokenizer

    return prepare_tokenizer(tokenizer)
