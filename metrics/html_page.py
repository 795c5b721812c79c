"""Parts of the HTML pages of evaluation.py; a page is one file, audio and pictures included."""

import base64
import difflib
import html
import io
import json
import shlex
from pathlib import Path

import numpy as np

from common.run_record import plot_curves
from speech.audio import wav_bytes

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2f6fde; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; }
.about, dd, .transcript small { opacity: .7; } code { font-size: .85em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; font-size: .85em; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
td:first-child { font-weight: 600; } tbody tr:hover { background: var(--soft); }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .3rem .9rem; align-items: center; }
.track { position: relative; height: 1.1rem; background: var(--soft); border-radius: .3rem; }
.range { position: absolute; height: 100%; background: var(--accent); opacity: .35; border-radius: .3rem; }
.point { position: absolute; width: .55rem; height: 100%; margin-left: -.27rem; border-radius: .3rem;
  background: var(--accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.card audio { width: 100%; height: 2.2rem; margin: .4rem 0; } .transcript { margin: .2rem 0; }
.reference { font-size: 1.05rem; margin: 1.6rem 0 .5rem; } .reference audio { height: 2.2rem; vertical-align: middle; }
mark { background: #e5484d40; color: inherit; border-radius: .2rem; }
img { max-width: 100%; background: white; border-radius: .6rem; } dt { font-weight: 600; } dd { margin: 0 0 .5rem; }
.contours { width: 100%; height: auto; margin: .8rem 0 0; break-inside: avoid; }
.contours text { font: 13px system-ui, sans-serif; fill: currentColor; }
.contours .name, .contours .marked-word { font-weight: 700; } .contours .word { text-anchor: middle; }
.contours .tick { font-size: 11px; text-anchor: end; opacity: .7; }
.contours line { stroke: var(--line); } .contours .marked { fill: var(--accent); opacity: .15; }
.contours polyline { fill: none; stroke: var(--accent); stroke-width: 2.5; stroke-linecap: round;
  stroke-linejoin: round; }
@media print { .card { break-inside: avoid; } .card audio { display: none; } }
"""


def document(about: str, argv: list[str], parts: list[str]) -> str:
    """The page; `parts` are HTML and stand below the heading, `about` and the command."""
    head = f"<h1>Evaluation</h1><p class=about>{html.escape(about)}</p><code>{html.escape(shlex.join(argv))}</code>"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Evaluation</title><style>{STYLE}</style>\n" + "\n".join([head, *parts]) + "</html>\n"
    )


def metrics_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in header)
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<h2>Metrics</h2><div class=wide><table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div>"


def explanation_list(explanations: dict[str, str]) -> str:
    terms = (f"<dt>{html.escape(title)}</dt><dd>{html.escape(meaning)}</dd>" for title, meaning in explanations.items())
    return f"<h2>What the columns mean</h2><dl>{''.join(terms)}</dl>"


def bars(title: str, rates: dict[str, tuple[float, list[float]]]) -> str:
    """Error rates by name, each with its interval, on one scale from 0."""
    scale = 100 / max(0.01, *(high for _, (_, high) in rates.values()))
    lines = []
    for name, (rate, (low, high)) in rates.items():
        lines.append(
            f"<span>{html.escape(name)}</span><div class=track>"
            f"<div class=range style='left:{scale * low:.2f}%;width:{scale * (high - low):.2f}%'></div>"
            f"<div class=point style='left:{scale * rate:.2f}%'></div></div><span>{100 * rate:.1f} %</span>"
        )
    return f"<h2>{html.escape(title)}</h2><div class=bars>{''.join(lines)}</div>"


def evenly_spaced(items: list, count: int) -> list:
    """`count` of the items, evenly spaced; all of them would make a page too long."""
    return items[:: max(1, len(items) // max(1, count))][:count]


def player(wav: np.ndarray) -> str:
    return f"<audio controls src='{data_uri('audio/wav', wav_bytes(wav))}'></audio>"


def training_curves(models: dict[str, str]) -> list[str]:
    """A picture for each model (name -> path) that has a log of its training."""
    pictures = []
    for name, model in models.items():
        png = reward_curve(model)
        if png is not None:
            image = f"<img alt='training curves' src='{data_uri('image/png', png)}'>"
            pictures.append(f"<h2>Training of {html.escape(name)}</h2>{image}")
    return pictures


def marked(text: str, hyp_text: str) -> str:
    """The transcript, escaped, with <mark> around the words that the text does not have in that place."""
    hyp_words = hyp_text.split()
    matcher = difflib.SequenceMatcher(None, _plain(text.split()), _plain(hyp_words), autojunk=False)
    correct = set()
    for block in matcher.get_matching_blocks():
        correct |= set(range(block.b, block.b + block.size))
    escaped = [html.escape(word) for word in hyp_words]
    return " ".join(word if i in correct else f"<mark>{word}</mark>" for i, word in enumerate(escaped))


def _plain(words: list[str]) -> list[str]:
    return ["".join(filter(str.isalnum, word)).lower() for word in words]


def data_uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def reward_curve(model: str) -> bytes | None:
    """A model's training curves as PNG: those of train.py, else drawn from the Trainer's log; None without a log."""
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
