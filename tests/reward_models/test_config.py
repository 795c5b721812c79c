"""Reward configs: every shipped one builds, and bad ones are refused before anything is loaded."""

import doctest
import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_rollouts import speech_scorer

from common.cli import InputError
from reward_models import DEFAULT_CONFIG, REWARDS, build_rewards, load_config, models_needed, values_of


def write(path: Path, config) -> Path:
    """`config` as JSON, or a text as it is."""
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


SHIPPED = sorted(Path("reward_models").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_builds(path):
    task = "asr" if path.name.startswith("asr_") else "tts"
    config = load_config(path, task)
    rewards, weights = build_rewards(config, speech_scorer(), task)
    assert [reward.__name__ for reward in rewards] == list(config) == list(json.loads(path.read_text()))
    assert weights == [parameters["weight"] for parameters in config.values()]


@pytest.mark.parametrize("name", ["pitch_height", "rate", "variation"])
def test_worked_numbers_of_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"reward_models.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_the_default_configs_ship():
    for task, path in DEFAULT_CONFIG.items():
        assert Path(path) in SHIPPED and load_config(path, task)


def test_weights_that_are_all_zero_are_refused(tmp_path):
    path = write(tmp_path / "reward.json", {"whisper": {"weight": 0}, "duration": {"weight": 0}})
    with pytest.raises(InputError, match="the weight of every reward is 0"):
        load_config(path)


def test_weights_and_parameters(tmp_path):
    path = write(tmp_path / "reward.json", {"whisper": {"alpha_nll": 6}, "duration": {"weight": 0.5}})
    config = load_config(path)
    assert config == {"whisper": {"weight": 1.0, "alpha_nll": 6}, "duration": {"weight": 0.5}}
    [whisper, _], weights = build_rewards(config, speech_scorer())
    assert weights == [1.0, 0.5]
    assert whisper.parameters == {"alpha_wer": 3.0, "alpha_nll": 6, "lambda_wer": 0.6, "lambda_nll": 0.4}


@pytest.mark.parametrize(
    ("config", "models"),
    [
        ({"whisper": {}, "duration": {}}, {"codec", "whisper"}),
        ({"duration": {}}, set()),
        ({"pauses": {}, "question": {}, "rate": {}}, {"codec", "whisper", "word_times"}),
        ({"log_f0_spread": {}, "token2text": {}}, {"codec", "token2text"}),
        ({"speaker_similarity": {}}, {"codec", "whisper", "speaker_encoder"}),
        ({"dnsmos": {}}, {"codec", "dnsmos"}),
    ],
)
def test_models_needed(config, models):
    assert models_needed(config, "tts") == models


@pytest.mark.parametrize("needs", [("codecs",), ("codec")])  # the second is a string
def test_a_reward_that_needs_an_unknown_model_raises(needs, monkeypatch):
    """Nothing would be loaded for it."""
    monkeypatch.setitem(REWARDS["tts"], "own", SimpleNamespace(needs=needs))
    with pytest.raises(ValueError, match="needs: a tuple of codec, dnsmos"):
        models_needed({"whisper": {}, "own": {}}, "tts")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"whisper": {"lamda_wer": 1}}, "whisper: unknown key 'lamda_wer'. Did you mean 'lambda_wer'?"),
        ({"wisper": {}}, "unknown key 'wisper'. Did you mean 'whisper'?"),
        ({"whisper": {"alpha_wer": "3"}}, "whisper: alpha_wer: must be a finite number (got '3')"),
        ({"whisper": {"alpha_wer": True}}, "whisper: alpha_wer: must be a finite number (got True)"),
        ({"whisper": {"weight": None}}, "whisper: weight: must be a finite number (got None)"),
        ({"whisper": 1}, "whisper: expected an object with weight, alpha_wer"),
        ([], "expected an object with at least one of whisper"),
        ({}, "expected an object with at least one of whisper"),
        ("{whisper}", "not JSON"),
        # JSON has neither, Python's reader takes both
        ('{"whisper": {"weight": NaN}}', "whisper: weight: must be a finite number (got nan)"),
        ('{"duration": {"weight": Infinity}}', "duration: weight: must be a finite number (got inf)"),
        ('{"whisper": {"alpha_nll": -Infinity}}', "whisper: alpha_nll: must be a finite number (got -inf)"),
        # Out of range: refused by the reward itself
        ({"whisper": {"alpha_nll": 0}}, "whisper: alpha_nll: must be finite and > 0 (got 0)"),
        ({"whisper": {"lambda_wer": 0, "lambda_nll": 0}}, "whisper: lambda_wer, lambda_nll: must not both be 0"),
        ({"token2text": {"alpha": -3}}, "token2text: alpha: must be finite and > 0 (got -3)"),
        ({"log_f0_spread": {"ceiling": 0}}, "log_f0_spread: ceiling: must be finite and > 0 (got 0)"),
        ({"speaker_similarity": {"max_wer": -1}}, "speaker_similarity: max_wer: must be >= 0 (got -1)"),
        ({"diversity": {"ceiling": -0.3}}, "diversity: ceiling: must be finite and > 0 (got -0.3)"),
        ({"duration": {"ceiling": 1}}, "duration: unknown key 'ceiling'. Did you mean 'weight'? Known: weight"),
    ],
)
def test_bad_configs_are_refused(tmp_path, config, message):
    """By `load_config`, which knows neither models nor data."""
    path = write(tmp_path / "reward.json", config)
    with pytest.raises(InputError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_bad_weights_of_the_asr_reward_are_refused(tmp_path):
    for parameters, message in (
        ({"weight_exact": -1}, "asr_rules: weight_exact: must be finite and >= 0 (got -1)"),
        ({"weight_accuracy": 0}, "asr_rules: weight_accuracy, weight_exact: both 0"),
    ):
        path = write(tmp_path / "reward.json", {"asr_rules": parameters})
        with pytest.raises(InputError) as error:
            load_config(path, "asr")
        assert message in str(error.value)


def test_a_missing_config_names_the_shipped_ones(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: no such reward config.*whisper\.json"):
        load_config(tmp_path / "none.json")


def test_rewards_have_distinct_names():
    """TRL logs each reward by its name."""
    classes = {name: reward for rewards in REWARDS.values() for name, reward in rewards.items()}
    assert [reward.__dict__["__name__"] for reward in classes.values()] == list(classes)


def test_a_reward_of_the_other_task_is_named():
    with pytest.raises(InputError, match="asr_rules is a reward of --task asr, this is --task tts"):
        load_config("reward_models/asr_rules.json")
    with pytest.raises(InputError, match="whisper is a reward of --task tts, this is --task asr"):
        load_config("reward_models/prosody_reward.json", "asr")


def test_a_shipped_config_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("reward_models/whisper.json")["whisper"]["weight"] == 1.0


def own_reward(values):
    """A reward of which no more is known than what it gives."""

    def reward(**_):
        return values

    reward.__name__ = "own"
    return reward


@pytest.mark.parametrize("values", [[1, None], np.array([1.0, 0.5]), torch.tensor([1.0, 0.5]), [np.float32(1), True]])
def test_numbers_of_any_kind_are_values(values):
    given = values_of(own_reward(values), completion_ids=[[1], [2]])
    assert given[0] == 1.0 and all(type(value) in (float, type(None)) for value in given)


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ([0.5, math.nan], "got nan for rollout 1"),  # would pass for None
        ([-math.inf, 0.5], "got -inf for rollout 0"),
        ([0.5], "got 1 of them"),
        (0.5, "got 0.5"),
        (None, "got None"),
    ],
)
def test_a_reward_that_gives_no_numbers_ends_the_run(values, got):
    with pytest.raises(ValueError, match=f"reward own: must give each of 2 rollouts a finite number, or None .{got}"):
        values_of(own_reward(values), completion_ids=[[1], [2]])
