"""train_preference_model.py: it learns what the text asks for, its guards do what they say, it resumes exactly."""

import argparse
import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from clips import write_rows
from fake_preference import array_files, random_features, save_melody_pairs, small_model
from fake_whisper import save_random_whisper

import train_preference_model
from common.cli import InputError
from reward_models.preference import MELODY, PreferenceModel, with_pitch_features
from speech.pitch import pitch_track
from speech.whisper_scorer import WhisperScorer
from train_preference_model import (
    Pair,
    encode_clips,
    evaluate,
    losses,
    mixed,
    pair_scores,
    preference_loss,
    read_pairs,
    read_rows,
    set_centre,
)
from training.loop import text_key

SMALL = "--hidden_size 32 --num_layers 1 --num_heads 2 --dropout 0 --batch_size 8"


@pytest.fixture(scope="module")
def melodies(tmp_path_factory) -> Path:
    return save_melody_pairs(tmp_path_factory.mktemp("melodies"))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> str:
    return str(save_random_whisper(tmp_path_factory.mktemp("whisper") / "random.pt"))


@pytest.fixture(scope="module")
def features(melodies, whisper, tmp_path_factory) -> str:
    """The features of all clips, computed once for all tests."""
    folder = tmp_path_factory.mktemp("features")
    scorer = WhisperScorer(whisper, device="cpu")
    rows = read_rows(str(melodies), None)
    own = folder / f"{scorer.fingerprint()}-{MELODY}"
    own.mkdir()
    assert not encode_clips([clip for _, *clips in rows for clip in clips], scorer, None, own)
    assert len(list(own.iterdir())) == 32  # of 64 clips in pairs: each is in two
    return str(folder)


@pytest.fixture
def flags(melodies, whisper, features, tmp_path) -> list[str]:
    given = f"--pairs {melodies} --whisper {whisper} --features_dir {features} {SMALL} --device cpu"
    return [*given.split(), "--output_dir", str(tmp_path / "model")]


def run(flags: list[str]) -> dict:
    args = train_preference_model.parse_args(flags)
    train_preference_model.main(args)
    return json.loads((Path(args.output_dir) / "report.json").read_text())


def test_training_learns_which_melody_the_text_asks_for(flags, tmp_path, caplog):
    more = "--steps 150 --learning_rate 3e-3 --heldout_frac 0.25 --save_steps 100 --mixup 0.2"
    report = run([*flags, *more.split()])
    # Chance is a half: the clips of a question are those of a statement, the other way round
    assert report["accuracy"] >= 0.85
    assert report["pairs"] == 8 and report["by_source"].keys() == {"made"}
    assert report["by_kind"].keys() <= {"question", "statement"}
    assert sum(part["pairs"] for part in report["by_kind"].values()) == 8
    assert sum(part["pairs"] for part in report["by_speaker"].values()) == 8
    assert "step 100/150  held out: accuracy" in caplog.text and "held out: accuracy" in caplog.text
    record = json.loads((tmp_path / "model/run.json").read_text())
    model = PreferenceModel.from_pretrained(tmp_path / "model")
    assert record["heldout"] == report and record["fingerprint"] == model.config["whisper"]
    assert model.config["speakers"] == ["high", "low"] and model.centre != 0


def test_resumed_is_uninterrupted(flags, tmp_path, monkeypatch, caplog):
    flags = [*flags, "--steps", "12", "--save_steps", "5", "--logging_steps", "6", "--dropout", "0.1"]
    original, calls = losses, []
    run([*flags, "--output_dir", str(tmp_path / "whole")])

    def interrupted(*args):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_preference_model, "losses", interrupted)
        run([*flags, "--output_dir", str(tmp_path / "parts")])
    with pytest.raises(SystemExit):
        run([*flags, "--output_dir", str(tmp_path / "parts")])
    assert "checkpoint of an interrupted run" in caplog.text
    resumed = [*flags, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "true"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # saved, not yet recorded
        patch.setattr(train_preference_model, "write_run", Mock(side_effect=KeyboardInterrupt))
        run(resumed)
    run(resumed)
    whole, parts = (PreferenceModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    records = [json.loads((tmp_path / name / "run.json").read_text())["losses"] for name in ("whole", "parts")]
    assert records[0] == records[1]


# --- The losses -------------------------------------------------------------------------------------------


def test_the_loss_is_bradley_terry_s():
    margins, sure = torch.tensor([0.0, 2.0]), torch.ones(2)
    # −log σ(0) = ln 2 = 0.6931, −log σ(2) = ln(1 + e⁻²) = 0.1269
    assert preference_loss(margins, sure, 0.0).item() == pytest.approx((0.6931 + 0.1269) / 2, abs=1e-4)
    # ε = 0.1: 0.9 · 0.1269 + 0.1 · ln(1 + e²) = 0.1142 + 0.2127
    assert preference_loss(margins[1:], sure[1:], 0.1).item() == pytest.approx(0.3269, abs=1e-4)


@pytest.mark.parametrize(
    ("target", "smoothing", "best"), [(1.0, 0.1, math.log(9)), (0.5, 0.1, 0.0), (0.8, 0.0, math.log(4))]
)
def test_label_smoothing_and_mixtures_bound_the_margin(target, smoothing, best):
    """The loss is least at a finite margin, beyond which a pair pulls back."""
    margin = torch.tensor([best], requires_grad=True)
    loss = preference_loss(margin, torch.tensor([target]), smoothing)
    assert torch.autograd.grad(loss, margin)[0].abs().item() < 1e-6
    for step in (-0.5, 0.5):
        assert preference_loss(torch.tensor([best + step]), torch.tensor([target]), smoothing) > loss


def test_mixtures_lie_between_the_clips():
    one, other = torch.zeros(4, 2), torch.ones(6, 2)
    first, second = mixed(one, other, 0.25)
    assert first.shape == (4, 2) and second.shape == (6, 2)
    assert torch.allclose(first, torch.full((4, 2), 0.25)) and torch.allclose(second, torch.full((6, 2), 0.75))
    ramp = torch.arange(6.0)[:, None]
    assert torch.equal(mixed(ramp, 1 - ramp, 0.0)[0], ramp)
    # Stretched, the ends stay at the ends: 0, 1, 2 over five frames
    stretched, _ = mixed(torch.zeros(5, 1), torch.arange(3.0)[:, None], 0.5)
    assert torch.allclose(stretched[:, 0], 0.5 * torch.tensor([0, 0.5, 1, 1.5, 2]))
    halves = mixed(ramp, 1 - ramp, 0.5)
    assert torch.allclose(halves[0], halves[1])


@pytest.fixture
def pairs(tmp_path) -> list[Pair]:
    """Random features: nothing to learn but the pairs themselves."""
    files = array_files(tmp_path, [item.half().numpy() for item in random_features([12, 12, 9, 15])])
    return [
        Pair("so?", files[0], files[1], "made", "flattened", "anna"),
        Pair("so.", files[2], files[3], "human", None, "ben"),
    ]


def settings(**changed) -> argparse.Namespace:
    return argparse.Namespace(**{"mixup": 0.0, "label_smoothing": 0.0, "speaker_weight": 0.0} | changed)


def test_mixup_draws_its_own_mixtures_and_their_labels(pairs, monkeypatch):
    seen = []

    def remembered(margins, targets, label_smoothing):
        seen.append(targets)
        return margins.sum()

    monkeypatch.setattr(train_preference_model, "preference_loss", remembered)
    model = small_model()
    for mixup in (0.0, 1.0):
        losses(model, pairs, settings(mixup=mixup), np.random.default_rng(0))
    assert seen[0].tolist() == [1.0, 1.0]
    shares = np.random.default_rng(0).beta(1.0, 1.0, 2)
    assert seen[1].tolist() == pytest.approx(np.maximum(shares, 1 - shares).tolist())
    assert all(0.5 <= target < 1 for target in seen[1].tolist())


def test_the_losses_of_a_batch_by_hand(pairs):
    """Each clip by itself: −log σ(r_chosen − r_rejected) on average, and −log P(its pair's speaker) of all clips."""
    model = small_model(speakers=("anna", "ben"))
    found = losses(model, pairs, settings(speaker_weight=1.0), np.random.default_rng(0))
    of_pairs, of_speakers = [], []
    for number, pair in enumerate(pairs):
        vectors = [
            model.pooled([torch.from_numpy(np.load(file)).float()], [pair.text])
            for file in (pair.chosen, pair.rejected)
        ]
        margin = (model.scores(vectors[0]) - model.scores(vectors[1])).item()
        of_pairs.append(math.log(1 + math.exp(-margin)))
        of_speakers += [-model.speaker_logits(vector).log_softmax(-1)[0, number].item() for vector in vectors]
    assert found["preference"].item() == pytest.approx(np.mean(of_pairs), abs=1e-5)
    assert found["speaker"].item() == pytest.approx(np.mean(of_speakers), abs=1e-5)


def test_the_speaker_branch_is_adversarial(pairs):
    """A step down its loss makes the head better at the speaker and the rest of the model worse."""
    args = settings(speaker_weight=1.0)
    model = small_model(speakers=("anna", "ben"))

    def speaker_loss() -> torch.Tensor:
        return losses(model, pairs, args, np.random.default_rng(0))["speaker"]

    before = speaker_loss()
    head = set(model.speaker_head.parameters())
    found = torch.autograd.grad(before, list(model.parameters()), allow_unused=True)
    gradients = dict(zip(model.parameters(), found, strict=True))
    for own_head in (True, False):
        step = {
            weight: 0.01 * gradient
            for weight, gradient in gradients.items()
            if gradient is not None and (weight in head) == own_head
        }
        with torch.no_grad():
            for weight, change in step.items():
                weight -= change
            after = speaker_loss()
            for weight, change in step.items():
                weight += change
        assert after < before if own_head else after > before


def test_a_batch_without_known_speakers_has_no_speaker_loss(pairs):
    """Pairs by machine or by people need no speaker; the mean is over those that have one."""
    model, args = small_model(speakers=("anna", "ben")), settings(speaker_weight=1.0)

    def speaker_loss(*batch: Pair) -> float:
        return losses(model, list(batch), args, np.random.default_rng(0))["speaker"].item()

    unknown = replace(pairs[1], speaker=None)
    assert speaker_loss(unknown) == 0
    assert speaker_loss(pairs[0], unknown) == pytest.approx(speaker_loss(pairs[0]))


def test_without_speakers_there_is_no_branch(pairs):
    two = small_model(speakers=("anna", "ben"))
    for model, args in ((small_model(), settings(speaker_weight=1.0)), (two, settings())):
        assert losses(model, pairs, args, np.random.default_rng(0)).keys() == {"preference"}
        assert "speaker_accuracy" not in evaluate(model, pairs, args)


def test_the_report_counts_by_source_and_kind(pairs):
    model = small_model(speakers=("anna", "ben"))
    scores = pair_scores(model, pairs)
    report = evaluate(model, pairs, settings(speaker_weight=1.0))
    right = scores[:, 0] > scores[:, 1]
    assert report["accuracy"] == right.mean() and report["pairs"] == 2
    assert report["by_source"]["human"] == {
        "pairs": 1,
        "accuracy": float(right[1]),
        "margin": pytest.approx(scores[1, 0] - scores[1, 1]),
    }
    assert report["by_kind"].keys() == {"flattened"} and report["by_speaker"].keys() == {"anna", "ben"}
    assert report["speaker_chance"] == 0.5 and report["speaker_accuracy"] in (0.0, 0.5, 1.0)


def test_a_tie_is_not_right_and_an_unknown_speaker_does_not_count(pairs):
    tie = replace(pairs[0], rejected=pairs[0].chosen)
    assert evaluate(small_model(), [tie], settings())["accuracy"] == 0
    model = small_model(speakers=("anna", "ben"))
    with torch.no_grad():  # a head that always says Anna
        model.speaker_head[-1].weight.zero_()
        model.speaker_head[-1].bias.copy_(torch.tensor([1.0, 0.0]))
    rows = [replace(pairs[0], speaker=speaker) for speaker in ("anna", "ben", "ben", None)]
    report = evaluate(model, rows, settings(speaker_weight=1.0))
    assert report["speaker_accuracy"] == pytest.approx(1 / 3) and report["speaker_chance"] == pytest.approx(2 / 3)


def test_the_centre_is_the_mean_of_the_training(pairs):
    model = small_model()
    model.centre.fill_(0.5)
    set_centre(model, pairs)
    assert pair_scores(model, pairs).mean() == pytest.approx(0, abs=1e-6)
    assert np.abs(pair_scores(model, pairs)).max() > 1e-3


# --- Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--hidden_size 30 --num_heads 4", "must be even and a multiple of --num_heads 4 (got 30)"),
        ("--label_smoothing 0.5", "--label_smoothing: must be in [0, 0.5) (got 0.5)"),
        ("--mixup nan", "--mixup: must be in [0, inf) (got nan)"),
        ("--speaker_weight -1", "--speaker_weight: must be in [0, inf) (got -1.0)"),
        ("--heldout_frac 0.99", "must leave texts to train on (got 0.99 of 16 distinct texts)"),
        ("--steps 0", "--steps: must be >= 1 (got 0)"),
        ("--pairs gone.jsonl", "gone.jsonl: no such file of pairs"),
        ("--heldout_pairs {pairs}", "--heldout_pairs: has every text of --pairs"),
        ("--device quantum", "--device quantum"),
    ],
)
def test_bad_flags_exit_2(flags, melodies, caplog, more, message):
    with pytest.raises(SystemExit) as stop:
        run([*flags, *more.format(pairs=melodies).split()])
    assert stop.value.code == 2 and message in caplog.text


AUDIO = {"chosen_audio": "low_anna_up.wav", "rejected_audio": "low_anna_down.wav"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "so"}, "row 0: no chosen_audio. Add the path"),
        ({"text": "so", "chosen_codes": [1], "rejected_codes": [2]}, "Decode its codes with --codec_id"),
        ({**AUDIO, "text": " "}, "row 0: its text is empty"),
        (AUDIO, "no column 'text'"),
        ({**AUDIO, "text": 7}, "text must be text"),
        ({**AUDIO, "text": "so", "rejected_audio": "gone.wav"}, "gone.wav is no file"),
    ],
)
def test_bad_rows(melodies, tmp_path, row, message):
    for name in AUDIO.values():
        shutil.copy(melodies.parent / name, tmp_path)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        read_rows(write_rows(tmp_path / "bad.jsonl", [row]), None)


def test_a_bad_line_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "so"\n')
    with pytest.raises(InputError, match="bad.jsonl: cannot be read as .jsonl"):
        read_rows(str(tmp_path / "bad.jsonl"), None)


def test_codes_are_decoded_and_useless_pairs_are_left_out(melodies, whisper, tmp_path, caplog):
    from fake_rollouts import HummingCodec

    (tmp_path / "broken.wav").write_bytes(b"no audio")
    shutil.copy(melodies.parent / "low_anna_up.wav", tmp_path)
    rows = [
        {"text": "so", "chosen_codes": [20] * 20, "rejected_codes": [30] * 20},
        {"text": "so", "chosen_codes": [20] * 20, "rejected_codes": [20] * 20},  # equal
        {"text": "so", "chosen_codes": [20] * 20, "rejected_codes": [0] * 20},  # silent
        {"text": "so", "chosen_audio": "broken.wav", "rejected_audio": "low_anna_up.wav", "source": "human"},
    ]
    scorer, codec = WhisperScorer(whisper, device="cpu"), HummingCodec()
    [pair] = read_pairs([write_rows(tmp_path / "rows.jsonl", rows)], scorer, codec, tmp_path / "features")
    assert pair.source == "not stated" and pair.kind is None
    [wav] = codec.decode([[20] * 20])
    expected = with_pitch_features(scorer.encode([wav])[0], pitch_track(wav))
    # Alone and in a batch, and so equal up to float16: a CPU may multiply the two in another order
    assert np.load(pair.chosen) == pytest.approx(expected.numpy(), rel=2e-3, abs=2e-3) and expected.shape == (20, 35)
    assert "3 of 4 pairs left out: 1 of equal clips, 2 with a clip that is unreadable or silent" in caplog.text


def test_held_out_texts_are_left_out_before_any_feature_is_computed(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    rows = [{"text": text, "chosen_codes": [1], "rejected_codes": [2]} for text in ("So.", "so", "Hello there.")]
    pairs = [write_rows(tmp_path / "rows.jsonl", rows)]
    encoded = []
    monkeypatch.setattr(train_preference_model, "encode_clips", lambda clips, *_: encoded.extend(clips) or set())
    codec = SimpleNamespace(codebook_size=64)
    assert len(read_pairs(pairs, None, codec, tmp_path / "f", frozenset({text_key("so")}))) == 1
    assert len(encoded) == 2 and "2 of 3 pairs left out: their texts are held out" in caplog.text
    with pytest.raises(InputError, match="--heldout_pairs: has every text"):
        read_pairs(pairs, None, codec, tmp_path / "f", frozenset(map(text_key, ("so", "hello there"))))
    assert len(encoded) == 2
