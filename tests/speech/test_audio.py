"""Audio files, failures of a waveform, and cuts at pauses."""

import io
import tracemalloc

import numpy as np
import pytest
import soundfile
from fake_whisper import babble

from common.cli import InputError
from speech.audio import TooLongError, audio_failure, load_audio, save_audio, split_at_pauses
from speech.tokens import SAMPLE_RATE


def level(dbfs: float) -> np.ndarray:
    """A second of a tone with that RMS, about an offset which does not count."""
    tone = np.sin(2 * np.pi * 100 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    return (0.1 + 10 ** (dbfs / 20) * np.sqrt(2) * tone).astype(np.float32)


@pytest.mark.parametrize(
    ("wav", "failure"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.zeros(16_000, np.float32), "silent"),
        (np.full(16_000, 0.5, np.float32), "silent"),
        (babble(1, 0, level=1e-4), "silent"),
        (level(-61), "silent"),
        (level(-59), None),
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


def test_samples_far_above_full_scale_are_refused(tmp_path):
    """1e30 overflows in the codec; 16-bit integers saved as floats are as wrong, and sound right nowhere."""
    for peak, refused in ((1.5, False), (9.9, False), (20_000, True), (1e30, True)):
        wav = babble(0.5, seed=5)
        soundfile.write(tmp_path / "a.wav", wav / np.abs(wav).max() * peak, SAMPLE_RATE, subtype="FLOAT")
        if refused:
            with pytest.raises(InputError, match=r"a\.wav: samples up to (2e\+04|1e\+30), full scale is 1\. Export"):
                load_audio(tmp_path / "a.wav")
        else:
            assert np.abs(load_audio(tmp_path / "a.wav")).max() == pytest.approx(peak)


def as_mp3(wav: np.ndarray) -> bytes:
    """With a variable bit rate; the first frame is LAME's header, which has the length."""
    file = io.BytesIO()
    soundfile.write(file, wav, SAMPLE_RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    return file.getvalue()


@pytest.mark.parametrize("is_path", [False, True])
def test_an_mp3_that_is_cut_off_is_refused(tmp_path, is_path):
    whole = as_mp3(babble(3, seed=6))
    for share, refused in ((1, False), (0.9, True), (0.5, True)):
        source = whole[: int(len(whole) * share)]
        if is_path:
            (tmp_path / "a.mp3").write_bytes(source)
            source = tmp_path / "a.mp3"
        if refused:
            with pytest.raises(InputError, match="the MP3 ends before the 3.00 s of its header. Copy or export it"):
                load_audio(source, max_duration_s=30)
            with pytest.raises(TooLongError) if share == 0.9 else pytest.raises(InputError, match="ends before"):
                load_audio(source, max_duration_s=1)  # of a longer one only the first seconds are looked at
        else:
            assert len(load_audio(source)) == 3 * SAMPLE_RATE


def test_an_mp3_without_a_header_is_not_taken_for_cut_off():
    """libsndfile guesses its length from the first frame, which is short in silence and long in speech."""
    whole = as_mp3(np.concatenate([np.zeros(2 * SAMPLE_RATE, np.float32), babble(3, seed=7)]))
    starts = [i for i in range(4, 2_000) if whole[i] == 0xFF and whole[i + 1] >> 5 == 0b111]
    stream = whole[starts[0] :]
    assert soundfile.info(io.BytesIO(stream)).duration > 10
    assert len(load_audio(stream)) / SAMPLE_RATE == pytest.approx(5, abs=0.2)


def test_a_long_recording_is_refused_without_being_loaded(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(600 * 8_000, np.int16), 8_000)
    tracemalloc.start()
    with pytest.raises(TooLongError, match=r"a\.wav: 600\.00 s is over 2 s\. Use a shorter recording"):
        load_audio(tmp_path / "a.wav", max_duration_s=2)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2_000_000  # 600 s are 19 MB as they stand, 38 MB resampled


@pytest.mark.parametrize("sample_rate", [16_000, 44_100, 8_000])
def test_a_limit_changes_no_sample(tmp_path, sample_rate):
    wav = babble(0.5, seed=8)
    soundfile.write(tmp_path / "a.flac", wav, sample_rate)
    whole = load_audio(tmp_path / "a.flac")
    duration_s = len(whole) / SAMPLE_RATE
    assert np.array_equal(load_audio(tmp_path / "a.flac", duration_s), whole)
    assert np.array_equal(load_audio(tmp_path / "a.flac", 30), whole)
    with pytest.raises(TooLongError):
        load_audio(tmp_path / "a.flac", duration_s - 1e-4)
