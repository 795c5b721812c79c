"""The quality that the toy setup's models promise, on held-out texts and recordings."""

import json
from pathlib import Path

import datasets
import numpy as np
import parselmouth
import pytest
from transformers import set_seed

from speech.audio import load_audio
from speech.codec import SpeechCodec, decode_rollouts
from speech.error_rate import error_rate, sum_errors
from speech.policy import Policy
from speech.text_marks import plain_text
from speech.tokens import SAMPLE_RATE, asr_prompt, tts_prompt
from speech.whisper_scorer import WhisperScorer
from tiny.build import ROLLOUT_TEXTS
from tiny.corpus import sentences
from tiny.judge_melody import ends_as_question
from tiny.speak import train_rows

TINY = Path("tiny")
ROWS = [json.loads(line) for line in (TINY / "heldout" / "metadata.jsonl").read_text().splitlines()]
SOME = ROWS[:24]


@pytest.fixture(scope="module")
def codec() -> SpeechCodec:
    return SpeechCodec.from_pretrained(str(TINY / "codec"))


@pytest.fixture(scope="module")
def whisper() -> WhisperScorer:
    return WhisperScorer(TINY / "whisper.pt")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.from_pretrained(str(TINY / "llasa"))


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    return [load_audio(TINY / "heldout" / row["file_name"]) for row in ROWS]


@pytest.fixture(scope="module")
def codes(codec, recordings) -> list[list[int]]:
    return codec.encode(recordings)


def wer(asr, wavs: list[np.ndarray], rows: list[dict]) -> float:
    texts = [plain_text(row["text"]) for row in rows]
    scores = asr.score(wavs, texts, ["en"] * len(texts))
    return sum_errors([error_rate(text, score.hyp_text, "en") for text, score in zip(texts, scores, strict=True)]).rate


def median_f0(wavs: list[np.ndarray]) -> float:
    f0 = [parselmouth.Sound(w.astype(float), SAMPLE_RATE).to_pitch().selected_array["frequency"] for w in wavs]
    return float(np.median(np.concatenate([values[values > 0] for values in f0])))


def test_heldout_texts_are_in_no_training_data():
    trained = {row["text"] for row in train_rows()}
    rl = {json.loads(line)["text"] for line in (TINY / "texts" / "train.jsonl").read_text().splitlines()}
    heldout = (TINY / "texts" / "heldout.txt").read_text().splitlines()
    assert heldout == [row["text"] for row in ROWS] and len(set(heldout)) == 120
    assert not set(heldout) & (trained | rl) and not rl & trained
    assert not set(sentences(0)[ROLLOUT_TEXTS]) & (set(heldout) | trained | rl)


def test_reward_asr_on_natural_and_resynthesized_clips(whisper, codec, recordings, codes):
    assert wer(whisper, recordings, ROWS) <= 0.03
    assert wer(whisper, codec.decode(codes), ROWS) <= 0.03


def test_the_codec_keeps_questions(codec, recordings, codes):
    asked = [i for i, row in enumerate(ROWS) if row["form"] == "question"]
    stated = [i for i, row in enumerate(ROWS) if row["form"] == "statement"]
    assert np.mean([ends_as_question(recordings[i]) for i in asked]) >= 0.9
    resynthesized = codec.decode([codes[i] for i in asked + stated])
    told = [ends_as_question(wav) for wav in resynthesized]
    assert np.mean(told[: len(asked)]) >= 0.75 and np.mean(told[len(asked) :]) <= 0.15


def test_the_start_of_rl_can_be_improved_and_learnt_from(policy, codec, whisper):
    set_seed(0)
    samples = policy.sample([tts_prompt(row["text"]) for row in ROWS], temperature=1.0, max_length=240, batch_size=60)
    assert np.mean([sample.truncated for sample in samples]) < 0.1
    assert 0.05 <= wer(whisper, decode_rollouts(codec, [sample.codes for sample in samples]), ROWS) <= 0.45


def test_a_voice_prompt_selects_the_voice(policy, codec, recordings, codes):
    """The median F0 is that of the prompt's voice; without a prompt it is joe's."""
    heard, recorded = {}, {}
    for speaker in ("joe", "slt", "rms"):
        of = [i for i, row in enumerate(ROWS) if row["speaker"] == speaker][:8]
        set_seed(0)
        prompts = [tts_prompt(SOME[n]["text"], ROWS[i]["text"], codes[i]) for n, i in enumerate(of)]
        samples = policy.sample(prompts, temperature=0.7, max_length=500)
        heard[speaker] = median_f0(decode_rollouts(codec, [sample.codes for sample in samples]))
        recorded[speaker] = median_f0([recordings[i] for i in of])
    assert recorded["slt"] > 1.3 * recorded["rms"]
    for speaker in heard:
        assert heard[speaker] == pytest.approx(recorded[speaker], rel=0.15)
    set_seed(0)
    samples = policy.sample([tts_prompt(row["text"]) for row in SOME[:8]], temperature=0.7, max_length=240)
    alone = median_f0(decode_rollouts(codec, [sample.codes for sample in samples]))
    assert alone == pytest.approx(recorded["joe"], rel=0.15)


def test_asr_knows_common_words_leaves_noise_alone_and_recalls_some_rare_names():
    """What R1, R2 and R3 start from: errors, hallucinations and keywords, each now and then."""
    clips = datasets.Dataset.from_parquet(str(TINY / "asr" / "heldout.parquet"))
    clips = clips.filter(lambda row: not row["text"] or row["keywords"] or row["duration_s"] > 4.5)
    policy = Policy.from_pretrained(str(TINY / "llasa_asr"), task="asr")
    prompts = [asr_prompt(codes) for codes in clips["audio_codes"]]
    transcripts = [t.text for t in policy.transcribe(prompts, temperature=0, max_completion_length=40)]
    rows = list(zip(clips["text"], clips["keywords"], transcripts, strict=True))
    errors = sum_errors([error_rate(text, heard, "en") for text, _, heard in rows if text])
    assert 0.1 < errors.rate < 0.3  # long clips, and rare names; of all clips 0.09
    assert not any(heard for text, _, heard in rows if not text)
    recalled = [name in heard for _, names, heard in rows for name in names]
    assert len(recalled) >= 40 and 0.2 <= np.mean(recalled) <= 0.8


def test_the_rows_of_supervised_training_are_of_this_codec(codec, whisper):
    rows = datasets.Dataset.from_parquet("tiny/speech.parquet").select(range(24))
    assert wer(whisper, codec.decode(rows["audio_codes"][:]), list(rows)) <= 0.03


def test_the_toy_setup_is_small():
    files = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
