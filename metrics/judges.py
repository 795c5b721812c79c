"""Who listens: the ASRs that evaluation.py asks. A judge scores clips as `WhisperScorer.score` does.

The reward's own Whisper is a partial judge: the policy was trained to please it. `pocketsphinx` is one that
nobody here trained: the acoustic model of human English in its wheel, held to the words of the texts.
"""

import math
import re

import numpy as np

from common.cli import InputError
from speech.audio import audio_failure
from speech.error_rate import error_rate, language_code
from speech.whisper_scorer import Score, WhisperScorer


def load_judges(names: list[str], texts: list[str], languages: list[str], device: str) -> dict[str, object]:
    """Judges by name, "pocketsphinx" or a Whisper's name or path; ValueError for one that cannot judge these."""
    return {
        name: PocketsphinxJudge(texts, languages) if name == "pocketsphinx" else WhisperScorer(name, device)
        for name in names
    }


class PocketsphinxJudge:
    """CMU pocketsphinx with a grammar: any sequence of the words that occur in `texts`.

    Raises:
        ValueError: a text that is not English, or a word that pocketsphinx's dictionary lacks.
    """

    def __init__(self, texts: list[str], languages: list[str]):
        from pocketsphinx import Decoder  # an optional package: only this judge needs it

        foreign = sorted({language for language in languages if language_code(language) != "en"})
        if foreign:
            raise InputError(f"pocketsphinx judges English only, these texts are in {foreign[0]!r}; give a Whisper")
        # cmn=batch: normalised by the clip alone; the default carries over from one clip to the next.
        self.decoder = Decoder(lm=None, cmn="batch", loglevel="FATAL")
        words = sorted({word for text in texts for word in spoken_words(text)})
        unknown = [word for word in words if self.decoder.lookup_word(word) is None]
        if unknown:
            raise InputError(
                f"pocketsphinx's dictionary lacks {', '.join(map(repr, unknown[:5]))}"
                f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}; spell numbers out, "
                "leave those texts out, or judge by a Whisper"
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
        """What is said in a clip of 16 kHz; "" where nothing was recognised."""
        self.decoder.start_utt()
        pcm = (wav.clip(-1, 1) * 32767).astype("<i2").tobytes()
        self.decoder.process_raw(pcm, no_search=False, full_utt=True)
        self.decoder.end_utt()
        hyp = self.decoder.hyp()
        return hyp.hypstr if hyp else ""


def spoken_words(text: str) -> list[str]:
    """Words as a pronunciation dictionary writes them: "Don't stop!" is don't, stop."""
    words = re.findall(r"[\w']+", text.lower().replace("’", "'"))
    return [word.strip("'") for word in words if word.strip("'")]
