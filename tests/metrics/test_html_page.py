"""Parts of the HTML pages."""

import json

from metrics.html_page import evenly_spaced, marked, reward_curve


def test_marked_words():
    assert marked("Anna found two hats.", "anna <i> two hats") == "anna <mark>&lt;i&gt;</mark> two hats"
    assert marked("Anna", "") == ""


def test_reward_curve_is_found_or_drawn(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    assert reward_curve(str(checkpoint)) is None
    log = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.3}, {"step": 2, "train_runtime": 1}]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert reward_curve(str(checkpoint)).startswith(b"\x89PNG")
    (tmp_path / "run" / "reward_curve.png").write_bytes(b"drawn by train.py")
    assert reward_curve(str(checkpoint)) == b"drawn by train.py"


def test_evenly_spaced_items():
    assert evenly_spaced(list(range(10)), 3) == [0, 3, 6]
    assert evenly_spaced(list(range(2)), 3) == [0, 1] and evenly_spaced([1], 0) == []
