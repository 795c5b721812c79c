"""The token-to-text model: soft codes score as codes, batches as single items, and the quality of the shipped one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_rollouts import TOKENS, call, ids
from fake_token2text import small

from common.cli import InputError
from reward_models.rollouts import SpeechRolloutScorer
from reward_models.token2text import Token2Text, Token2TextReward
from speech.audio import load_audio
from speech.codec import SpeechCodec
from speech.error_rate import error_rate, sum_errors
from speech.whisper_scorer import MAX_NLL
from train_token2text import with_noise

CODES = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10], [11] * 12]
TEXTS = ["Anna found two boxes.", "Peter, bought!", "…zwölf Bücher"]
LANGUAGES = ["en"] * 3


@pytest.fixture(scope="module")
def model() -> Token2Text:
    return small({"speaker": ["rms", "slt"]})


def test_one_hot_rows_score_as_codes(model):
    codes, mask = model.pad(CODES)
    one_hot = torch.nn.functional.one_hot(codes, 64).float()
    text_ids = model.text_ids(TEXTS, LANGUAGES)
    log_probs = model.text_log_probs(*model.encode(model.embed(one_hot), mask), text_ids)
    torch.testing.assert_close(log_probs, model.log_prob(CODES, TEXTS, LANGUAGES))


def test_soft_codes_have_gradients(model):
    codes, mask = model.pad(CODES)
    soft = (torch.nn.functional.one_hot(codes, 64).float() * 5).softmax(-1).requires_grad_()
    states = model.encode(model.embed(soft), mask)
    model.text_log_probs(*states, model.text_ids(TEXTS, LANGUAGES)).sum().backward()
    assert (soft.grad[mask].abs().sum(-1) > 0).all()
    assert (soft.grad[~mask] == 0).all()


def test_a_batch_scores_as_each_item_alone(model):
    """3, 7 and 12 codes: padding must not be seen, not even at odd lengths."""
    together = model.log_prob(CODES, TEXTS, LANGUAGES)
    alone = torch.cat([model.log_prob([codes], [text], ["en"]) for codes, text in zip(CODES, TEXTS, strict=True)])
    torch.testing.assert_close(together, alone)
    assert model.transcribe(CODES) == [model.transcribe([codes])[0] for codes in CODES]
    assert model.labels(CODES)["speaker"] == [model.labels([codes])["speaker"][0] for codes in CODES]


def test_log_prob_is_the_mean_over_tokens_and_end(model):
    text_ids = model.text_ids(["anna found"], ["en"])
    assert text_ids[0, -1] == 1 and (text_ids != -100).all()
    codes, mask = model.pad(CODES[:1])
    logits = model.text_logits(*model.encode(model.embed(codes), mask), text_ids)
    by_hand = logits.log_softmax(-1)[0, torch.arange(text_ids.shape[1]), text_ids[0]].mean()
    torch.testing.assert_close(model.log_prob(CODES[:1], ["Anna found,"], ["en"])[0], by_hand)


def test_text_is_normalised_as_for_the_error_rate(model):
    assert torch.equal(
        model.text_ids(["Anna found two boxes!"], ["en"]), model.text_ids(["anna found 2 boxes"], ["en"])
    )
    # Any text can be encoded, and comes back
    encoded = model.text_ids(["Zwölf 本"], ["de"])[0, :-1].tolist()
    assert model.tokenizer.decode(encoded).strip() == "zwölf 本"


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Token2Text.from_pretrained(tmp_path)
    reloaded, before = (one.log_prob(CODES, TEXTS, LANGUAGES) for one in (loaded, model))
    torch.testing.assert_close(reloaded, before, atol=5e-3, rtol=0)
    assert model.embedding.weight.dtype == loaded.embedding.weight.dtype == torch.float32
    assert not any(weights.requires_grad for weights in loaded.parameters())


def test_bad_input(model, tmp_path):
    with pytest.raises(ValueError, match="item 1 has no codes"):
        model.log_prob([[1], []], ["a", "b"], ["en"] * 2)
    for match, call_it in (
        ("another codec", lambda: model.log_prob([[64]], ["a"], ["en"])),
        ("empty after Whisper's normalisation", lambda: model.log_prob([[1]], ["…"], ["en"])),
        ("no head for 'emotion'; it has: speaker", lambda: model.label_ids("emotion", ["sad"])),
        ("'kal' was not among the labels", lambda: model.label_ids("speaker", ["kal"])),
        ("lacks config.json, tokenizer.json", lambda: Token2Text.from_pretrained(tmp_path)),
        ("has 64 codes and the policy has 4096", lambda: model.check_codebook(4096)),
    ):
        with pytest.raises(InputError, match=match):
            call_it()


def test_reward_needs_neither_codec_nor_whisper(model):
    scorer = SpeechRolloutScorer(TOKENS, None, None, group_size=2, token2text=model)
    metrics = {}
    batch = [ids([1, 2, 3]), ids([]), ids([1, 2, 3], truncated=True), ids([4] * 50)]
    rewards = call(Token2TextReward(scorer), batch, metrics)
    log_probs = model.score([[1, 2, 3], [], [1, 2, 3], [4] * 50], ["hello"] * 4, ["en"] * 4)
    assert log_probs[1] == -MAX_NLL
    assert rewards == pytest.approx([np.exp(log_probs[0] / 3), 0, 0, np.exp(log_probs[3] / 3)])
    assert metrics["text_log_prob"] == pytest.approx(np.mean(log_probs))
    assert metrics["frac_empty"] == metrics["frac_truncated"] == metrics["frac_repetitive"] == 0.25
    assert not metrics.keys() & {"wer", "nll", "log_f0_std", "frac_silent"}
    with pytest.raises(InputError, match="alpha: must be finite and > 0"):
        Token2TextReward(scorer, alpha=0)


def test_a_hopeless_clip_scores_as_none(model, monkeypatch):
    monkeypatch.setattr(model, "log_prob", lambda codes, *_: torch.tensor([-1e3, -19.5]))
    assert model.score([[1, 2, 3], [4, 5]], ["hello"] * 2, ["en"] * 2) == [-19.5, -MAX_NLL]  # from short to long


# --- The shipped model -------------------------------------------------------------------------------------------

ROWS = [json.loads(line) for line in Path("tiny/heldout/metadata.jsonl").read_text().splitlines()[:60]]
REF_TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(scope="module")
def shipped() -> Token2Text:
    return Token2Text.from_pretrained("tiny/token2text")


@pytest.fixture(scope="module")
def natural() -> list[list[int]]:
    return SpeechCodec.from_pretrained("tiny/codec").encode(
        [load_audio(f"tiny/heldout/{r['file_name']}") for r in ROWS]
    )


def test_shipped_transcribes_held_out_recordings(shipped, natural):
    hyps = shipped.transcribe(natural)
    assert sum_errors([error_rate(*pair, "en") for pair in zip(REF_TEXTS, hyps, strict=True)]).rate <= 0.08
    speakers = shipped.labels(natural)["speaker"]
    assert np.mean([guess == row["speaker"] for guess, row in zip(speakers, ROWS, strict=True)]) >= 0.95


def test_shipped_prefers_the_right_text_and_whole_speech(shipped, natural):
    def mean_score(codes: list[list[int]], texts: list[str]) -> float:
        return np.mean(shipped.score(codes, texts, ["en"] * len(texts)))

    right = mean_score(natural, REF_TEXTS)
    assert right > mean_score(natural, REF_TEXTS[1:] + REF_TEXTS[:1]) + 1
    assert right > mean_score([codes[: len(codes) // 2] for codes in natural], REF_TEXTS) + 0.5
    rng = np.random.default_rng(0)
    noisy = with_noise(natural, 0.5, 4096, rng)
    # Trained with noise it tolerates much of it: −0.26 with every other code random.
    assert right > mean_score(noisy, REF_TEXTS) + 0.1


def test_shipped_is_small():
    assert sum(path.stat().st_size for path in Path("tiny/token2text").iterdir()) <= 6e6
