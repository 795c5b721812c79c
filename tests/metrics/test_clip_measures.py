"""Measurements of clips, and the fractions that a row makes of them."""

import numpy as np
import pytest
from fake_policy import NUM_CODES, FirstWordLostASR
from fake_token2text import small

from metrics.clip_measures import (
    SynthesizedSpeech,
    add_dnsmos_scores,
    add_speaker_similarities,
    add_token2text_scores,
    measure_clips,
)
from metrics.report import summarize
from metrics.texts import Item
from speech.audio import audio_failure
from speech.dnsmos import MosScores
from speech.policy import Sample
from speech.whisper_scorer import MAX_NLL


def test_each_failure_is_counted():
    items = [Item(str(i), "red hats", "en") for i in range(4)]
    samples = [Sample([], False), Sample([5] * 40, True), Sample([1, 2, 3], False), Sample([4, 5], False)]
    sound = 0.1 * np.sin(np.arange(8_000) * 0.1).astype(np.float32)
    wavs = [np.zeros(0, np.float32), sound, np.zeros(8_000, np.float32), sound]
    clips = measure_clips({"asr": FirstWordLostASR()}, items, SynthesizedSpeech(samples, wavs), 0)
    row = {"seeds": [0], "compute_s": 2.0, "clips": clips}
    metrics = summarize(row, row)
    assert {name: metrics[name] for name in ("truncated", "empty", "silent", "repetitive")} == {
        "truncated": 0.25, "empty": 0.25, "silent": 0.25, "repetitive": 0.25,
    }  # fmt: skip
    assert metrics["speech_per_compute_s"] == 0.5  # two clips of half a second in 2 s
    assert metrics["units_per_second"] == 4


def test_token_to_text_scores_are_of_clips_with_codes():
    model = small(num_codes=NUM_CODES)
    samples = [Sample([1, 2, 3], False), None, Sample([], False)]  # a natural reading has no codes
    clips = [{} for _ in samples]
    add_token2text_scores(model, [Item(str(i), "red hats", "en") for i in range(3)], samples, clips)
    assert clips[0]["token2text"] == pytest.approx(model.log_prob([[1, 2, 3]], ["red hats"]).item())
    assert clips[1:] == [{}, {"token2text": -MAX_NLL}]


class FirstSampleEncoder:
    """The embedding is the first two samples of the clip; none without."""

    def embed(self, wavs):
        return np.array([wav[:2] if len(wav) else [np.nan, np.nan] for wav in wavs], np.float32)


def test_similarities_are_to_each_clip_s_own_voice_prompt():
    items = [Item(str(i), "red hats", "en", ref_audio=path) for i, path in enumerate(("a", None, "b", "a"))]
    wavs = [np.array(wav, np.float32) for wav in ([1, 0], [1, 0], [0.6, 0.8], [])]
    voices = {"a": np.array([0.6, 0.8]), "b": np.array([0.6, 0.8])}
    clips = [{} for _ in items]
    add_speaker_similarities(FirstSampleEncoder(), voices, items, wavs, clips)
    similarities = [clip["speaker_similarity"] for clip in clips]
    assert similarities == [pytest.approx(0.6), None, pytest.approx(1.0), None]
    add_speaker_similarities(FirstSampleEncoder(), {}, items[1:2], wavs[1:2], clips[:1])
    assert clips[0]["speaker_similarity"] is None


class Opinion:
    def score(self, wavs):
        return [None if audio_failure(wav) else MosScores(3.0, 3.5, 4.0) for wav in wavs]


def test_dnsmos_of_clips():
    clips = [{}, {}]
    add_dnsmos_scores(Opinion(), [np.ones(9, np.float32) * [[-1, 1, 1] * 3][0], np.zeros(0, np.float32)], clips)
    assert clips == [{"dnsmos": {"ovrl": 3.0, "sig": 3.5, "bak": 4.0}}, {"dnsmos": None}]
