"""From judged clips to numbers, and from numbers to results.json, results.md and report.html.

A row of the results is a dict, ready for JSON: "name", "seeds", "compute_s", and "clips", seed by seed and in the
texts' order within a seed (`evaluation.judge_clips` says what a clip holds).
"""

import html
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np

from metrics.bootstrap import change, edit_counts, error_metrics
from metrics.html_page import bars, document, marked, meanings, metrics_table, player, training_curves


def summarize(row: dict, first: dict) -> dict:
    """The metrics of a row; None where one does not apply (natural readings have no codes).

    Args:
        first: the row to compare with.
    """
    clips = row["clips"]
    spoken = clips[0]["num_codes"] is not None
    sounding = [clip for clip in clips if clip["failure"] is None]
    sound_s = sum(clip["duration_s"] for clip in sounding)

    def share(holds: Callable[[dict], bool]) -> float:
        return sum(map(holds, clips)) / len(clips)

    return {
        "judges": {
            judge: {
                **error_metrics(edit_counts(row, judge)),
                "change": None if row is first else change(row, first, judge),
                "nll": mean([clip["judges"][judge]["nll"] for clip in clips]),
            }
            for judge in clips[0]["judges"]
        },
        "token2text": mean([clip.get("token2text") for clip in clips]),
        "duration_s": mean([clip["duration_s"] for clip in sounding]),
        "units_per_second": sum(clip["num_units"] for clip in sounding) / sound_s if sound_s else None,
        "log_f0_std": mean([clip["log_f0_std"] for clip in sounding]),
        "truncated": share(lambda clip: clip["truncated"]) if spoken else None,
        "empty": share(lambda clip: clip["failure"] == "empty"),
        "silent": share(lambda clip: clip["failure"] in ("silent", "non_finite")),
        "repetitive": share(lambda clip: clip["repetitive"]) if spoken else None,
        "speech_per_compute_s": sound_s / row["compute_s"] if spoken else None,
    }


def mean(values: list[float | None]) -> float | None:
    """Of those that are not None; None if that leaves nothing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- The table --------------------------------------------------------------------------------------------

EXPLANATIONS = {
    "WER": "Word error rate: words to substitute, delete and insert over the words of the texts, all texts and seeds "
    "together, by what the judge heard. An empty or silent clip counts all its words as deleted. In brackets the 95 % "
    "bootstrap interval over texts. CER is the same with characters.",
    "by seed": "Mean ± standard deviation of the error rates of the seeds.",
    "by itself": "What the checkpoint that spoke reads in its own codes (--cycle).",
    "vs first": "Relative change of the error rate from the first row, with its 95 % interval paired by text: "
    "below 0 throughout is a gain.",
    "NLL": "How surprised the judge is by the true text, in nats per token; a failed clip counts 20.",
    "token-to-text": "Mean log P of the text's tokens given the codes (--token2text), in nats per token.",
    "seconds": "Mean duration of a clip with sound.",
    "per second": "Words (or characters) of the text spoken in a second.",
    "log-F0 spread": "Standard deviation of the logarithm of the pitch over voiced frames, mean over clips. Falling "
    "means monotonous.",
    "truncated": "Share of rollouts that were cut off before END, by the context; scored as they sound.",
    "empty": "Share of clips without one speech code.",
    "silent": "Share of clips too quiet to hear, or not a number.",
    "repetitive": "Share of clips caught in a loop of codes.",
    "speed": "Seconds of speech made in one second of computing: sampling and decoding, for best-of-N the choice too.",
}


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def percents(values: list[float]) -> str:
    return f"[{', '.join(f'{100 * value:.1f}' for value in values)}]"


def judge_cells(judge: str, unit: str, metrics: dict) -> dict[str, str]:
    cells = {f"{unit} by {judge}": f"{percent(metrics['error_rate'])} {percents(metrics['interval'])}"}
    if metrics["seed_std"] is not None:
        cells[f"by seed, {judge}"] = f"{percents([metrics['seed_mean']])[1:-1]} ± {percent(metrics['seed_std'])}"
    if metrics["change"]:
        cells[f"vs first, {judge}"] = (
            f"{100 * metrics['change']['relative']:+.0f} % {percents(metrics['change']['interval'])}"
        )
    if metrics["nll"] is not None:
        cells[f"NLL by {judge}"] = number(metrics["nll"])
    return cells


def row_cells(row: dict, units: str) -> dict[str, str]:
    """Column title -> what stands there."""
    metrics = row["metrics"]
    unit = "CER" if units == "characters" else "WER"
    cells = {"": row["name"]}
    for judge, judged in metrics["judges"].items():
        cells |= judge_cells(judge, unit, judged)
    if metrics["token2text"] is not None:
        cells["token-to-text"] = number(metrics["token2text"])
    return cells | {
        "seconds": number(metrics["duration_s"]),
        f"{units} per second": number(metrics["units_per_second"]),
        "log-F0 spread": number(metrics["log_f0_std"], 3),
        **{name: percent(metrics[name]) for name in ("truncated", "empty", "silent", "repetitive")},
        "speed": number(metrics["speech_per_compute_s"]),
    }


def table(results: dict) -> list[list[str]]:
    """Header and rows; a cell that a row has not is a dash."""
    rows = [row_cells(row, results["units"]) for row in results["rows"]]
    widest = max(rows, key=len)
    header = [*widest, *(title for row in rows for title in row if title not in widest)]
    return [list(dict.fromkeys(header))] + [[row.get(title, "–") for title in dict.fromkeys(header)] for row in rows]


def about(results: dict) -> str:
    where = ", ".join(results["hardware"]["gpus"]) or f"{results['hardware']['cores']} CPU cores"
    arguments = results["arguments"]
    drawn = [f"{name} {' '.join(f'{n:g}' for n in arguments[name])}" for name in ("seeds", "temperature")]
    return " · ".join([f"{results['num_texts']} texts", *drawn, results["date"], results["git_commit"], where])


def markdown(about: str, argv: list[str], lines: list[list[str]]) -> str:
    """results.md; the first of `lines` is the header."""
    header, *rows = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])
    return f"{about}\n\n    {shlex.join(argv)}\n\n{table}\n"


# --- The page ---------------------------------------------------------------------------------------------


def page(results: dict, players: dict[str, list[tuple]]) -> str:
    """report.html.

    Args:
        players: text -> (row's name, clip, waveform) of each row that says it.
    """
    judges = list(results["rows"][0]["metrics"]["judges"])
    error = "Character error rate" if results["units"] == "characters" else "Word error rate"
    header, *rows = table(results)
    parts = [bars(f"{error} by {judge}", error_rates(results["rows"], judge)) for judge in judges]
    parts += [metrics_table(header, rows), *training_curves(results["models"])]
    if players:
        parts.append("<h2>Listen</h2><p class=about>First seed. Marked: words that the text does not have there.</p>")
    for text, said in players.items():
        cards = "".join(card(text, *one) for one in said)
        parts.append(f"<p class=said>“{html.escape(text)}”</p><div class=cards>{cards}</div>")
    return document(about(results), results["argv"], [*parts, meanings(EXPLANATIONS)])


def error_rates(rows: list[dict], judge: str) -> dict[str, tuple[float, list[float]]]:
    judged = {row["name"]: row["metrics"]["judges"].get(judge) for row in rows}
    # a recording has nobody to read itself back
    return {name: (one["error_rate"], one["interval"]) for name, one in judged.items() if one}


def card(text: str, name: str, clip: dict, wav: np.ndarray) -> str:
    """One player with what each judge heard."""
    playable = clip["failure"] not in ("empty", "non_finite")
    sound = player(wav) if playable else ""
    notes = [clip["failure"], "truncated" if clip["truncated"] else None]
    heard = "".join(
        f"<p class=heard>{marked(text, judged['hyp_text']) or '<i>nothing heard</i>'}<br>"
        f"<small>{html.escape(judge)}, {percent(judged['error_rate'], 0)} wrong</small></p>"
        for judge, judged in clip["judges"].items()
    )
    said = "".join(f" · {note.replace('_', '-')}" for note in notes if note)
    return f"<div class=card><b>{html.escape(name)}</b> {clip['duration_s']:.1f} s{said}{sound}{heard}</div>"


def write_reports(folder: Path, results: dict, players: dict[str, list[tuple]]) -> None:
    """results.json, results.md and report.html."""
    replace_files(folder, results, markdown(about(results), results["argv"], table(results)), page(results, players))


def replace_files(folder: Path, results: dict, table: str, page: str) -> None:
    """What an evaluation leaves, each file replaced as a whole: whoever reads it meanwhile reads all of it."""
    contents = {
        "results.json": json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False),
        "results.md": table,
        "report.html": page,
    }
    for name, content in contents.items():
        unfinished = folder / f".{name}"
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(folder / name)
