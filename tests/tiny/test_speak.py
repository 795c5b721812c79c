"""tiny/speak.py: which clips are spoken, and what is written of them."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile as sf
from fake_vowel import falling

from tiny import speak
from tiny.corpus import emphasised_word, sentences, spoken_words
from tiny.judge_melody import ends_as_question


def a_neutral_clip(text, speaker):
    """A vowel of 0.3 s a word."""
    count = len(text.split())
    return falling(0.3 * count, 130, 110), [(0.3 * i, 0.3 * (i + 1)) for i in range(count)]


def test_training_clips_by_voice_form_and_melody():
    rows = speak.train_rows()
    voices = Counter(row["speaker"] for row in rows)
    assert voices == {"joe": 17_000, "slt": 8_500, "rms": 8_500}
    melodies = Counter((row["form"], row["melody"]) for row in rows)
    for form in ("question", "emphasis"):
        assert 0.46 < melodies[form, "neutral"] / (melodies[form, "neutral"] + melodies[form, "right"]) < 0.54
    assert melodies["statement", "neutral"] == 0
    assert rows == speak.train_rows()


def test_heldout_clips_are_new_and_evenly_divided():
    rows = speak.heldout_rows()
    divided = Counter((row["speaker"], row["form"]) for row in rows)
    assert set(divided.values()) == {16, 12} and len(rows) == 120
    trained = {spoken_words(row["text"]) for row in speak.train_rows()}
    assert not trained & {spoken_words(row["text"]) for row in rows}
    assert {row["text"] for row in rows} <= set(sentences(speak.SEED)[50_000:])
    asr = speak.asr_heldout_rows()
    assert len(asr) == 400 and Counter(row["speaker"] for row in asr)["joe"] == 134
    assert not (trained | {spoken_words(row["text"]) for row in rows}) & {spoken_words(row["text"]) for row in asr}


def test_record_writes_the_melody_that_the_row_asks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(speak, "speak_with_times", a_neutral_clip)
    rows = {(row["form"], row["melody"]): row for row in speak.train_rows()[:200]}
    for (form, melody), row in rows.items():
        [(_, written)] = speak.record(row, tmp_path)
        wav, rate = sf.read(tmp_path / f"{row['id']}.flac", dtype="float32")
        assert rate == 16_000 and written["duration_s"] == pytest.approx(len(wav) / rate, abs=0.001)
        neutral_s = 0.3 * len(row["text"].split())
        longer = form == "emphasis" and melody == "right"
        assert written["duration_s"] == pytest.approx(neutral_s + longer * 0.3 * 0.25, abs=0.02)
        if form != "emphasis":
            assert ends_as_question(wav) is (form == "question" and melody == "right")
        assert [word for word, _, _ in written["words"]] == spoken_words(row["text"]).split()
        if form == "emphasis":
            index = emphasised_word(row["text"])
            assert written["word_start_s"] == pytest.approx(0.3 * index, abs=0.001)
            assert written["word_end_s"] - written["word_start_s"] == pytest.approx(0.375 if longer else 0.3, abs=0.001)
        else:
            assert written["word_start_s"] is None and written["word_end_s"] is None


def test_a_run_resumes(tmp_path, monkeypatch):
    rows = [*speak.heldout_rows()[:2], *speak.train_rows()[:2]]
    monkeypatch.setattr(speak, "speak_with_times", a_neutral_clip)
    speak.record_all(rows[:3], tmp_path, processes=1)
    monkeypatch.setattr(speak, "speak_with_times", lambda text, speaker: (np.ones(9, np.float32), []))  # fails
    with pytest.raises(ValueError):
        speak.record_all(rows, tmp_path, processes=1)
    monkeypatch.setattr(speak, "speak_with_times", a_neutral_clip)
    speak.record_all(rows, tmp_path, processes=1)
    written = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    neutral = [json.loads(line) for line in (tmp_path / "heldout_neutral" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["id"], row["melody"]) for row in neutral] == [(row["id"], "neutral") for row in rows[:2]]
