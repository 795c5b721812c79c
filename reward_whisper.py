"""The WER + NLL reward of arXiv 2509.18798: its formulas, and a script that scores one clip.

    python reward_whisper.py --audio a.wav --text "The quick brown fox." [--whisper large-v3]

prints Whisper's transcript of the clip, its error rate against the text, the negative log-likelihood (NLL) of the
text given the clip, and the reward made of both. In training `reward_models/whisper.py` calls `reward` for every
rollout; `speech/whisper_scorer.py` computes WER and NLL.

Differs from the paper: it writes the NLL as a sum over the text's tokens; every published code takes the mean,
as here (with a sum exp(-NLL / 3) is about 0 for any sentence). The authors' reward server is not public.
"""

import argparse
import math

from common.cli import (
    HelpFormatter,
    InputError,
    add_device,
    bad_input_exits,
    parse_strictly,
    pick_device,
    run_script,
    set_up_logging,
)
from speech.audio import load_audio
from speech.error_rate import CER_LANGUAGES, check_reference_text, language_code
from speech.tokens import SAMPLE_RATE
from speech.whisper_checkpoint import DEFAULT_WHISPER
from speech.whisper_scorer import Score, WhisperScorer

# arXiv 2509.18798, §4
ALPHA_WER, ALPHA_NLL = 3.0, 3.0
LAMBDA_WER, LAMBDA_NLL = 0.6, 0.4


def wer_reward(wer: float, alpha_wer: float = ALPHA_WER) -> float:
    """R_wer = 1 - tanh(alpha_wer * WER), in [0, 1] (arXiv 2509.18798, where it is R_CER).

    One word wrong in ten: 1 - tanh(3 * 0.1) = 1 - 0.2913 = 0.7087.
    """
    _check_measured("wer", wer)
    check_parameters(alpha_wer=alpha_wer)
    return 1.0 - math.tanh(alpha_wer * wer)


def nll_reward(nll: float, alpha_nll: float = ALPHA_NLL) -> float:
    """R_nll = exp(-NLL / alpha_nll), in (0, 1] (arXiv 2509.18798); NLL in nats, the mean over the text's tokens.

    NLL 0.6: exp(-0.6 / 3) = exp(-0.2) = 0.8187.
    """
    _check_measured("nll", nll)
    check_parameters(alpha_nll=alpha_nll)
    return math.exp(-nll / alpha_nll)


def harmonic_mean(r_wer: float, r_nll: float, lambda_wer: float = LAMBDA_WER, lambda_nll: float = LAMBDA_NLL) -> float:
    """R = (l_wer + l_nll) / (l_wer / R_wer + l_nll / R_nll): one bad term sinks the reward (arXiv 2509.18798).

    R_wer 0.5, R_nll 0.8: 1 / (0.6 / 0.5 + 0.4 / 0.8) = 1 / 1.7 = 0.5882. Either of them 0: 0, the limit.
    A weight of 0 leaves its term out, so (1, 0) and (0, 1) are the paper's single-reward ablations.
    """
    _check_measured("r_wer", r_wer)
    _check_measured("r_nll", r_nll)
    check_parameters(lambda_wer=lambda_wer, lambda_nll=lambda_nll)
    terms = [(weight, r) for weight, r in ((lambda_wer, r_wer), (lambda_nll, r_nll)) if weight > 0]
    if any(r == 0 for _, r in terms):
        return 0.0
    return (lambda_wer + lambda_nll) / sum(weight / r for weight, r in terms)


def reward(
    score: Score,
    truncated: bool = False,
    alpha_wer: float = ALPHA_WER,
    alpha_nll: float = ALPHA_NLL,
    lambda_wer: float = LAMBDA_WER,
    lambda_nll: float = LAMBDA_NLL,
) -> float:
    """The reward R of one clip, in [0, 1].

    Args:
        score: from `WhisperScorer.score`; a clip that is empty, silent or not finite has a `failure` and earns 0.
        truncated: whether the rollout was cut off before END; it earns 0 too.
    """
    if truncated or score.failure:
        return 0.0
    return harmonic_mean(wer_reward(score.wer, alpha_wer), nll_reward(score.nll, alpha_nll), lambda_wer, lambda_nll)


def check_parameters(
    alpha_wer: float = ALPHA_WER,
    alpha_nll: float = ALPHA_NLL,
    lambda_wer: float = LAMBDA_WER,
    lambda_nll: float = LAMBDA_NLL,
) -> None:
    """Raises InputError for a parameter of the reward that is out of range."""
    for name, alpha in (("alpha_wer", alpha_wer), ("alpha_nll", alpha_nll)):
        if not 0 < alpha < math.inf:
            raise InputError(f"{name}: must be finite and > 0 (got {alpha})")
    for name, weight in (("lambda_wer", lambda_wer), ("lambda_nll", lambda_nll)):
        if not 0 <= weight < math.inf:
            raise InputError(f"{name}: must be finite and >= 0 (got {weight})")
    if lambda_wer + lambda_nll == 0:
        raise InputError(f"lambda_wer, lambda_nll: must not both be 0 (got {lambda_wer} and {lambda_nll})")


def _check_measured(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: must be finite and >= 0 (got {value})")


# --- The script -------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--audio", required=True, help="the clip: WAV, FLAC, OGG or MP3, any sampling rate, any number of channels")
    add("--text", required=True, help="the reference text of the clip")
    add("--language", default="en", help="language of the text, as Whisper's code or name")
    add(
        "--whisper",
        default=DEFAULT_WHISPER,
        help=f"{DEFAULT_WHISPER} or another openai-whisper name, a .pt file, or a folder or hub id",
    )
    add_device(parser, "where Whisper runs")
    add("--alpha_wer", type=float, default=ALPHA_WER, help="steepness of R_wer = 1 - tanh(alpha_wer * WER)")
    add("--alpha_nll", type=float, default=ALPHA_NLL, help="scale of R_nll = exp(-NLL / alpha_nll), in nats")
    add("--lambda_wer", type=float, default=LAMBDA_WER, help="weight of R_wer in the harmonic mean")
    add("--lambda_nll", type=float, default=LAMBDA_NLL, help="weight of R_nll in the harmonic mean")
    return parse_strictly(parser, argv)


def main(args: argparse.Namespace) -> None:
    parameters = {name: getattr(args, name) for name in ("alpha_wer", "alpha_nll", "lambda_wer", "lambda_nll")}
    set_up_logging()
    with bad_input_exits():
        check_parameters(**parameters)
        check_reference_text(args.text, args.language)
        wav = load_audio(args.audio)
        scorer = WhisperScorer(args.whisper, pick_device(args.device))
        [score] = scorer.score([wav], [args.text], args.language)
    unit = "CER" if language_code(args.language) in CER_LANGUAGES else "WER"
    failure = f" ({score.failure}: not transcribed, R is 0)" if score.failure else ""
    print(f"audio      {len(wav) / SAMPLE_RATE:.2f} s{failure}")
    print(f"transcript {score.hyp_text}")
    print(f"{unit}        {score.wer:.4f} ({score.edits} edits / {score.ref_length})")
    print(f"NLL        {score.nll:.4f} nats per token")
    print(f"R_wer      {wer_reward(score.wer, args.alpha_wer):.4f}")
    print(f"R_nll      {nll_reward(score.nll, args.alpha_nll):.4f}")
    print(f"R          {reward(score, **parameters):.4f}")


if __name__ == "__main__":
    run_script(main, parse_args)
