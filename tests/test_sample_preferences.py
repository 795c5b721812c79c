"""sample_preferences.py on a small random policy: pairs by their scores, a resumed run, and what is refused."""

import doctest
import json
import logging
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_policy import save_policy
from fake_speaker_encoder import save_speaker_encoder

import sample_preferences
from common.dataset_io import load_any_dataset
from sample_preferences import best_and_worst, make_pairs, weighted_scores
from speech.policy import Policy, load_tokenizer
from speech.tokens import tts_prompt
from training.preference_rows import preference_rows

TEXTS = [json.loads(line)["text"] for line in Path("tiny/texts/train.jsonl").read_text().splitlines()[:6]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"), initializer_range=0.1)


@pytest.fixture(scope="module")
def tokens(policy):
    return load_tokenizer(policy)[1]


@pytest.fixture
def inputs(policy, tmp_path) -> list[str]:
    """Six texts, one of them after a voice prompt, and a reward that needs no model."""
    rows = [{"text": text, "ref_text": None, "ref_codes": None, "speaker": "anna"} for text in TEXTS]
    rows[0] |= {"ref_text": "Go.", "ref_codes": [1, 2, 3]}
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "duration.json").write_text('{"duration": {"weight": 2.0}}')
    flags = ["--model_name_or_path", policy, "--dataset", str(tmp_path / "texts.jsonl"), "--num_samples", "4"]
    flags += ["--reward_config", str(tmp_path / "duration.json"), "--max_completion_length", "140", "--batch_size", "8"]
    return [*flags, "--min_margin", "0.01"]


def run(flags: list[str], output: Path) -> list[dict]:
    sample_preferences.main(sample_preferences.parse_args([*flags, "--output", str(output)]))
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_pairs_of_a_policy_are_what_dpo_reads(inputs, policy, tmp_path, caplog):
    pairs = run(inputs, tmp_path / "pairs.jsonl")
    assert 3 <= len(pairs) <= len(TEXTS)
    for pair in pairs:
        assert pair["text"] == TEXTS[int(pair["id"])]
        assert pair["chosen_codes"] != pair["rejected_codes"]
        assert pair["chosen_score"] - pair["rejected_score"] >= 0.01
        assert (pair["source"], pair["rater"]) == ("machine", str(tmp_path / "duration.json"))
        assert ("ref_codes" in pair) == (pair["id"] == "0")
        assert pair.get("speaker") == ("anna" if pair["id"] == "0" else None)  # the voice prompt's, where there is one
    assert "6 texts × 4 rollouts, mean score -" in caplog.text and f": {len(pairs)} pairs; left out" in caplog.text
    rows = load_any_dataset(str(tmp_path / "pairs.jsonl"))
    assert len(preference_rows(rows, "pairs", *load_tokenizer(policy), 512)) == len(pairs)


def test_batches_have_random_numbers_of_their_own(inputs, tmp_path):
    (tmp_path / "texts.jsonl").write_text(4 * (json.dumps({"text": TEXTS[0]}) + "\n"))
    pairs = run(inputs, tmp_path / "pairs.jsonl")
    assert len({str(pair["chosen_codes"]) for pair in pairs}) == len(pairs) >= 3  # two batches of two texts


def test_the_mean_score_is_of_all_rollouts(inputs, tmp_path, monkeypatch, caplog):
    """Scores i and i + 1 of text i: 2.5 on average of five texts; of the batches, of 2, 2 and 1 text, it is 2.833."""

    def reward(completion_ids, text, **_):
        return [TEXTS.index(one) + number % 2 for number, one in enumerate(text)]

    monkeypatch.setattr(sample_preferences, "load_rewards", lambda *_: ([reward], [1.0], None))
    caplog.set_level(logging.INFO)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:5]))
    run(inputs, tmp_path / "pairs.jsonl")
    assert "5 texts × 4 rollouts, mean score 2.500: " in caplog.text


def test_rewards_get_the_columns_that_they_get_in_grpo(inputs, tmp_path, monkeypatch):
    """Voice prompts and patterns of pauses, a value for each rollout; a row without one has an empty value."""
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    rows[1]["pauses"] = [TEXTS[1].replace(" ", " | ", 1)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = []

    def reward(completion_ids, **columns):
        calls.append(columns)
        return [float(len(ids)) for ids in completion_ids]

    monkeypatch.setattr(sample_preferences, "load_rewards", lambda *_: ([reward], [1.0], None))
    run(inputs, tmp_path / "pairs.jsonl")
    first = calls[0]  # two texts of four rollouts
    assert first["text"] == [TEXTS[0]] * 4 + [TEXTS[1]] * 4 and first["language"] == ["en"] * 8
    assert first["ref_codes"] == [[1, 2, 3]] * 4 + [[]] * 4 and first["ref_text"] == ["Go."] * 4 + [""] * 4
    assert first["pauses"] == [[]] * 4 + [rows[1]["pauses"]] * 4


def test_only_rollouts_that_are_understood(inputs, tmp_path, monkeypatch, caplog):
    """Of four rollouts of a text Whisper understands the first two; the third would be the best, the last the worst."""
    wers = [0.0, 0.2, 0.3, 1.0]

    def reward(completion_ids, **columns):
        return [1.0, 2.0, 3.0, 0.0] * (len(completion_ids) // 4)

    scores = [SimpleNamespace(wer=wer) for wer in wers * 2]
    scorer = SimpleNamespace(rollouts=SimpleNamespace(scores=scores))
    monkeypatch.setattr(sample_preferences, "load_rewards", lambda *_: ([reward], [1.0], scorer))
    pairs = run([*inputs, "--max_wer", "0.2"], tmp_path / "understood.jsonl")
    assert pairs and {(pair["chosen_score"], pair["rejected_score"]) for pair in pairs} == {(2.0, 1.0)}
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        run([*inputs, "--max_wer", "0"], tmp_path / "refused.jsonl")
    assert "--max_wer: no reward of" in caplog.text and "Add whisper to it" in caplog.text


def test_a_reward_of_the_voice_wants_voice_prompts(inputs, tmp_path, caplog):
    inputs[inputs.index("--reward_config") + 1] = "reward_models/voice.json"
    with pytest.raises(SystemExit) as stop:
        run(inputs, tmp_path / "pairs.jsonl")
    assert stop.value.code == 2 and "texts.jsonl, row 0: a reward compares with the row's voice prompt" in caplog.text


def test_a_reward_of_the_voice_scores_rollouts(inputs, tmp_path):
    """speaker_similarity alone, whose Whisper is the toy setup's, with a speaker encoder of random weights."""
    row = {"text": TEXTS[0], "ref_text": "Go.", "ref_codes": [7, 99, 512, 3000] * 10}
    (tmp_path / "texts.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "voice.json").write_text('{"speaker_similarity": {"weight": 1.0, "max_wer": 100.0}}')
    inputs[inputs.index("--reward_config") + 1] = str(tmp_path / "voice.json")
    inputs[inputs.index("--model_name_or_path") + 1] = "tiny/llasa"
    flags = ["--codec_id", "tiny/codec", "--whisper", "tiny/whisper.pt", "--min_margin", "0", "--max_length", "512"]
    flags += ["--speaker_encoder", save_speaker_encoder(tmp_path / "encoder")]
    (pair,) = run(inputs + flags, tmp_path / "pairs.jsonl")
    assert 0 <= pair["rejected_score"] < pair["chosen_score"] <= 1


def test_a_resumed_run_writes_the_same_file(inputs, tmp_path, monkeypatch):
    run(inputs, tmp_path / "whole.jsonl")
    answer, calls = Policy.answer, []

    def interrupted(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*args, **kwargs)

    monkeypatch.setattr(Policy, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path / "killed.jsonl")
    assert not (tmp_path / "killed.jsonl").exists()
    with (tmp_path / "killed.jsonl.partial").open("a") as file:
        file.write('{"pairs": [{"id"')  # the line that was being written
    run(inputs, tmp_path / "killed.jsonl")
    assert len(calls) == 4, "two batches of two texts, one interrupted, and that one again"
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    run(inputs, tmp_path / "killed.jsonl")
    assert len(calls) == 4, "complete already"
    other = [*inputs, "--seed", "1"]
    with pytest.raises(SystemExit) as stop:
        run(other, tmp_path / "killed.jsonl")
    assert stop.value.code == 2
    run([*other, "--overwrite"], tmp_path / "killed.jsonl")
    assert (tmp_path / "killed.jsonl").read_bytes() != (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_is_of_one_set_of_reward_models(inputs, tmp_path, caplog, monkeypatch):
    whisper = tmp_path / "whisper.pt"
    whisper.write_bytes(b"one")
    pairs = run([*inputs, "--whisper", str(whisper)], tmp_path / "pairs.jsonl")
    whisper.write_bytes(b"trained further")
    assert run([*inputs, "--whisper", str(whisper)], tmp_path / "pairs.jsonl") == pairs  # this reward does not read it
    paths = {"whisper": str(whisper), "codec_id": "owner/name", "token2text": None}
    assert list(sample_preferences.digests(paths, {"whisper", "codec", "word_times"})) == ["whisper"]
    monkeypatch.setattr("reward_models.models_needed", lambda *_: {"whisper"})
    with pytest.raises(SystemExit):
        run([*inputs, "--whisper", str(whisper)], tmp_path / "pairs.jsonl")
    assert "reward_weights" in caplog.text


def test_texts_are_drawn_by_the_seed(inputs, tokens):
    def drawn(seed: str) -> list[str]:
        args = sample_preferences.parse_args([*inputs, "--num_texts", "3", "--seed", seed, "--output", "x.jsonl"])
        return [row["text"] for row in sample_preferences.read_rows(args, tokens.num_codes, False)]

    draws = [drawn(seed) for seed in "01234"]
    assert drawn("0") == draws[0] and len({tuple(texts) for texts in draws}) > 1
    assert all(len(set(texts)) == 3 and texts == sorted(texts, key=TEXTS.index) for texts in draws)


def test_best_and_worst():
    assert doctest.testmod(sample_preferences).attempted == 2 and doctest.testmod(sample_preferences).failed == 0
    assert best_and_worst([0.5, 0.5], 0.0) is None  # no margin at all
    assert best_and_worst([math.nan, 0.5], 0.0) is None
    assert best_and_worst([1.0, 0.0, 1.0, 0.0], 1.0) == (0, 1)


def test_scores_are_the_weighted_sum():
    """A reward that does not concern a text counts nothing there; one that no reward concerns has no score."""
    rewards = [lambda completion_ids, **_: [1.0, 2.0, None], lambda completion_ids, **_: [0.5, None, None]]
    scores = weighted_scores(rewards, [2.0, 4.0], {"completion_ids": [[1], [2], [3]]}).tolist()
    assert scores[:2] == [2 * 1.0 + 4 * 0.5, 2 * 2.0] and math.isnan(scores[2])


def test_nan_from_a_reward_is_not_taken_for_none():
    def faulty(completion_ids, **_):
        return [math.nan for _ in completion_ids]

    with pytest.raises(ValueError, match="reward faulty: must give each of 2 rollouts a finite number"):
        weighted_scores([faulty], [1.0], {"completion_ids": [[1], [2]]})


def test_rollouts_without_an_end_or_without_codes_are_in_no_pair(tokens):
    ids, end = tokens.ids, tokens.end_id
    row = {"id": "0", "text": "Go.", "prompt": tts_prompt("Go."), "voice": {}}
    completions = [ids([1]), [end], [*ids([2]), end], [*ids([3]), end]]  # truncated, empty, and two that count
    completions += [ids([1]), [end], ids([2]), [*ids([3]), end]]
    scores = np.asarray([0.0, 0.0, 0.3, 0.8, 0.0, 0.0, 1.0, 0.5])
    [pair], outcomes = make_pairs([row, row], completions, scores, tokens, 0.1, "r.json")
    assert (pair["chosen_codes"], pair["rejected_codes"]) == ([3], [2])
    assert outcomes == Counter(pairs=1, too_few=1)
    pairs, outcomes = make_pairs([row], completions[:4], scores[:4], tokens, 0.6, "r.json")
    assert pairs == [] and outcomes == Counter(too_close=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0"], "--temperature: must be above 0"),
        (["--output", "pairs.csv"], "not a .jsonl file"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl: no such dataset"),
        (["--reward_config", "nowhere.json"], "nowhere.json: no such reward config"),
        (["--reward_config", "reward_models/asr_rules.json"], "asr_rules is a reward of --task asr"),
        (["--reward_config", "reward_models/token2text.json"], "the reward token2text needs --token2text"),
        (["--model_name_or_path", "nowhere/at/all"], "no such model"),
        (["--max_length", "60"], "is too long"),
    ],
)
def test_bad_input(flags, message, inputs, tmp_path, caplog):
    with pytest.raises(SystemExit) as stop:
        sample_preferences.main(
            sample_preferences.parse_args([*inputs, "--output", str(tmp_path / "pairs.jsonl"), *flags])
        )
    assert stop.value.code == 2 and message in caplog.text


def test_a_text_that_cannot_be_scored_is_named(inputs, tmp_path, caplog):
    (tmp_path / "bad.jsonl").write_text('{"text": "Go."}\n{"text": "?!"}\n')
    with pytest.raises(SystemExit):
        run([*inputs, "--dataset", str(tmp_path / "bad.jsonl")], tmp_path / "pairs.jsonl")
    assert "bad.jsonl, row 1: reference text '?!' is empty" in caplog.text


def test_no_pair_at_all_is_an_exit_code(inputs, tmp_path, caplog):
    with pytest.raises(SystemExit) as stop:
        run([*inputs, "--min_margin", "99"], tmp_path / "pairs.jsonl")
    assert stop.value.code == 1 and "Lower --min_margin" in caplog.text and not (tmp_path / "pairs.jsonl").exists()
