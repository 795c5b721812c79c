"""From measured clips of synthesized speech to metrics, and from metrics to results.md and report.html.

A row of the results is a dict, ready for JSON: "name", "seeds", "compute_s", and "clips", seed by seed and in the
texts' order within a seed (`clip_measures.measure_clips` lists the keys of a clip).
"""

import html
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from common.cli import write_whole
from metrics.bootstrap import change_from_first, edit_counts, error_metrics, mean_metrics
from metrics.contours import Contour, contour_figure
from metrics.formatting import difference, number, percent, percent_interval, points, relative_change
from metrics.html_page import (
    bars,
    data_uri,
    document,
    explanation_list,
    marked,
    metrics_table,
    player,
    training_curves,
)
from metrics.judges import asr_label
from metrics.pareto import Point, pareto_png
from metrics.pass_at_k import MAX_ERROR_RATE, pass_metrics
from metrics.result_files import write_results
from speech.audio import SILENCE_DBFS
from speech.dnsmos import MosScores
from speech.measures import REPEATED_SPAN_S
from speech.melody import EMPHASISED, F0_RANGE_PERCENTILES, MIN_RISE_ST
from speech.pauses import MIN_PAUSE_S
from speech.pitch import pitch_track
from speech.text_marks import marked_words
from speech.whisper_scorer import MAX_NLL

# Means of a value of the clips: its key there, and its title and digits in the table; None is a fraction, in percent
MELODY: dict[str, tuple[str, int | None]] = {
    "emphasis": ("emphasis realised", None),
    "question": ("question realised", None),
    "statement_rise": ("statements that rise", None),
    "f0_range_st": ("F0 movement, st", 2),
    "num_pauses": ("pauses per clip", 2),
    "pause_match": ("pause placement", 2),
}


def summarize(row: dict, first: dict) -> dict:
    """The metrics of a row; None where one does not apply (natural readings have no codes).

    Args:
        first: the row to compare with.
    """
    clips = row["clips"]
    synthesized = clips[0]["num_codes"] is not None
    audible = [clip for clip in clips if clip["failure"] is None]
    speech_s = sum(clip["duration_s"] for clip in audible)

    def mean_of(name: str) -> dict | None:
        return mean_metrics(row, first, lambda clip: clip.get(name))

    def dnsmos_mean(name: str) -> dict | None:
        return mean_metrics(row, first, lambda clip: clip["dnsmos"][name] if clip.get("dnsmos") else None)

    def fraction(holds: Callable[[dict], bool]) -> float:
        return sum(map(holds, clips)) / len(clips)

    return {
        "asr": {
            asr: {
                **error_metrics(edit_counts(row, asr)),
                "change": None if row is first else change_from_first(row, first, asr),
                "nll": mean([clip["asr"][asr]["nll"] for clip in clips]),
            }
            for asr in clips[0]["asr"]
        },
        "pass_at_k": pass_metrics(row, first, next(iter(clips[0]["asr"]))),
        **{name: mean_of(name) for name in (*MELODY, "code_distance", "speaker_similarity")},
        "dnsmos": {name: dnsmos_mean(name) for name in MosScores._fields},
        "token2text": mean([clip.get("token2text") for clip in clips]),
        "duration_s": mean([clip["duration_s"] for clip in audible]),
        "units_per_second": sum(clip["num_units"] for clip in audible) / speech_s if speech_s else None,
        "f0_hz": mean([clip.get("f0_hz") for clip in audible]),
        "log_f0_std": mean([clip["log_f0_std"] for clip in audible]),
        "truncated": fraction(lambda clip: clip["truncated"]) if synthesized else None,
        "empty": fraction(lambda clip: clip["failure"] == "empty"),
        "silent": fraction(lambda clip: clip["failure"] in ("silent", "non_finite")),
        "repetitive": fraction(lambda clip: clip["repetitive"]) if synthesized else None,
        "real_time_factor": row["compute_s"] / speech_s if synthesized and speech_s else None,
    }


def mean(values: list[float | None]) -> float | None:
    """Of those that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- The table --------------------------------------------------------------------------------------------

EXPLANATIONS = {
    "WER": "Word error rate of the ASR's transcripts: substitutions, deletions and insertions over the words of the "
    "texts, all texts and seeds together. An empty or silent clip counts all its words as deleted. In brackets the "
    "95 % bootstrap interval over texts. CER is the same with characters.",
    "held-out, reward's ASR": "A held-out ASR was used by no reward; the reward's ASR is what training optimises.",
    "by seed": "Mean ± standard deviation of the error rates of the seeds.",
    "round trip": "The checkpoint's own ASR of its own speech codes (--cycle).",
    "vs first": "Relative change of the error rate from the first row, with its 95 % interval paired by text: "
    "an interval below 0 is an improvement.",
    "NLL": "Negative log-likelihood of the text given the clip, by that ASR, in nats per token; a failed clip has "
    f"{MAX_NLL:g}.",
    "speaker similarity": "Cosine of the speaker embeddings (--speaker_encoder) of a clip and of the recording of its "
    "voice prompt: 1 is the same voice. Mean over the clips that have a voice, with its 95 % interval over texts.",
    "DNSMOS": "Opinions of listeners from 1 to 5 as DNSMOS P.835 predicts them (--dnsmos): overall (OVRL), of the "
    "speech (SIG) and of the background (BAK). Mean over the audible clips. It does not know the text.",
    "vs first, of a mean": "Difference from the first row, with its 95 % interval paired by text.",
    "emphasis realised": "Of the words that a text marks (*word*), how many are emphasised: higher, longer or louder "
    f"than the other words, an emphasis score above {EMPHASISED} (0.5 is a plain word, 1 the most). A word that is not "
    "recognised is not emphasised. Word times are by the ASR named below the figures of F0.",
    "question realised": "Of the texts that ask for yes or no (in English, not those that begin with what, where and "
    f"the like), how many end with a rise of F0 by more than {MIN_RISE_ST:g} semitones.",
    "statements that rise": "The same of texts that end with a full stop; fewer are better. A checkpoint that rises "
    "everywhere shows here. Shown where there are questions as well.",
    "F0 movement": f"From the {F0_RANGE_PERCENTILES[0]}th to the {F0_RANGE_PERCENTILES[1]}th percentile of F0 over a "
    "clip's voiced frames, in semitones.",
    "pauses": f"Silences of {MIN_PAUSE_S} s and more inside a clip; and F1 of the words that they follow and of those "
    "that the punctuation has them after, in texts with punctuation inside.",
    "vs first, of a percentage": "Difference from the first row in percentage points, with its 95 % interval paired "
    "by text.",
    "code diversity": "Mean edit distance of the speech codes of two samples of a text, divided by the longer one's "
    "length: 0 for equal ones, 1 for samples with nothing in common.",
    "Pass@K, Failure@K": f"Chance that the best of K samples of a text has an error rate of at most "
    f"{100 * MAX_ERROR_RATE:g} % by the first evaluation ASR; and that the worst has more. K is the number of seeds.",
    "token-to-text": "Mean log P of the text's tokens given the codes (--token2text), in nats per token.",
    "duration": "Mean duration of an audible clip.",
    "per second": "Words (or characters) of the text per second of audible speech.",
    "F0": "Pitch, mean over the voiced frames of its logarithm, mean over clips.",
    "log-F0 std": "Standard deviation of ln F0 (the pitch) over voiced frames, mean over clips. Lower is more "
    "monotonous.",
    "truncated": "Fraction of rollouts cut off before END, by the context; scored as they sound.",
    "empty": "Fraction of clips without a speech code.",
    "silent": f"Fraction of clips below −{-SILENCE_DBFS:g} dBFS, or not finite.",
    "repetitive": f"Fraction of clips with {REPEATED_SPAN_S} s or more of one repeated pattern of codes.",
    "real-time factor": "Seconds of computing (sampling, decoding, and the ranking of best-of-N) per second of audible "
    "speech, on the device in the heading. Below 1 is faster than real time.",
}


def error_unit(units: str) -> str:
    """ "WER", or "CER" for texts scored by characters."""
    return "CER" if units == "characters" else "WER"


def asr_cells(label: str, unit: str, metrics: dict) -> dict[str, str]:
    """The columns of one evaluation ASR."""
    cells = {f"{unit}, {label}": f"{percent(metrics['error_rate'])} {percent_interval(metrics['interval'])}"}
    if metrics["seed_std"] is not None:
        cells[f"by seed, {label}"] = f"{100 * metrics['seed_mean']:.1f} ± {percent(metrics['seed_std'])}"
    if metrics["change"]:
        cells[f"vs first, {label}"] = relative_change(metrics["change"])
    if metrics["nll"] is not None:
        cells[f"NLL, {label}"] = number(metrics["nll"])
    return cells


def mean_cells(title: str, metrics: dict | None, digits: int) -> dict[str, str]:
    """The columns of a mean with its interval; none where the row has no such value."""
    if metrics is None:
        return {}
    low, high = (number(value, digits) for value in metrics["interval"])
    cells = {title: f"{number(metrics['mean'], digits)} [{low}, {high}]"}
    if metrics["change"]:
        cells[f"vs first, {title}"] = difference(metrics["change"], digits)
    return cells


def percent_cells(title: str, metrics: dict | None) -> dict[str, str]:
    """`mean_cells` of a fraction."""
    if metrics is None:
        return {}
    cells = {title: f"{percent(metrics['mean'])} {percent_interval(metrics['interval'])}"}
    if metrics["change"]:
        cells[f"vs first, {title}"] = points(metrics["change"])
    return cells


def melody_cells(metrics: dict) -> dict[str, str]:
    """The columns of MELODY; a rise of statements says something beside that of questions only."""
    cells = {}
    for name, (title, digits) in MELODY.items():
        if name == "statement_rise" and metrics["question"] is None:
            continue
        one = metrics[name]
        cells |= percent_cells(title, one) if digits is None else mean_cells(title, one, digits)
    return cells


def row_cells(row: dict, units: str, asr_roles: dict[str, str]) -> dict[str, str]:
    """Column title -> cell."""
    metrics = row["metrics"]
    cells = {"": row["name"]}
    for asr, asr_metrics in metrics["asr"].items():
        cells |= asr_cells(asr_label(asr, asr_roles[asr]), error_unit(units), asr_metrics)
    for title, one in metrics["pass_at_k"].items():
        cells |= percent_cells(title, one)
    cells |= melody_cells(metrics)
    cells |= mean_cells("code diversity", metrics["code_distance"], digits=3)
    cells |= mean_cells("speaker similarity", metrics["speaker_similarity"], digits=3)
    for name, mos in metrics["dnsmos"].items():
        cells |= mean_cells(f"DNSMOS {name.upper()}", mos, digits=2)
    if metrics["token2text"] is not None:
        cells["token-to-text"] = number(metrics["token2text"])
    return cells | {
        "duration, s": number(metrics["duration_s"]),
        f"{units} per second": number(metrics["units_per_second"]),
        "F0, Hz": number(metrics["f0_hz"], 0),
        "log-F0 std": number(metrics["log_f0_std"], 3),
        **{name: percent(metrics[name]) for name in ("truncated", "empty", "silent", "repetitive")},
        "real-time factor": number(metrics["real_time_factor"]),
    }


def table(results: dict) -> list[list[str]]:
    """Header and rows; a dash where a row has no such column."""
    rows = [row_cells(row, results["units"], results["asr_roles"]) for row in results["rows"]]
    widest = max(rows, key=len)
    other_titles = [title for row in rows for title in row if title not in widest]
    header = list(dict.fromkeys([*widest, *other_titles]))
    return [header, *([row.get(title, "–") for title in header] for row in rows)]


def about(results: dict) -> str:
    """The line below the heading: texts, sampling, date, commit, device."""
    arguments = results["arguments"]
    on_gpu = arguments["device"].startswith("cuda")
    hardware = ", ".join(results["hardware"]["gpus"]) if on_gpu else f"{results['hardware']['cores']} CPU cores"
    sampling = [f"{name} {' '.join(f'{n:g}' for n in arguments[name])}" for name in ("seeds", "temperature")]
    return " · ".join([f"{results['num_texts']} texts", *sampling, results["date"], results["git_commit"], hardware])


# --- The plot ---------------------------------------------------------------------------------------------

# What the error rate is plotted against: key of the metrics, title, factor
REALISED = [("emphasis", "emphasis realised, %", 100), ("question", "question realised, %", 100)]
MOVEMENT = [("f0_range_st", "F0 movement, st", 1)]
SIMILARITY = [("speaker_similarity", "speaker similarity", 1)]


def pareto_plot(results: dict) -> bytes | None:
    """pareto.png: a point for each row of a checkpoint; None where there are not two checkpoints."""
    rows = [row for row in results["rows"] if row["model"] is not None]
    if len({row["model"] for row in rows}) < 2:
        return None
    has_melody = any(row["metrics"][name] for row in rows for name, *_ in REALISED)
    asr, role = next(iter(results["asr_roles"].items()))
    panels = {}
    for name, title, factor in (REALISED if has_melody else MOVEMENT) + SIMILARITY:
        points = [pareto_point(row, asr, name, factor) for row in rows if row["metrics"][name]]
        if points:
            panels[title] = points
    return pareto_png(f"{error_unit(results['units'])}, %, {asr_label(asr, role)}", panels) if panels else None


def pareto_point(row: dict, asr: str, name: str, factor: float) -> Point:
    errors, metric = row["metrics"]["asr"][asr], row["metrics"][name]
    error_interval = [100 * value for value in errors["interval"]]
    metric_interval = [factor * value for value in metric["interval"]]
    return Point(row["name"], 100 * errors["error_rate"], error_interval, factor * metric["mean"], metric_interval)


# --- The page ---------------------------------------------------------------------------------------------

Player = tuple[str, dict, np.ndarray]  # the row's name, the clip, its waveform


def page(results: dict, players: dict[str, list[Player]], plot: bytes | None) -> str:
    """report.html.

    Args:
        players: text -> the clips of it to listen to, one per row.
        plot: a PNG, of `pareto_plot`.
    """
    unit = error_unit(results["units"])
    header, *rows = table(results)
    parts = [
        bars(f"{unit}, {asr_label(asr, role)}", error_rates(results["rows"], asr))
        for asr, role in results["asr_roles"].items()
    ]
    by_metric = [list(column) for column in zip(header, *rows, strict=True)]  # on a page, as wide as there are rows
    parts += [metrics_table(*by_metric[:1], by_metric[1:]), *training_curves(results["models"])]
    if plot is not None:
        image = f"<img alt='error rate against melody' src='{data_uri('image/png', plot)}'>"
        parts.append(f"<h2>Error rate against melody</h2>{image}")
    if players:
        parts.append(f"<h2>Listen</h2><p class=about>{html.escape(listening_note(results))}</p>")
    for text, clips in players.items():
        cards = "".join(card(text, unit, results["asr_roles"], *clip) for clip in clips)
        figure = contour_figure(text, [contour(*clip) for clip in clips if clip[1]["failure"] is None])
        parts.append(f"<p class=reference>“{html.escape(text)}”</p><div class=cards>{cards}</div>{figure}")
    return document(about(results), results["argv"], [*parts, explanation_list(EXPLANATIONS)])


def error_rates(rows: list[dict], asr: str) -> dict[str, tuple[float, list[float]]]:
    """Error rate and interval by row, of the rows that this ASR transcribed (no round trip of a recording)."""
    metrics = {row["name"]: row["metrics"]["asr"].get(asr) for row in rows}
    return {name: (one["error_rate"], one["interval"]) for name, one in metrics.items() if one}


def listening_note(results: dict) -> str:
    timer = results["word_timer"]
    words = f"times by {asr_label(timer, results['asr_roles'][timer])}" if timer else "no ASR here tells their times"
    return (
        "First seed. Marked: words of the transcript that differ from the text. Below the players: F0 in semitones "
        f"from the clip's median, over the words ({words}; shaded: to be emphasised)."
    )


def contour(row_name: str, clip: dict, wav: np.ndarray) -> Contour:
    return Contour(row_name, pitch_track(wav), clip.get("words") or [], clip["duration_s"], marked_words(clip["text"]))


def card(text: str, unit: str, asr_roles: dict[str, str], row_name: str, clip: dict, wav: np.ndarray) -> str:
    """One player with the transcript of each evaluation ASR."""
    audio = "" if clip["failure"] in ("empty", "non_finite") else player(wav)
    notes = [clip["failure"], "truncated" if clip["truncated"] else None]
    transcripts = "".join(
        f"<p class=transcript>{marked(text, errors['hyp_text']) or '<i>empty transcript</i>'}<br>"
        f"<small>{html.escape(asr_label(asr, asr_roles[asr]))}: {unit} {percent(errors['error_rate'], 0)}</small></p>"
        for asr, errors in clip["asr"].items()
    )
    if clip.get("speaker_similarity") is not None:
        notes.append(f"speaker similarity {number(clip['speaker_similarity'], 3)}")
    if clip.get("dnsmos"):
        notes.append(f"DNSMOS {number(clip['dnsmos']['ovrl'])}")
    note = "".join(f" · {note.replace('_', '-')}" for note in notes if note)
    return f"<div class=card><b>{html.escape(row_name)}</b> {clip['duration_s']:.1f} s{note}{audio}{transcripts}</div>"


def write_reports(folder: Path, results: dict, players: dict[str, list[Player]]) -> None:
    """Write results.json, results.md, report.html and, of several checkpoints, pareto.png."""
    plot = pareto_plot(results)
    if plot is not None:
        write_whole(folder / "pareto.png", partial(Path.write_bytes, data=plot))
    else:
        (folder / "pareto.png").unlink(missing_ok=True)  # of an evaluation that --overwrite replaces
    write_results(folder, results, about(results), table(results), page(results, players, plot))
