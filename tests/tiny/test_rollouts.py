"""tiny/rollouts.py: samples of a policy with a teacher's transcripts, resumed; which are to be trusted."""

import pickle

import pytest

from speech.codec import SpeechCodec
from speech.policy import Policy
from speech.whisper_scorer import WhisperScorer
from tiny import rollouts
from tiny.rollouts import Rollout, sample_rollouts, transcript

TEXTS = ["Nancy took the lamp.", "Did *Peter* find three boats?", "My cousin left.", "Oliver lost it.", "Tom sang."]


def test_rollouts_resume_with_the_same_samples(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rollouts, "BATCH", 2)
    monkeypatch.setattr(rollouts, "MAX_LENGTH", 110)
    caplog.set_level("INFO", logger=rollouts.__name__)
    policy = Policy.from_pretrained("tiny/llasa", "cpu")
    codec = SpeechCodec.from_pretrained("tiny/codec", "cpu")
    teacher = WhisperScorer("tiny/whisper.pt", "cpu")
    sample = Policy.sample
    temperatures = []

    def sample_and_note(self, prompts, **options):
        temperatures.append(options["temperature"])
        return sample(self, prompts, **options)

    monkeypatch.setattr(Policy, "sample", sample_and_note)
    file = tmp_path / "rollouts.pkl"
    whole = sample_rollouts(TEXTS, policy, codec, teacher, seed=3, file=file)
    assert [rollout.text for rollout in whole] == [text.replace("*", "") for text in TEXTS]
    assert all(rollout.codes for rollout in whole) and temperatures == [0.8, 1.0, 1.0]
    assert "rollouts: 5 of 5, temperature 1, WER" in caplog.text
    file.write_bytes(pickle.dumps(whole[:2]))  # as after a run killed in its second batch
    assert sample_rollouts(TEXTS, policy, codec, teacher, seed=3, file=file) == whole
    assert pickle.loads(file.read_bytes()) == whole and temperatures == [0.8, 1.0, 1.0, 1.0, 1.0]
    assert sample_rollouts(TEXTS, policy, codec, teacher, seed=3, file=file) == whole and len(temperatures) == 5


@pytest.mark.parametrize(
    "heard, expected",
    [
        ("helen broke 7 lambs.", "Helen broke seven lambs."),
        ("Helen broke 500 lamps.", "Helen broke 500 lamps."),
        ("", ""),
        ("Helen broke seven lamps. Helen broke seven lamps.", None),
    ],
)
def test_transcripts_have_the_texts_spelling_and_no_loops(heard, expected):
    assert transcript(Rollout("Helen broke seven lamps.", [1], heard)) == expected


def test_a_rollout_without_codes_is_left_out():
    assert transcript(Rollout("Helen left.", [], "Helen left.")) is None
