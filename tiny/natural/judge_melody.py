"""Whether the clips of an evaluation have the melody of their texts, by the rule that made the recordings' melody.

    python evaluation.py … --num_players 120 --output_dir runs/melody
    python -m tiny.natural.judge_melody runs/melody

evaluation.py counts questions and emphasis by the measure of the rewards (speech/melody.py). This one has another
F0 track and other thresholds, and no reward uses it. It judges the clips that are on the page, which sounds.npz has,
so give evaluation.py as many players as there are texts. The times of words are those of the evaluation.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path

import numpy as np

from common.cli import HelpFormatter, InputError, bad_input_exits, parse_strictly, set_up_logging
from common.tables import markdown_table
from metrics.result_files import read_sounds
from tiny.natural.corpus import emphasised_word, form
from tiny.natural.melody import Word, emphasis_cues, is_emphasised, is_question

logger = logging.getLogger("tiny.natural.judge_melody")

COLUMNS = {"question": "questions that rise", "statement": "others that rise", "emphasis": "words emphasised"}


def judgements(clips: list[tuple[dict, np.ndarray]]) -> dict[str, list[bool]]:
    """Of each clip of an audible text: whether it ends as a question does, and whether its marked word is emphasised.

    Args:
        clips: text and words of evaluation.py's results, and the waveform at 16 kHz.
    """
    found = {name: [] for name in COLUMNS}
    for clip, wav in clips:
        kind = form(clip["text"])
        rises = bool(clip["failure"] is None and is_question(wav))
        found["question" if kind == "question" else "statement"].append(rises)
        if kind == "emphasis":
            words = [Word(*word) for word in clip["words"] or []]
            index = emphasised_word(clip["text"])
            found["emphasis"].append(bool(words) and is_emphasised(emphasis_cues(wav, words, index)))
    return found


def judged(folder: Path) -> list[tuple[str, dict[str, list[bool]]]]:
    """Name and judgements of each row of an evaluation; InputError where there is none, or it has not all clips."""
    if not (folder / "results.json").exists():
        raise InputError(f"{folder}: has no results.json. Give an --output_dir of evaluation.py")
    rows, sounds = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"], read_sounds(folder)
    judged_rows = []
    for number, row in enumerate(rows):
        clips = [(clip, sounds[f"{number}_{i}"]) for i, clip in enumerate(row["clips"]) if f"{number}_{i}" in sounds]
        texts = len({clip["text"] for clip in row["clips"]})
        if len(clips) < texts:
            raise InputError(
                f"{folder}: sounds.npz has {len(clips)} clips of {texts} texts. "
                f"Evaluate with --num_players {texts} --overwrite"
            )
        judged_rows.append((row["name"], judgements(clips)))
    return judged_rows


def percent(found: list[bool]) -> str:
    return f"{100 * statistics.mean(found):.1f} % of {len(found)}" if found else "–"


def main(args: argparse.Namespace) -> None:
    set_up_logging("tiny")
    with bad_input_exits():
        rows = [(folder, *row) for folder in args.evaluations for row in judged(folder)]
    cells = [[folder, name, *(percent(found[key]) for key in COLUMNS)] for folder, name, found in rows]
    logger.info("%s", markdown_table(["evaluation", "row", *COLUMNS.values()], cells))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tiny.natural.judge_melody", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("evaluations", type=Path, nargs="+", metavar="FOLDER", help="--output_dir of evaluation.py")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    main(parse_args())
