"""Whether the clips of an evaluation have the melody of their texts, by the rule that made the recordings' melody.

    python evaluation.py … --num_players 120 --output_dir runs/melody
    python -m tiny.judge_melody runs/melody

evaluation.py counts questions and emphasis by the F0 track and the measures that the rewards have (speech/melody.py).
This one has F0 by cross-correlation in place of autocorrelation, other spans and thresholds, no level and no length of
words, and no reward uses it. Both compare an end with most of the clip. Of the held-out recordings it tells 33 of 36
questions and 35 of 36 emphasised words, and of the same clips before they got their melody 0 of 36 and 2 of 36. It
judges the clips that are on the page, those of the first seed, which sounds.npz has, so give evaluation.py as many
players as there are texts. More samplings of a policy are evaluations of their own, with other --seeds: rows of the
same name, model, temperature and texts are one row here. The times of words are those of the evaluation.
"""

import argparse
import json
import logging
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import parselmouth

from common.cli import HelpFormatter, InputError, bad_input_exits, parse_strictly, run_script, set_up_logging
from common.tables import markdown_table
from metrics.result_files import read_sounds
from speech.pitch import levels_db
from speech.tokens import SAMPLE_RATE
from tiny.corpus import emphasised_word, form

logger = logging.getLogger("tiny.judge_melody")

F0_RANGE_HZ = (60, 450)
MIN_SECONDS = 0.1  # of a clip
MAX_BELOW_DB = 16.0  # quieter frames, below the loudest, are breath and creak
JUDGED_END_S = 0.12  # voiced time at the end
# The rule raises a question's end to 9.2 semitones above the median, and a word by 6.4; 12 are an octave error.
RISE_ST = (4.0, 12.0)
Clips = list[tuple[dict, np.ndarray]]  # of evaluation.py's results, and their waveforms at 16 kHz
COLUMNS = {"question": "question-rise rate", "statement": "false-rise rate", "emphasis": "emphasis rate"}


def f0_above_median(wav: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times in s of the voiced frames, 10 ms apart, and their F0 in semitones above the clip's median.

    Args:
        wav: float32 mono at 16 kHz, shape (n_samples,), finite.
    """
    if len(wav) < MIN_SECONDS * SAMPLE_RATE:
        return np.zeros(0), np.zeros(0)
    floor, ceiling = F0_RANGE_HZ
    sound = parselmouth.Sound(wav.astype(np.float64), SAMPLE_RATE)
    pitch = sound.to_pitch_cc(time_step=0.01, pitch_floor=floor, pitch_ceiling=ceiling)
    hz = pitch.selected_array["frequency"]
    times, hz = pitch.xs()[hz > 0], hz[hz > 0]
    level = levels_db(wav, times)
    loud = level > level.max(initial=-np.inf) - MAX_BELOW_DB
    times, semitones = times[loud], 12 * np.log2(hz[loud])
    return times, semitones - np.median(semitones) if len(times) else semitones


def ends_as_question(wav: np.ndarray) -> bool:
    """Whether the last JUDGED_END_S of voice is in RISE_ST above the clip's median; not in a clip without voice."""
    times, f0 = f0_above_median(wav)
    return bool(len(times) and RISE_ST[0] <= np.median(f0[times > times[-1] - JUDGED_END_S]) <= RISE_ST[1])


def stands_out(wav: np.ndarray, start_s: float, end_s: float) -> bool:
    """Whether a word's median F0 is in RISE_ST above that of the rest; not where one of them has no voice."""
    times, f0 = f0_above_median(wav)
    inside = (times >= start_s) & (times <= end_s)
    if inside.all() or not inside.any():
        return False
    return bool(RISE_ST[0] <= np.median(f0[inside]) - np.median(f0[~inside]) <= RISE_ST[1])


def judgements(clips: Clips) -> dict[str, list[bool]]:
    """By COLUMNS' keys, of each clip that one concerns, whether it rises at the end or emphasises its marked word.

    A clip that failed does neither. One whose text is too long for the ASR to tell its words is left out of emphasis.
    """
    counted = {name: [] for name in COLUMNS}
    for clip, wav in clips:
        audible, kind = clip["failure"] is None, form(clip["text"])
        counted["question" if kind == "question" else "statement"].append(audible and ends_as_question(wav))
        if kind != "emphasis":
            continue
        if not audible:
            counted["emphasis"].append(False)
        elif clip["words"] is not None:
            _, start_s, end_s = clip["words"][emphasised_word(clip["text"])]
            counted["emphasis"].append(stands_out(wav, start_s, end_s))
    return counted


@dataclass
class SampledRow:
    """A row of one evaluation or of several: a policy's clips, once for each sampling; `folder` is of the first."""

    folder: Path
    name: str
    samplings: list[Clips]


def clips_on_page(folder: Path) -> list[tuple[dict, Clips]]:
    """The rows of an evaluation, and of each the first seed's clips.

    Raises:
        InputError: no evaluation there, or not all clips in sounds.npz.
    """
    if not (folder / "results.json").exists():
        raise InputError(f"{folder}: has no results.json. Give an --output_dir of evaluation.py")
    rows, sounds = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"], read_sounds(folder)
    clips_of_rows = []
    for number, row in enumerate(rows):
        clips = [(clip, sounds[f"{number}_{i}"]) for i, clip in enumerate(row["clips"]) if f"{number}_{i}" in sounds]
        texts = len({clip["text"] for clip in row["clips"]})
        if len(clips) < texts:
            raise InputError(
                f"{folder}: sounds.npz has {len(clips)} clips of {texts} texts. "
                f"Evaluate with --num_players {texts} --overwrite"
            )
        clips_of_rows.append((row, clips))
    return clips_of_rows


def sampled_rows(folders: list[Path]) -> list[SampledRow]:
    """The rows of evaluations; those of one name, model, temperature and texts are samplings of one policy.

    A sampling that has been there, and the rows of recordings, which are no samplings, are taken once.

    Raises:
        InputError: as `clips_on_page`.
    """
    rows, seen = {}, set()
    for folder in folders:
        for row, clips in clips_on_page(folder):
            texts = tuple(sorted(clip["text"] for clip, _ in clips))
            policy = (row["name"], row["model"], row["temperature"], texts)
            sampling = (policy, row["seeds"][0])
            if sampling in seen:
                if row["model"] is not None:
                    logger.warning("%s: row %s with --seeds %s was there before", folder, row["name"], row["seeds"][0])
                continue
            seen.add(sampling)
            rows.setdefault(policy, SampledRow(folder, row["name"], [])).samplings.append(clips)
    return list(rows.values())


def judged(row: SampledRow) -> dict[str, list[bool]]:
    """The judgements of all samplings; InputError where there are no times of words."""
    if any("words" not in clip for clips in row.samplings for clip, _ in clips):
        raise InputError(f"{row.folder}: has no times of words. Evaluate with --judge tiny/whisper.pt …")
    each = [judgements(clips) for clips in row.samplings]
    return {name: [answer for counted in each for answer in counted[name]] for name in COLUMNS}


def percent(answers: list[bool]) -> str:
    return f"{100 * statistics.mean(answers):.1f} % of {len(answers)}" if answers else "–"


def main(args: argparse.Namespace) -> None:
    set_up_logging("tiny")
    with bad_input_exits():
        rows = [(row, judged(row)) for row in sampled_rows(args.evaluations)]
    cells = [[row.folder, row.name, *(percent(counted[key]) for key in COLUMNS)] for row, counted in rows]
    logger.info("%s", markdown_table(["evaluation", "row", *COLUMNS.values()], cells))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tiny.judge_melody", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("evaluations", type=Path, nargs="+", metavar="FOLDER", help="--output_dir of evaluation.py")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    run_script(main, parse_args)
