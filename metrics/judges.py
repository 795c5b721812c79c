"""Evaluation ASRs, the --judge of evaluation.py: what transcribes the clips and scores them against their texts.

The Whisper that a checkpoint's reward was made of flatters it: training optimises its score. An ASR that no reward
has used is held-out. `pocketsphinx` is one: a wheel with an acoustic model of human English, limited here to the words
of the texts.
"""

import math
import os
import re
from typing import Protocol

import numpy as np

from common.cli import InputError
from speech.audio import audio_failure
from speech.error_rate import error_rate, language_code
from speech.policy import recorded
from speech.whisper_scorer import Score, WhisperScorer

HELD_OUT = "held-out"
REWARD_ASR = "reward's ASR"
ROUND_TRIP = "round trip"  # the checkpoint itself, transcribing its own speech (--cycle)


class EvaluationASR(Protocol):
    def score(self, wavs: list[np.ndarray], texts: list[str], languages: list[str]) -> list[Score]:
        """As `WhisperScorer.score`: one score per clip, in their order."""


def asr_roles(names: list[str], reward_whisper: str, models: list[str]) -> dict[str, str]:
    """The role of each evaluation ASR, HELD_OUT or REWARD_ASR; the held-out ones first.

    Args:
        names: of the evaluation ASRs.
        reward_whisper: name, path or hub id of the reward's Whisper (--whisper).
        models: paths of the checkpoints; the Whisper that their run.json records was used by a reward too.
    """
    used = {_canonical(reward_whisper)}
    for model in models:
        recorded_whisper = recorded(model, "whisper")
        if recorded_whisper is not None:
            used.add(_canonical(recorded_whisper))
    roles = {name: REWARD_ASR if _canonical(name) in used else HELD_OUT for name in names}
    return dict(sorted(roles.items(), key=lambda entry: entry[1] != HELD_OUT))


def _canonical(whisper: str) -> str:
    """One spelling for the same Whisper: a file's or folder's real path, or a model's name without its Hub prefix."""
    return os.path.realpath(whisper) if os.path.exists(whisper) else whisper.removeprefix("openai/whisper-")


def asr_label(name: str, role: str) -> str:
    """A heading: "pocketsphinx (held-out)"."""
    return "round trip (own ASR)" if role == ROUND_TRIP else f"{name} ({role})"


def load_evaluation_asrs(
    names: list[str], texts: list[str], languages: list[str], device: str
) -> dict[str, EvaluationASR]:
    """Evaluation ASRs by name: "pocketsphinx", or a Whisper's name, path or hub id; InputError for an unusable one."""
    return {
        name: PocketsphinxScorer(texts, languages) if name == "pocketsphinx" else WhisperScorer(name, device)
        for name in names
    }


class PocketsphinxScorer:
    """CMU pocketsphinx with a grammar: any sequence of the words that occur in `texts`.

    Raises:
        InputError: a text that is not English, or a word that pocketsphinx's dictionary lacks.
    """

    def __init__(self, texts: list[str], languages: list[str]):
        from pocketsphinx import Decoder  # an optional package, needed only here

        foreign = sorted({language for language in languages if language_code(language) != "en"})
        if foreign:
            raise InputError(
                f"--judge pocketsphinx: it knows English only (got texts in {foreign[0]!r}). Use a Whisper"
            )
        # cmn=batch: normalised by the clip alone; the default carries over from one clip to the next.
        self.decoder = Decoder(lm=None, cmn="batch", loglevel="FATAL")
        words = sorted({word for text in texts for word in dictionary_words(text)})
        unknown = [word for word in words if self.decoder.lookup_word(word) is None]
        if unknown:
            raise InputError(
                f"--judge pocketsphinx: its dictionary lacks {', '.join(map(repr, unknown[:5]))}"
                f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}. Spell numbers out, "
                "leave those texts out, or use a Whisper"
            )
        grammar = f"#JSGF V1.0; grammar g; public <s> = ( {' | '.join(words)} )+ ;"
        self.decoder.add_jsgf_string("texts", grammar)
        self.decoder.activate_search("texts")

    def score(self, wavs: list[np.ndarray], texts: list[str], languages: list[str]) -> list[Score]:
        """As `WhisperScorer.score`, except that `nll` is NaN: pocketsphinx has no such number."""
        scores = []
        for wav, text, language in zip(wavs, texts, languages, strict=True):
            failure = audio_failure(wav)
            hyp_text = "" if failure else self.transcribe(wav)
            errors = error_rate(text, hyp_text, language)
            scores.append(Score(hyp_text, errors.rate, math.nan, errors.edits, errors.ref_length, failure))
        return scores

    def transcribe(self, wav: np.ndarray) -> str:
        """The transcript of a clip at 16 kHz; "" where nothing was recognised."""
        self.decoder.start_utt()
        pcm = (wav.clip(-1, 1) * 32767).astype("<i2").tobytes()
        self.decoder.process_raw(pcm, no_search=False, full_utt=True)
        self.decoder.end_utt()
        hyp = self.decoder.hyp()
        return hyp.hypstr if hyp else ""


def dictionary_words(text: str) -> list[str]:
    """Words as a pronunciation dictionary writes them: "Don't stop!" is don't, stop."""
    words = re.findall(r"[\w']+", text.lower().replace("’", "'"))
    return [word.strip("'") for word in words if word.strip("'")]
