"""tiny/train_speaker_encoder.py: other speeds are other speakers, it learns, and the shipped one tells voices apart."""

import datasets
import numpy as np
import pytest
from fake_vowel import falling

from speech.codec import SpeechCodec
from speech.pitch import pitch_track
from speech.speaker_encoder import SpeakerEncoder
from tiny import train_codec
from tiny import train_speaker_encoder as ts

VOWELS = [falling(1.0, f0_hz, f0_hz - 5) for f0_hz in (110, 112, 200, 203)]
VOICES = ["low", "low", "high", "high"]


def test_a_clip_at_another_speed_is_another_speaker_of_another_pitch():
    copies, speakers = ts.with_speeds([VOWELS[0], VOWELS[2]], ["low", "high"])
    assert speakers == [*range(5, 10), *range(5)]  # by the name of the voice
    assert copies[2] is VOWELS[0]
    for copy, speed in zip(copies, ts.SPEEDS, strict=False):
        assert len(copy) == pytest.approx(16_000 / speed, abs=1)
        assert 2 ** (pitch_track(copy).f0.mean() / 12) == pytest.approx(107.5 * speed, rel=0.02)


def test_crops():
    wav, rng = np.arange(10), np.random.default_rng(0)
    starts = set()
    for _ in range(100):
        part = ts.crop(wav, 4, rng)
        starts.add(int(part[0]))
        assert np.array_equal(part, np.arange(part[0], part[0] + 4))
    assert starts == set(range(7))
    assert sorted(ts.crop(wav, 20, rng)) == sorted([*range(10)] * 2)  # begins again
    assert len(ts.crop(wav, 25, rng)) == 25


def test_it_learns_and_loads_as_a_speaker_encoder(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(train_codec, "LOG_STEPS", 10)
    monkeypatch.setattr(ts, "BATCH", 8)
    monkeypatch.setattr(ts, "SPEEDS", (1.0,))
    ts.train_speaker_encoder(VOWELS, VOICES, tmp_path / "encoder", steps=60, seed=0)
    losses = [float(message.split(": ")[1].split(",")[0]) for message in caplog.messages]
    assert losses[-1] < 0.5 * losses[0]
    embeddings = SpeakerEncoder.from_pretrained(str(tmp_path / "encoder")).embed(VOWELS)
    cosines = embeddings @ embeddings.T
    assert min(cosines[0, 1], cosines[2, 3]) > cosines[:2, 2:].max() + 0.3


def test_the_one_that_ships_tells_the_voices_of_new_clips_apart():
    rows = datasets.Dataset.from_parquet("tiny/speech.parquet")
    rows = rows.select(range(len(rows) - 60, len(rows)))  # it learnt from the first ones
    wavs = SpeechCodec.from_pretrained("tiny/codec").decode([list(codes) for codes in rows["audio_codes"]])
    embeddings = SpeakerEncoder.from_pretrained("tiny/speaker_encoder").embed(wavs)
    same = np.equal.outer(rows["speaker"][:], rows["speaker"][:])
    cosines = embeddings @ embeddings.T
    other = ~np.eye(len(rows), dtype=bool)
    assert cosines[same & other].mean() > 0.6
    assert cosines[~same].mean() < 0.3
    nearest = np.where(other, cosines, -1).argmax(axis=1)
    assert same[np.arange(len(rows)), nearest].all()
