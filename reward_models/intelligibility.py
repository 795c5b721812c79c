"""The Whisper reward (arXiv 2509.18798) as TRL calls it; its formulas are in reward_whisper.py."""

import numpy as np

from reward_whisper import harmonic_mean, nll_reward, wer_reward


class WhisperReward:
    """R of eq. harmonic_mean, in [0, 1].

    A rollout that failed earns 0, the lowest: it never ended, has no codes, is silent, or holds NaN.

    Args:
        listener: see reward_models/rollouts.py.
        alpha_wer, alpha_nll, lambda_wer, lambda_nll: the paper's 3, 3, 0.6, 0.4.
    """

    __name__ = "whisper"
    needs = ("codec", "whisper")

    def __init__(
        self, listener, alpha_wer: float = 3.0, alpha_nll: float = 3.0, lambda_wer: float = 0.6, lambda_nll: float = 0.4
    ):
        self.listener = listener
        self.alpha_wer, self.alpha_nll = alpha_wer, alpha_nll
        self.lambda_wer, self.lambda_nll = lambda_wer, lambda_nll
        # Bad parameters are to be found now, not after the first batch was sampled.
        harmonic_mean(wer_reward(0.5, alpha_wer), nll_reward(0.5, alpha_nll), lambda_wer, lambda_nll)

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float]:
        rollouts = self.listener.hear(completion_ids, text, language, log_metric)
        r_wer = [wer_reward(score.wer, self.alpha_wer) for score in rollouts.scores]
        r_nll = [nll_reward(score.nll, self.alpha_nll) for score in rollouts.scores]
        for name, values in (("r_wer", r_wer), ("r_nll", r_nll)):
            log_metric(f"{name}/mean", float(np.mean(values)))
            log_metric(f"{name}/std", float(np.std(values)))
            log_metric(f"{name}/group_std", float(rollouts.grouped(values).std(axis=1).mean()))
        return [
            0.0 if failure else harmonic_mean(a, b, self.lambda_wer, self.lambda_nll)
            for a, b, failure in zip(r_wer, r_nll, rollouts.failures, strict=True)
        ]
