"""`evaluation.py --task asr`: checkpoints transcribe clips with known texts.

Corpus-level WER with its insertions, deletions and substitutions, hallucinations by the rules of
reward_models/asr_rules.py, keyword recall and precision, short and long clips apart, and clips without speech, where
every word is a hallucination.
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from transformers import set_seed

from common.cli import InputError, bad_input_exits
from common.dataset_io import (
    AUDIO_COLUMNS,
    check_codes,
    check_keywords,
    check_texts,
    load_any_dataset,
    open_source,
    path_and_bytes,
)
from common.run_record import content_digest, short_digest
from metrics.bootstrap import interval, paired_change, resampled_sums
from metrics.comparison import asr_comparison
from metrics.formatting import percent
from metrics.html_page import evenly_spaced
from metrics.recognition_report import write_reports
from metrics.report import error_unit
from metrics.result_files import open_results
from metrics.texts import units_of
from reward_models.asr_rules import find_keywords, hallucination, keyword_index
from speech.audio import load_short_audio
from speech.codec import SpeechCodec, decode_rollouts
from speech.error_rate import ErrorRate, error_rate, language_code, normalize_text, sum_errors
from speech.policy import DEFAULT_CODEC, Policy, Transcript, load_tokenizer, recorded
from speech.tokens import CODES_PER_SECOND, asr_prompt

logger = logging.getLogger(__name__)

KINDS = ("substitutions", "deletions", "insertions")

# --- Clips ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecognitionClip:
    """Speech codes and their reference text, "" without speech; keywords as `select_rl_data.py` finds them."""

    id: str
    codes: list[int]
    text: str
    language: str
    keywords: list[str]

    @property
    def duration_s(self) -> float:
        return len(self.codes) / CODES_PER_SECOND


def read_clips(
    path: str, split: str, language: str, num_codes: int, codec: Callable[[], SpeechCodec], max_length: int
) -> list[RecognitionClip]:
    """The clips of a dataset with codes, or with audio.

    Args:
        language: of rows without one of their own.
        num_codes: of the models; codes are in [0, num_codes).
        codec: called once if there are only recordings.
        max_length: of a recording in codes, at most.
    Raises:
        InputError: no such dataset; no text, no codes and no audio; a value of a wrong type, or an unknown language,
            with its row; texts of which some are scored by words and some by characters.
    """
    language_code(language)  # raises for an unknown one
    where = f"--clips {path}"
    rows = load_any_dataset(path, split)
    if "text" not in rows.column_names:
        raise InputError(f"{where}: no column 'text' (got {', '.join(rows.column_names)}). Add the transcripts")
    check_texts(rows, "text", where)
    check_texts(rows, "language", where, optional=True)
    check_keywords(rows, "keywords", where)
    nothing = [None] * len(rows)
    ids, languages, keywords = (
        list(rows[name]) if name in rows.column_names else nothing for name in ("id", "language", "keywords")
    )
    texts, languages = [text.strip() for text in rows["text"]], [own or language for own in languages]
    for i, text in enumerate(texts):
        check_text(text, languages[i], f"{where}, row {i}")
    if not any(texts):
        raise InputError(f"{where}: all clips are without speech. Add clips with a text")
    units_of((own for text, own in zip(texts, languages, strict=True) if text), where)  # raises if they are mixed
    if "audio_codes" in rows.column_names:
        check_codes(rows, "audio_codes", num_codes, where)
        codes = list(rows["audio_codes"])
    else:
        codes = codec().encode(_recordings(rows.column_names, path, split, max_length))
    return [
        RecognitionClip(str(i if ids[i] in (None, "") else ids[i]), codes[i], text, languages[i], keywords[i] or [])
        for i, text in enumerate(texts)
    ]


def check_text(text: str, language: str, where: str) -> None:
    """Raises InputError, beginning with `where`, for an unknown language, or a text without a word."""
    try:
        has_word = normalize_text(text, language)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if text and not has_word:
        raise InputError(f"{where}: the text has no word in it (got {text!r}). Use '' for a clip without speech")


def _recordings(columns: list[str], path: str, split: str, max_length: int) -> list[np.ndarray]:
    names = [name for name in AUDIO_COLUMNS if name in columns]
    if not names:
        raise InputError(
            f"--clips {path}: neither audio_codes nor audio (got {', '.join(columns)}). "
            f"Use a dataset of create_dataset.py, or name the audio {' or '.join(AUDIO_COLUMNS)}"
        )
    source = open_source(path, split, text_column="text", audio_column=names[0])
    wavs = []
    for i, value in enumerate(source.rows[names[0]]):
        file, data = path_and_bytes(value)
        try:
            if not (data or isinstance(file, str)):
                raise InputError("neither a path nor bytes of audio. Correct the row, or drop it")
            wavs.append(load_short_audio(data or str(source.folder / file), max_length))
        except InputError as error:
            raise InputError(f"--clips {path}, row {i}: {error}") from None
    return wavs


def with_all_keywords(clips: list[RecognitionClip]) -> list[RecognitionClip]:
    """The clips, each with the keywords of all clips, so that a keyword in the wrong transcript lowers precision."""
    keywords = sorted({keyword for clip in clips for keyword in clip.keywords})
    return [replace(clip, keywords=keywords) for clip in clips]


# --- Metrics ----------------------------------------------------------------------------------------------


def transcript_entry(clip: RecognitionClip, transcript: Transcript, seed: int | None) -> dict:
    """All measurements of one transcript, ready for JSON; "ref_length" and the errors in words or characters."""
    entry = {
        "id": clip.id,
        "seed": seed,
        "duration_s": clip.duration_s,
        "text": clip.text,
        "hyp_text": transcript.text,
        "truncated": transcript.truncated,
        "num_words": len(normalize_text(transcript.text, clip.language).split()),
    }
    if not clip.text:
        return entry
    errors = error_rate(clip.text, transcript.text, clip.language)
    rule = "truncated" if transcript.truncated else hallucination(clip.text, transcript.text, clip.language, errors)
    index = keyword_index(clip.keywords, clip.language)
    in_text = find_keywords(clip.text, index, clip.language)
    in_transcript = find_keywords(transcript.text, index, clip.language)
    return {
        **entry,
        **{kind: getattr(errors, kind) for kind in KINDS},
        "ref_length": errors.ref_length,
        "hallucination": rule,
        "keywords": {
            "in_text": in_text.total(),
            "in_transcript": in_transcript.total(),
            "in_both": (in_text & in_transcript).total(),
        },
    }


def errors_of(entry: dict) -> ErrorRate:
    edits = sum(entry[kind] for kind in KINDS)
    return ErrorRate(edits / entry["ref_length"], *(entry[kind] for kind in KINDS), entry["ref_length"])


def edit_counts(entries: list[dict], num_seeds: int) -> np.ndarray:
    """Edits and reference lengths by clip, all seeds of one together; shape (2, num_clips)."""
    errors = [errors_of(entry) for entry in entries]
    counts = np.array([[one.edits for one in errors], [one.ref_length for one in errors]])
    return counts.reshape(2, num_seeds, -1).sum(axis=1)


def error_metrics(entries: list[dict], num_seeds: int) -> dict:
    """Rates over all reference words; the WER's 95 % interval resamples clips, all seeds of one together."""
    total = sum_errors([errors_of(entry) for entry in entries])
    resampled_edits, resampled_length = resampled_sums(edit_counts(entries, num_seeds))
    rules = [entry["hallucination"] for entry in entries]
    return {
        "wer": total.rate,
        "interval": interval(resampled_edits / resampled_length),
        **{kind: getattr(total, kind) / total.ref_length for kind in KINDS},
        "hallucinations": 1 - rules.count(None) / len(rules),
        "truncated": rules.count("truncated") / len(rules),
    }


def with_speech(row: dict, long_s: float) -> dict[str, list[dict]]:
    """The transcripts of clips with speech: "all", and those of "short" and "long" clips."""
    entries = [entry for entry in row["clips"] if entry["text"]]
    return {
        "all": entries,
        "short": [entry for entry in entries if entry["duration_s"] <= long_s],
        "long": [entry for entry in entries if entry["duration_s"] > long_s],
    }


def summarize(row: dict, first: dict, long_s: float) -> dict:
    """The metrics of a row; None where it has no such clip.

    Args:
        row: "seeds" and "clips", seed by seed.
        first: the row to compare with.
        long_s: clips above so many seconds are long.
    """
    num_seeds, parts, first_parts = len(row["seeds"]), with_speech(row, long_s), with_speech(first, long_s)
    metrics = {part: error_metrics(entries, num_seeds) if entries else None for part, entries in parts.items()}
    for part, entries in parts.items():
        if entries:
            first_counts = edit_counts(first_parts[part], len(first["seeds"]))
            change = None if row is first else paired_change(edit_counts(entries, num_seeds), first_counts)
            metrics[part]["change"] = change
    keywords = [entry["keywords"] for entry in parts["all"]]
    in_text, in_transcript, in_both = (
        sum(counts[key] for counts in keywords) for key in ("in_text", "in_transcript", "in_both")
    )
    non_speech = [entry["num_words"] for entry in row["clips"] if not entry["text"]]
    return {
        **metrics,
        "keyword_recall": in_both / in_text if in_text else None,
        "keyword_precision": in_both / in_transcript if in_transcript else None,
        "nonspeech_words_per_clip": sum(non_speech) / len(non_speech) if non_speech else None,
        "nonspeech_hallucinations": sum(n > 0 for n in non_speech) / len(non_speech) if non_speech else None,
    }


# --- Rows -------------------------------------------------------------------------------------------------


def load_clips(
    args: argparse.Namespace, models: dict[str, str], codec: Callable[[], SpeechCodec]
) -> list[RecognitionClip]:
    """The clips of --clips, each with the keywords of all; InputError for codes that a model's tokenizer lacks."""
    model_tokens = [load_tokenizer(path, "asr")[1] for path in models.values()]
    num_codes = min(tokens.num_codes for tokens in model_tokens)
    clips = with_all_keywords(read_clips(args.clips, args.split, args.language, num_codes, codec, args.max_length))
    for tokens in model_tokens:
        for clip in clips:
            tokens.ids(clip.codes)  # raises where recordings were encoded by another codec
    return clips


def transcribed_clips(
    policy: Policy,
    args: argparse.Namespace,
    clips: list[RecognitionClip],
    temperature: float,
    seed: int | None,
    label: str,
) -> list[dict]:
    """A `transcript_entry` of each clip."""
    if seed is not None:
        set_seed(seed)
    transcripts = policy.transcribe(
        [asr_prompt(clip.codes) for clip in clips],
        temperature=temperature,
        top_p=args.top_p,
        max_length=args.max_length,
        max_completion_length=args.max_completion_length,
        batch_size=args.batch_size,
        progress=label,
    )
    return [transcript_entry(clip, transcript, seed) for clip, transcript in zip(clips, transcripts, strict=True)]


def row_summary(row: dict, units: str) -> str:
    """One line for the terminal."""
    rate = percent(row["metrics"]["all"]["wer"])
    return f"{row['name']}: {len(row['clips'])} transcripts, {error_unit(units)} {rate}"


def digests_of(models: dict[str, str], codec_id: str, clips: list[RecognitionClip]) -> dict:
    """What tells the models and clips from others of the same names; see `result_files.open_results`."""
    contents = {f"content of {name}": content_digest(name) for name in sorted({*models.values(), codec_id})}
    return {"clips": short_digest(vars(clip) for clip in clips), **contents}


def evaluate(args: argparse.Namespace, models: dict[str, str]) -> dict:
    """Rows of checkpoints x temperatures, written anew after each; returns what results.json holds.

    Rows that an earlier run of the same settings has left are kept.

    Args:
        args: of evaluation.py, checked.
        models: name -> path.
    """
    first_model = next(iter(models.values()))
    codec_id = args.codec_id or recorded(first_model, "codec_id", DEFAULT_CODEC)

    @cache
    def codec() -> SpeechCodec:
        return SpeechCodec.from_pretrained(codec_id, args.device)

    with bad_input_exits():
        clips = load_clips(args, models, codec)
        results = open_results(Path(args.output_dir), vars(args), digests_of(models, codec_id, clips), args.overwrite)
        listened = evenly_spaced(list(range(len(clips))), args.num_players)
        wavs = decode_rollouts(codec(), [clips[i].codes for i in listened]) if listened else []
    sounds = dict(zip(listened, wavs, strict=True))  # by position: several clips may have one id
    rows = results.pop("rows")
    units = units_of(clip.language for clip in clips if clip.text)
    results |= {"models": models, "num_clips": len(clips), "units": units, "rows": rows}
    for row in rows:
        logger.info("%s (done before)", row_summary(row, units))
    planned = [(name, path, temperature) for name, path in models.items() for temperature in args.temperature]
    policy, loaded = None, None
    for name, path, temperature in planned[len(rows) :]:
        if path != loaded:
            with bad_input_exits():
                policy, loaded = Policy.from_pretrained(path, args.device, task="asr"), path
                names = [f"--clips {args.clips}, row {i}" for i in range(len(clips))]
                policy.encode([asr_prompt(clip.codes) for clip in clips], args.max_length, names)  # raises if too long
        seeds = args.seeds if temperature > 0 else [None]  # greedy decoding is the same for all seeds
        label = f"{name} T={temperature:g}" if len(args.temperature) > 1 else name
        row = {"name": label, "model": path, "temperature": temperature, "seeds": seeds, "clips": []}
        for seed in seeds:
            row["clips"] += transcribed_clips(policy, args, clips, temperature, seed, label)
        rows.append(row)
        row["metrics"] = summarize(row, rows[0], args.long_s)
        write_reports(Path(args.output_dir), results, sounds)
        logger.info(row_summary(row, units))
    for line in asr_comparison(results):
        logger.info(line)
    logger.info("Listen: %s", (Path(args.output_dir) / "report.html").resolve())
    return results
