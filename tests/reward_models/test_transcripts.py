"""One batch of ASR completions for all rewards: what is decoded, logged and kept."""

import math

import pytest
from fake_rollouts import call, transcript_scorer

from reward_models.asr_rules import AsrRulesReward
from reward_models.transcripts import TranscriptScorer
from speech.policy import load_tokenizer


@pytest.fixture
def scorer():
    return transcript_scorer()


def test_a_batch_is_decoded_and_logged_once(scorer):
    batch, texts, logged = [scorer.tokenizer.ids("good morning")], ["good morning"], []
    for reward in (AsrRulesReward(scorer), AsrRulesReward(scorer, weight_exact=1)):
        reward(completion_ids=batch, text=texts, log_metric=lambda name, value: logged.append(name))
    assert scorer.tokenizer.decoded == 1 and len(logged) == len(set(logged))
    AsrRulesReward(scorer)(completion_ids=list(batch), text=texts)  # the next batch, though equal, is another one
    assert scorer.tokenizer.decoded == 2


def test_only_what_comes_before_end_counts(scorer):
    assert call(AsrRulesReward(scorer), [scorer.tokenizer.ids("yes") + [5, 6]], text=["yes"]) == [1.0]


def test_texts_of_a_real_tokenizer_come_back_as_they_are():
    """Control tokens included: a policy's stray ones are part of its transcript."""
    tokenizer, _ = load_tokenizer("tiny/llasa")
    end_id = tokenizer.convert_tokens_to_ids("<|TEXT_GENERATION_END|>")
    scorer = TranscriptScorer(tokenizer, end_id)
    text = "Anna found two boxes."
    batch = [[*tokenizer.encode(text, add_special_tokens=False), end_id]]
    assert call(AsrRulesReward(scorer), batch, text=[text]) == [1.0]
    assert scorer.transcripts.hyp_texts == [text]
    control = tokenizer.convert_tokens_to_ids("<|SPEECH_UNDERSTANDING_END|>")
    scorer.score([[control, end_id]], [text])
    assert scorer.transcripts.hyp_texts == ["<|SPEECH_UNDERSTANDING_END|>"]


def test_metrics_of_a_batch_without_speech(scorer):
    metrics = scorer.score([scorer.tokenizer.ids(""), scorer.tokenizer.ids("you")], ["", ""]).metrics()
    assert math.isnan(metrics["wer"]) and math.isnan(metrics["insertions"])
    assert metrics["frac_non_speech"] == metrics["frac_hallucination"] == metrics["frac_exact"] == 0.5


def test_last_samples(scorer):
    assert scorer.last_samples(2) == []
    ids = scorer.tokenizer.ids
    scorer.score([ids("good night"), ids("good", truncated=True)], ["good morning", "good morning"])
    record = {"rollout": 0, "text": "good morning", "transcript": "good night", "wer": 0.5, "failure": None}
    assert scorer.last_samples(1) == [(record, None)]
    assert [sample["failure"] for sample, _ in scorer.last_samples(9)] == [None, "truncated"]
