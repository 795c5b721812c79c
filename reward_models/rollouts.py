"""One batch of speech rollouts, scored once for all rewards.

`SpeechRolloutScorer` holds the codec, Whisper, the token-to-text model, the speaker encoder, DNSMOS and the preference
model, or those of them that the rewards need; `Rollouts` computes each quantity at most once and only if a reward or a
metric asks for it.
"""

import contextlib
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from common.averages import mean_of_known
from reward_models.preference import PreferenceModel, with_pitch_features
from reward_models.token2text import Token2Text
from speech.audio import audio_failure
from speech.codec import SpeechCodec, check_codebook, decode_rollouts
from speech.dnsmos import Dnsmos, MosScores
from speech.measures import is_repetitive, log_f0_std
from speech.pitch import PitchTrack, pitch_track
from speech.speaker_encoder import SpeakerEncoder, cosines
from speech.tokens import CODES_PER_SECOND, SpeechTokens
from speech.whisper_scorer import Score, WhisperScorer


class Rollouts:
    """A batch of completions as codes, as audio, and as Whisper's transcripts.

    Args:
        models: whose codec, Whisper and token-to-text model score the batch.
        completion_ids: sampled token ids, including END if it was sampled, without padding.
        texts: the reference text of each.
        languages: Whisper's language code of each text.
        group_size: number of rollouts of one prompt; they are next to each other.
    Attributes (each a list in the batch's order, computed when first used):
        codes: ids in the codebook.
        truncated: whether the rollout was cut off before END.
        wavs: float32 mono at 16 kHz, shape (n_samples,), read-only; (0,) where there are no codes.
        scores: a `whisper_scorer.Score` each.
        text_log_probs: mean log P per text token by the token-to-text model.
        failures: None, or why a rollout earns the lowest reward: "empty", "silent", "non_finite" (the last
            two only where there is a codec), "truncated".
        log_f0_stds: in natural-log units; NaN without voiced frames.
        preferences: by the preference model, without a bound; NaN for a rollout that has failed.
        mos_scores: by DNSMOS; None for a clip that is empty, silent or not finite.
    Raises:
        ValueError: the rollouts cannot be divided into groups, a group has several texts, or an id is no code.
    """

    def __init__(
        self, models: "SpeechRolloutScorer", completion_ids, texts: list[str], languages: list[str], group_size: int
    ):
        if len(completion_ids) % group_size:
            raise ValueError(f"{len(completion_ids)} rollouts cannot be divided into groups of {group_size}")
        for first in range(0, len(texts), group_size):
            if len(set(texts[first : first + group_size])) != 1:
                raise ValueError(f"rollouts {first} to {first + group_size - 1} are not of one prompt")
        self.models = models
        self.texts = texts
        self.languages = languages
        self.group_size = group_size
        parsed = [models.tokens.codes(ids) for ids in completion_ids]
        self.codes = [codes for codes, _ in parsed]
        self.truncated = [truncated for _, truncated in parsed]
        self._log_f0_cache: dict[int, float] = {}
        self._pitch_cache: dict[int, PitchTrack] = {}

    @cached_property
    def wavs(self) -> list[np.ndarray]:
        wavs = decode_rollouts(self.models.codec, self.codes)
        for wav in wavs:
            wav.flags.writeable = False  # all rewards hear the same: one that writes into it raises
        return wavs

    @cached_property
    def scores(self) -> list[Score]:
        models = self.models
        features = models.preference_model is not None
        return models.whisper.score(
            self.wavs, self.texts, self.languages, word_times=models.word_times, features=features
        )

    @cached_property
    def text_log_probs(self) -> list[float]:
        return self.models.token2text.score(self.codes, self.texts, self.languages)

    @cached_property
    def mos_scores(self) -> list[MosScores | None]:
        return self.models.dnsmos.score(self.wavs)

    @cached_property
    def preferences(self) -> list[float]:
        heard = [
            None if failure else with_pitch_features(score.features, self.pitch_track(i))
            for i, (failure, score) in enumerate(zip(self.failures, self.scores, strict=True))
        ]
        return self.models.preference_model.score(heard, self.texts)

    @cached_property
    def failures(self) -> list[str | None]:
        if self.models.codec is None:
            failures = [None if codes else "empty" for codes in self.codes]
        else:
            failures = [audio_failure(wav) for wav in self.wavs]
        return [
            failure or ("truncated" if truncated else None)
            for failure, truncated in zip(failures, self.truncated, strict=True)
        ]

    @cached_property
    def log_f0_stds(self) -> list[float]:
        return [self._log_f0_std(i) for i in range(len(self.wavs))]

    def _log_f0_std(self, i: int) -> float:
        if i not in self._log_f0_cache:
            audible = audio_failure(self.wavs[i]) is None
            self._log_f0_cache[i] = log_f0_std(self.wavs[i]) if audible else float("nan")
        return self._log_f0_cache[i]

    def pitch_track(self, i: int) -> PitchTrack:
        """Of rollout i, which has not failed."""
        if i not in self._pitch_cache:
            self._pitch_cache[i] = pitch_track(self.wavs[i])
        return self._pitch_cache[i]

    def grouped(self, values: list[float]) -> np.ndarray:
        """One value per rollout as an array of shape (prompts, group_size)."""
        return np.asarray(values, dtype=np.float64).reshape(-1, self.group_size)

    def edits_and_ref_length(self) -> tuple[int, int]:
        """Of the whole batch, by the reward's Whisper, in words (or characters); (0, 0) without one."""
        scores = self.scores if self.models.whisper is not None else []
        return sum(score.edits for score in scores), sum(score.ref_length for score in scores)

    def metrics(self) -> dict[str, float]:
        """The batch's metrics besides its rewards; means over the rollouts (F0: over the first of each group)."""
        failures, models = self.failures, self.models
        metrics = {
            "duration_s": float(np.mean([len(codes) / CODES_PER_SECOND for codes in self.codes])),
            "frac_truncated": float(np.mean(self.truncated)),
            "frac_empty": failures.count("empty") / len(failures),
            "frac_repetitive": float(np.mean([is_repetitive(codes) for codes in self.codes])),
        }
        if models.codec is not None:
            # Praat takes as long per clip as the codec: one rollout of each prompt shows a collapse of F0 as well.
            metrics |= {
                "log_f0_std": mean_of_known(self._log_f0_std(i) for i in range(0, len(self.codes), self.group_size)),
                "frac_silent": failures.count("silent") / len(failures),
                "frac_non_finite": failures.count("non_finite") / len(failures),
            }
        if models.whisper is not None:
            metrics |= {
                "wer": float(np.mean([score.wer for score in self.scores])),
                "nll": float(np.mean([score.nll for score in self.scores])),
            }
        if models.dnsmos is not None:
            known = [mos for mos in self.mos_scores if mos is not None]
            for name in MosScores._fields:
                values = [getattr(mos, name) for mos in known]
                metrics[f"dnsmos_{name}"] = float(np.mean(values)) if values else float("nan")
        if models.token2text is not None:
            metrics |= {"text_log_prob": float(np.mean(self.text_log_probs))}
        return metrics


class SpeechRolloutScorer:
    """The models that score (see `Args`), and the batch of rollouts that was scored last.

    TRL calls every reward function of a batch with the same list of completions: the first call computes the
    `Rollouts` (and logs their metrics), the others reuse them.

    Args:
        tokens: the policy's speech tokens.
        codec, whisper, token2text, speaker_encoder, dnsmos, preference_model: None where no reward needs it; all of
            them but token2text need the codec, and the preference model needs Whisper.
        group_size: number of rollouts of one prompt.
        offload: keep codec, Whisper and speaker encoder on the CPU, and on their device only while they score; each
            move copies all their weights.
        word_times: whether the scores have the words' times.
    Raises:
        InputError: the codec's or the token-to-text model's codebook is not the policy's, or the preference model's
            Whisper is another one.
    """

    def __init__(
        self,
        tokens: SpeechTokens,
        codec: SpeechCodec | None,
        whisper: WhisperScorer | None,
        group_size: int,
        offload: bool = False,
        token2text: Token2Text | None = None,
        word_times: bool = False,
        speaker_encoder: SpeakerEncoder | None = None,
        dnsmos: Dnsmos | None = None,
        preference_model: PreferenceModel | None = None,
    ):
        if codec is None and whisper is not None:
            raise ValueError("whisper: it scores decoded audio and needs a codec (got None). Pass a codec as well")
        if codec is not None:
            check_codebook(codec, tokens)
        if token2text is not None:
            token2text.check_codebook(tokens.num_codes)
        if preference_model is not None:
            preference_model.check_whisper(whisper.fingerprint())
        self.tokens = tokens
        self.codec = codec
        self.whisper = whisper
        self.token2text = token2text
        self.word_times = word_times
        self.speaker_encoder = speaker_encoder
        self.dnsmos = dnsmos
        self.preference_model = preference_model
        self.group_size = group_size
        self.rollouts: Rollouts | None = None
        self._completion_ids = None
        self.device = codec.device if codec else torch.device("cpu")
        self.offload = offload
        if offload:
            self._move(torch.device("cpu"), codec, whisper, speaker_encoder)

    @contextlib.contextmanager
    def _on_device(self, *scorers) -> Iterator[None]:
        """Within it the scorers are on the device; offloaded ones are on the CPU before and after."""
        if self.offload:
            self._move(self.device, *scorers)
        yield
        if self.offload:
            self._move(torch.device("cpu"), *scorers)

    def _move(self, device: torch.device, *scorers) -> None:
        for scorer in scorers:
            if scorer is not None:
                scorer.model.to(device)
                scorer.device = device
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # freed blocks may be too small or too fragmented for the policy's allocations

    def score(
        self, completion_ids: list[list[int]], text: list[str], language: list[str] | None, log_metric=None
    ) -> Rollouts:
        """The scored batch.

        Args:
            completion_ids: sampled token ids, including END if it was sampled, without padding.
            text: the reference texts.
            language: Whisper's code of each; None is English. Without a default: the first reward of a batch scores it
                for all, and one that forgot the languages would have all of them score English.
            log_metric: called once per batch with each metric's name and value; None logs nothing.
        Raises:
            ValueError: the rewards of a batch give other texts or languages than the first of them did.
        """
        if completion_ids is not self._completion_ids:
            self.rollouts, metrics = self._scored(completion_ids, text, language, self.group_size)
            self._completion_ids = completion_ids
            if log_metric is not None:
                for name, value in metrics.items():
                    log_metric(name, value)
        if text != self.rollouts.texts or (language or ["en"] * len(text)) != self.rollouts.languages:
            raise ValueError("text, language: must be those of the rows, as for the batch's other rewards")
        return self.rollouts

    def score_held_out(
        self, completion_ids: list[list[int]], text: list[str], language: list[str] | None = None
    ) -> tuple[Rollouts, dict[str, float]]:
        """One rollout of each prompt and their metrics; the batch of the rewards stays the one scored last."""
        return self._scored(completion_ids, text, language, group_size=1)

    def _scored(
        self, completion_ids, text: list[str], language: list[str] | None, group_size: int
    ) -> tuple[Rollouts, dict[str, float]]:
        rollouts = Rollouts(self, completion_ids, text, language or ["en"] * len(text), group_size)
        with self._on_device(self.codec, self.whisper):
            return rollouts, rollouts.metrics()  # runs codec and Whisper

    def speaker_similarities(self, rollouts: Rollouts, ref_codes: list[list[int]]) -> list[float]:
        """Cosine of the speaker embeddings of each rollout and its voice prompt, both as the codec decodes them.

        Each voice prompt of the batch is decoded and embedded once.

        Args:
            ref_codes: the codes of each rollout's voice prompt.
        Returns:
            In [−1, 1]; NaN where rollout or prompt has no voice to tell (`SpeakerEncoder.embed`).
        """
        prompt_wavs = self._decode_prompts(ref_codes)
        with self._on_device(self.speaker_encoder):
            embeddings = self.speaker_encoder.embed(rollouts.wavs + list(prompt_wavs.values()))
        number_of = {codes: len(rollouts.wavs) + i for i, codes in enumerate(prompt_wavs)}
        references = embeddings[[number_of[tuple(codes)] for codes in ref_codes]]
        return cosines(embeddings[: len(rollouts.wavs)], references)

    def prompt_pitch_tracks(self, ref_codes: list[list[int]]) -> list[PitchTrack]:
        """The pitch of each rollout's voice prompt, as the codec decodes it; each prompt is tracked once.

        Args:
            ref_codes: the codes of each rollout's voice prompt.
        """
        tracks = {codes: pitch_track(wav) for codes, wav in self._decode_prompts(ref_codes).items()}
        return [tracks[tuple(codes)] for codes in ref_codes]

    def _decode_prompts(self, ref_codes: list[list[int]]) -> dict[tuple[int, ...], np.ndarray]:
        """The waveforms of the different voice prompts by their codes, in the order of their first rollouts."""
        prompts = list(dict.fromkeys(map(tuple, ref_codes)))
        with self._on_device(self.codec):
            wavs = decode_rollouts(self.codec, [list(codes) for codes in prompts])
        return dict(zip(prompts, wavs, strict=True))

    def last_samples(self, count: int) -> list[tuple[dict, np.ndarray | None]]:
        """The first rollouts of the batch scored last: a record of each, and its waveform if it has one."""
        rollouts = self.rollouts
        if rollouts is None:
            return []
        samples = []
        for i in range(min(count, len(rollouts.codes))):
            record = {"rollout": i, "text": rollouts.texts[i], "failure": rollouts.failures[i]}
            if self.whisper is not None:
                score = rollouts.scores[i]
                record |= {"transcript": score.hyp_text, "wer": score.wer, "nll": score.nll}
            if self.token2text is not None:
                record["text_log_prob"] = rollouts.text_log_probs[i]
            audible = self.codec is not None and rollouts.failures[i] not in ("empty", "non_finite")
            samples.append((record, rollouts.wavs[i] if audible else None))
        return samples
