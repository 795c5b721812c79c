"""Measurements of clips, and the fractions that a row makes of them."""

import numpy as np
import pytest
from fake_policy import NUM_CODES, FirstWordLostASR
from fake_rollouts import speech_scorer
from fake_token2text import small

from metrics.clip_measures import (
    SynthesizedSpeech,
    add_code_distances,
    add_dnsmos_scores,
    add_speaker_similarities,
    add_token2text_scores,
    measure_clips,
    melody_measures,
    word_measures,
)
from metrics.report import summarize
from metrics.texts import Item
from speech.audio import audio_failure
from speech.dnsmos import MosScores
from speech.pitch import pitch_track
from speech.policy import Sample
from speech.whisper_scorer import MAX_NLL, Score, WhisperScorer
from speech.word_times import Word


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
    assert metrics["real_time_factor"] == 2.0  # two clips of half a second in 2 s
    assert metrics["units_per_second"] == 4


def test_f0_is_of_clips_with_a_voice():
    hum = 0.3 * np.sin(2 * np.pi * 150 * np.arange(16_000) / 16_000).astype(np.float32)
    wavs = [hum, hum[:800], np.zeros(8_000, np.float32)]
    items = [Item(str(i), "red hats", "en") for i in range(3)]
    clips = measure_clips({"asr": FirstWordLostASR()}, items, SynthesizedSpeech([None] * 3, wavs), 0)
    assert [clip["f0_hz"] for clip in clips] == [pytest.approx(150, abs=0.5), None, None]
    row = {"seeds": [0], "compute_s": 2.0, "clips": clips}
    assert summarize(row, row)["f0_hz"] == pytest.approx(150, abs=0.5)


def test_token_to_text_scores_are_of_clips_with_codes():
    model = small(num_codes=NUM_CODES)
    samples = [Sample([1, 2, 3], False), None, Sample([], False)]  # a natural reading has no codes
    clips = [{} for _ in samples]
    add_token2text_scores(model, [Item(str(i), "red hats", "en") for i in range(3)], samples, clips)
    assert clips[0]["token2text"] == pytest.approx(model.log_prob([[1, 2, 3]], ["red hats"], ["en"]).item())
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


# --- Melody -----------------------------------------------------------------------------------------------

LEVEL = [30] * 50  # codes of the humming codec: 100 + 2 · 30 = 160 Hz for 1 s
RISING = [30] * 40 + [40, 50, 55, 60, 60, 60, 60, 60, 60, 60]  # to 220 Hz, 5.5 semitones


def clip_of(codes: list[int]) -> tuple:
    """Waveform and pitch track."""
    [wav] = speech_scorer().codec.decode([codes])
    return wav, pitch_track(wav)


def test_melody_without_word_times():
    rising = melody_measures(Item("1", "Did he?", "English"), *clip_of(RISING))
    assert rising["question"] == 1.0 and rising["statement_rise"] is None and rising["num_pauses"] == 0
    assert rising["final_movement_st"] == pytest.approx(5.5, abs=0.3) and rising["f0_range_st"] > 4
    level = melody_measures(Item("1", "Did he?", "en"), *clip_of(LEVEL))
    assert level["question"] == 0.0 and level["f0_range_st"] == pytest.approx(0, abs=0.1)
    statement = melody_measures(Item("1", "He did.", "en"), *clip_of(RISING))
    assert statement["question"] is None and statement["statement_rise"] == 1.0
    other = melody_measures(Item("1", "Where is he?", "en"), *clip_of(RISING))
    assert other["question"] is None and other["statement_rise"] is None


def test_a_failed_clip_does_not_rise_and_has_no_other_value():
    nothing = np.zeros(0, np.float32)
    measured = melody_measures(Item("1", "Did he?", "en"), nothing, None)
    assert measured.pop("question") == 0.0
    assert set(measured.values()) == {None} and len(measured) == 5
    assert melody_measures(Item("1", "He did.", "en"), nothing, None)["statement_rise"] is None
    score = Score("", 1.0, MAX_NLL, 2, 2, "empty")
    failed = {"words": None, "emphasis": 0.0, "pause_match": None}
    assert word_measures(Item("1", "He *will*, go.", "en"), nothing, None, score) == failed
    assert word_measures(Item("1", "He will go.", "en"), nothing, None, score) == failed | {"emphasis": None}


def test_emphasis_and_pauses_by_word_times():
    """140 Hz, and 200 Hz on the second word, 6.17 semitones above: a score of 0.8. A pause of 0.2 s after it."""
    wav, track = clip_of([20] * 20 + [50] * 20 + [0] * 10 + [20] * 20)
    words = (Word("He", 0.0, 0.4), Word("will,", 0.4, 0.9), Word("go.", 0.9, 1.4))

    def measured(text: str, hyp_text: str = "he will go", timed=words) -> dict:
        score = Score(hyp_text, 0.0, 0.3, 0, 3, words=timed)
        return word_measures(Item("1", text, "en"), wav, track, score)

    right = measured("He *will*, go.")
    assert right == {
        "words": [["He", 0.0, 0.4], ["will,", 0.4, 0.9], ["go.", 0.9, 1.4]], "emphasis": 1.0, "pause_match": 1.0,
    }  # fmt: skip
    assert measured("He *will*, go.", hyp_text="he go")["emphasis"] == 0.0
    assert measured("*He* *will*, go.")["emphasis"] == 0.5  # one of two
    assert measured("*He* will go.")["emphasis"] == 0.0 and measured("*He* will go.")["pause_match"] is None
    # One pause made, two expected: 2 · 1 / (1 + 2)
    assert measured("He, will, go.")["pause_match"] == pytest.approx(2 / 3)
    unknown = {"words": None, "emphasis": None, "pause_match": None}
    assert measured("He *will*, go.", timed=None) == unknown


class TimedASR(FirstWordLostASR, WhisperScorer):
    """A Whisper: told to, it times the words."""


def test_words_are_timed_by_the_first_whisper_only():
    asrs = {"sphinx": FirstWordLostASR(), "base": TimedASR(), "small": TimedASR()}
    asked = []
    for name, asr in asrs.items():
        score = asr.score
        asr.score = lambda *args, name=name, score=score, **options: (
            asked.append((name, options)) or score(*args, **options)
        )
    wav, _ = clip_of(LEVEL)
    [clip] = measure_clips(asrs, [Item("1", "red hats", "en")], SynthesizedSpeech([Sample([1], False)], [wav]), 0)
    assert asked == [("sphinx", {}), ("base", {"word_times": True}), ("small", {})]
    assert clip["words"] == [["red", 0.0, 0.5], ["hats", 0.5, 1.0]] and list(clip["asr"]) == list(asrs)


def test_code_distances_by_hand():
    """Of the first text: [1, 2, 3, 4] and [1, 2, 5] are 2 edits apart, 2/4; [1, 2, 3, 4] and itself 0. So 1/4 for the
    two equal ones, 1/2 for the other. Of the second text only one sample has codes: nothing to compare with."""
    samples = [[Sample(codes, False) for codes in seed] for seed in ([[1, 2, 3, 4], []], [[1, 2, 5], [7]])]
    samples.append([Sample([1, 2, 3, 4], False), Sample([], True)])
    clips = [{} for _ in range(6)]
    add_code_distances(samples, clips)
    assert [clip["code_distance"] for clip in clips] == [0.25, None, 0.5, None, 0.25, None]
