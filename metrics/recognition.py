"""What `evaluation.py --task asr` does: checkpoints that recognise, measured on clips with known texts.

Corpus-level WER with its insertions, deletions and substitutions, hallucinations by the rules of
reward_models/asr_rules.py, keyword recall and precision, short and long clips apart, and clips in which nothing is
said, where every word is made up. Writes results.json (every transcript), results.md (the table) and report.html (a
page to look and listen: the clips as their codes sound).
"""

import argparse
import html
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import set_seed

from common.cli import InputError, bad_input_exits
from common.dataset_io import AUDIO_COLUMNS, load_any_dataset
from common.run_record import provenance
from metrics.bootstrap import interval, resampled_sums
from metrics.html_page import bars, document, marked, meanings, metrics_table, player, to_show, training_curves
from metrics.report import markdown, percent, percents, replace_files
from reward_models.asr_rules import find_keywords, hallucination, keyword_index
from speech.audio import load_audio
from speech.codec import SpeechCodec, decode_rollouts
from speech.error_rate import error_rate, normalize_text
from speech.policy import DEFAULT_CODEC, Policy, Transcript, load_tokenizer, recorded
from speech.tokens import CODES_PER_SECOND, asr_prompt

logger = logging.getLogger("evaluation")

KINDS = ("substitutions", "deletions", "insertions")


@dataclass(frozen=True)
class Clip:
    """Speech codes and what is said in them, "" for nothing; keywords as `select_rl_data.py` finds them."""

    id: str
    codes: list[int]
    text: str
    language: str
    keywords: list[str]

    @property
    def duration_s(self) -> float:
        return len(self.codes) / CODES_PER_SECOND


def read_clips(path: str, split: str, language: str, codec: Callable[[], SpeechCodec]) -> list[Clip]:
    """The clips of a data set with codes, or with paths of audio.

    Args:
        language: of the rows that do not say.
        codec: called once if there are only recordings.
    Raises:
        OSError, ValueError: no such set; no text, no codes and no audio; an unknown language.
    """
    rows = load_any_dataset(path, split)
    if "text" not in rows.column_names:
        raise InputError(f"{path} has no column 'text' (it has {', '.join(rows.column_names)})")
    if "audio_codes" in rows.column_names:
        speech = list(rows["audio_codes"])
    else:
        speech = codec().encode(_recordings(rows, path))
    column = {name: rows[name] if name in rows.column_names else None for name in ("id", "language", "keywords")}
    clips = []
    for i, (text, codes) in enumerate(zip(rows["text"], speech, strict=True)):
        if not codes:
            raise InputError(f"{path}, row {i}: no audio_codes")
        row_id, row_language, keywords = (column[name] and column[name][i] for name in column)
        clip = Clip(str(row_id or i), codes, (text or "").strip(), row_language or language, keywords or [])
        if clip.text and not normalize_text(clip.text, clip.language):
            raise InputError(f"{path}, row {i}: the text {clip.text!r} has no word in it; give '' for nothing said")
        clips.append(clip)
    if not any(clip.text for clip in clips):
        raise InputError(f"{path}: in none of its clips is anything said")
    return clips


def _recordings(rows, path: str) -> list[np.ndarray]:
    names = [name for name in AUDIO_COLUMNS if name in rows.column_names]
    if not names:
        raise InputError(f"{path} has neither audio_codes nor audio (one of {', '.join(AUDIO_COLUMNS)})")
    file = Path(path)
    folder = file if file.is_dir() else file.parent
    return [load_audio(str(folder / name)) for name in rows[names[0]]]


def judged(clip: Clip, transcript: Transcript, seed: int | None) -> dict:
    """Everything measured on one transcript, ready for JSON."""
    entry = {
        "id": clip.id,
        "seed": seed,
        "duration_s": clip.duration_s,
        "text": clip.text,
        "hyp_text": transcript.text,
        "truncated": transcript.truncated,
        "words": len(normalize_text(transcript.text, clip.language).split()),
    }
    if not clip.text:
        return entry
    errors = error_rate(clip.text, transcript.text, clip.language)
    rule = "truncated" if transcript.truncated else hallucination(clip.text, transcript.text, clip.language)
    index = keyword_index(clip.keywords, clip.language)
    said, heard = (find_keywords(text, index, clip.language) for text in (clip.text, transcript.text))
    return {
        **entry,
        **{kind: getattr(errors, kind) for kind in KINDS},
        "ref_length": errors.ref_length,
        "hallucination": rule,
        "keywords": {"said": said.total(), "heard": heard.total(), "hits": (said & heard).total()},
    }


def all_keywords(clips: list[Clip]) -> list[Clip]:
    """The clips, each with the keywords of all: one that is written where it was not said is to be seen."""
    every = sorted({keyword for clip in clips for keyword in clip.keywords})
    return [Clip(clip.id, clip.codes, clip.text, clip.language, every) for clip in clips]


# --- Numbers ----------------------------------------------------------------------------------------------


def error_metrics(entries: list[dict], num_seeds: int) -> dict | None:
    """Rates over all reference words, the WER's 95 % interval by resampling clips (all seeds of one together)."""
    if not entries:
        return None
    counts = np.array([[entry[key] for entry in entries] for key in (*KINDS, "ref_length")])
    counts = counts.reshape(len(counts), num_seeds, -1).sum(axis=1)
    edits, length = counts[:3].sum(axis=0), counts[3]
    resampled_edits, resampled_length = resampled_sums(np.stack([edits, length]))
    rates = {kind: float(total / length.sum()) for kind, total in zip(KINDS, counts.sum(axis=1), strict=False)}
    rules = [entry["hallucination"] for entry in entries]
    return {
        "wer": float(edits.sum() / length.sum()),
        "interval": interval(resampled_edits / resampled_length),
        **rates,
        "hallucinations": 1 - rules.count(None) / len(rules),
        "truncated": rules.count("truncated") / len(rules),
    }


def summarize(entries: list[dict], num_seeds: int, long_s: float) -> dict:
    """Metrics of all transcripts of a row; None where there is no such clip."""
    spoken = [entry for entry in entries if entry["text"]]
    nothing = [entry for entry in entries if not entry["text"]]
    said, heard, hits = (sum(entry["keywords"][key] for entry in spoken) for key in ("said", "heard", "hits"))
    return {
        "all": error_metrics(spoken, num_seeds),
        "short": error_metrics([entry for entry in spoken if entry["duration_s"] <= long_s], num_seeds),
        "long": error_metrics([entry for entry in spoken if entry["duration_s"] > long_s], num_seeds),
        "keyword_recall": hits / said if said else None,
        "keyword_precision": hits / heard if heard else None,
        "words_on_nothing": sum(entry["words"] for entry in nothing) / len(nothing) if nothing else None,
        "nothing_with_words": sum(entry["words"] > 0 for entry in nothing) / len(nothing) if nothing else None,
    }


def cells(row: dict) -> list[str]:
    metrics = row["metrics"]
    line = [row["name"]]
    for part in ("all", "short", "long"):
        own = metrics[part]
        rates = " / ".join(f"{100 * own[key]:.1f}" for key in ("wer", "insertions", "deletions")) if own else "–"
        line.append(f"{rates} {percents(own['interval'])}" if own else "–")
    for key in ("hallucinations", "truncated"):
        line.append(percent(metrics["all"][key]))
    line += [percent(metrics[key]) for key in ("keyword_recall", "keyword_precision", "nothing_with_words")]
    return line


HEADER = ("", "all: WER / ins / del, % [95 %]", "short", "long", "hallucinations", "truncated")
HEADER += ("keyword recall", "keyword precision", "words where nothing is said")
EXPLANATIONS = {
    "WER / ins / del": "Words to substitute, delete and insert over the words that are said, and of these the inserted "
    "and the deleted; in brackets the WER's 95 % bootstrap interval over clips.",
    "short, long": "Clips of up to --long_s seconds, and above.",
    "hallucinations": "Share of the clips with speech whose transcript breaks a rule of reward_models/asr_rules.py: it "
    "was truncated, is empty, loops, is in another script, is twice as long or half as long, has no word in common.",
    "truncated": "Share of transcripts that were cut off before END, at --max_completion_length.",
    "keyword recall, precision": "Keywords found over those said, and over those written.",
    "words where nothing is said": "Share of the clips without speech that got a word.",
}


def page(about: str, results: dict, sounds: dict[str, np.ndarray]) -> str:
    """report.html.

    Args:
        sounds: id -> waveform of each clip to show, with the first transcript that each row has of it.
    """
    rows = results["rows"]
    rates = {row["name"]: (row["metrics"]["all"]["wer"], row["metrics"]["all"]["interval"]) for row in rows}
    metrics = metrics_table(list(HEADER), [cells(row) for row in rows])
    parts = [bars("Word error rate", rates), metrics, *training_curves(results["models"])]
    if sounds:
        told = "As the codes sound. Marked: words that are not said there."
        parts.append(f"<h2>Clips</h2><p class=about>{told}</p>")
    for clip_id, wav in sounds.items():
        firsts = [(row["name"], next(c for c in row["clips"] if c["id"] == clip_id)) for row in rows]
        text = firsts[0][1]["text"]
        said = f"“{html.escape(text)}”" if text else "<i>nothing is said</i>"
        cards = "".join(card(name, entry) for name, entry in firsts)
        parts.append(f"<p class=said>{said} {player(wav)}</p><div class=cards>{cards}</div>")
    return document(about, results["argv"], [*parts, meanings(EXPLANATIONS)])


def card(name: str, entry: dict) -> str:
    """One transcript."""
    notes = [entry.get("hallucination")]
    if entry["text"]:
        edits = sum(entry[kind] for kind in KINDS)
        notes.append(f"{edits} of {entry['ref_length']} words wrong")
    note = " · ".join(note.replace("_", "-") for note in notes if note)
    heard = marked(entry["text"], entry["hyp_text"]) or "<i>nothing written</i>"
    return f"<div class=card><b>{html.escape(name)}</b><p class=heard>{heard}<br><small>{note}</small></p></div>"


def write_reports(folder: Path, results: dict, sounds: dict[str, np.ndarray]) -> None:
    about = f"{results['num_clips']} clips, long above {results['arguments']['long_s']:g} s"
    about = f"{about} · {results['date']} · {results['git_commit']}"
    table = markdown(about, results["argv"], [list(HEADER), *map(cells, results["rows"])])
    replace_files(folder, results, table, page(about, results, sounds))


# --- The script -------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace, models: dict[str, str]) -> dict:
    """Rows of checkpoints × temperatures; returns what results.json holds.

    Args:
        args: of evaluation.py, checked; `clips` is the data set.
        models: name -> path.
    """
    with bad_input_exits():
        tokens = [load_tokenizer(path, "asr")[1] for path in models.values()]
        first = next(iter(models.values()))
        codec_id = args.codec_id or recorded(first, "codec_id", DEFAULT_CODEC)
        clips = read_clips(
            args.clips, args.split, args.language, lambda: SpeechCodec.from_pretrained(codec_id, args.device)
        )
        clips = all_keywords(clips)
        for model_tokens in tokens:
            for clip in clips:
                model_tokens.ids(clip.codes)  # another codec's codes
        shown = to_show(clips, args.num_players)
        sounds = {}
        if shown:
            codec = SpeechCodec.from_pretrained(codec_id, args.device)
            wavs = decode_rollouts(codec, [clip.codes for clip in shown])
            sounds = {clip.id: wav for clip, wav in zip(shown, wavs, strict=True)}
    prompts = [asr_prompt(clip.codes) for clip in clips]
    results = {**provenance(), "arguments": vars(args), "models": models, "num_clips": len(clips), "rows": []}
    for name, path in models.items():
        with bad_input_exits():
            policy = Policy.from_pretrained(path, args.device, task="asr")
            policy.encode(prompts, args.max_length)
        for temperature in args.temperature:
            seeds = args.seeds if temperature > 0 else [None]  # the likeliest words are the same each time
            label = f"{name} T={temperature:g}" if len(args.temperature) > 1 else name
            entries = []
            for seed in seeds:
                if seed is not None:
                    set_seed(seed)
                transcripts = policy.transcribe(
                    prompts,
                    temperature=temperature,
                    top_p=args.top_p,
                    max_length=args.max_length,
                    max_completion_length=args.max_completion_length,
                    batch_size=args.batch_size,
                    progress=label,
                )
                entries += [judged(*pair, seed) for pair in zip(clips, transcripts, strict=True)]
            metrics = summarize(entries, len(seeds), args.long_s)
            row = {"name": label, "model": path, "temperature": temperature, "seeds": seeds, "metrics": metrics}
            results["rows"].append({**row, "clips": entries})
            write_reports(Path(args.output_dir), results, sounds)
            logger.info("%s: %.2f %% of the words wrong", label, 100 * metrics["all"]["wer"])
    logger.info("look and listen: %s", Path(args.output_dir) / "report.html")
    return results
