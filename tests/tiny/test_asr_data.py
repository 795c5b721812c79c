"""tiny/asr_data.py: which clips it makes of recordings, and their codes, texts and times of words."""

from collections import Counter

import numpy as np
import pytest
import soundfile as sf

from speech.tokens import SAMPLE_RATE
from tiny import asr_data
from tiny.asr_data import FRAC_NOISY, ClipPlan

WORDS = {"Rebecca *lost* it.": ["rebecca", "lost", "it"], "Did Peter lose it?": ["did", "peter", "lose", "it"]}
RARE, COMMON = WORDS


def rows(count: int, texts: tuple[str, ...] = tuple(WORDS)) -> list[dict]:
    """Words of 0.1 s each, one after the other."""
    return [
        {
            "id": f"train_{i}",
            "text": texts[i % len(texts)],
            "speaker": ["joe", "slt"][i // 2 % 2],
            "duration_s": 2.0 if i % 10 else 5.0,
            "words": [[word, 0.1 * n, 0.1 * (n + 1)] for n, word in enumerate(WORDS[texts[i % len(texts)]])],
        }
        for i in range(count)
    ]


def test_every_recording_is_in_one_clip_of_its_voice():
    recordings = rows(2_000)
    clips = asr_data.clips_of(recordings, seed=0)
    assert sorted(row["id"] for clip in clips for row in clip.rows) == sorted(row["id"] for row in recordings)
    assert all(len({row["speaker"] for row in clip.rows}) == 1 for clip in clips)
    lengths = Counter(len(clip.rows) for clip in clips)
    assert lengths.keys() == {1, 2, 3}
    assert 0.7 * asr_data.FRAC_LONG < (lengths[2] + lengths[3]) / len(clips) < 1.1 * asr_data.FRAC_LONG
    assert max(asr_data.seconds(clip.rows) for clip in clips) <= asr_data.MAX_SECONDS
    assert sum(clip.snr_db is not None for clip in clips) / len(clips) == pytest.approx(FRAC_NOISY, abs=0.04)
    assert clips == asr_data.clips_of(recordings, seed=0) != asr_data.clips_of(recordings, seed=1)


def test_rare_names_become_rare():
    few = asr_data.with_few_rare_names(rows(4_000), seed=0)
    by_text = Counter(row["text"] for row in few)
    assert by_text[COMMON] == 2_000 and by_text[RARE] == pytest.approx(2_000 * asr_data.FRAC_RARE, abs=25)


def test_texts_have_no_marks_and_keywords_are_the_rare_names():
    clip = ClipPlan(tuple(rows(2)), None)
    assert clip.text == "Rebecca lost it. Did Peter lose it?" and clip.keywords == ["Rebecca"]
    assert ClipPlan((), None).text == "" and ClipPlan((), 20.0).keywords == []


@pytest.fixture
def folder(tmp_path):
    for i, level in enumerate((0.1, 0.2)):
        wav = level * np.sin(np.arange(4_000) / 5)  # 0.25 s
        sf.write(tmp_path / f"train_{i}.flac", wav.astype(np.float32), SAMPLE_RATE)
    return tmp_path


def test_joined_recordings_keep_the_times_of_their_words(folder):
    first, second = rows(2)
    wav, words = asr_data.mix_clip(ClipPlan((first, second), None), folder, np.random.default_rng(0))
    assert len(wav) == 4_000 + 3_200 + 4_000  # 0.2 s of pause
    assert np.abs(wav[4_000:7_200]).max() == 0 and np.abs(wav[7_200:]).max() == pytest.approx(0.2, abs=1e-3)
    assert [word for word, _, _ in words] == "rebecca lost it did peter lose it".split()
    assert words[3] == ("did", pytest.approx(0.45), pytest.approx(0.55))


def test_noise_has_the_level_that_is_asked_for(folder):
    (row,) = rows(1)
    clean, _ = asr_data.mix_clip(ClipPlan((row,), None), folder, np.random.default_rng(0))
    noisy, _ = asr_data.mix_clip(ClipPlan((row,), 20.0), folder, np.random.default_rng(0))
    assert 20 * np.log10(clean.std() / (noisy - clean).std()) == pytest.approx(20, abs=0.1)


def test_clips_without_speech_are_silent_or_noisy(folder):
    clips = asr_data.clips_without_speech(100, seed=0)
    rng = np.random.default_rng(0)
    levels = [np.abs(asr_data.mix_clip(clip, folder, rng)[0]).max() for clip in clips]
    assert all(clip.rows == () and clip.text == "" for clip in clips)
    assert [level > 0 for level in levels] == [clip.snr_db is not None for clip in clips]


def test_rows_have_the_columns_of_a_data_set(folder):
    class CountingCodec:
        def encode(self, wavs):
            return [[0] * (len(wav) // 320) for wav in wavs]

    clips = [ClipPlan(tuple(rows(2)), None), ClipPlan((), None)]
    made, words = asr_data.rows_of("pool", clips, folder, CountingCodec(), seed=0, chunk=1)
    assert made["id"] == ["pool_00000", "pool_00001"] and made["text"] == [clips[0].text, ""]
    assert made["keywords"] == [["Rebecca"], []] and made["speaker"] == ["joe", None]
    assert made["duration_s"][0] == len(made["audio_codes"][0]) / 50 == 0.7
    assert len(words["pool_00000"]) == 7 and words["pool_00001"] == []
