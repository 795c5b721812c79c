"""Reward configs: a JSON file names rewards with their weights and parameters.

    {"whisper": {"weight": 1.0, "alpha_wer": 3.0}, "duration": {"weight": 0.5}}

Adding a reward is one class in a file of this folder (its `needs` says which models it scores with), one line in
REWARDS, a test, and a row in docs/rewards.md.
"""

import inspect
import json
import math
from pathlib import Path

from common.cli import InputError, unknown_key
from reward_models.asr_rules import AsrRulesReward
from reward_models.diversity import DiversityReward
from reward_models.dnsmos import DnsmosReward
from reward_models.emphasis import EmphasisReward
from reward_models.pauses import PausesReward
from reward_models.pitch_height import PitchHeightReward
from reward_models.preference import PreferenceReward
from reward_models.prosody import DurationReward, LogF0SpreadReward
from reward_models.question import QuestionReward
from reward_models.rate import RateReward
from reward_models.speaker_similarity import SpeakerSimilarityReward
from reward_models.token2text import Token2TextReward
from reward_models.variation import VariationReward
from reward_models.whisper import WhisperReward

REWARDS = {  # by task, then by name: a reward of speech cannot score text
    "tts": {
        "whisper": WhisperReward,
        "token2text": Token2TextReward,
        "duration": DurationReward,
        "log_f0_spread": LogF0SpreadReward,
        "diversity": DiversityReward,
        "emphasis": EmphasisReward,
        "question": QuestionReward,
        "pauses": PausesReward,
        "rate": RateReward,
        "pitch_height": PitchHeightReward,
        "variation": VariationReward,
        "speaker_similarity": SpeakerSimilarityReward,
        "dnsmos": DnsmosReward,
        "preference": PreferenceReward,
    },
    "asr": {"asr_rules": AsrRulesReward},
}
# What a reward may score with; training/models.py loads it
MODELS = {"codec", "whisper", "word_times", "speaker_encoder", "token2text", "preference_model", "dnsmos"}
DEFAULT_CONFIG = {"tts": "reward_models/whisper.json", "asr": "reward_models/asr_rules.json"}

RewardConfig = dict[str, dict[str, float]]  # {reward: {"weight": …, parameter: …}}


def load_config(path: str | Path, task: str = "tts") -> RewardConfig:
    """Read and check a reward config.

    Args:
        task: a key of REWARDS.
    Returns:
        {reward: {"weight": …, parameter: …}}, weights filled in with 1.
    Raises:
        InputError: no such file, not JSON, an unknown reward or one of another task, an unknown parameter, a value out
            of range.
    """
    path, rewards = Path(path), REWARDS[task]
    in_project = Path(__file__).parent.parent / path  # from another working directory
    if not path.is_file() and in_project.is_file():
        path = in_project
    if not path.is_file():
        shipped = ", ".join(str(p) for p in sorted(Path(__file__).parent.glob("*.json")))
        raise InputError(f"{path}: no such reward config. Use a JSON file, such as {shipped}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path}: not JSON: {error}. Use an object with at least one of {', '.join(rewards)}"
        ) from None
    if not isinstance(config, dict) or not config:
        raise InputError(f"{path}: expected an object with at least one of {', '.join(rewards)} (got {config!r})")
    for name, parameters in config.items():
        for other_task in REWARDS:
            if other_task != task and name in REWARDS[other_task]:
                raise InputError(f"{path}: {name} is a reward of --task {other_task}, this is --task {task}")
        if name not in rewards:
            raise InputError(f"{path}: {unknown_key(name, rewards)}")
        _check_parameters(f"{path}: {name}", parameters, rewards[name])
    weighted = {name: {"weight": 1.0, **parameters} for name, parameters in config.items()}
    if not any(parameters["weight"] for parameters in weighted.values()):
        raise InputError(f"{path}: the weight of every reward is 0, and so is their sum. Give one of them a weight")
    return weighted


def _check_parameters(where: str, parameters: dict, reward: type) -> None:
    """Raises InputError for a parameter that the reward does not have, or whose value it does not accept."""
    known = ["weight", *list(inspect.signature(reward).parameters)[1:]]
    if not isinstance(parameters, dict):
        raise InputError(f"{where}: expected an object with {', '.join(known)} (got {parameters!r})")
    for key, value in parameters.items():
        if key not in known:
            raise InputError(f"{where}: {unknown_key(key, known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{where}: {key}: must be a finite number (got {value!r})")
    try:
        reward(None, **_without_weight(parameters))  # a reward checks its parameters before it has anything to score
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _without_weight(parameters: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in parameters.items() if key != "weight"}


def models_needed(config: RewardConfig, task: str) -> set[str]:
    """What the rewards of a config score with, as their `needs` name it; ValueError for what is not in MODELS."""
    needed = {model for name in config for model in REWARDS[task][name].needs}
    if not needed <= MODELS:
        raise ValueError(f"needs: a tuple of {', '.join(sorted(MODELS))} (got {', '.join(sorted(needed - MODELS))})")
    return needed


def needs_voice_prompt(config: RewardConfig, task: str) -> bool:
    """Whether a reward of a config compares with the voice prompt, `ref_codes`, of each row."""
    rewards, _ = build_rewards(config, None, task)
    return any(getattr(reward, "needs_voice_prompt", False) for reward in rewards)


def build_rewards(config: RewardConfig, rollout_scorer, task: str = "tts") -> tuple[list, list[float]]:
    """The reward functions and weights that `GRPOTrainer` takes.

    Args:
        config: from `load_config`.
        rollout_scorer: shared by all of them: a `rollouts.SpeechRolloutScorer`, or for "asr" a
            `transcripts.TranscriptScorer`.
    """
    rewards = []
    for name, parameters in config.items():
        rewards.append(REWARDS[task][name](rollout_scorer, **_without_weight(parameters)))
    return rewards, [parameters["weight"] for parameters in config.values()]


def values_of(reward, /, **columns) -> list[float | None]:
    """What a reward gives the rollouts of a batch, called as TRL calls it.

    Raises:
        ValueError: other than a finite number for each rollout, or None where the reward does not apply. That is a
            fault of the reward, and NaN would pass for None.
    """
    values, count = reward(**columns), len(columns["completion_ids"])
    wanted = f"reward {reward.__name__}: must give each of {count} rollouts a finite number, or None"
    if not hasattr(values, "__len__") or len(values) != count:
        got = f"{len(values)} of them" if hasattr(values, "__len__") else repr(values)
        raise ValueError(f"{wanted} (got {got})")
    for i, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{wanted} (got {value} for rollout {i})")
    return [None if value is None else float(value) for value in values]
