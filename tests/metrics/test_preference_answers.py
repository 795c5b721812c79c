"""Answers: raters' scores, agreement by hand-worked numbers, pairs, and errors that name the line."""

import doctest
import json

import pytest

from common.cli import InputError
from metrics import preference_answers
from metrics.preference_answers import (
    choices_by_item,
    judge_raters,
    krippendorff_alpha,
    pair_rows,
    percent_agreement,
    preferences,
    read_answers,
    read_keys,
    wins,
)


def key_row(item: str, better: str | None = None, **changes) -> dict:
    clips = [{"audio": f"/{item}{side}.wav", "codes": [ord(side)], "source": side, "degraded": None} for side in "xy"]
    row = {"page": "p", "item": item, "id": f"id-{item}", "text": item, "clips": clips, "better": better}
    return {**row, "ref_text": None, "ref_codes": None, **changes}


def items_of(*rows: dict) -> dict:
    return {(row["page"], row["item"]): row for row in rows}


def answers_of(**choices: str) -> dict:
    """Answers to the items 0, 1, …, a letter each: A, B, n for no difference, - for none."""
    names = {"A": "A", "B": "B", "n": "none"}
    return {
        rater: {("p", str(i)): names[letter] for i, letter in enumerate(letters) if letter != "-"}
        for rater, letters in choices.items()
    }


def test_worked_examples():
    failed, attempted = doctest.testmod(preference_answers)
    assert attempted >= 2 and failed == 0


def test_krippendorffs_own_example():
    """Four observers, twelve units, missing values: alpha is 0.743 (Computing Krippendorff's Alpha-Reliability, C)."""
    observers = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    units = [[value for value in unit if value != "."] for unit in zip(*observers, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_agreement_at_its_ends():
    assert krippendorff_alpha([["A", "A"], ["B", "B"]]) == 1
    # n = 4, o_AB = 4 (ordered), expected 4² − 2 · 2² = 8: 1 − 3 · 4 / 8
    assert krippendorff_alpha([["A", "B"], ["B", "A"]]) == -0.5
    assert krippendorff_alpha([["A", "A"], ["A", "A"]]) is None
    assert krippendorff_alpha([["A"], ["B"]]) is None and percent_agreement([["A"]]) is None
    # 3 pairs of raters on the first item, of which 1 agrees, and 1 on the second
    assert percent_agreement([["A", "A", "none"], ["B", "B"]]) == 0.5


def test_raters_below_the_bar_are_left_out():
    items = items_of(*(key_row(str(i), better="AB"[i % 2]) for i in range(5)), key_row("5"), key_row("6"))
    answers = answers_of(
        all_right="ABABAAn", four="ABABBA", tie_is_wrong="ABAnn", none_planted="-----A", three="ABA", two="AB"
    )
    raters = {rater.name: rater for rater in judge_raters(answers, items, min_planted=0.8)}
    scores = {name: (rater.right, rater.planted, rater.kept) for name, rater in raters.items()}
    assert scores == {
        "all_right": (5, 5, True),
        "four": (4, 5, True),  # 0.8 is enough
        "tie_is_wrong": (3, 5, False),
        "none_planted": (0, 0, False),
        "three": (3, 3, True),
        "two": (2, 2, False),  # less than half of the five
    }
    assert (raters["all_right"].answers, raters["all_right"].ties) == (2, 1)
    assert raters["tie_is_wrong"].ties == 0  # those on planted pairs are wrong answers
    other_page = items_of(*(key_row(str(i), better="A", page="q") for i in range(9)))
    assert judge_raters(answers, items | other_page, min_planted=0.8) == [*raters.values()]  # nobody was asked there


def test_without_planted_pairs_all_are_kept():
    [rater] = judge_raters(answers_of(anna="A"), items_of(key_row("0")), min_planted=1)
    assert rater.kept


def test_planted_pairs_and_ties_are_no_preferences():
    items = items_of(key_row("0", better="A"), key_row("1"), key_row("2"))
    answers = answers_of(anna="AnB", ben="BAA")
    assert choices_by_item(answers, items, ["anna", "ben"]) == [["none", "A"], ["B", "A"]]
    preferred = preferences(answers, items, ["anna", "ben"])
    assert [(rater, row["item"], side) for rater, row, side in preferred] == [
        ("anna", "2", 1),
        ("ben", "1", 0),
        ("ben", "2", 0),
    ]
    assert wins(preferred) == {"x": 2, "y": 1} and wins(preferred[1:]) == {"x": 2, "y": 0}
    one_source = [{**clip, "source": "x"} for clip in items["p", "1"]["clips"]]
    assert wins([("ben", key_row("1", clips=one_source), 0)]) == {}
    assert preferences(answers, items, ["ben"]) == preferred[1:]


def test_rows_of_pairs():
    with_prompt = key_row("0", ref_text="Hi.", ref_codes=[7], speaker="slt")
    without_codes = key_row("1")
    without_codes["clips"][1]["codes"] = None
    rows = pair_rows([("anna", with_prompt, 1), ("anna", without_codes, 0)], {"/1y.wav": [5, 6]}, "human")
    assert rows[0] == {
        "id": "p-id-0-anna",
        "text": "0",
        "chosen_codes": [ord("y")],
        "rejected_codes": [ord("x")],
        "source": "human",
        "chosen_audio": "/0y.wav",
        "rejected_audio": "/0x.wav",
        "rater": "anna",
        "ref_text": "Hi.",
        "ref_codes": [7],
        "speaker": "slt",
    }
    assert rows[1].keys().isdisjoint({"ref_text", "ref_codes", "speaker"})
    assert (rows[1]["chosen_codes"], rows[1]["rejected_codes"]) == ([ord("x")], [5, 6])


# --- Files ------------------------------------------------------------------------------------------------


def write(path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def answer(item: str, choice: str = "A", rater: str = "anna", page: str = "p") -> dict:
    return {"page": page, "item": item, "rater": rater, "choice": choice, "plays": [1, 1], "seconds": 3.5}


def test_reads_answers_of_several_files_once(tmp_path):
    items = read_keys([write(tmp_path / "key.jsonl", [key_row("0"), key_row("1")])])
    early = write(tmp_path / "early.jsonl", [answer("0")])
    late = write(tmp_path / "late.jsonl", [answer("0"), answer("1", "none"), answer("1", "B", rater=" ben ")])
    assert read_answers([early, late], items) == answers_of(anna="An", ben="-B")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([answer("0", "C")], r"a.jsonl, line 1: no answer of a listening page.*A, B, none \(got"),
        ([{"text": "a"}], "line 1: no answer of a listening page"),
        ([answer(["0"])], "line 1: no answer of a listening page"),
        ([answer("0", ["A"])], "line 1: no answer of a listening page"),
        ([answer("0", rater=None)], "line 1: no answer of a listening page"),
        ([answer("0"), answer("9")], "line 2: pair '9' of page 'p' is in none of the keys. Add its key to --pages"),
        ([answer("0", page="q")], "pair '0' of page 'q' is in none"),
        ([answer("0"), answer("0", "B")], "line 2: anna has answered pair 0 otherwise before. Keep the later"),
        ([[1]], "line 1: expected an object"),
        ([], "a.jsonl: no row in the file"),
    ],
)
def test_wrong_answers(rows, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_answers([write(tmp_path / "a.jsonl", rows)], items_of(key_row("0")))


def test_answers_are_no_key(tmp_path):
    with pytest.raises(InputError, match="a.jsonl, line 1: not the key of a page. Use the .key.jsonl"):
        read_keys([write(tmp_path / "a.jsonl", [answer("0")])])
