"""DNSMOS: the package's own numbers, speech above noisy speech above noise, failed clips, the missing package."""

import sys

import numpy as np
import pytest

from common.cli import InputError
from speech.audio import load_audio
from speech.dnsmos import Dnsmos, windows

INSTALL = "is not installed: requirements-dnsmos.txt"


@pytest.fixture(scope="module")
def dnsmos() -> Dnsmos:
    for package in ("speechmos", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} {INSTALL}")
    return Dnsmos()


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return load_audio("tiny/heldout/heldout_059.ogg")


def test_speech_and_noise(dnsmos, speech):
    noise = np.random.default_rng(0).standard_normal(len(speech)).astype(np.float32)
    loud = 2 * speech / np.abs(speech).max()  # over full scale
    clips = [speech, speech + 0.05 * noise, 0.1 * noise, np.zeros(16_000, np.float32), np.zeros(0, np.float32), loud]
    clean, noisy, alone, silent, empty, clipped = dnsmos.score(clips)
    # speechmos 0.0.1.1 has 3.10, 3.45, 3.90 for the clip; with noise 1.86, 3.28, 1.74
    assert tuple(clean) == pytest.approx((3.10, 3.45, 3.90), abs=0.01)
    assert clean.ovrl > noisy.ovrl + 0.8 > alone.ovrl + 0.8 and alone.ovrl < 1.3
    assert clean.bak > noisy.bak + 1.5 and abs(clean.sig - noisy.sig) < 0.4  # the noise is background
    assert silent is None and empty is None and 1 < clipped.ovrl < clean.ovrl + 0.3


@pytest.mark.parametrize("seconds", [0.5, 5.0, 9.5, 12.3])
def test_scores_are_those_of_the_package(dnsmos, speech, seconds):
    package = pytest.importorskip("speechmos.dnsmos", reason="librosa, which speechmos's own code needs, is missing")
    wav = np.resize(speech, int(seconds * 16_000))
    theirs = package.run(wav, 16_000)
    [ours] = dnsmos.score([wav])
    assert tuple(ours) == pytest.approx([theirs[f"{name}_mos"] for name in ours._fields], abs=1e-5)


def test_windows_of_short_and_long_clips():
    """16,000 samples are doubled four times, to 16 s: 16 − 9.01 leaves 7 windows, one a second."""
    assert [len(piece) for piece in windows(np.zeros(16_000))] == [144_160] * 7
    assert len(windows(np.zeros(144_160))) == len(windows(np.zeros(159_999))) == 1
    assert windows(np.arange(200_000))[1][0] == 16_000


@pytest.mark.parametrize("package", ["speechmos", "onnxruntime"])
def test_a_missing_package_is_named_with_what_to_install(package, monkeypatch):
    monkeypatch.setattr("speech.dnsmos._is_installed", lambda name: name != package)
    with pytest.raises(InputError, match=rf"needs a package .*{package}.*pip install -r requirements-dnsmos.txt"):
        Dnsmos()


def test_what_is_not_there_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "speechmos", None)
    with pytest.raises(InputError, match="speechmos"):
        Dnsmos()
