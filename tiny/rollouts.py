"""Samples of the supervised policy, and what OpenAI's Whisper tiny.en hears in them: data of the reward ASR.

    python -m tiny.whisper_weights tiny.en build/whisper-tiny.en --window_s 8
    python -m tiny.build --stage rollouts

What an ASR has not learnt to find wrong, RL cannot mend: the reward ASR that knew recordings, and words put together
from them, found no error in half of the policy's samples, of whose words Whisper base has a third wrong
(docs/experiments/reward_asr.md). So it learns from the samples too, with transcripts by tiny.en, which
evaluates no policy of this setup: sequence-level knowledge distillation (Kim and Rush, arXiv 1606.07947).
"""

import logging
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import set_seed

from common.cli import write_whole
from speech.codec import SpeechCodec, decode_rollouts
from speech.policy import Policy
from speech.text_marks import plain_text
from speech.tokens import tts_prompt
from speech.whisper_scorer import WhisperScorer
from tiny.corpus import NUMBERS

logger = logging.getLogger(__name__)

TEMPERATURES = (0.8, 1.0, 1.0, 1.2)  # of the batches in turn
BATCH = 128  # rollouts; they are saved after each
MAX_LENGTH = 240  # tokens of a rollout with its prompt
DIGITS = dict(zip("3 5 6 7 9 10 11 20 30 40".split(), NUMBERS, strict=True))


@dataclass(frozen=True)
class Rollout:
    """A sample of the policy.

    Attributes:
        codes: none, where the policy ended at once.
        heard: the teacher's transcript.
    """

    text: str
    codes: list[int]
    heard: str


def sample_rollouts(
    texts: list[str], policy: Policy, codec: SpeechCodec, teacher: WhisperScorer, seed: int, file: Path
) -> list[Rollout]:
    """One rollout of each text as the teacher hears it; those that are in `file` already are kept."""
    rollouts = pickle.loads(file.read_bytes()) if file.exists() else []
    if len(rollouts) == len(texts):
        return rollouts
    starts = range(0, len(texts), BATCH)
    done = len(rollouts) // BATCH
    for number in tqdm(starts[done:], "rollouts", initial=done, total=len(starts), disable=None):
        part, batch = texts[number : number + BATCH], number // BATCH
        set_seed(seed + batch)
        temperature = TEMPERATURES[batch % len(TEMPERATURES)]
        samples = policy.sample(
            [tts_prompt(text) for text in part], temperature=temperature, max_length=MAX_LENGTH, batch_size=BATCH // 2
        )
        plain = [plain_text(text) for text in part]
        scores = teacher.score(decode_rollouts(codec, [sample.codes for sample in samples]), plain)
        rollouts = rollouts[:number] + [
            Rollout(*columns)
            for columns in zip(plain, [s.codes for s in samples], [s.hyp_text for s in scores], strict=True)
        ]
        content = pickle.dumps(rollouts)
        write_whole(file, lambda temporary, content=content: temporary.write_bytes(content))
        wer = sum(score.edits for score in scores) / sum(score.ref_length for score in scores)
        logger.info(
            "rollouts: %d of %d, temperature %g, WER %.1f %%", len(rollouts), len(texts), temperature, 100 * wer
        )
    return rollouts


def transcript(rollout: Rollout) -> str | None:
    """What the ASR is to hear, numbers in letters as the texts have them; None where the teacher is not to be trusted.

    >>> transcript(Rollout("Helen broke seven lamps.", [1], "helen broke 7 lambs."))
    'Helen broke seven lambs.'
    >>> transcript(Rollout("He left.", [1], "He left. He left. He left."))  # a loop
    """
    if not rollout.codes or len(rollout.heard.split()) > 1.5 * len(rollout.text.split()):
        return None
    text = re.sub(r"\d+", lambda number: DIGITS.get(number[0], number[0]), rollout.heard)
    return text[:1].upper() + text[1:]
