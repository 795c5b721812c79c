"""From judged clips to numbers, and from numbers to results.json, results.md and report.html.

A row of the results is a dict, ready for JSON: "name", "seeds", "compute_s", and "clips", seed by seed and in the
texts' order within a seed (`evaluation.judge_clips` says what a clip holds).
"""

import base64
import difflib
import html
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from run_record import plot_curves
from speech_tokens import SAMPLE_RATE

NUM_RESAMPLES = 2_000  # of the bootstrap: the ends of an interval then vary by some 2 % of its width

# --- Numbers ----------------------------------------------------------------------------------------------


def resampled_sums(counts: np.ndarray) -> np.ndarray:
    """Bootstrap over texts: each row of `counts`, shape (k, num_texts), summed over the same random draws.

    Returns:
        shape (k, NUM_RESAMPLES).
    """
    num_texts = counts.shape[1]
    uniform = np.full(num_texts, 1 / num_texts)
    times_drawn = np.random.default_rng(0).multinomial(num_texts, uniform, size=NUM_RESAMPLES)
    return counts @ times_drawn.T


def interval(values: np.ndarray) -> list[float]:
    """The middle 95 %."""
    return np.percentile(values, [2.5, 97.5]).tolist()


def edit_counts(row: dict, judge: str) -> np.ndarray:
    """Edits and reference lengths, shape (2, num_seeds, num_texts)."""
    heard = [clip["judges"][judge] for clip in row["clips"]]
    counts = [[clip["edits"] for clip in heard], [clip["ref_length"] for clip in heard]]
    return np.array(counts).reshape(2, len(row["seeds"]), -1)


def error_metrics(counts: np.ndarray) -> dict:
    """Corpus-level error rate: all edits over all words (or characters) of all texts and seeds.

    The interval resamples the texts, all seeds of one together: its seeds share a text's difficulty.

    Args:
        counts: from `edit_counts`.
    """
    edits, ref_length = counts.sum(axis=(1, 2))
    resampled_edits, resampled_length = resampled_sums(counts.sum(axis=1))
    per_seed = counts[0].sum(axis=1) / counts[1].sum(axis=1)
    return {
        "error_rate": float(edits / ref_length),
        "interval": interval(resampled_edits / resampled_length),
        "per_seed": per_seed.tolist(),
        "seed_mean": float(per_seed.mean()),
        "seed_std": float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None,
    }


def change(row: dict, first: dict, judge: str) -> dict | None:
    """Relative change of the error rate from the first row's, its interval paired by text.

    None for other texts than the first row's, and where that has no error to lose.
    """
    if first_seed_texts(row) != first_seed_texts(first):
        return None
    counts = np.concatenate([edit_counts(r, judge).sum(axis=1) for r in (row, first)])
    if counts[2].sum() == 0:
        return None

    def relative(edits, length, first_edits, first_length):
        return (edits / length) / (first_edits / first_length) - 1

    sums = resampled_sums(counts)
    sums = sums[:, sums[2] > 0]  # a draw of texts that the first row has all right says nothing
    return {"relative": float(relative(*counts.sum(axis=1))), "interval": interval(relative(*sums))}


def first_seed_texts(row: dict) -> list[str]:
    return [clip["text"] for clip in row["clips"][: len(row["clips"]) // len(row["seeds"])]]


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
        "truncated": share(lambda clip: not clip["ended"]) if spoken else None,
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
    "truncated": "Share of clips that never ended and were cut where the context was; judged as they sound.",
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


def markdown(results: dict) -> str:
    header, *rows = [[cell.replace("|", "\\|") for cell in cells] for cells in table(results)]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])
    return f"{about(results)}\n\n    {shlex.join(results['argv'])}\n\n{lines}\n"


# --- The page ---------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2f6fde; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; }
.about, dd, .heard small { opacity: .7; } code { font-size: .85em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; font-size: .85em; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
td:first-child { font-weight: 600; } tbody tr:hover { background: var(--soft); }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .3rem .9rem; align-items: center; }
.track { position: relative; height: 1.1rem; background: var(--soft); border-radius: .3rem; }
.range { position: absolute; height: 100%; background: var(--accent); opacity: .35; border-radius: .3rem; }
.point { position: absolute; width: .55rem; height: 100%; margin-left: -.27rem; border-radius: .3rem;
  background: var(--accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.card audio { width: 100%; height: 2.2rem; margin: .4rem 0; } .heard { margin: .2rem 0; }
.said { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
mark { background: #e5484d40; color: inherit; border-radius: .2rem; }
img { max-width: 100%; background: white; border-radius: .6rem; } dt { font-weight: 600; } dd { margin: 0 0 .5rem; }
"""


def page(results: dict, players: dict[str, list[tuple]], curves: dict[str, bytes]) -> str:
    """One HTML document with everything in it.

    Args:
        players: text -> (row's name, clip, waveform) of each row that says it.
        curves: model -> PNG of its reward curve.
    """
    esc = html.escape
    header, *rows = table(results)
    cells = "".join(f"<tr>{''.join(f'<td>{esc(cell)}</td>' for cell in row)}</tr>" for row in rows)
    judges = list(results["rows"][0]["metrics"]["judges"])
    error = "Character error rate" if results["units"] == "characters" else "Word error rate"
    head = "".join(f"<th>{esc(title)}</th>" for title in header)
    parts = [
        f"<h1>Evaluation</h1><p class=about>{esc(about(results))}</p><code>{esc(shlex.join(results['argv']))}</code>",
        *(f"<h2>{error} by {esc(judge)}</h2>{bars(results['rows'], judge)}" for judge in judges),
        "<h2>Metrics</h2>",
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div>",
    ]
    for name, png in curves.items():
        parts.append(f"<h2>Training of {esc(name)}</h2><img alt='training curves' src='{data_uri('image/png', png)}'>")
    if players:
        parts.append("<h2>Listen</h2><p class=about>First seed. Marked: words that the text does not have there.</p>")
    for text, said in players.items():
        parts.append(
            f"<p class=said>“{esc(text)}”</p><div class=cards>{''.join(card(text, *one) for one in said)}</div>"
        )
    meanings = (f"<dt>{esc(title)}</dt><dd>{esc(meaning)}</dd>" for title, meaning in EXPLANATIONS.items())
    parts.append(f"<h2>What the columns mean</h2><dl>{''.join(meanings)}</dl>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Evaluation</title><style>{STYLE}</style>\n" + "\n".join(parts) + "</html>\n"
    )


def bars(rows: list[dict], judge: str) -> str:
    """The error rates with their intervals, on one scale from 0."""
    judged = [(row["name"], row["metrics"]["judges"].get(judge)) for row in rows]
    judged = [(name, metrics) for name, metrics in judged if metrics]  # a recording has nobody to read itself back
    scale = 100 / max(0.01, *(metrics["interval"][1] for _, metrics in judged))
    lines = []
    for name, metrics in judged:
        low, high = metrics["interval"]
        lines.append(
            f"<span>{html.escape(name)}</span><div class=track>"
            f"<div class=range style='left:{scale * low:.2f}%;width:{scale * (high - low):.2f}%'></div>"
            f"<div class=point style='left:{scale * metrics['error_rate']:.2f}%'></div></div>"
            f"<span>{percent(metrics['error_rate'])}</span>"
        )
    return f"<div class=bars>{''.join(lines)}</div>"


def card(text: str, name: str, clip: dict, wav: np.ndarray) -> str:
    """One player with what each judge heard."""
    playable = clip["failure"] not in ("empty", "non_finite")
    sound = f"<audio controls src='{data_uri('audio/wav', wav_bytes(wav))}'></audio>" if playable else ""
    notes = [clip["failure"], "never ended" if clip["ended"] is False else None]
    heard = "".join(
        f"<p class=heard>{marked(text, judged['hyp_text']) or '<i>nothing heard</i>'}<br>"
        f"<small>{html.escape(judge)}, {percent(judged['error_rate'], 0)} wrong</small></p>"
        for judge, judged in clip["judges"].items()
    )
    said = "".join(f" · {note.replace('_', '-')}" for note in notes if note)
    return f"<div class=card><b>{html.escape(name)}</b> {clip['duration_s']:.1f} s{said}{sound}{heard}</div>"


def marked(text: str, hyp_text: str) -> str:
    """The transcript, escaped, the words marked that the text does not have in that place."""
    words = hyp_text.split()
    plain = [["".join(filter(str.isalnum, word)).lower() for word in side] for side in (text.split(), words)]
    right = set()
    for block in difflib.SequenceMatcher(None, *plain, autojunk=False).get_matching_blocks():
        right |= set(range(block.b, block.b + block.size))
    escaped = [html.escape(word) for word in words]
    return " ".join(word if i in right else f"<mark>{word}</mark>" for i, word in enumerate(escaped))


def data_uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def wav_bytes(wav: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wav.clip(-1, 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def reward_curve(model: str) -> bytes | None:
    """A model's curves over its training, as PNG: train.py's own, else drawn from the Trainer's log, else None."""
    folders = [Path(model), Path(model).parent]  # a checkpoint-N lies in its run's folder
    for folder in folders:
        if (folder / "reward_curve.png").is_file():
            return (folder / "reward_curve.png").read_bytes()
    log_file = Path(model) / "trainer_state.json"
    if not log_file.is_file():
        return None
    png = io.BytesIO()
    plot_curves(json.loads(log_file.read_text(encoding="utf-8"))["log_history"], png)
    return png.getvalue() or None


def write_reports(folder: Path, results: dict, players: dict[str, list[tuple]]) -> None:
    """results.json, results.md and report.html, each replaced as a whole."""
    curves = {name: png for name, model in results["models"].items() if (png := reward_curve(model))}
    contents = {
        "results.json": json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False),
        "results.md": markdown(results),
        "report.html": page(results, players, curves),
    }
    for name, content in contents.items():
        unfinished = folder / f".{name}"
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(folder / name)  # whoever reads it meanwhile reads a whole one
