"""The token-to-text model: soft codes read as codes are, batches as single items, and what the shipped one is worth."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from test_reward_models import TOKENS, call, ids

import train_token2text
from reward_models.rollouts import SpeechRolloutScorer
from reward_models.token2text import Token2Text, Token2TextReward, new_text_tokenizer
from speech.audio import load_audio
from speech.codec import SpeechCodec
from speech.error_rate import corpus_error_rate
from speech.whisper_scorer import MAX_NLL

CODES = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10], [11] * 12]
TEXTS = ["Anna found two boxes.", "Peter, bought!", "…zwölf Bücher"]


def small(labels=None, seed: int = 0, num_codes: int = 64) -> Token2Text:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 1}
    config = {"num_codes": num_codes, "labels": labels or {}, "t5": shape}
    torch.manual_seed(seed)
    return Token2Text(config, new_text_tokenizer(["anna found 2 boxes", "peter bought"], 270)).eval()


@pytest.fixture(scope="module")
def model() -> Token2Text:
    return small({"speaker": ["rms", "slt"]})


def test_one_hot_rows_are_read_as_codes(model):
    codes, mask = model.pad(CODES)
    one_hot = torch.nn.functional.one_hot(codes, 64).float()
    torch.testing.assert_close(model.log_prob(one_hot, TEXTS, mask=mask), model.log_prob(CODES, TEXTS))


def test_soft_codes_have_gradients(model):
    codes, mask = model.pad(CODES)
    soft = (torch.nn.functional.one_hot(codes, 64).float() * 5).softmax(-1).requires_grad_()
    model.log_prob(soft, TEXTS, mask=mask).sum().backward()
    assert (soft.grad[mask].abs().sum(-1) > 0).all()
    assert (soft.grad[~mask] == 0).all()


def test_a_batch_is_read_as_each_item_alone(model):
    """3, 7 and 12 codes: odd lengths too must not see the padding."""
    together = model.log_prob(CODES, TEXTS)
    alone = torch.cat([model.log_prob([codes], [text]) for codes, text in zip(CODES, TEXTS, strict=True)])
    torch.testing.assert_close(together, alone)
    assert model.transcribe(CODES) == [model.transcribe([codes])[0] for codes in CODES]
    assert model.labels(CODES)["speaker"] == [model.labels([codes])["speaker"][0] for codes in CODES]


def test_log_prob_is_the_mean_over_tokens_and_end(model):
    text_ids = model.text_ids(["anna found"], ["en"])
    assert text_ids[0, -1] == 1 and (text_ids != -100).all()
    codes, mask = model.pad(CODES[:1])
    logits = model.text_logits(*model.encode(model.embed(codes), mask), text_ids)
    by_hand = logits.log_softmax(-1)[0, torch.arange(text_ids.shape[1]), text_ids[0]].mean()
    torch.testing.assert_close(model.log_prob(CODES[:1], ["Anna found,"])[0], by_hand)


def test_text_is_normalised_as_for_the_error_rate(model):
    assert torch.equal(
        model.text_ids(["Anna found two boxes!"], ["en"]), model.text_ids(["anna found 2 boxes"], ["en"])
    )
    # Whatever is written can be scored, and comes back
    written = model.text_ids(["Zwölf 本"], ["de"])[0, :-1].tolist()
    assert model.tokenizer.decode(written).strip() == "zwölf 本"


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = Token2Text.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.log_prob(CODES, TEXTS), model.log_prob(CODES, TEXTS), atol=5e-3, rtol=0)
    assert model.embedding.weight.dtype == loaded.embedding.weight.dtype == torch.float32
    assert not any(weights.requires_grad for weights in loaded.parameters())


def test_bad_input(model, tmp_path):
    with pytest.raises(ValueError, match="item 1 has no codes"):
        model.log_prob([[1], []], ["a", "b"])
    with pytest.raises(ValueError, match="another codec"):
        model.log_prob([[64]], ["a"])
    with pytest.raises(ValueError, match="empty after Whisper's normalisation"):
        model.log_prob([[1]], ["…"])
    with pytest.raises(ValueError, match="no head for 'emotion'; it has: speaker"):
        model.label_ids("emotion", ["sad"])
    with pytest.raises(ValueError, match="'kal' was not among the labels"):
        model.label_ids("speaker", ["kal"])
    with pytest.raises(ValueError, match="lacks config.json, tokenizer.json"):
        Token2Text.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads 64 codes and the policy speaks 4096"):
        model.check_codebook(4096)


def test_reward_needs_neither_codec_nor_whisper(model):
    listener = SpeechRolloutScorer(TOKENS, None, None, group_size=2, token2text=model)
    metrics = {}
    batch = [ids([1, 2, 3]), ids([]), ids([1, 2, 3], ended=False), ids([4] * 50)]
    rewards = call(Token2TextReward(listener), batch, metrics)
    log_probs = model.score([[1, 2, 3], [], [1, 2, 3], [4] * 50], ["hello"] * 4)
    assert log_probs[1] == -MAX_NLL
    assert rewards == pytest.approx([np.exp(log_probs[0] / 3), 0, 0, np.exp(log_probs[3] / 3)])
    assert metrics["text_log_prob"] == pytest.approx(np.mean(log_probs))
    assert metrics["frac_empty"] == metrics["frac_truncated"] == metrics["frac_repetitive"] == 0.25
    assert not metrics.keys() & {"wer", "nll", "log_f0_std", "frac_silent"}
    with pytest.raises(ValueError, match="alpha"):
        Token2TextReward(listener, alpha=0)


# --- Training ---------------------------------------------------------------------------------------------

WORDS = {word: 2 + 8 * i for i, word in enumerate("anna peter apples horses hats birds books shoes".split())}


def spell(text: str) -> list[int]:
    return [WORDS[word] + i for word in text.split() for i in range(6)]


@pytest.fixture(scope="module")
def spelled(tmp_path_factory) -> Path:
    """All sentences of three words, a word being six codes of its own."""
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    rows = [{"text": text, "audio_codes": spell(text), "speaker": text.split()[0]} for text in texts]
    path = tmp_path_factory.mktemp("spelled") / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


SMALL = (
    "--num_codes 64 --vocab_size 300 --hidden_size 64 --num_heads 4 --encoder_layers 1 --decoder_layers 1 --dropout 0"
)


def test_training_learns_words_in_new_sentences(spelled, tmp_path):
    flags = f"--dataset {spelled} --labels speaker --output_dir {tmp_path} {SMALL} --dropout 0"
    flags += " --heldout_share 0.2 --steps 300 --batch_size 16 --learning_rate 3e-3 --code_noise 0.1"
    train_token2text.main(train_token2text.parse_args(flags.split()))
    found = json.loads((tmp_path / "run.json").read_text())["heldout"]
    assert found["wer"] <= 0.5  # a guess is wrong in seven words of eight
    assert found["accuracy_speaker"] >= 0.95
    assert found["log_prob"] > found["log_prob_wrong_text"] + 1


def test_resumed_is_uninterrupted(spelled, tmp_path, monkeypatch, caplog):
    """Stopped in the second epoch, between two lines of the log."""
    flags = f"--dataset {spelled} --labels speaker {SMALL} --dropout 0.1 --steps 12 --save_steps 5 --batch_size 64"
    flags += " --logging_steps 6 --output_dir"

    def run(folder, *more):
        train_token2text.main(train_token2text.parse_args([*flags.split(), str(tmp_path / folder), *more]))

    run("whole")
    original = train_token2text.losses

    def stopped(*args):
        if (tmp_path / "parts" / train_token2text.CHECKPOINT).exists() and len(calls) == 11:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args)

    calls = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_token2text, "losses", stopped)
        run("parts")
    for more, message in (
        ([], "was stopped"),
        (["--resume_from_checkpoint", "true", "--seed", "3"], "--seed 0 before"),
    ):
        with pytest.raises(SystemExit):
            run("parts", *more)
        assert message in caplog.text
    run("parts", "--resume_from_checkpoint", "true")
    whole, parts = (Token2Text.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    runs = [json.loads((tmp_path / name / "run.json").read_text())["losses"] for name in ("whole", "parts")]
    assert runs[0] == runs[1]
    assert not (tmp_path / "parts" / train_token2text.CHECKPOINT).exists()


def test_no_text_is_on_both_sides(spelled):
    rows, heldout = train_token2text.split_by_text(datasets.Dataset.from_parquet(str(spelled)), 0.25, seed=0)
    assert len(set(heldout["text"])) == 128 and not set(rows["text"]) & set(heldout["text"])
    assert len(rows) + len(heldout) == 512


def test_batches_hold_every_row_once_an_epoch():
    rng = np.random.default_rng(0)
    epoch = train_token2text.epoch_batches(list(range(25)), 4, rng)
    assert len(epoch) == 7 and sorted(i for batch in epoch for i in batch) == list(range(25))


def test_noise_replaces_the_share_it_should():
    rng = np.random.default_rng(0)
    [noisy] = train_token2text.with_noise([[70] * 10_000], 0.3, 64, rng)
    assert np.mean(np.asarray(noisy) != 70) == pytest.approx(0.3, abs=0.02)
    assert train_token2text.with_noise(CODES, 0.0, 64, rng) == CODES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--labels emotion", "no column 'emotion'"),
        ("--num_codes 60", "come from another codec"),
        ("--hidden_size 30", "must be a multiple of --num_heads 8"),
        ("--code_noise 1.5", "--code_noise 1.5: give a share"),
        ("--heldout_share 0", "--heldout_share 0.0"),
        ("--steps 0", "--steps 0"),
        ("--device quantum", "--device quantum"),
    ],
)
def test_bad_flags_exit_2(spelled, tmp_path, caplog, flags, message):
    argv = ["--dataset", str(spelled), "--output_dir", str(tmp_path), *flags.split()]
    with pytest.raises(SystemExit) as stop:
        train_token2text.main(train_token2text.parse_args(argv))
    assert stop.value.code == 2
    assert message in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "anna", "audio_codes": []}, "row 0: no audio_codes"),
        ({"text": "…", "audio_codes": [1]}, "no row has a text with a word"),
        ({"text": "anna", "audio_codes": [1], "language": "klingon"}, "unknown language 'klingon'"),
        ({"text": "anna"}, "no column 'audio_codes'"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        train_token2text.open_rows(str(path), "train", [])


def test_help_exits_0():
    with pytest.raises(SystemExit) as stop:
        train_token2text.parse_args(["--help"])
    assert stop.value.code == 0


# --- What ships -------------------------------------------------------------------------------------------

ROWS = [json.loads(line) for line in Path("tiny/heldout/metadata.jsonl").read_text().splitlines()]
SPOKEN = [row["text"] for row in ROWS]


@pytest.fixture(scope="module")
def shipped() -> Token2Text:
    return Token2Text.from_pretrained("tiny/token2text")


@pytest.fixture(scope="module")
def natural() -> list[list[int]]:
    return SpeechCodec.from_pretrained("tiny/codec").encode(
        [load_audio(f"tiny/heldout/{r['file_name']}") for r in ROWS]
    )


def test_shipped_hears_recordings_that_nobody_trained_on(shipped, natural):
    hyps = shipped.transcribe(natural)
    assert corpus_error_rate(SPOKEN, hyps, "en").rate <= 0.08
    speakers = shipped.labels(natural)["speaker"]
    assert np.mean([guess == row["speaker"] for guess, row in zip(speakers, ROWS, strict=True)]) >= 0.95


def test_shipped_prefers_the_right_text_and_whole_speech(shipped, natural):
    right = np.mean(shipped.score(natural, SPOKEN))
    assert right > np.mean(shipped.score(natural, SPOKEN[1:] + SPOKEN[:1])) + 1
    assert right > np.mean(shipped.score([codes[: len(codes) // 2] for codes in natural], SPOKEN)) + 0.5
    rng = np.random.default_rng(0)
    noisy = train_token2text.with_noise(natural, 0.5, 4096, rng)
    # Trained under noise it forgives much of it: −0.26 with every other code random.
    assert right > np.mean(shipped.score(noisy, SPOKEN)) + 0.1


def test_shipped_is_small():
    assert sum(path.stat().st_size for path in Path("tiny/token2text").iterdir()) <= 6e6
