"""The measurements of one clip of synthesized speech: error rates, prosody, failures."""

import argparse
import math
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from metrics.judges import ROUND_TRIP, EvaluationASR, word_timer
from metrics.texts import Item, num_units
from reward_models.pitch_height import mean_pitch
from reward_models.token2text import Token2Text
from speech.audio import audio_failure
from speech.dnsmos import Dnsmos
from speech.error_rate import error_rate, language_code
from speech.measures import is_repetitive, log_f0_std
from speech.melody import (
    asks,
    f0_range_st,
    final_movement_st,
    is_emphasised,
    is_rise,
    marked_word_scores,
    words_to_emphasise,
)
from speech.pauses import expected_pauses, num_pauses, pause_match, realised_pauses
from speech.pitch import PitchTrack, pitch_track
from speech.policy import MIN_ROOM, Policy, Sample
from speech.speaker_encoder import SpeakerEncoder, cosines
from speech.tokens import SAMPLE_RATE, asr_prompt
from speech.whisper_scorer import Score

MEASUREMENTS = 4  # one more whenever a clip's measurements change: an earlier code's results are not resumed


class SynthesizedSpeech(NamedTuple):
    """One clip per item: its rollout (None for a recording, which has no codes) and its waveform."""

    samples: list[Sample | None]
    wavs: list[np.ndarray]


def measure_clips(
    evaluation_asrs: dict[str, EvaluationASR], items: list[Item], speech: SynthesizedSpeech, seed: int | None
) -> list[dict]:
    """All measurements of each clip, ready for JSON, in the items' order."""
    clips = [clip_measures(*clip, seed) for clip in zip(items, *speech, strict=True)]
    audible = [(clip["failure"] is None, wav) for clip, wav in zip(clips, speech.wavs, strict=True)]
    tracks = [pitch_track(wav) if is_audible else None for is_audible, wav in audible]
    for item, clip, wav, track in zip(items, clips, speech.wavs, tracks, strict=True):
        clip |= melody_measures(item, wav, track)
    texts, languages = [item.text for item in items], [item.language for item in items]
    timer = word_timer(evaluation_asrs)
    for name, asr in evaluation_asrs.items():
        options = {"word_times": True} if name == timer else {}
        scores = asr.score(speech.wavs, texts, languages, **options)
        if name == timer:
            for clip, *measured in zip(clips, items, speech.wavs, tracks, scores, strict=True):
                clip |= word_measures(*measured)
        for clip, score in zip(clips, scores, strict=True):
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


def melody_measures(item: Item, wav: np.ndarray, track: PitchTrack | None) -> dict:
    """The measurements of melody that need no times of words.

    "question" and "statement_rise" are whether F0 rises at the end of a yes-no question, and of a statement: 1 or 0,
    None for other texts. A question that failed does not rise; a failed clip has none of the other values.

    Args:
        track: None of a clip that failed.
    """
    movement_st = math.nan if track is None else final_movement_st(track)
    question, rise = asks(item.text, language_code(item.language)), float(is_rise(movement_st))
    return {
        "final_movement_st": number_or_none(movement_st),
        "question": rise if question is True else None,
        "statement_rise": rise if question is False and track is not None else None,
        "f0_hz": None if track is None else number_or_none(2 ** (mean_pitch(track) / 12)),
        "f0_range_st": None if track is None else number_or_none(f0_range_st(track)),
        "num_pauses": None if track is None else num_pauses(wav),
    }


def word_measures(item: Item, wav: np.ndarray, track: PitchTrack | None, score: Score) -> dict:
    """The measurements that need the times of the words.

    "words" are [word, start in s, end in s]; "emphasis" is the fraction of the marked words that are emphasised, 0 in a
    clip that failed; "pause_match" is of an audible clip and a text with punctuation inside. None where there is none,
    and where the ASR cannot tell the words of the text: see `whisper_scorer.Score`.
    """
    marked = words_to_emphasise(item.text)
    if track is None:
        return {"words": None, "emphasis": 0.0 if marked else None, "pause_match": None}
    if score.words is None:
        return {"words": None, "emphasis": None, "pause_match": None}
    language = language_code(item.language)
    scores = marked_word_scores(track, score.words, item.text, score.hyp_text, language)
    expected = expected_pauses(item.text, patterns=None)
    realised = realised_pauses(wav, list(score.words))
    return {
        "words": [[word.text, round(word.start_s, 3), round(word.end_s, 3)] for word in score.words],
        "emphasis": sum(map(is_emphasised, scores)) / len(scores) if scores else None,
        "pause_match": pause_match(realised, expected[0]) if expected else None,
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


def add_code_distances(samples: list[list[Sample]], clips: list[dict]) -> None:
    """Normalised edit distance of the codes of each clip to those of the other samples of its text, on average.

    [1, 2, 3, 4] and [1, 2, 5] are 2 edits apart, 2 / 4 = 0.5 of the longer one. None of a clip without codes, or with
    no other to compare with.

    Args:
        samples: of each seed, in the texts' order.
        clips: seed by seed.
    """
    by_text = list(zip(*samples, strict=True))
    for number, clip in enumerate(clips):
        seed, text = divmod(number, len(by_text))
        own = by_text[text][seed].codes
        others = [sample.codes for i, sample in enumerate(by_text[text]) if i != seed and sample.codes]
        distances = [Levenshtein.normalized_distance(own, other) for other in others]
        clip["code_distance"] = sum(distances) / len(distances) if own and distances else None


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
