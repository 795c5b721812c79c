"""Evaluation ASRs, the --judge of evaluation.py: what transcribes the clips and scores them against their texts.

The Whisper that a checkpoint's reward was made of flatters it: training optimises its score. An ASR that no reward
has used is held-out. `faster-whisper:base` is a real Whisper by code that no reward uses either; `pocketsphinx`, a
wheel with an acoustic model of human English, is limited here to the words of the texts.
"""

import functools
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from common.cli import InputError, first_line
from speech.audio import audio_failure, split_at_pauses
from speech.error_rate import SPACELESS_LANGUAGES, error_rate, language_code
from speech.policy import recorded
from speech.tokens import SAMPLE_RATE
from speech.whisper_checkpoint import weights_digest
from speech.whisper_scorer import Score, WhisperScorer, transcript_limit

FASTER_WHISPER = "faster-whisper:"  # before a name, a folder or a hub id
HELD_OUT = "held-out"
REWARD_ASR = "reward's ASR"
MAX_WORKERS = 4  # clips that faster-whisper transcribes at a time; each has memory of its own
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


@functools.cache
def _canonical(whisper: str) -> str:
    """One spelling for the same Whisper: a digest of its weights, or the name of a model that is not on this disk.

    A file or folder that cannot be read is told by its real path.
    """
    path = model_path(whisper)
    if not os.path.exists(path):
        return path.removeprefix("openai/whisper-").removeprefix("Systran/faster-whisper-")
    try:
        return weights_digest(path)
    except InputError:
        return os.path.realpath(path)


def model_path(name: str) -> str:
    """The path or name of an evaluation ASR's model, without the prefix that picks the code to run it."""
    return name.removeprefix(FASTER_WHISPER)


def asr_label(name: str, role: str) -> str:
    """A heading: "pocketsphinx (held-out)"."""
    return "round trip (own ASR)" if role == ROUND_TRIP else f"{name} ({role})"


def load_evaluation_asrs(
    names: list[str], texts: list[str], languages: list[str], device: str
) -> dict[str, EvaluationASR]:
    """Evaluation ASRs by name: "pocketsphinx", "faster-whisper:" and a model, or a Whisper's name, path or hub id.

    Raises:
        InputError: an unusable one.
    """
    return {name: load_evaluation_asr(name, texts, languages, device) for name in names}


def load_evaluation_asr(name: str, texts: list[str], languages: list[str], device: str) -> EvaluationASR:
    if name == "pocketsphinx":
        return PocketsphinxScorer(texts, languages)
    if name.startswith(FASTER_WHISPER):
        return FasterWhisperScorer(name, languages, device)
    scorer = WhisperScorer(name, device)
    scorer.check_languages(languages)
    return scorer


def word_timer(evaluation_asrs: dict[str, EvaluationASR]) -> str | None:
    """The first evaluation ASR that tells when each word of a text is spoken, a Whisper by openai-whisper, or None."""
    return next((name for name, asr in evaluation_asrs.items() if isinstance(asr, WhisperScorer)), None)


def transcript_score(text: str, hyp_text: str, language: str, failure: str | None) -> Score:
    """The Score of an ASR that gives transcripts only: its `nll` is NaN."""
    errors = error_rate(text, hyp_text, language)
    return Score(hyp_text, errors.rate, math.nan, errors.edits, errors.ref_length, failure)


class FasterWhisperScorer:
    """A Whisper by the package faster-whisper: beam search at temperature 0, without fallback to a higher one.

    As for OpenAI's own code a clip is padded to 30 s with silence. (faster-whisper pads the spectrogram with zeros,
    which are no silence.) A longer clip is cut at pauses.

    Args:
        name: "faster-whisper:" and the name of one of its models, a folder in CTranslate2's format, or a hub id.
    Raises:
        InputError: the package is not installed, no such model, or a language that the model does not know.
    """

    BEAM_SIZE = 5  # the default of faster-whisper and of OpenAI's command line
    WINDOW = 30 * SAMPLE_RATE
    MAX_TOKENS = 224  # of a window's transcript: half of the decoder's context, as in OpenAI's code

    def __init__(self, name: str, languages: list[str], device: str):
        self.workers = clips_at_a_time(device)
        self.model = load_faster_whisper(name, device)
        known = self.model.supported_languages
        unknown = sorted({language_code(language) for language in languages} - set(known))
        if unknown:
            raise InputError(
                f"--judge {name}: this Whisper does not know the language {unknown[0]!r}. Known: {', '.join(known)}"
            )

    def score(self, wavs: list[np.ndarray], texts: list[str], languages: list[str]) -> list[Score]:
        """As `WhisperScorer.score`, with its limit on the length of a transcript, but `nll` is NaN."""
        clips = list(zip(wavs, texts, languages, strict=True))
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda clip: self.score_clip(*clip), clips))

    def score_clip(self, wav: np.ndarray, text: str, language: str) -> Score:
        failure = audio_failure(wav)
        text_ids = self.model.hf_tokenizer.encode(text, add_special_tokens=False).ids
        hyp_text = "" if failure else self.transcribe(wav, language_code(language), transcript_limit(len(text_ids)))
        return transcript_score(text, hyp_text, language, failure)

    def transcribe(self, wav: np.ndarray, language: str, max_tokens: int = MAX_TOKENS) -> str:
        """The transcript of a clip at 16 kHz; at most `max_tokens` tokens of each 30 s."""
        windows = split_at_pauses(wav, self.WINDOW) if len(wav) > self.WINDOW else [wav]
        hyps = []
        for window in windows:
            padded = np.pad(window.clip(-1, 1).astype(np.float32), (0, self.WINDOW - len(window)))
            segments, _ = self.model.transcribe(
                padded,
                language=language,
                beam_size=self.BEAM_SIZE,
                temperature=0.0,
                condition_on_previous_text=False,
                without_timestamps=True,
                max_new_tokens=min(max_tokens, self.MAX_TOKENS),
            )
            hyps += [segment.text.strip() for segment in segments]
        return ("" if language in SPACELESS_LANGUAGES else " ").join(hyps).strip()


def load_faster_whisper(name: str, device: str):
    """faster-whisper's WhisperModel: float32 on a CPU, float16 on a GPU; InputError for an unusable one."""
    try:
        import faster_whisper  # an optional package, needed only here
    except ModuleNotFoundError as error:
        raise InputError(
            f"--judge {name}: needs a package that is not installed ({error.name}). Install it: "
            "pip install -r requirements-asr.txt"
        ) from error
    path = model_path(name)
    accepted = (
        f"{FASTER_WHISPER} and a name such as large-v3, a folder in CTranslate2's format (model.bin, config.json, "
        "tokenizer.json, vocabulary), or a hub id"
    )
    if os.path.exists(path):
        missing = [file for file in ("model.bin", "config.json", "tokenizer.json") if not (Path(path) / file).is_file()]
        if missing:
            raise InputError(
                f"--judge {name}: no CTranslate2 folder, {', '.join(missing)} missing. Accepted: {accepted}"
            )
    elif "/" not in path and path not in faster_whisper.available_models():
        names = ", ".join(faster_whisper.available_models())
        raise InputError(f"--judge {name}: no such model. Accepted: {accepted}. Names: {names}")
    kind, _, index = device.partition(":")
    workers = clips_at_a_time(device)
    try:
        return faster_whisper.WhisperModel(
            path,
            device=kind,
            device_index=int(index or 0),
            compute_type="float16" if kind == "cuda" else "float32",
            cpu_threads=torch.get_num_threads() // workers,
            num_workers=workers,
        )
    except (OSError, RuntimeError, ValueError) as error:  # no such hub id, offline; a broken file; no such device
        raise InputError(f"--judge {name}: cannot be loaded ({first_line(error)}). Accepted: {accepted}") from error


def clips_at_a_time(device: str) -> int:
    """On a CPU two clips on one thread each take 0.8 of the time of one after the other on two threads."""
    if device != "cpu":
        return 1
    threads = torch.get_num_threads()
    return max(workers for workers in range(1, MAX_WORKERS + 1) if threads % workers == 0)


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
        # cmn=batch: a clip's features are normalised by their own mean. What still carries over from clip to clip is
        # told in docs/evaluation.md.
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
            scores.append(transcript_score(text, hyp_text, language, failure))
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
