"""Whisper on batches of clips: the transcript and the NLL of a reference text from one encoder pass."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from torch.nn.utils.rnn import pad_sequence
from whisper.audio import HOP_LENGTH as MEL_HOP_LENGTH
from whisper.audio import N_FFT, mel_filters
from whisper.tokenizer import LANGUAGES, Tokenizer, get_tokenizer

from common.cli import InputError
from speech.audio import audio_failure, cut_at_pauses
from speech.error_rate import SPACELESS_LANGUAGES, error_rate, language_code, split_reference
from speech.text_marks import plain_text
from speech.tokens import SAMPLE_RATE
from speech.whisper_checkpoint import attention_lag_s, load_whisper
from speech.whisper_decoding import Reading, WindowReader
from speech.word_times import Word, words_of_tokens

MAX_NLL = 20.0  # nats per token, the worst score: a uniform guess over Whisper's vocabulary is ln 51,866 = 10.9
SAMPLES_PER_FEATURE = 2 * MEL_HOP_LENGTH  # 20 ms: two mel frames of 10 ms make one encoder position

# The decoder's keys and values of the audio outweigh all else in a batch: 17 windows of large-v3 in float16 (246 MB
# each) fit, and 8 in float32. Small models: 64 clips with tiny/whisper.pt take 0.56 s in batches of 16, 0.50 s of 32,
# 0.49 s of 64 (one CPU thread).
BATCH_BYTES = 4 << 30
MAX_BATCH_SIZE = 32  # windows


@dataclass(frozen=True)
class Score:
    """Whisper's transcript of one clip, and how well it fits the reference text.

    `wer` is the CER for CER_LANGUAGES; `nll` is in nats per token, <= MAX_NLL. `words` are those of
    `plain_text(text).split()` with their times and NLLs, where they were asked for, the text fits the decoder, and its
    words can be told: not where one without spaces is cut over two windows.
    `features`, where they were asked for, are those of `WhisperScorer.encode`.
    """

    hyp_text: str
    wer: float
    nll: float
    edits: int
    ref_length: int
    failure: str | None = None  # 'empty', 'silent', 'non_finite': scored without Whisper, WER 1 and MAX_NLL
    words: tuple[Word, ...] | None = None
    features: torch.Tensor | None = field(default=None, compare=False, repr=False)


def transcript_limit(text_tokens: int) -> int:
    """Tokens at which the transcript of a clip of a text of so many is cut off: no loop can hold up the run."""
    return 2 * text_tokens + 8


def load_model(model_id_or_path: str | os.PathLike, device: torch.device, dtype: torch.dtype) -> whisper.Whisper:
    """`load_whisper`'s model, ready to score on a device."""
    model = load_whisper(model_id_or_path)
    for module in model.modules():
        # Whisper casts weights on the fly but computes its LayerNorms in float32: model.half() would break those.
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Embedding)):
            module.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def log_mel_spectrograms(wavs: torch.Tensor, n_mels: int) -> torch.Tensor:
    """Whisper's log-mel spectrogram of each waveform, shape (rows, n_mels, n_samples // 160), on its device.

    `whisper.log_mel_spectrogram` takes its floor from the loudest value of its whole input, so it cannot take a batch:
    a quiet clip would lose what lies far below its neighbours.

    Args:
        wavs: float32 at 16 kHz, shape (rows, n_samples).
    """
    window = torch.hann_window(N_FFT, device=wavs.device)
    spectrum = torch.stft(wavs, N_FFT, MEL_HOP_LENGTH, window=window, return_complex=True)[..., :-1].mT
    power = spectrum.real.square() + spectrum.imag.square()
    log_mel = (power @ mel_filters(wavs.device, n_mels).T).clamp(min=1e-10).log10().mT
    log_mel = torch.maximum(log_mel, log_mel.amax(dim=(1, 2), keepdim=True) - 8.0)
    return (log_mel + 4.0) / 4.0


@dataclass(frozen=True)
class Windows:
    """Windows of audio: their features, and the first sample and the length in samples of each in its clip."""

    features: torch.Tensor
    starts: list[int]
    lengths: list[int]

    def __getitem__(self, part: slice) -> "Windows":
        return Windows(self.features[part], self.starts[part], self.lengths[part])

    def joined_features(self) -> torch.Tensor:
        """Those of the clip, each window at its place and 0 between them, shape (frames, n_audio_state); a copy."""
        firsts = [start // SAMPLES_PER_FEATURE for start in self.starts]
        ends = [
            max(first + 1, (start + length) // SAMPLES_PER_FEATURE)
            for first, start, length in zip(firsts, self.starts, self.lengths, strict=True)
        ]
        joined = self.features.new_zeros(ends[-1], self.features.shape[-1])
        for window, first, end in zip(self.features, firsts, ends, strict=True):
            joined[first:end] = window[: end - first]
        return joined


class WhisperScorer:
    """Transcripts and NLLs from one encoder pass, in batches; equal to scoring each clip alone.

    Args:
        model_id_or_path: see `whisper_checkpoint.load_whisper`. Any ModelDimensions, also a window shorter than 30 s.
        device: None is CUDA if there is one; 'cuda' is the process's current device.
        dtype: float16 or float32; None is float16 on a GPU and float32 elsewhere.
    Attributes:
        batch_size: windows per forward pass, as many as BATCH_BYTES and MAX_BATCH_SIZE allow.
    Raises:
        InputError: see `load_whisper`; or no CUDA here.
        ValueError: another dtype.
    """

    def __init__(
        self,
        model_id_or_path: str | os.PathLike,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device {device}: this machine or this PyTorch has no CUDA. Use 'cpu'")
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        if self.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"dtype: openai-whisper decodes in float16 or float32 (got {self.dtype})")
        self.model = load_model(model_id_or_path, self.device, self.dtype)
        dims = self.model.dims
        window_bytes = 2 * dims.n_text_layer * dims.n_audio_ctx * dims.n_text_state * self.dtype.itemsize
        self.batch_size = max(1, min(MAX_BATCH_SIZE, BATCH_BYTES // window_bytes))
        self.window = dims.n_audio_ctx * SAMPLES_PER_FEATURE  # samples: 480,000 = 30 s for OpenAI's

    def score(
        self,
        wavs: list[np.ndarray],
        texts: list[str],
        languages: list[str] | str = "en",
        word_times: bool = False,
        features: bool = False,
    ) -> list[Score]:
        """Score each waveform against its reference text.

        A transcript has at most `transcript_limit` tokens per window. The NLL is that of the text as written, with case
        and punctuation: the kind of text that Whisper was trained on; marks of emphasis (`*so*`) are taken off first. A
        clip longer than the window is cut at pauses; each piece is scored against the stretch of the text that aligns
        with its transcript, followed by an end-of-text of its own.

        Args:
            wavs: float mono at 16 kHz, shape (n_samples,) each. Empty, silent and non-finite ones are the
                policy's failures: they get the stated score, not an exception.
            texts: the reference texts, one per waveform.
            languages: Whisper's code or name of the language; one for all, or one per waveform.
            word_times: whether the scores have `words`, from the cross-attention of the pass that makes the NLL.
            features: whether the scores have `features`, those of the encoder pass; none of a waveform that failed.
        Returns:
            One `Score` per waveform, in the same order.
        Raises:
            InputError: a text is empty once normalised, or a language is unknown to Whisper or to this model.
            ValueError, TypeError: lengths differ, or a waveform is not a one-dimensional float array.
        """
        wavs, languages = self._check(wavs, languages)
        if isinstance(texts, str) or len(texts) != len(wavs):
            raise ValueError(f"texts: expected one text for each of the {len(wavs)} waveforms (got {texts!r:.80})")
        texts = [plain_text(text) for text in texts]
        all_deleted = [error_rate(text, "", language) for text, language in zip(texts, languages, strict=True)]
        failures = [audio_failure(wav) for wav in wavs]
        scores = [
            Score("", errors.rate, MAX_NLL, errors.edits, errors.ref_length, failure)
            for failure, errors in zip(failures, all_deleted, strict=True)
        ]
        text_ids = [self._text_ids(*item) for item in zip(texts, languages, strict=True)]
        max_tokens = [transcript_limit(len(ids)) for ids in text_ids]
        for i, windows, readings in self._readings(wavs, failures, languages, text_ids, max_tokens, word_times):
            language, drafts, stretches = languages[i], [text_ids[i]], [texts[i]]
            hyps = self._transcripts(readings, language)
            if len(hyps) > 1:  # only the transcripts tell which stretch of the text is in which window
                stretches = split_reference(texts[i], hyps, language)
                drafts = [self._text_ids(stretch, language) for stretch in stretches]
                readings = self._read(windows, language, drafts, [0] * len(drafts), word_times)
            hyp_text = _join(hyps, language)
            errors = error_rate(texts[i], hyp_text, language)
            nll = _mean_nll(readings, drafts)
            words = self._words(windows, readings, stretches, drafts, language) if word_times else None
            if words and len(words) != len(texts[i].split()):
                words = None  # a text without spaces, cut over two windows
            own = windows.joined_features() if features else None
            scores[i] = Score(hyp_text, errors.rate, nll, errors.edits, errors.ref_length, words=words, features=own)
        return scores

    def encode(self, wavs: list[np.ndarray]) -> list[torch.Tensor | None]:
        """The encoder's last features of each waveform, without the rest of the window that is not the clip's.

        Of a clip of several windows they are 0 where a window of silence was left out, and end with the last one.

        Args:
            wavs: as for `score`.
        Returns:
            Shape (n_samples // 320, n_audio_state) each, 50 a second, on the scorer's device and in its dtype; one
            for a clip shorter than that, None for one that is empty, silent or not finite.
        """
        wavs, languages = self._check(wavs, "en")
        encoded: list[torch.Tensor | None] = [None] * len(wavs)
        failures = [audio_failure(wav) for wav in wavs]
        for batch, windows in self._windows(wavs, failures, languages, [0] * len(wavs)):
            for i, own in batch.items():
                encoded[i] = windows[own].joined_features()
        return encoded

    def fingerprint(self) -> str:
        """Of the encoder's weights, in any of the formats and precisions that a Whisper comes in."""
        digest = hashlib.sha256()
        for weight in (self.model.encoder.conv1.weight, self.model.encoder.blocks[-1].mlp[2].weight):
            digest.update(weight.detach().half().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def transcribe(
        self, wavs: list[np.ndarray], languages: list[str] | str = "en", max_tokens: int | None = None
    ) -> list[str]:
        """Greedy transcripts, '' for empty, silent and non-finite waveforms; arguments as for `score`.

        Args:
            max_tokens: tokens per window at most; None is half the decoder's context (224 for OpenAI's models).
        """
        wavs, languages = self._check(wavs, languages)
        limit = self.model.dims.n_text_ctx // 2 if max_tokens is None else max_tokens
        if limit < 1:
            raise ValueError(f"max_tokens: must be >= 1 (got {max_tokens})")
        texts, failures = [""] * len(wavs), [audio_failure(wav) for wav in wavs]
        for i, _, readings in self._readings(wavs, failures, languages, [[]] * len(wavs), [limit] * len(wavs)):
            texts[i] = _join(self._transcripts(readings, languages[i]), languages[i])
        return texts

    def check_languages(self, languages: Iterable[str]) -> None:
        """Raises InputError for a language, by its code or name, that this Whisper does not know."""
        for code in {language_code(language) for language in languages}:
            self._tokenizer(code)

    def _check(self, wavs: list[np.ndarray], languages: list[str] | str) -> tuple[list[np.ndarray], list[str]]:
        languages = [languages] * len(wavs) if isinstance(languages, str) else languages
        if len(languages) != len(wavs):
            raise ValueError(f"languages: expected one for each of the {len(wavs)} waveforms (got {len(languages)})")
        for i, wav in enumerate(wavs):
            if not (isinstance(wav, np.ndarray) and wav.ndim == 1 and np.issubdtype(wav.dtype, np.floating)):
                kind = f"{wav.dtype} array of shape {wav.shape}" if isinstance(wav, np.ndarray) else type(wav).__name__
                raise TypeError(f"waveform {i}: expected a float numpy array of shape (n_samples,) (got {kind})")
        codes = [language_code(language) for language in languages]
        self.check_languages(codes)
        return [np.ascontiguousarray(wav, dtype=np.float32) for wav in wavs], codes

    def _tokenizer(self, language: str) -> Tokenizer:
        model = self.model
        known = list(LANGUAGES)[: model.num_languages] if model.is_multilingual else ["en"]
        if language not in known:
            raise InputError(f"this Whisper does not know the language {language!r}. Known: {', '.join(known)}")
        return get_tokenizer(
            model.is_multilingual, num_languages=model.num_languages, language=language, task="transcribe"
        )

    def _text_ids(self, text: str, language: str) -> list[int]:
        text = text.strip()
        if text and language not in SPACELESS_LANGUAGES:
            text = " " + text
        # No special is disallowed: a text that spells a special token is encoded as plain text.
        return self._tokenizer(language).encode(text, disallowed_special=())

    def _readings(
        self,
        wavs: list[np.ndarray],
        failures: list[str | None],
        languages: list[str],
        drafts: list[list[int]],
        max_tokens: list[int],
        word_times: bool = False,
    ) -> Iterator[tuple[int, "Windows", list[Reading]]]:
        """For each waveform without a failure: its index, its windows and their readings.

        A waveform of several windows is read without a draft.
        """
        for batch, windows in self._windows(wavs, failures, languages, max_tokens, drafts):
            owners = [i for i, own in batch.items() for _ in range(own.start, own.stop)]
            window_drafts = [drafts[i] if owners.count(i) == 1 else [] for i in owners]
            limits = [max_tokens[i] for i in owners]
            readings = self._read(windows, languages[owners[0]], window_drafts, limits, word_times)
            for i, own in batch.items():
                yield i, windows[own], readings[own]

    def _windows(
        self,
        wavs: list[np.ndarray],
        failures: list[str | None],
        languages: list[str],
        max_tokens: list[int],
        drafts: list[list[int]] | None = None,
    ) -> Iterator[tuple[dict[int, slice], "Windows"]]:
        """Batches of the waveforms without a failure: which windows are whose, and the windows.

        One language per batch, as it has one prompt; similar lengths together, as they finish together.
        """
        pieces: dict[int, list[tuple[int, np.ndarray]]] = {}
        for i, (wav, failure) in enumerate(zip(wavs, failures, strict=True)):
            if failure is None:
                clipped = wav.clip(-1.0, 1.0)  # as a WAV file is; finite but huge samples would overflow in the mel
                pieces[i] = cut_at_pauses(clipped, self.window) if len(clipped) > self.window else [(0, clipped)]
        num_drafted = [0] * len(wavs) if drafts is None else [len(draft) for draft in drafts]
        batches: list[list[int]] = []
        room = 0
        for i in sorted(pieces, key=lambda i: (languages[i], max_tokens[i], num_drafted[i], len(wavs[i]))):
            if not batches or len(pieces[i]) > room or languages[batches[-1][0]] != languages[i]:
                batches.append([])
                room = self.batch_size
            batches[-1].append(i)
            room -= len(pieces[i])
        for batch in batches:
            starts, window_wavs = zip(*(piece for i in batch for piece in pieces[i]), strict=True)
            lengths = [len(wav) for wav in window_wavs]
            ends = np.cumsum([len(pieces[i]) for i in batch]).tolist()
            own = {i: slice(end - len(pieces[i]), end) for i, end in zip(batch, ends, strict=True)}
            yield own, Windows(self._encode(list(window_wavs)), list(starts), lengths)

    @torch.inference_mode()
    def _encode(self, wavs: list[np.ndarray]) -> torch.Tensor:
        """Features, shape (len(wavs), n_audio_ctx, n_audio_state), of waveforms of at most `window` samples."""
        features = []
        for first in range(0, len(wavs), self.batch_size):
            batch = [torch.from_numpy(wav) for wav in wavs[first : first + self.batch_size]]
            padded = pad_sequence(batch, batch_first=True).to(self.device)
            # The *waveform* is padded, as in Whisper's training: zeros in a mel are not silence.
            padded = F.pad(padded, (0, self.window - padded.shape[1]))
            mels = log_mel_spectrograms(padded, self.model.dims.n_mels)
            features.append(self.model.encoder(mels.to(self.dtype)))
        return torch.cat(features)

    def _read(
        self, windows: "Windows", language: str, drafts: list[list[int]], max_tokens: list[int], word_times: bool
    ) -> list[Reading]:
        """`WindowReader.read`, in batches."""
        reader, readings = WindowReader(self.model, language), []
        for first in range(0, len(drafts), self.batch_size):
            part = slice(first, first + self.batch_size)
            num_frames = [length // SAMPLES_PER_FEATURE for length in windows.lengths[part]] if word_times else None
            readings += reader.read(windows.features[part], drafts[part], max_tokens[part], num_frames)
        return readings

    def _words(
        self,
        windows: "Windows",
        readings: list[Reading],
        stretches: list[str],
        drafts: list[list[int]],
        language: str,
    ) -> tuple[Word, ...] | None:
        """The words of a clip with their times and NLLs; None where the text does not fit the decoder."""
        words, tokenizer, lag_s = [], self._tokenizer(language), attention_lag_s(self.model.dims)
        for start, reading, stretch, ids in zip(windows.starts, readings, stretches, drafts, strict=True):
            if len(reading.nlls) <= len(ids):
                return None
            tokens = [tokenizer.encoding.decode_single_token_bytes(token) for token in ids]
            times = [(start + frame * SAMPLES_PER_FEATURE) / SAMPLE_RATE for frame in reading.frames]
            # The clip's edges are no lagging attention: the path has to begin and end there.
            times[1:-1] = [min(max(time - lag_s, times[0]), times[-1]) for time in times[1:-1]]
            words += words_of_tokens(stretch, tokens, times, reading.nlls)
        return tuple(words)

    def _transcripts(self, readings: list[Reading], language: str) -> list[str]:
        """The readings' tokens as text."""
        tokenizer = self._tokenizer(language)
        # Special tokens have the ids from `eot` on; the library forbids only some of them and would spell out the rest.
        return [tokenizer.decode([t for t in reading.tokens if t < tokenizer.eot]).strip() for reading in readings]


def _mean_nll(readings: list[Reading], texts: list[list[int]]) -> float:
    """Nats per token over all windows of a clip, the end-of-text of each included; at most MAX_NLL.

    Tokens beyond the decoder's context cannot be in this much audio: they count MAX_NLL each.
    """
    num_tokens = sum(len(ids) + 1 for ids in texts)
    nlls = [nll for reading in readings for nll in reading.nlls]
    return min((sum(nlls) + MAX_NLL * (num_tokens - len(nlls))) / num_tokens, MAX_NLL)


def _join(hyps: list[str], language: str) -> str:
    return ("" if language in SPACELESS_LANGUAGES else " ").join(hyps).strip()
