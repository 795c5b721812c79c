"""Credit in time: what a reward says of a part of a rollout moves the codes of that part alone.

GRPO gives all tokens of a rollout the same advantage, though a misheard word or a rise at the end is the doing of a few
codes: for the others it is noise. Here a reward that can tell when (`parts` of reward_models/*.py) is normalised part
by part among the rollouts of a prompt, which have the same text and so the same parts; the others as in GDPO (arXiv
2601.05242), each by itself and then summed. TRL's loss takes advantages of a shape (rollouts, tokens).
"""

import numpy as np

from reward_models.parts import Part

EPSILON = 1e-4  # TRL's, beside a group's standard deviation


def token_advantages(
    rewards: np.ndarray,
    parts: list[list[dict[str, Part] | None]],
    weights: list[float],
    whole_fracs: list[float],
    lengths: list[int],
    group_size: int,
) -> np.ndarray:
    """Advantages of shape (rollouts, longest length), 0 behind a rollout's length; they are still to be scaled.

    Args:
        rewards: (rollouts, reward functions), NaN where a reward does not concern a rollout.
        parts: for each reward function and rollout its parts by name; None or {} of a reward without, or of a rollout
            that failed, which takes the reward as a whole.
        weights: of the reward functions.
        whole_fracs: of each reward's weight, how much stays on the whole rollout where there are parts.
        lengths: of the rollouts in tokens, with END.
    """
    advantages = np.zeros((len(lengths), max(lengths)))
    for rewards_of_one, parts_of_one, weight, whole in zip(rewards.T, parts, weights, whole_fracs, strict=True):
        normalised = in_group(rewards_of_one.reshape(-1, group_size)).reshape(-1)
        for row, (advantage, of_rollout) in enumerate(zip(normalised, parts_of_one, strict=True)):
            advantages[row, : lengths[row]] += weight * advantage * (whole if of_rollout else 1.0)
        for first in range(0, len(lengths), group_size):
            group = parts_of_one[first : first + group_size]
            names = dict.fromkeys(name for of_rollout in group for name in of_rollout or {})
            for name in names:
                values = [of_rollout[name].value if name in (of_rollout or {}) else np.nan for of_rollout in group]
                for row, advantage in enumerate(in_group(np.array([values]))[0], start=first):
                    part = (parts_of_one[row] or {}).get(name)
                    if part is not None:
                        tokens = part.tokens(lengths[row])
                        advantages[row, tokens] += weight * (1 - whole) * advantage
    return advantages


def in_group(values: np.ndarray) -> np.ndarray:
    """(groups, rollouts), each group with mean 0 and deviation 1; 0 where a value is NaN or alone.

    >>> in_group(np.array([[1.0, 3.0, np.nan]])).round(3)
    array([[-0.707,  0.707,  0.   ]])
    """
    known = ~np.isnan(values)
    count = known.sum(axis=1, keepdims=True)
    filled = np.where(known, values, 0.0)
    mean = filled.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    off = np.where(known, values - mean, 0.0)
    deviation = np.sqrt(np.square(off).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    return off / (deviation + EPSILON)
