"""Audio files, failures of a waveform, and cuts at pauses."""

import numpy as np
import pytest
import soundfile
from fake_whisper import babble

from common.cli import InputError
from speech.audio import audio_failure, load_audio, save_audio, split_at_pauses
from speech.tokens import SAMPLE_RATE


@pytest.mark.parametrize(
    ("wav", "failure"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.zeros(16_000, np.float32), "silent"),
        (np.full(16_000, 0.5, np.float32), "silent"),
        (babble(1, 0, level=1e-4), "silent"),
        (np.array([0.1, np.nan], np.float32), "non_finite"),
        (np.array([0.1, -np.inf], np.float32), "non_finite"),
        (babble(1, 0, level=0.01), None),
    ],
)
def test_audio_failures(wav, failure):
    assert audio_failure(wav) == failure


@pytest.mark.parametrize("duration_s", [0.5, 2.0, 2.01, 3.1, 3.3, 7.0])
def test_pieces_fit_the_window_and_lose_nothing(duration_s):
    wav = babble(duration_s, seed=1)
    pieces = split_at_pauses(wav, 2 * SAMPLE_RATE)
    assert np.array_equal(np.concatenate(pieces), wav)
    assert max(map(len, pieces)) <= 2 * SAMPLE_RATE
    assert duration_s <= 2 or min(map(len, pieces)) >= 0.4 * 2 * SAMPLE_RATE


def test_pieces_end_in_pauses():
    wav = babble(5, seed=2)
    pauses = [(1.7, 1.9), (3.2, 3.4)]
    for start, end in pauses:
        wav[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)] *= 0.001
    cuts = np.cumsum([len(piece) for piece in split_at_pauses(wav, 2 * SAMPLE_RATE)])[:-1] / SAMPLE_RATE
    assert len(cuts) == 2
    assert all(start < cut < end for cut, (start, end) in zip(cuts, pauses, strict=True))


def test_silent_pieces_are_dropped():
    wav = np.concatenate([babble(1.5, seed=3), np.zeros(10 * SAMPLE_RATE, np.float32)])
    assert len(split_at_pauses(wav, 2 * SAMPLE_RATE)) == 1
    # A step between two constants is not silence as a whole, but its pieces are: one is left all the same.
    step = np.repeat(np.float32([-0.1, 0.1]), 2 * SAMPLE_RATE)
    assert audio_failure(step) is None
    assert len(split_at_pauses(step, 2 * SAMPLE_RATE)) == 1


def test_audio_files_round_trip(tmp_path):
    wav = babble(0.5, seed=4)
    save_audio(tmp_path / "new" / "a.wav", wav)
    read = load_audio(tmp_path / "new" / "a.wav")
    assert read.dtype == np.float32 and read.shape == wav.shape
    assert np.abs(read - wav).max() < 1 / 32_768
    assert np.array_equal(load_audio((tmp_path / "new" / "a.wav").read_bytes()), read)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_load_audio_mixes_down_and_resamples(tmp_path, suffix):
    t = np.arange(44_100) / 44_100
    tone = np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / f"a.{suffix}", np.stack([0.6 * tone, 0.2 * tone], axis=1), 44_100)
    wav = load_audio(tmp_path / f"a.{suffix}")
    assert wav.dtype == np.float32 and wav.ndim == 1 and abs(len(wav) - SAMPLE_RATE) <= 1_600
    spectrum = np.abs(np.fft.rfft(wav[4_000:12_000]))
    assert spectrum.argmax() * 2 == 440  # bins of 2 Hz
    assert np.abs(wav[4_000:12_000]).max() == pytest.approx(0.4, abs=0.02)  # the mean of the channels


def test_unreadable_audio_names_the_file(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), SAMPLE_RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), SAMPLE_RATE, subtype="FLOAT")
    for name, why in (("text", "cannot read"), ("none", "no samples"), ("nan", "NaN"), ("missing", "no such")):
        with pytest.raises(InputError, match=rf"{name}\.wav: .*{why}"):
            load_audio(tmp_path / f"{name}.wav")
    with pytest.raises(ValueError, match="mono"):
        save_audio(tmp_path / "b.wav", np.zeros((2, 3)))
    with pytest.raises(ValueError, match="NaN"):
        save_audio(tmp_path / "b.wav", np.array([np.nan]))
