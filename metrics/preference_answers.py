"""Reading the answers of a listening page back: who is kept, how far listeners agree, and the pairs to train on."""

import json
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from common.cli import InputError, write_whole_text
from metrics.listening_page import NO_DIFFERENCE, SIDES
from metrics.listening_pairs import read_rows
from speech.audio import load_audio

logger = logging.getLogger(__name__)

CHOICES = (*SIDES, NO_DIFFERENCE)
MIN_PLANTED = 0.8  # of the planted pairs, by default; what a guesser passes: docs/preferences.md
KEY_FIELDS = {"page", "item", "id", "text", "clips", "better", "ref_text", "ref_codes"}

ItemId = tuple[str, str]  # the page's id, the pair's id on it
Answers = dict[str, dict[ItemId, str]]  # rater → item → choice


@dataclass(frozen=True)
class Rater:
    """A listener's record.

    Attributes:
        planted, right: number of planted pairs answered, and of those answered right; "no difference" is wrong.
        kept: whether the answers count.
    """

    name: str
    answers: int
    ties: int
    planted: int
    right: int
    kept: bool


# --- Files ------------------------------------------------------------------------------------------------


def read_keys(paths: list[str]) -> dict[ItemId, dict]:
    """The rows of the pages' keys; InputError for a file that is no key."""
    items = {}
    for path in paths:
        for number, row in read_rows(path):
            named = all(isinstance(row.get(name), str) for name in ("page", "item"))
            both = isinstance(row.get("clips"), list) and len(row["clips"]) == len(SIDES)
            if not (row.keys() >= KEY_FIELDS and named and both):
                raise InputError(
                    f"--pages {path}, line {number}: not the key of a page. Use the .key.jsonl file that was written "
                    "beside the page"
                )
            items[row["page"], row["item"]] = row
    return items


def read_answers(paths: list[str], items: dict[ItemId, dict]) -> Answers:
    """The choices of every rater; the same answer in two files counts once.

    Raises:
        InputError: a row is no answer, or to a page without a key, or a rater answers one pair in two ways.
    """
    answers = defaultdict(dict)
    for path in paths:
        for number, row in read_rows(path):
            where = f"--read {path}, line {number}"
            is_text = all(isinstance(row.get(name), str) for name in ("page", "item", "rater", "choice"))
            if not is_text or row["choice"] not in CHOICES or not row["rater"].strip():
                raise InputError(
                    f"{where}: no answer of a listening page. Expected page, item, the rater's name, and a choice of "
                    f"{', '.join(CHOICES)} (got {str(row):.80})"
                )
            item, rater = (row["page"], row["item"]), row["rater"].strip()
            if item not in items:
                raise InputError(
                    f"{where}: pair {item[1]!r} of page {item[0]!r} is in none of the keys. Add its key to --pages"
                )
            if answers[rater].setdefault(item, row["choice"]) != row["choice"]:
                raise InputError(
                    f"{where}: {rater} has answered pair {item[1]} otherwise before. Keep the later of the files, or "
                    "correct the name if these are two people"
                )
    return dict(answers)


# --- Raters -----------------------------------------------------------------------------------------------


def judge_raters(answers: Answers, items: dict[ItemId, dict], min_planted: float) -> list[Rater]:
    """Each rater's score on the planted pairs; kept are those with a fraction of at least `min_planted` right.

    Left out is also who has answered less than half of the planted pairs on the answered pages: a single one is soon
    right by chance. Where these pages have none, all raters are kept.
    """
    raters = []
    for name, chosen in sorted(answers.items()):
        planted = [item for item in chosen if items[item]["better"]]
        right = sum(chosen[item] == items[item]["better"] for item in planted)
        pages = {page for page, _ in chosen}
        on_these_pages = sum(bool(row["better"]) for (page, _), row in items.items() if page in pages)
        kept = right >= min_planted * len(planted) and 2 * len(planted) >= on_these_pages
        ties = sum(choice == NO_DIFFERENCE for item, choice in chosen.items() if not items[item]["better"])
        raters.append(Rater(name, len(chosen) - len(planted), ties, len(planted), right, kept))
    return raters


# --- Agreement --------------------------------------------------------------------------------------------


def choices_by_item(answers: Answers, items: dict[ItemId, dict], raters: list[str]) -> list[list[str]]:
    """The raters' choices on each pair that is not planted."""
    by_item = defaultdict(list)
    for rater in raters:
        for item, choice in answers[rater].items():
            if not items[item]["better"]:
                by_item[item].append(choice)
    return list(by_item.values())


def percent_agreement(choices: list[list[str]]) -> float | None:
    """Fraction of the pairs of raters on one item, all items together, that chose the same; None without any.

    >>> percent_agreement([["A", "A", "B"], ["A", "A"], ["B"]])  # 1 of 3, 1 of 1, none
    0.5
    """
    same = [first == second for item in choices for first, second in combinations(item, 2)]
    return sum(same) / len(same) if same else None


def krippendorff_alpha(choices: list[list[str]]) -> float | None:
    """Krippendorff's alpha for nominal data: 1 is perfect agreement, 0 that of chance, and below 0 is worse.

    alpha = 1 − D_o / D_e, where D_o is the disagreement within items and D_e that of choices drawn from all items.
    Items with one choice do not count (K. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011).

    Two raters, four items, one disagreement: D_o = 2 / 8. All eight choices are 5 A and 3 B, so D_e = 2·5·3 / (8·7)
    = 30 / 56 and alpha = 1 − 14 / 30.

    >>> round(krippendorff_alpha([["A", "A"], ["A", "A"], ["A", "B"], ["B", "B"]]), 4)
    0.5333

    Returns:
        None where it is not defined: no item with two choices, or the same choice everywhere.
    """
    choices = [item for item in choices if len(item) > 1]
    totals = Counter(choice for item in choices for choice in item)
    count = totals.total()
    observed = sum(
        2 * sum(first != second for first, second in combinations(item, 2)) / (len(item) - 1) for item in choices
    )
    expected = count**2 - sum(number**2 for number in totals.values())
    return 1 - (count - 1) * observed / expected if expected else None


# --- Pairs ------------------------------------------------------------------------------------------------


def preferences(answers: Answers, items: dict[ItemId, dict], raters: list[str]) -> list[tuple[str, dict, int]]:
    """Rater, row of the key, and the side (0 or 1) chosen: all that is neither planted nor a tie."""
    return [
        (rater, items[item], SIDES.index(choice))
        for rater in raters
        for item, choice in answers[rater].items()
        if choice != NO_DIFFERENCE and not items[item]["better"]
    ]


def wins(preferred: list[tuple[str, dict, int]]) -> dict[str, int]:
    """How often a clip of each source was chosen; empty where both clips of a pair have one source."""
    counts = Counter()
    for _, row, side in preferred:
        winner, loser = row["clips"][side]["source"], row["clips"][1 - side]["source"]
        if winner != loser:
            counts.update({winner: 1, loser: 0})
    return dict(sorted(counts.items()))


def pair_rows(preferred: list[tuple[str, dict, int]], codes: dict[str, list[int]], source: str) -> list[dict]:
    """Rows of a preference dataset, one for each answer.

    Args:
        codes: path → codes, of the clips whose codes the key does not have.
        source: what judged, "human" or "machine".
    """
    rows = []
    for rater, key_row, side in preferred:
        chosen, rejected = key_row["clips"][side], key_row["clips"][1 - side]
        row = {
            "id": f"{key_row['page']}-{key_row['id']}-{rater}",
            "text": key_row["text"],
            "chosen_codes": chosen["codes"] or codes[chosen["audio"]],
            "rejected_codes": rejected["codes"] or codes[rejected["audio"]],
            "source": source,
            "chosen_audio": chosen["audio"],
            "rejected_audio": rejected["audio"],
            "rater": rater,
        }
        if key_row["ref_codes"]:
            row |= {"ref_text": key_row["ref_text"], "ref_codes": key_row["ref_codes"]}
        if key_row.get("speaker"):  # a key of an earlier version has none
            row["speaker"] = key_row["speaker"]
        rows.append(row)
    return rows


def clips_without_codes(preferred: list[tuple[str, dict, int]]) -> list[str]:
    """Their paths, each once."""
    return sorted({clip["audio"] for _, row, _ in preferred for clip in row["clips"] if not clip["codes"]})


def report_path(output: Path) -> Path:
    """Where the report on a file of pairs stands."""
    return output.with_suffix(".report.json")


def write_report(output: Path, report: dict) -> None:
    write_whole_text(report_path(output), json.dumps(report, ensure_ascii=False, indent=1) + "\n")


def encode_clips(paths: list[str], codec_id: str, device: str) -> dict[str, list[int]]:
    """Path → codes of the clips."""
    if not paths:
        return {}
    from speech.codec import SpeechCodec  # here: not needed where the codes are known

    logger.info("%d clips came without codes: encoding them with %s", len(paths), codec_id)
    wavs = [load_audio(path) for path in paths]
    codec = SpeechCodec.from_pretrained(codec_id, device)
    return dict(zip(paths, codec.encode(wavs), strict=True))
