"""train_token2text.py: it learns, it resumes exactly, and bad input is refused."""

import json
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch

import train_token2text
from common.cli import InputError
from reward_models.token2text import Token2Text
from training.loop import epoch_batches

WORDS = {word: 2 + 8 * i for i, word in enumerate("anna peter apples horses hats birds books shoes".split())}


def spell(text: str) -> list[int]:
    return [WORDS[word] + i for word in text.split() for i in range(6)]


@pytest.fixture(scope="module")
def spelled(tmp_path_factory) -> Path:
    """All sentences of three words; each word has six codes that no other word has."""
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
    flags += " --heldout_frac 0.2 --steps 300 --batch_size 16 --learning_rate 3e-3 --code_noise 0.1"
    train_token2text.main(train_token2text.parse_args(flags.split()))
    metrics = json.loads((tmp_path / "run.json").read_text())["heldout"]
    assert metrics["wer"] <= 0.5  # a guess is wrong in seven words of eight
    assert metrics["accuracy_speaker"] >= 0.95
    assert metrics["log_prob"] > metrics["log_prob_mismatched_text"] + 1
    assert metrics.keys() == {"wer", "wer_noisy", "log_prob", "log_prob_mismatched_text", "accuracy_speaker"}


def test_codes_of_neighbouring_levels_start_as_neighbours():
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(4**5, 32)
    train_token2text.start_from_levels(embedding)
    weights = embedding.weight.detach()
    assert weights.std() == pytest.approx(1, abs=0.2)
    code = 2 + 1 * 4 + 3 * 16  # its levels are 2, 1, 3, 0, 0
    one_step, two_steps = (weights[code + 4 * steps] - weights[code] for steps in (1, 2))
    others = (weights - weights[code]).norm(dim=1)
    assert one_step.norm() < others.quantile(0.1) and one_step.norm() < two_steps.norm()


def test_a_codebook_of_another_size_keeps_its_random_embeddings():
    embedding = torch.nn.Embedding(100, 8)
    before = embedding.weight.detach().clone()
    train_token2text.start_from_levels(embedding)
    assert torch.equal(embedding.weight, before)


def test_resumed_is_uninterrupted(spelled, tmp_path, monkeypatch, caplog):
    """Interrupted in the second epoch, between two lines of the log."""
    flags = f"--dataset {spelled} --labels speaker {SMALL} --dropout 0.1 --steps 12 --save_steps 5 --batch_size 64"
    flags += " --logging_steps 6 --output_dir"

    def run(folder, *more):
        train_token2text.main(train_token2text.parse_args([*flags.split(), str(tmp_path / folder), *more]))

    run("whole")
    original = train_token2text.losses

    def interrupted(*args):
        if (tmp_path / "parts" / train_token2text.CHECKPOINT).exists() and len(calls) == 11:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args)

    calls = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_token2text, "losses", interrupted)
        run("parts")
    for more, message in (
        ([], "checkpoint of an interrupted run"),
        (["--resume_from_checkpoint", "true", "--seed", "3"], "--seed 0 before"),
    ):
        with pytest.raises(SystemExit):
            run("parts", *more)
        assert message in caplog.text
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # saved, not yet recorded
        patch.setattr(train_token2text, "write_run", Mock(side_effect=KeyboardInterrupt))
        run("parts", "--resume_from_checkpoint", "true", "--debug")
    run("parts", "--resume_from_checkpoint", "true", "--debug")
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
    epoch = epoch_batches(list(range(25)), 4, rng)
    assert len(epoch) == 7 and sorted(i for batch in epoch for i in batch) == list(range(25))


def test_noise_replaces_its_fraction_of_the_codes():
    rng = np.random.default_rng(0)
    [noisy] = train_token2text.with_noise([[70] * 10_000], 0.3, 64, rng)
    assert np.mean(np.asarray(noisy) != 70) == pytest.approx(0.3, abs=0.02)
    codes = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10], [11] * 12]
    assert train_token2text.with_noise(codes, 0.0, 64, rng) == codes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--labels emotion", "no column 'emotion'"),
        ("--num_codes 60", "audio_codes must be a list of whole numbers from 0 to 59"),
        ("--hidden_size 30", "must be a multiple of --num_heads 8"),
        ("--code_noise 1.5", "--code_noise: must be in [0, 1) (got 1.5)"),
        ("--label_weight -1", "--label_weight: must be in [0, inf) (got -1.0)"),
        ("--ctc_weight nan", "--ctc_weight: must be in [0, inf) (got nan)"),
        ("--learning_rate 0", "--learning_rate: must be in (0, inf) (got 0.0)"),
        ("--heldout_frac 0", "--heldout_frac: must be in (0, 1)"),
        ("--heldout_frac 0.9999", "leave texts to train on (got 0.9999 of 512 distinct texts)"),
        ("--heldout_dataset {dataset}", "has every text of --dataset"),
        ("--vocab_size 257", "--vocab_size: must be >= 258 (got 257)"),
        ("--steps 0", "--steps: must be >= 1 (got 0)"),
        ("--device quantum", "--device quantum"),
    ],
)
def test_bad_flags_exit_2(spelled, tmp_path, caplog, flags, message):
    argv = ["--dataset", str(spelled), "--output_dir", str(tmp_path), *flags.format(dataset=spelled).split()]
    with pytest.raises(SystemExit) as stop:
        train_token2text.main(train_token2text.parse_args(argv))
    assert stop.value.code == 2
    assert message in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "anna", "audio_codes": []}, "row 0: audio_codes must be"),
        ({"text": "…", "audio_codes": [1]}, "no row has a text with a word"),
        ({"text": "anna", "audio_codes": [1], "language": "klingon"}, "unknown language 'klingon'"),
        ({"text": "anna"}, "no column 'audio_codes'"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        train_token2text.open_rows(str(path), "train", [], 64)


def test_rows_without_a_word_are_ignored(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": text, "audio_codes": [1]} for text in ("anna", "…", "", None)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert train_token2text.open_rows(str(path), "train", [], 64)["text"][:] == ["anna"]
    assert "ignored 3 of 4 rows" in caplog.text


def test_rows_that_state_no_language_are_english(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "anna", "audio_codes": [1], "language": language} for language in (None, "de")]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert train_token2text.open_rows(str(path), "train", [], 64)["language"][:] == ["en", "de"]


def test_help_exits_0(capsys):
    with pytest.raises(SystemExit) as stop:
        train_token2text.parse_args(["--help"])
    assert stop.value.code == 0 and "number of attention heads" in capsys.readouterr().out
