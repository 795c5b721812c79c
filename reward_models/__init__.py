"""Reward configs: a JSON file names rewards with their weights and parameters.

    {"whisper": {"weight": 1.0, "alpha_wer": 3.0}, "duration": {"weight": 0.5}}

Adding a reward is one class in a file of this folder (its `needs` says what it listens with), one line in REWARDS, a
test, and a row in the README.
"""

import difflib
import inspect
import json
from pathlib import Path

from reward_models.asr_rules import AsrRulesReward
from reward_models.diversity import DiversityReward
from reward_models.intelligibility import WhisperReward
from reward_models.prosody import DurationReward, LogF0SpreadReward
from reward_models.token2text import Token2TextReward

REWARDS = {  # by task, then by name: what judges speech cannot judge text
    "tts": {
        "whisper": WhisperReward,
        "token2text": Token2TextReward,
        "duration": DurationReward,
        "log_f0_spread": LogF0SpreadReward,
        "diversity": DiversityReward,
    },
    "asr": {"asr_rules": AsrRulesReward},
}
DEFAULT_CONFIG = {"tts": "reward_models/whisper.json", "asr": "reward_models/asr_rules.json"}


def unknown_key(key: str, known: list[str]) -> str:
    """The end of an error message: the nearest known key, and all of them."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown key {key!r}.{hint} Known: {', '.join(sorted(known))}"


def load_config(path: str | Path, task: str = "tts") -> dict[str, dict[str, float]]:
    """Read and check a reward config.

    Args:
        task: a key of REWARDS; a reward of another task is an unknown one.
    Returns:
        {reward: {"weight": …, parameter: …}}, weights filled in with 1.
    Raises:
        ValueError: no such file, not JSON, an unknown reward or parameter, a value that is no number.
    """
    path, rewards = Path(path), REWARDS[task]
    if not path.is_file():
        shipped = ", ".join(str(p) for p in sorted(Path(__file__).parent.glob("*.json")))
        raise ValueError(f"no reward config {path}; give a JSON file, such as {shipped}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or not config:
        raise ValueError(f"{path}: expected an object with at least one of {', '.join(rewards)}")
    for name, parameters in config.items():
        others = [other for other in REWARDS if name in REWARDS[other] and other != task]
        if others:
            raise ValueError(f"{path}: {name} is a reward of --task {others[0]}, this is --task {task}")
        if name not in rewards:
            raise ValueError(f"{path}: {unknown_key(name, list(rewards))}")
        known = ["weight", *list(inspect.signature(rewards[name]).parameters)[1:]]
        if not isinstance(parameters, dict):
            raise ValueError(f"{path}: {name} must be an object with {', '.join(known)}; got {parameters!r}")
        for key, value in parameters.items():
            if key not in known:
                raise ValueError(f"{path}: {name}: {unknown_key(key, known)}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{path}: {name}: {key} must be a number, got {value!r}")
    return {name: {"weight": 1.0, **parameters} for name, parameters in config.items()}


def models_needed(path: str | Path) -> set[str]:
    """Which of "codec", "whisper" and "token2text" the speech rewards of a config listen with."""
    return {model for name in load_config(path) for model in REWARDS["tts"][name].needs}


def load_rewards(path: str | Path, listener, task: str = "tts") -> tuple[list, list[float]]:
    """The reward functions and weights that `GRPOTrainer` takes.

    Args:
        path: a reward config.
        listener: what all of them share: a `reward_models.rollouts.Listener`, for "asr" a `asr_rules.Reader`.
    """
    rewards, weights = [], []
    for name, parameters in load_config(path, task).items():
        weight = parameters.pop("weight")
        try:
            rewards.append(REWARDS[task][name](listener, **parameters))
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
        weights.append(weight)
    return rewards, weights
