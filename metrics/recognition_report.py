"""The table and the page of `evaluation.py --task asr`: results.md and report.html."""

import html
from pathlib import Path

import numpy as np

from metrics.formatting import percent, percent_interval
from metrics.html_page import bars, document, explanation_list, marked, metrics_table, player, training_curves
from metrics.report import error_unit
from metrics.result_files import write_results

COLUMNS = [  # behind the name and the error rate
    "short",
    "long",
    "hallucinations",
    "truncated",
    "keyword recall",
    "keyword precision",
    "hallucinations on non-speech",
]
EXPLANATIONS = {
    "WER / ins / del": "Word error rate: substitutions, deletions and insertions over the words of the references, all "
    "clips and seeds together; and of these the insertions and the deletions. In brackets the WER's 95 % bootstrap "
    "interval over clips. CER: over the characters, for zh, ja, ko and the like.",
    "short, long": "Clips of up to --long_s seconds, and above.",
    "hallucinations": "Fraction of the clips with speech whose transcript breaks a rule of reward_models/asr_rules.py: "
    "it was truncated, is empty, loops, is in another script, is twice as long or half as long, has no word in common.",
    "truncated": "Fraction of transcripts cut off before END, at --max_completion_length.",
    "keyword recall, precision": "Correct keywords over those of the references, and over those of the transcripts.",
    "hallucinations on non-speech": "Fraction of the clips without speech whose transcript has a word.",
}


def table(results: dict) -> list[list[str]]:
    """Header and rows."""
    header = ["", f"all: {error_unit(results['units'])} / ins / del, % [95 %]", *COLUMNS]
    return [header, *(row_cells(row) for row in results["rows"])]


def row_cells(row: dict) -> list[str]:
    metrics = row["metrics"]
    rates = ("keyword_recall", "keyword_precision", "nonspeech_hallucinations")
    return [
        row["name"],
        *(error_cell(metrics[part]) for part in ("all", "short", "long")),
        *(percent(metrics["all"][key]) for key in ("hallucinations", "truncated")),
        *(percent(metrics[key]) for key in rates),
    ]


def error_cell(metrics: dict | None) -> str:
    """ "21.6 / 0.3 / 1.2 [19.0, 24.1]"."""
    if metrics is None:
        return "–"
    rates = " / ".join(f"{100 * metrics[key]:.1f}" for key in ("wer", "insertions", "deletions"))
    return f"{rates} {percent_interval(metrics['interval'])}"


def about(results: dict) -> str:
    """The line below the heading: clips, date, commit."""
    clips = f"{results['num_clips']} clips, long above {results['arguments']['long_s']:g} s"
    return " · ".join([clips, results["date"], results["git_commit"]])


def page(results: dict, sounds: dict[int, np.ndarray]) -> str:
    """report.html.

    Args:
        sounds: position -> waveform of each clip to listen to; the page has each row's first transcript of it.
    """
    rows = results["rows"]
    rates = {row["name"]: (row["metrics"]["all"]["wer"], row["metrics"]["all"]["interval"]) for row in rows}
    header, *cells = table(results)
    counted = results["units"].removesuffix("s")  # word or character
    title = f"{counted.capitalize()} error rate"
    parts = [bars(title, rates), metrics_table(header, cells), *training_curves(results["models"])]
    if sounds:
        note = "As the codec decodes them. Marked: words of the transcript that differ from the reference text."
        parts.append(f"<h2>Clips</h2><p class=about>{note}</p>")
    for position, wav in sounds.items():
        entries = {row["name"]: row["clips"][position] for row in rows}  # the first seed's come first
        text = next(iter(entries.values()))["text"]
        reference = f"“{html.escape(text)}”" if text else "<i>non-speech</i>"
        cards = "".join(card(name, entry, counted) for name, entry in entries.items())
        parts.append(f"<p class=reference>{reference} {player(wav)}</p><div class=cards>{cards}</div>")
    return document(about(results), results["argv"], [*parts, explanation_list(EXPLANATIONS)])


def card(row_name: str, entry: dict, counted: str) -> str:
    """One transcript; its errors are `counted` in words or characters."""
    notes = [entry.get("hallucination")]
    if entry["text"]:
        edits = sum(entry[kind] for kind in ("substitutions", "deletions", "insertions"))
        notes.append(f"{edits} {counted} errors in {entry['ref_length']} {counted}s")
    note = " · ".join(note.replace("_", "-") for note in notes if note)
    transcript = marked(entry["text"], entry["hyp_text"]) or "<i>empty transcript</i>"
    text = f"<p class=transcript>{transcript}<br><small>{note}</small></p>"
    return f"<div class=card><b>{html.escape(row_name)}</b>{text}</div>"


def write_reports(folder: Path, results: dict, sounds: dict[int, np.ndarray]) -> None:
    """Write results.json, results.md and report.html."""
    write_results(folder, results, about(results), table(results), page(results, sounds))
