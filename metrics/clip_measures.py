"""The measurements of one clip of synthesized speech: error rates, prosody, failures."""

import argparse
import math
from typing import NamedTuple

import numpy as np

from metrics.judges import ROUND_TRIP, EvaluationASR
from metrics.texts import Item, num_units
from reward_models.token2text import Token2Text
from speech.audio import audio_failure
from speech.dnsmos import Dnsmos
from speech.error_rate import error_rate
from speech.measures import is_repetitive, log_f0_std
from speech.policy import MIN_ROOM, Policy, Sample
from speech.speaker_encoder import SpeakerEncoder, cosines
from speech.tokens import SAMPLE_RATE, asr_prompt


class SynthesizedSpeech(NamedTuple):
    """One clip per item: its rollout (None for a recording, which has no codes) and its waveform."""

    samples: list[Sample | None]
    wavs: list[np.ndarray]


def measure_clips(
    evaluation_asrs: dict[str, EvaluationASR], items: list[Item], speech: SynthesizedSpeech, seed: int | None
) -> list[dict]:
    """All measurements of each clip, ready for JSON, in the items' order."""
    clips = [clip_measures(*clip, seed) for clip in zip(items, *speech, strict=True)]
    texts, languages = [item.text for item in items], [item.language for item in items]
    for name, asr in evaluation_asrs.items():
        for clip, score in zip(clips, asr.score(speech.wavs, texts, languages), strict=True):
            clip["asr"][name] = {
                "hyp_text": score.hyp_text,
                "error_rate": score.wer,
                "edits": score.edits,
                "ref_length": score.ref_length,
                "nll": number_or_none(score.nll),
            }
    return clips


def clip_measures(item: Item, sample: Sample | None, wav: np.ndarray, seed: int | None) -> dict:
    """The measurements that need no model."""
    failure = audio_failure(wav)
    return {
        "id": item.id,
        "text": item.text,
        "seed": seed,
        "num_codes": None if sample is None else len(sample.codes),
        "truncated": None if sample is None else sample.truncated,
        "repetitive": None if sample is None else is_repetitive(sample.codes),
        "failure": failure,
        "duration_s": len(wav) / SAMPLE_RATE,
        "num_units": num_units(item),
        "log_f0_std": None if failure else number_or_none(log_f0_std(wav)),
        "asr": {},
    }


def number_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def add_speaker_similarities(
    encoder: SpeakerEncoder, voices: dict[str, np.ndarray], items: list[Item], wavs: list[np.ndarray], clips: list[dict]
) -> None:
    """Cosine of the speaker embeddings of each clip and its voice prompt; None without a prompt, or without a voice.

    Args:
        voices: embedding of each voice prompt's recording, by its path.
    """
    prompted = [i for i, item in enumerate(items) if item.ref_audio]
    references = np.array([voices[items[i].ref_audio] for i in prompted])
    similarities = cosines(encoder.embed([wavs[i] for i in prompted]), references) if prompted else []
    for clip in clips:
        clip["speaker_similarity"] = None
    for i, similarity in zip(prompted, similarities, strict=True):
        clips[i]["speaker_similarity"] = number_or_none(similarity)


def add_dnsmos_scores(dnsmos: Dnsmos, wavs: list[np.ndarray], clips: list[dict]) -> None:
    """The predicted opinions of each clip; None of one that failed."""
    for clip, mos in zip(clips, dnsmos.score(wavs), strict=True):
        clip["dnsmos"] = mos and mos._asdict()


def add_token2text_scores(
    token2text: Token2Text, items: list[Item], samples: list[Sample | None], clips: list[dict]
) -> None:
    """DiffRO's reward of each clip with codes. Where it rises and the error rates do not fall, it is hacked."""
    with_codes = [i for i, sample in enumerate(samples) if sample is not None]
    texts, languages = [items[i].text for i in with_codes], [items[i].language for i in with_codes]
    scores = token2text.score([samples[i].codes for i in with_codes], texts, languages)
    for i, score in zip(with_codes, scores, strict=True):
        clips[i]["token2text"] = score


def add_round_trip_errors(
    policy: Policy, items: list[Item], samples: list[Sample], clips: list[dict], args: argparse.Namespace
) -> None:
    """Round-trip error rate: the checkpoint transcribes its own codes, as the evaluation ASR ROUND_TRIP."""
    policy.turn_to("asr")
    prompt_overhead = len(policy.encode([asr_prompt([0])], args.max_length)[0]) - 1
    longest = min(args.max_length, policy.model.config.max_position_embeddings) - prompt_overhead - MIN_ROOM
    transcripts = policy.transcribe(
        [asr_prompt(sample.codes[:longest]) for sample in samples if sample.codes],
        max_length=args.max_length,
        max_completion_length=args.max_completion_length,
        batch_size=args.batch_size,
    )
    policy.turn_to("tts")
    hyp_texts = iter([transcript.text for transcript in transcripts])
    for item, sample, clip in zip(items, samples, clips, strict=True):
        hyp_text = next(hyp_texts) if sample.codes else ""
        errors = error_rate(item.text, hyp_text, item.language)
        clip["asr"][ROUND_TRIP] = {
            "hyp_text": hyp_text,
            "error_rate": errors.rate,
            "edits": errors.edits,
            "ref_length": errors.ref_length,
            "nll": None,
        }
