"""The listening page: it plays what the key says, and its source gives nothing away."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from clips import tone

from metrics.listening_page import LEVEL, at_level, build
from metrics.listening_pairs import Clip, ClipPair, degraded_pair
from speech.audio import load_audio

ATTACK = "</script><script>document.title = 'hacked'</script> \"quotes\" & <!-- <b>'bold'</b> \u2028"


@pytest.fixture
def pairs(tmp_path) -> list[ClipPair]:
    """Six pairs of a first clip of 0.3 s and a second one of 0.2 s, and three planted ones."""
    pairs = []
    for number in range(6):
        sides = []
        for side, duration_s in (("sft", 0.3), ("grpo", 0.2)):
            path = tmp_path / f"{side}_{number}.wav"
            tone(path, duration_s)
            sides.append(Clip(str(path), [number], f"{side}.jsonl"))
        pairs.append(ClipPair(f"pair-{number}", f"text {number}", tuple(sides)))
    for number in range(3):
        tone(tmp_path / f"long_{number}.wav", 1.2)
        pairs.append(degraded_pair(f"planted-{number}", ATTACK, Clip(str(tmp_path / f"long_{number}.wav")), number))
    return pairs


def data_of(html: str) -> dict:
    """What the script of the page reads."""
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(data)


def wav_of(uri: str) -> np.ndarray:
    return load_audio(base64.b64decode(uri.removeprefix("data:audio/wav;base64,")))


def test_the_key_says_which_is_which(pairs):
    html, key = build(pairs, "Better?", seed=0)
    data = data_of(html)
    assert [row["item"] for row in key] == [item["item"] for item in data["items"]]
    assert {row["page"] for row in key} == {data["page"]}
    assert sorted(row["id"] for row in key) == sorted(pair.id for pair in pairs)
    for row, item in zip(key, data["items"], strict=True):
        assert row["text"] == item["text"]
        if row["better"] is None:
            for clip, uri in zip(row["clips"], item["clips"], strict=True):
                assert len(wav_of(uri)) == (4800 if clip["source"] == "sft.jsonl" else 3200)
        else:
            degraded = [clip["degraded"] for clip in row["clips"]]
            assert degraded["AB".index(row["better"])] is None and len(set(degraded)) == 2


def test_order_and_sides_go_by_the_seed(pairs):
    builds = [build(pairs, "Better?", seed)[1] for seed in (0, 0, 1, 2)]
    orders = [[row["id"] for row in key] for key in builds]
    sides = [{row["id"]: row["clips"][0]["source"] or row["better"] for row in key} for key in builds]
    assert orders[0] == orders[1] and sides[0] == sides[1]
    assert len({str(order) for order in orders}) == 3 and len({str(sorted(side.items())) for side in sides}) == 3
    assert len(set(sides[0].values())) > 2  # not all pairs have their first clip as A
    assert build(pairs, "Better?", 0) == build(pairs, "Better?", 0)


def test_the_source_gives_nothing_away(pairs):
    html, key = build(pairs, "Better?", seed=3)
    data = data_of(html)
    for item in data["items"]:
        assert set(item) == {"item", "text", "clips"} and re.fullmatch("[0-9a-f]{8}", item["item"])
    without_sound = re.sub(r"data:audio/wav;base64,[\w+/=]+", "", html)
    for row in key:
        for clip in row["clips"]:
            for name in (Path(clip["audio"]).name, Path(clip["audio"]).stem, str(Path(clip["audio"]).parent)):
                assert name not in without_sound
        assert row["id"] not in without_sound
    assert not re.search("planted|degraded|sft|grpo|hurried|noisy|garbled|better side", without_sound)
    sounds = [uri for item in data["items"] for uri in item["clips"]]
    headers = {base64.b64decode(uri.split(",")[1])[8:40] for uri in sounds}
    assert len(headers) == 1  # format and rate; nothing but the length differs


def test_a_clip_that_is_there_twice_has_other_bytes(pairs):
    html, _ = build([pairs[0], ClipPair("again", "text", pairs[0].clips)], "Better?", seed=0)
    sounds = [uri for item in data_of(html)["items"] for uri in item["clips"]]
    assert len(set(sounds)) == 4


def test_texts_are_escaped(pairs):
    html, _ = build(pairs, "</script><script>alert(1)</script>", seed=0)
    assert html.count("</script>") == 2
    assert not set("<>&") & set(html.partition('id="data">')[2].partition("</script>")[0])
    data = data_of(html)
    assert ATTACK in [item["text"] for item in data["items"]]
    assert data["question"] == "</script><script>alert(1)</script>"


def test_the_page_needs_no_other_file(pairs):
    html, _ = build(pairs, "Better?", seed=0)
    assert not re.search(r"https?:|src=|<link|@import|url\(", html)


def test_clips_are_equally_loud():
    rng = np.random.default_rng(0)
    for gain in (0.01, 0.1):
        assert at_level(gain * rng.normal(size=16_000)).std() == pytest.approx(LEVEL, rel=0.01)
    click = np.zeros(16_000)
    click[100] = 0.1
    assert np.abs(at_level(click)).max() == pytest.approx(0.99)
    assert not at_level(np.zeros(10)).any()
