"""Pairs for the listening page: of lists of clips, given one by one, and planted ones."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
from clips import tone, write_rows

from common.cli import InputError
from metrics.degraded_copies import DEGRADATIONS
from metrics.listening_pairs import (
    Clip,
    ClipPair,
    draw_pairs,
    first_usable,
    pair_clips,
    planted_copies,
    read_pairs,
    read_planted,
)
from speech.audio import save_audio


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(6):
        tone(tmp_path / f"{number}.wav", hz=200 + 20 * number)
    tone(tmp_path / "long.wav", duration_s=1.2)
    save_audio(tmp_path / "silent.wav", np.zeros(32_000))
    return tmp_path


def clip(text: str, audio: str, **more) -> dict:
    return {"text": text, "audio": audio, **more}


def names(pairs: list[ClipPair]) -> list[tuple[str, str, str]]:
    return [(pair.text, *(Path(clip.audio).name for clip in pair.clips)) for pair in pairs]


def test_one_list_pairs_the_clips_of_a_text(folder):
    rows = [clip("one", f"{i}.wav", codes=[i]) for i in range(5)] + [clip("two", "5.wav")]
    pairs = pair_clips([write_rows(folder / "c.jsonl", rows)], random.Random(0))
    assert {pair.text for pair in pairs} == {"one"} and len(pairs) == 2  # of five clips one is left
    used = [clip for pair in pairs for clip in pair.clips]
    assert len({clip.audio for clip in used}) == 4
    assert all(clip.codes == [int(Path(clip.audio).stem)] and Path(clip.audio).is_absolute() for clip in used)
    drawn = {str(names(pair_clips([str(folder / "c.jsonl")], random.Random(seed)))) for seed in range(5)}
    assert len(drawn) > 1


def test_two_lists_pair_the_first_with_the_first(folder):
    first = write_rows(folder / "sft.jsonl", [clip("one", "0.wav"), clip("two", "1.wav"), clip("one", "2.wav")])
    second = write_rows(folder / "grpo.jsonl", [clip("one", "3.wav"), clip("three", "4.wav"), clip("one", "5.wav")])
    pairs = pair_clips([first, second], random.Random(0))
    assert names(pairs) == [("one", "0.wav", "3.wav"), ("one", "2.wav", "5.wav")]
    assert [clip.source for clip in pairs[0].clips] == [first, second]


def test_the_pairs_to_ask_about_are_drawn(folder):
    rows = [{"text": str(i), "audio_a": "0.wav", "audio_b": "1.wav"} for i in range(4)]
    path = write_rows(folder / "p.jsonl", rows)
    drawn = [draw_pairs(None, path, 2, None, 0, random.Random(seed)) for seed in range(8)]
    assert {len(pairs) for pairs in drawn} == {2} and len({pair.text for pairs in drawn for pair in pairs}) > 2


def test_clips_of_the_same_codes_are_no_pair(folder):
    rows = [clip("one", "0.wav", codes=[1, 2]), clip("one", "1.wav", codes=[1, 2])]
    with pytest.raises(InputError, match="c.jsonl: no text has two different clips. Sample with"):
        pair_clips([write_rows(folder / "c.jsonl", rows)], random.Random(0))


def test_a_list_against_itself_is_no_pair(folder):
    path = write_rows(folder / "c.jsonl", [clip("one", "0.wav"), clip("one", "1.wav")])
    with pytest.raises(InputError, match="the files have no text in common, or the same clips of it"):
        pair_clips([path, path], random.Random(0))


def test_truncated_clips_are_in_no_pair(folder, caplog):
    caplog.set_level(logging.INFO)
    rows = [clip("one", f"{i}.wav", truncated=i == 1) for i in range(3)]
    [pair] = pair_clips([write_rows(folder / "c.jsonl", rows)], random.Random(0))
    assert {Path(clip.audio).name for clip in pair.clips} == {"0.wav", "2.wav"}
    assert "c.jsonl: 1 truncated clips are left out" in caplog.text


def test_clips_of_two_voice_prompts_are_no_pair(folder):
    voices = [{"ref_text": "Hi.", "ref_codes": [voice]} for voice in (1, 1, 2)]
    rows = [clip("one", f"{i}.wav", **voice) for i, voice in enumerate(voices)]
    [pair] = pair_clips([write_rows(folder / "c.jsonl", rows)], random.Random(0))
    assert (pair.ref_text, pair.ref_codes) == ("Hi.", [1])
    assert {Path(clip.audio).name for clip in pair.clips} == {"0.wav", "1.wav"}


def test_pairs_given_one_by_one(folder):
    rows = [
        {"text": " one ", "audio_a": "0.wav", "audio_b": "1.wav", "codes_b": [3], "id": "x", "speaker": "slt"},
        {"text": "two", "audio_a": str(folder / "2.wav"), "audio_b": "3.wav"},
    ]
    pairs = read_pairs(write_rows(folder / "p.jsonl", rows))
    assert names(pairs) == [("one", "0.wav", "1.wav"), ("two", "2.wav", "3.wav")]
    assert [(pair.id, pair.speaker) for pair in pairs] == [("x", "slt"), ("2", None)]
    assert [clip.codes for clip in pairs[0].clips] == [None, [3]]


def test_given_pairs_of_equal_clips_are_left_out(folder, caplog):
    equal = [
        {"text": "one", "audio_a": "0.wav", "audio_b": str(folder / "0.wav")},
        {"text": "two", "audio_a": "1.wav", "audio_b": "2.wav", "codes_a": [3, 4], "codes_b": [3, 4]},
    ]
    good = {"text": "three", "audio_a": "1.wav", "audio_b": "2.wav", "codes_a": [3, 4], "codes_b": [3]}
    assert [pair.text for pair in read_pairs(write_rows(folder / "p.jsonl", [*equal, good]))] == ["three"]
    assert "2 pairs of equal clips are left out" in caplog.text
    with pytest.raises(InputError, match="the two clips of each pair are equal"):
        read_pairs(write_rows(folder / "equal.jsonl", equal))


def test_planted_pairs_of_a_recording_and_of_a_known_pair(folder):
    known = {"text": "two", "chosen_audio": "1.wav", "rejected_audio": "0.wav"}
    rows = [clip("one", "long.wav"), known, {"text": "three", "file_name": "long.wav"}]
    recording, pair, other = read_planted(write_rows(folder / "p.jsonl", rows))
    assert [clip.degraded is None for clip in recording.clips] == [True, False] and recording.better == 0
    assert recording.clips[1].degraded in DEGRADATIONS and recording.clips[0].audio == recording.clips[1].audio
    assert names([pair]) == [("two", "1.wav", "0.wav")] and pair.better == 0
    assert other.text == "three" and other.clips[1].degraded != recording.clips[1].degraded


def test_copies_are_made_in_every_way_of_clips_that_are_long_enough(folder):
    def pair(text: str, first: str, second: str) -> ClipPair:
        return ClipPair(text, text, (Clip(str(folder / first), [1], "x"), Clip(str(folder / second), [2], "y")))

    pairs = [pair(str(i), "long.wav", "long.wav") for i in range(4)]
    pairs += [pair("short", "0.wav", "1.wav"), pair("silent", "silent.wav", "silent.wav")]
    candidates = planted_copies(pairs, random.Random(0))
    assert {one.clips[1].degraded for one in candidates[:3]} == set(DEGRADATIONS)
    assert all(one.better == 0 and one.clips[0].degraded is None for one in candidates)
    assert {clip.source for one in candidates for clip in one.clips} == {None}
    assert {one.clips[0].codes[0] for one in candidates} == {1, 2}  # not always the same side
    assert [one.text for one in first_usable(candidates, 2)] == ["0", "1"]
    assert [one.text for one in first_usable(candidates[::-1], 9)] == ["3", "2", "1", "0"]


PAIR = {"text": "one", "audio_a": "0.wav", "audio_b": "1.wav"}


@pytest.mark.parametrize(
    ("read", "rows", "message"),
    [
        (read_pairs, [{**PAIR, "audio_b": "no.wav"}], r"line 1: audio_b .*no.wav: no such file. Paths start beside"),
        (read_pairs, [PAIR, {**PAIR, "text": " "}], "line 2: text must be text"),
        (read_pairs, [{"text": "a", "audio_a": "0.wav"}], "line 1: audio_b must be text .got None"),
        (read_pairs, [{**PAIR, "codes_a": [1.5]}], "line 1: codes_a must be a list of speech codes"),
        (read_pairs, [{**PAIR, "codes_a": [True]}], "line 1: codes_a must be a list of speech codes"),
        (read_pairs, [{**PAIR, "codes_a": []}], "line 1: codes_a must be a list of speech codes"),
        (read_pairs, [{**PAIR, "ref_text": "Hi."}], "line 1: a voice prompt needs both"),
        (read_pairs, [{**PAIR, "id": "2"}, PAIR], "two rows have the id '2'"),
        (read_pairs, [], "no row in the file"),
        (read_planted, [{"text": "a"}], "line 1: audio must be text"),
        (read_planted, [{"text": "a", "chosen_audio": "0.wav"}], "line 1: rejected_audio must be text"),
    ],
)
def test_wrong_rows(read, rows, message, folder):
    with pytest.raises(InputError, match=message):
        read(write_rows(folder / "p.jsonl", rows))


def test_not_json_lines(folder):
    with pytest.raises(InputError, match="0.wav: not a .jsonl file"):
        read_pairs(str(folder / "0.wav"))
    (folder / "p.jsonl").write_text("{")
    with pytest.raises(InputError, match="p.jsonl, line 1: not JSON"):
        read_pairs(str(folder / "p.jsonl"))
