"""The WER + NLL reward of arXiv 2509.18798: the formulas, and the Whisper that feeds them.

    python reward_whisper.py --audio a.wav --text "The quick brown fox." [--whisper large-v3]

prints, for one clip, what Whisper heard, its error rate, the negative log-likelihood (NLL) of the true text,
and the reward made of both.

Differs from the paper: it writes the NLL as a sum over the text's tokens; every published code takes the mean,
as here (with a sum exp(-NLL / 3) is about 0 for any sentence). The authors' reward server is not public.
"""

import argparse
import difflib
import math
import os
import pickle
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
import whisper
from torch.nn.utils.rnn import pad_sequence
from whisper.audio import HOP_LENGTH as MEL_HOP_LENGTH
from whisper.audio import N_FFT, mel_filters
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer
from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE, Tokenizer, get_tokenizer

from audio import audio_failure, load_audio, split_at_pauses
from speech_tokens import SAMPLE_RATE
from whisper_decoding import Reading, WindowReader

# Written without spaces between words, so a "word" error rate means nothing; Whisper writes them without a
# leading space (openai/whisper#2112).
SPACELESS_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "km", "yue"})
# Scored by characters. Korean has spaces, but writers disagree on where, and arXiv 2509.18798 uses CER for it.
CER_LANGUAGES = SPACELESS_LANGUAGES | {"ko"}

MAX_NLL = 20.0  # nats per token, the worst score: a uniform guess over Whisper's vocabulary is ln 51,866 = 10.9
SAMPLES_PER_FEATURE = 2 * MEL_HOP_LENGTH  # 20 ms: two mel frames of 10 ms make one encoder position

# Keys and values of the sound outweigh all else in a batch: 17 windows of large-v3 in float16 (246 MB each) fit, and
# 8 in float32. Small models: 64 clips on tiny/ take 0.56 s in batches of 16, 0.50 of 32, 0.49 of 64 (one CPU thread).
BATCH_BYTES = 4 << 30
MAX_BATCH_SIZE = 32  # windows


# --- The formulas -----------------------------------------------------------------------------------------


def wer_reward(wer: float, alpha_wer: float = 3.0) -> float:
    """R_wer = 1 - tanh(alpha_wer * WER), in [0, 1] (arXiv 2509.18798, where it is R_CER).

    One word wrong in ten: 1 - tanh(3 * 0.1) = 1 - 0.2913 = 0.7087.
    """
    if not (0 <= wer < math.inf and 0 < alpha_wer < math.inf):
        raise ValueError(f"wer must be finite and >= 0, alpha_wer finite and > 0, got {wer} and {alpha_wer}")
    return 1.0 - math.tanh(alpha_wer * wer)


def nll_reward(nll: float, alpha_nll: float = 3.0) -> float:
    """R_nll = exp(-NLL / alpha_nll), in (0, 1] (arXiv 2509.18798); NLL in nats, the mean over the text's tokens.

    NLL 0.6: exp(-0.6 / 3) = exp(-0.2) = 0.8187.
    """
    if not (0 <= nll < math.inf and 0 < alpha_nll < math.inf):
        raise ValueError(f"nll must be finite and >= 0, alpha_nll finite and > 0, got {nll} and {alpha_nll}")
    return math.exp(-nll / alpha_nll)


def harmonic_mean(r_wer: float, r_nll: float, lambda_wer: float = 0.6, lambda_nll: float = 0.4) -> float:
    """R = (l_wer + l_nll) / (l_wer / R_wer + l_nll / R_nll): one bad term sinks the reward (arXiv 2509.18798).

    R_wer 0.5, R_nll 0.8: 1 / (0.6 / 0.5 + 0.4 / 0.8) = 1 / 1.7 = 0.5882. Either of them 0: 0, the limit.
    A weight of 0 leaves its term out, so (1, 0) and (0, 1) are the paper's single-reward ablations.
    """
    if not (0 <= lambda_wer < math.inf and 0 <= lambda_nll < math.inf and lambda_wer + lambda_nll > 0):
        raise ValueError(f"weights must be finite, >= 0 and not both 0, got {lambda_wer} and {lambda_nll}")
    if not (0 <= r_wer < math.inf and 0 <= r_nll < math.inf):
        raise ValueError(f"rewards must be finite and >= 0, got {r_wer} and {r_nll}")
    terms = [(weight, r) for weight, r in ((lambda_wer, r_wer), (lambda_nll, r_nll)) if weight > 0]
    if any(r == 0 for _, r in terms):
        return 0.0
    return (lambda_wer + lambda_nll) / sum(weight / r for weight, r in terms)


# --- Text and error rates ---------------------------------------------------------------------------------


def language_code(language: str) -> str:
    """Whisper's code of a language: 'en', 'EN' and 'English' are 'en'. ValueError if it knows none."""
    name = language.lower()
    if name in LANGUAGES:
        return name
    if name in TO_LANGUAGE_CODE:
        return TO_LANGUAGE_CODE[name]
    near = difflib.get_close_matches(name, [*LANGUAGES, *TO_LANGUAGE_CODE], n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown language {language!r}.{hint} Known: {', '.join(sorted(LANGUAGES))}")


@lru_cache(maxsize=2)
def _normalizer(english: bool) -> BasicTextNormalizer | EnglishTextNormalizer:
    return EnglishTextNormalizer() if english else BasicTextNormalizer()


@lru_cache(maxsize=1024)  # a text is compared with all of its group's rollouts
def normalize_text(text: str, language: str) -> str:
    """The text as it is compared: Whisper's own English normaliser for English, its basic one otherwise.

    The English one leaves a "." where a text ends in an ellipsis; what holds no letter or digit is dropped here,
    or it would be a word. It also joins numbers: "one two" is "12", one word. The basic one turns combining
    vowel signs (Hindi, Thai …) into spaces, in reference and transcript alike.
    """
    words = _normalizer(language_code(language) == "en")(text).split()
    return " ".join(word for word in words if re.search(r"\w", word))


class ErrorRate(NamedTuple):
    """WER, or CER for CER_LANGUAGES, with its counts. Can exceed 1: insertions count, and nothing bounds them."""

    rate: float
    substitutions: int
    deletions: int
    insertions: int
    ref_length: int  # words, or characters

    @property
    def edits(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def error_rate(ref: str, hyp: str, language: str) -> ErrorRate:
    """Edits between the normalised texts over the reference's length: 'a b c' heard as 'a x' is 2 / 3.

    Characters in place of words, and all spaces ignored, for CER_LANGUAGES. An empty `hyp` is 1.

    Raises:
        ValueError: nothing is left of `ref` after normalisation; such a text cannot be scored.
    """
    language = language_code(language)
    ref_text, hyp_text = normalize_text(ref, language), normalize_text(hyp, language)
    if not ref_text:
        raise ValueError(
            f"reference text {ref!r} is empty after Whisper's normalisation ({language}): drop it from the data set"
        )
    if language in CER_LANGUAGES:
        output = jiwer.process_characters("".join(ref_text.split()), "".join(hyp_text.split()))
    else:
        output = jiwer.process_words(ref_text, hyp_text)
    counts = (output.substitutions, output.deletions, output.insertions)
    ref_length = output.hits + output.substitutions + output.deletions
    return ErrorRate(sum(counts) / ref_length, *counts, ref_length)


def corpus_error_rate(refs: list[str], hyps: list[str], language: str) -> ErrorRate:
    """All edits over all reference words (or characters): long texts weigh more, unlike in a mean of rates."""
    if len(refs) != len(hyps) or not refs:
        raise ValueError(f"expected as many transcripts as references, at least one: {len(hyps)} and {len(refs)}")
    items = [error_rate(ref, hyp, language) for ref, hyp in zip(refs, hyps, strict=True)]
    _, substitutions, deletions, insertions, ref_length = map(sum, zip(*items, strict=True))
    return ErrorRate(
        (substitutions + deletions + insertions) / ref_length, substitutions, deletions, insertions, ref_length
    )


def split_reference(text: str, hyps: list[str], language: str) -> list[str]:
    """Divide a text over the consecutive transcripts of a clip: each gets the stretch that aligns with it.

    'one two three four' over ['one too', 'four'] is ['one two three', 'four'].
    """
    if len(hyps) == 1:
        return [text.strip()]
    spaceless = language in SPACELESS_LANGUAGES
    ref_units = list(text.strip()) if spaceless else text.split()
    hyp_units = [list(hyp) if spaceless else hyp.split() for hyp in hyps]

    def keys(units: list[str]) -> str:
        # Not normalize_text: it merges and splits words, and here every raw word needs exactly one key.
        return " ".join(re.sub(r"\W", "", unit).casefold() or "·" for unit in units)

    [alignment] = jiwer.process_words(keys(ref_units), keys(list(chain(*hyp_units)))).alignments
    ref_after = [0]  # ref_after[n]: the reference units used up by the first n units heard
    for op in alignment:
        if op.type == "delete":
            ref_after[-1] = op.ref_end_idx
        for n in range(op.hyp_end_idx - op.hyp_start_idx):
            ref_after.append(min(op.ref_start_idx + n + 1, op.ref_end_idx))
    cuts = [0, *(ref_after[n] for n in accumulate(map(len, hyp_units)))]
    joiner = "" if spaceless else " "
    return [joiner.join(ref_units[a:b]) for a, b in pairwise(cuts)]


# --- Whisper ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What Whisper says of one clip. `wer` is the CER for CER_LANGUAGES; `nll` in nats per token, <= MAX_NLL."""

    hyp_text: str
    wer: float
    nll: float
    edits: int
    ref_length: int
    failure: str | None = None  # 'empty', 'silent', 'non_finite': scored without Whisper, WER 1 and MAX_NLL


def load_whisper(model_id_or_path: str | os.PathLike, device: torch.device, dtype: torch.dtype) -> whisper.Whisper:
    """An openai-whisper model by name ('large-v3', also 'openai/whisper-large-v3') or from a .pt file.

    Raises:
        ValueError: no such name or file, not an openai-whisper checkpoint, or the download failed.
    """
    name = os.fspath(model_id_or_path).removeprefix("openai/whisper-")
    if name not in whisper.available_models() and not os.path.isfile(name):
        raise ValueError(
            f"{name}: no such Whisper. Give the path of an openai-whisper .pt file, or one of: "
            + ", ".join(whisper.available_models())
        )
    try:
        model = whisper.load_model(name, device="cpu")
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{name}: cannot be loaded as an openai-whisper model ({why})") from error
    for module in model.modules():
        # Whisper casts weights on the fly but computes its LayerNorms in float32: model.half() would break those.
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Embedding)):
            module.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def log_mel_spectrograms(wavs: torch.Tensor, n_mels: int) -> torch.Tensor:
    """Whisper's log-mel spectrogram of each waveform, shape (rows, n_mels, n_samples // 160), on its device.

    `whisper.log_mel_spectrogram` takes its floor from the loudest value of all it is given, so it cannot be given
    a batch: a quiet clip would lose what lies far below its neighbours.

    Args:
        wavs: float32 at 16 kHz, shape (rows, n_samples).
    """
    window = torch.hann_window(N_FFT, device=wavs.device)
    spectrum = torch.stft(wavs, N_FFT, MEL_HOP_LENGTH, window=window, return_complex=True)[..., :-1].mT
    power = spectrum.real.square() + spectrum.imag.square()
    log_mel = (power @ mel_filters(wavs.device, n_mels).T).clamp(min=1e-10).log10().mT
    log_mel = torch.maximum(log_mel, log_mel.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (log_mel + 4.0) / 4.0


class WhisperScorer:
    """Transcripts and NLLs from one encoder pass, in batches; equal to scoring each clip alone.

    Args:
        model_id_or_path: see `load_whisper`. Any ModelDimensions, also a window shorter than 30 s.
        device: CUDA if there is one; 'cuda' is the process's current device.
        dtype: float16 or float32; float16 on a GPU and float32 elsewhere if not given.
        batch_size: windows a forward pass; as many as BATCH_BYTES and MAX_BATCH_SIZE allow if not given.
    """

    def __init__(
        self,
        model_id_or_path: str | os.PathLike,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {device}: this machine or this PyTorch has no CUDA; use 'cpu'")
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        if self.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"openai-whisper decodes in float16 or float32, not {self.dtype}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = load_whisper(model_id_or_path, self.device, self.dtype)
        dims = self.model.dims
        window_bytes = 2 * dims.n_text_layer * dims.n_audio_ctx * dims.n_text_state * self.dtype.itemsize
        self.batch_size = batch_size or max(1, min(MAX_BATCH_SIZE, BATCH_BYTES // window_bytes))
        self.window = dims.n_audio_ctx * SAMPLES_PER_FEATURE  # samples: 480,000 = 30 s for OpenAI's

    def score(self, wavs: list[np.ndarray], texts: list[str], languages: list[str] | str = "en") -> list[Score]:
        """Score each waveform against the text it should carry.

        A transcript is cut at 2 * (tokens of the text) + 8 tokens a window, so that a loop cannot hold up the run.
        The NLL is that of the text as it is written, with case and punctuation: what Whisper was trained to
        write. A clip longer than the window is cut at pauses, and each piece is given the stretch of the text
        that aligns with its transcript, and an end of its own.

        Args:
            wavs: float mono at 16 kHz, shape (n_samples,) each. Empty, silent and non-finite ones are the
                policy's failures: they get the stated score, not an exception.
            texts: the references, one for each.
            languages: a Whisper code or name, one for all or one for each.
        Raises:
            ValueError, TypeError: lengths differ, a text is empty once normalised, an unknown language, or a
                waveform is not a one-dimensional float array.
        """
        wavs, languages = self._check(wavs, languages)
        if isinstance(texts, str) or len(texts) != len(wavs):
            raise ValueError(f"expected one text for each of the {len(wavs)} waveforms, got {texts!r:.80}")
        nothing_heard = [error_rate(text, "", language) for text, language in zip(texts, languages, strict=True)]
        failures = [audio_failure(wav) for wav in wavs]
        scores = [
            Score("", errors.rate, MAX_NLL, errors.edits, errors.ref_length, failure)
            for failure, errors in zip(failures, nothing_heard, strict=True)
        ]
        text_ids = [self._text_ids(*item) for item in zip(texts, languages, strict=True)]
        max_tokens = [2 * len(ids) + 8 for ids in text_ids]
        for i, features, readings in self._listen(wavs, failures, languages, text_ids, max_tokens):
            language, drafts = languages[i], [text_ids[i]]
            hyps = self._write(readings, language)
            if len(hyps) > 1:  # only now can be said which stretch of the text is in which window
                drafts = [self._text_ids(share, language) for share in split_reference(texts[i], hyps, language)]
                readings = self._read(features, language, drafts, [0] * len(drafts))
            hyp_text = _join(hyps, language)
            errors = error_rate(texts[i], hyp_text, language)
            nll = _mean_nll(readings, drafts)
            scores[i] = Score(hyp_text, errors.rate, nll, errors.edits, errors.ref_length)
        return scores

    def transcribe(
        self, wavs: list[np.ndarray], languages: list[str] | str = "en", max_tokens: int | None = None
    ) -> list[str]:
        """Greedy transcripts, '' for empty, silent and non-finite waveforms; arguments as for `score`.

        Args:
            max_tokens: a window's most, half the decoder's context (224 for OpenAI's) if not given.
        """
        wavs, languages = self._check(wavs, languages)
        limit = self.model.dims.n_text_ctx // 2 if max_tokens is None else max_tokens
        if limit < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        texts, failures = [""] * len(wavs), [audio_failure(wav) for wav in wavs]
        for i, _, readings in self._listen(wavs, failures, languages, [[]] * len(wavs), [limit] * len(wavs)):
            texts[i] = _join(self._write(readings, languages[i]), languages[i])
        return texts

    def _check(self, wavs: list[np.ndarray], languages: list[str] | str) -> tuple[list[np.ndarray], list[str]]:
        languages = [languages] * len(wavs) if isinstance(languages, str) else languages
        if len(languages) != len(wavs):
            raise ValueError(f"expected one language for each of the {len(wavs)} waveforms, got {len(languages)}")
        for i, wav in enumerate(wavs):
            if not (isinstance(wav, np.ndarray) and wav.ndim == 1 and np.issubdtype(wav.dtype, np.floating)):
                came = f"{wav.dtype} array of shape {wav.shape}" if isinstance(wav, np.ndarray) else type(wav).__name__
                raise TypeError(f"waveform {i}: expected a float numpy array of shape (n_samples,), got {came}")
        codes = [language_code(language) for language in languages]
        for code in set(codes):
            self._tokenizer(code)  # raises before any work
        return [np.ascontiguousarray(wav, dtype=np.float32) for wav in wavs], codes

    def _tokenizer(self, language: str) -> Tokenizer:
        model = self.model
        known = list(LANGUAGES)[: model.num_languages] if model.is_multilingual else ["en"]
        if language not in known:
            raise ValueError(f"this Whisper does not know the language {language!r}. It knows: {', '.join(known)}")
        return get_tokenizer(
            model.is_multilingual, num_languages=model.num_languages, language=language, task="transcribe"
        )

    def _text_ids(self, text: str, language: str) -> list[int]:
        text = text.strip()
        # A text that spells a special token is text.
        written = text if language in SPACELESS_LANGUAGES or not text else " " + text
        return self._tokenizer(language).encode(written, disallowed_special=())

    def _listen(
        self,
        wavs: list[np.ndarray],
        failures: list[str | None],
        languages: list[str],
        drafts: list[list[int]],
        max_tokens: list[int],
    ) -> Iterator[tuple[int, torch.Tensor, list[Reading]]]:
        """Of each waveform without a failure: its index, and the features and readings of its windows.

        Those of a waveform of several windows are read without a draft.
        """
        pieces = {
            # Clipped as in a file or a loudspeaker: what is finite but huge would overflow in the mel.
            i: split_at_pauses(wav.clip(-1.0, 1.0), self.window) if len(wav) > self.window else [wav.clip(-1.0, 1.0)]
            for i, (wav, failure) in enumerate(zip(wavs, failures, strict=True))
            if failure is None
        }
        batches: list[list[int]] = []
        room = 0
        # One language a batch, for one prompt; like lengths together, as they end together.
        for i in sorted(pieces, key=lambda i: (languages[i], max_tokens[i], len(drafts[i]), len(wavs[i]))):
            if not batches or len(pieces[i]) > room or languages[batches[-1][0]] != languages[i]:
                batches.append([])
                room = self.batch_size
            batches[-1].append(i)
            room -= len(pieces[i])
        for batch in batches:
            owners = [i for i in batch for _ in pieces[i]]  # the waveform of each window
            features = self._encode([piece for i in batch for piece in pieces[i]])
            window_drafts = [drafts[i] if len(pieces[i]) == 1 else [] for i in owners]
            readings = self._read(features, languages[batch[0]], window_drafts, [max_tokens[i] for i in owners])
            for i in batch:
                first = owners.index(i)
                windows = slice(first, first + len(pieces[i]))
                yield i, features[windows], readings[windows]

    @torch.inference_mode()
    def _encode(self, wavs: list[np.ndarray]) -> torch.Tensor:
        """Features, shape (len(wavs), n_audio_ctx, n_audio_state), of waveforms of at most `window` samples."""
        features = []
        for first in range(0, len(wavs), self.batch_size):
            batch = [torch.from_numpy(wav) for wav in wavs[first : first + self.batch_size]]
            padded = pad_sequence(batch, batch_first=True).to(self.device)
            # The *waveform* is padded, as in Whisper's training; a mel padded with zeros is not silence.
            padded = F.pad(padded, (0, self.window - padded.shape[1]))
            mels = log_mel_spectrograms(padded, self.model.dims.n_mels)
            features.append(self.model.encoder(mels.to(self.dtype)))
        return torch.cat(features)

    def _read(
        self, features: torch.Tensor, language: str, drafts: list[list[int]], max_tokens: list[int]
    ) -> list[Reading]:
        """`WindowReader.read`, in batches."""
        reader = WindowReader(self.model, language)
        batches = [slice(first, first + self.batch_size) for first in range(0, len(drafts), self.batch_size)]
        return list(chain(*(reader.read(features[part], drafts[part], max_tokens[part]) for part in batches)))

    def _write(self, readings: list[Reading], language: str) -> list[str]:
        """The transcripts, as text."""
        tokenizer = self._tokenizer(language)
        # Specials have the ids from `eot` on; the library forbids only some of them and would spell them out.
        return [tokenizer.decode([t for t in reading.tokens if t < tokenizer.eot]).strip() for reading in readings]


def _mean_nll(readings: list[Reading], texts: list[list[int]]) -> float:
    """Nats per token over all windows of a clip, an end-of-text each included; at most MAX_NLL.

    Tokens beyond the decoder's context cannot be in this much sound: they count MAX_NLL each.
    """
    num_tokens = sum(len(ids) + 1 for ids in texts)
    unread = num_tokens - sum(reading.nll_tokens for reading in readings)
    return min((sum(reading.nll for reading in readings) + MAX_NLL * unread) / num_tokens, MAX_NLL)


def _join(hyps: list[str], language: str) -> str:
    return ("" if language in SPACELESS_LANGUAGES else " ").join(hyps).strip()


# --- The script -------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Score one clip with the WER + NLL reward.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--audio", required=True, help="WAV, FLAC, OGG or MP3, any rate and channels")
    parser.add_argument("--text", required=True, help="what it should say")
    parser.add_argument("--language", default="en", help="Whisper's code or name of the language")
    parser.add_argument("--whisper", default="large-v3", help="name, or path of an openai-whisper .pt file")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="CUDA if there is one")
    parser.add_argument("--alpha_wer", type=float, default=3.0, help="R_wer = 1 - tanh(alpha_wer * WER)")
    parser.add_argument("--alpha_nll", type=float, default=3.0, help="R_nll = exp(-NLL / alpha_nll)")
    parser.add_argument("--lambda_wer", type=float, default=0.6, help="weight of R_wer in the harmonic mean")
    parser.add_argument("--lambda_nll", type=float, default=0.4, help="weight of R_nll in the harmonic mean")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    try:
        wav = load_audio(args.audio)
        error_rate(args.text, "", args.language)  # a text that cannot be scored is told before the model is loaded
        score = WhisperScorer(args.whisper, args.device).score([wav], [args.text], args.language)[0]
        r_wer = wer_reward(score.wer, args.alpha_wer)
        r_nll = nll_reward(score.nll, args.alpha_nll)
        reward = harmonic_mean(r_wer, r_nll, args.lambda_wer, args.lambda_nll)
    except ValueError as error:
        print(f"reward_whisper.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    unit = "CER" if language_code(args.language) in CER_LANGUAGES else "WER"
    failure = f" ({score.failure}: not shown to Whisper)" if score.failure else ""
    print(f"audio      {len(wav) / SAMPLE_RATE:.2f} s{failure}")
    print(f"transcript {score.hyp_text}")
    print(f"{unit}        {score.wer:.4f} ({score.edits} edits / {score.ref_length})")
    print(f"NLL        {score.nll:.4f} nats per token")
    print(f"R_wer      {r_wer:.4f}")
    print(f"R_nll      {r_nll:.4f}")
    print(f"R          {reward:.4f}")


if __name__ == "__main__":
    main(parse_args())
