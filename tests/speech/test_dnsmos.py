"""DNSMOS: speech above noisy speech above noise, failed clips, the missing package."""

import sys

import numpy as np
import pytest

from common.cli import InputError
from speech.audio import load_audio
from speech.dnsmos import Dnsmos


def test_speech_and_noise():
    pytest.importorskip("speechmos.dnsmos", reason="speechmos is not installed: requirements-dnsmos.txt")
    speech = load_audio("tiny/heldout/rms_001.flac")
    noise = np.random.default_rng(0).standard_normal(len(speech)).astype(np.float32)
    loud = 2 * speech / np.abs(speech).max()  # over full scale, which the package itself refuses
    clips = [speech, speech + 0.05 * noise, 0.1 * noise, np.zeros(16_000, np.float32), np.zeros(0, np.float32), loud]
    clean, noisy, alone, silent, empty, clipped = Dnsmos().score(clips)
    # As the package has it for the clip: 3.15, 3.38, 4.09; with noise 1.94, 3.27, 1.94; noise alone 1.1 each
    assert tuple(clean) == pytest.approx((3.15, 3.38, 4.09), abs=0.05)
    assert clean.ovrl > noisy.ovrl + 0.8 > alone.ovrl + 0.8 and alone.ovrl < 1.3
    assert clean.bak > noisy.bak + 1.5 and abs(clean.sig - noisy.sig) < 0.4  # the noise is background
    assert silent is None and empty is None and 1 < clipped.ovrl < clean.ovrl + 0.3


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "speechmos", None)
    with pytest.raises(InputError, match=r"dnsmos: needs a package .*speechmos.*pip install -r requirements-dnsmos"):
        Dnsmos()
