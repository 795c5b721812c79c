"""tiny/judge_melody.py: its counts on clips of known melody, and what it says of an evaluation without them."""

import json
from pathlib import Path

import numpy as np
import pytest
from fake_vowel import falling

from metrics.result_files import write_sounds
from speech.audio import load_audio
from tiny import judge_melody
from tiny.melody import with_emphasis, with_question

HELDOUT = Path("tiny/heldout")
TEXTS = ["Did Peter lose it?", "Did Peter take it?", "Peter lost it.", "Peter *lost* it.", "Peter *took* it."]


def evaluation(folder, seeds: int = 1, players: int = 5, first_seed: int = 0, temperature: float = 1.0):
    """The first question rises and the first marked word is emphasised; the statement rises too."""
    neutral = falling(1.2, 130, 110)
    risen, (emphasised, _) = with_question(neutral), with_emphasis(neutral, 0.4, 0.8)
    words = [["Peter", 0.0, 0.4], ["lost", 0.4, 0.8], ["it.", 0.8, 1.2]]
    clips = [{"text": text, "failure": None, "words": words} for text in TEXTS]
    row = {"name": "after", "model": "runs/after", "temperature": temperature, "clips": clips * seeds}
    row["seeds"] = list(range(first_seed, first_seed + seeds))
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"rows": [{**row, "name": "before"}, row]}))
    wavs = [risen, neutral, risen, emphasised, neutral][:players]
    after = {f"1_{i}": wav for i, wav in enumerate(wavs)}
    write_sounds(folder, after | {f"0_{i}": neutral for i in range(players)})


def test_it_counts_what_the_rule_says(tmp_path, caplog):
    evaluation(tmp_path / "run", seeds=2)  # sounds.npz has the first seed's clips
    judge_melody.main(judge_melody.parse_args([str(tmp_path / "run")]))
    header, _, before, after = [line[2:-2].split(" | ") for line in caplog.messages[-1].splitlines()]
    assert header == ["evaluation", "row", "question-rise rate", "false-rise rate", "emphasis rate"]
    assert before[1:] == ["before", "0.0 % of 2", "0.0 % of 3", "0.0 % of 2"]
    assert after[1:] == ["after", "50.0 % of 2", "33.3 % of 3", "50.0 % of 2"]


def test_other_seeds_are_further_samplings(tmp_path, caplog):
    """Rows of one policy are one row; at another temperature it is another; a sampling given twice counts once."""
    settings = {"one": {}, "two": {"first_seed": 1}, "cold": {"temperature": 0.7}}
    folders = [str(tmp_path / name) for name in settings]
    for name, setting in settings.items():
        evaluation(tmp_path / name, **setting)
    judge_melody.main(judge_melody.parse_args(folders))
    _, _, *rows = [line[2:-2].split(" | ") for line in caplog.messages[-1].splitlines()]
    assert rows[1] == [folders[0], "after", "50.0 % of 4", "33.3 % of 6", "50.0 % of 4"]
    assert rows[3] == [folders[2], "after", "50.0 % of 2", "33.3 % of 3", "50.0 % of 2"] and len(rows) == 4
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    results["rows"][0] |= {"name": "recordings", "model": None, "temperature": None, "seeds": [None]}
    for name, seed in (("one", 0), ("two", 1)):
        results["rows"][1]["seeds"] = [seed]
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    caplog.clear()
    judge_melody.main(judge_melody.parse_args(folders[:2]))
    _, _, *rows = [line[2:-2].split(" | ") for line in caplog.messages[-1].splitlines()]
    assert [row[1:3] for row in rows] == [["recordings", "0.0 % of 2"], ["after", "50.0 % of 4"]]
    assert "was there before" not in caplog.text
    evaluation(tmp_path / "one")
    judge_melody.main(judge_melody.parse_args([folders[0], folders[0]]))
    assert f"{folders[0]}: row before with --seeds 0 was there before" in caplog.text
    assert caplog.messages[-1].splitlines()[-1].endswith("| after | 50.0 % of 2 | 33.3 % of 3 | 50.0 % of 2 |")


def test_failed_clips_have_no_melody():
    risen = with_question(falling(1.2, 130, 110))
    question = {"text": TEXTS[0], "failure": None, "words": None}
    assert judge_melody.judgements([(question, risen)])["question"] == [True]
    assert judge_melody.judgements([({**question, "failure": "silent"}, risen)])["question"] == [False]
    marked = {"text": TEXTS[3], "failure": "silent", "words": None}
    assert judge_melody.judgements([(marked, risen)])["emphasis"] == [False]
    assert judge_melody.judgements([({**marked, "failure": None}, risen)])["emphasis"] == []  # no times of its words


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.05, 0.11, 0.3])
def test_short_and_voiceless_clips_have_no_melody(seconds):
    noise = np.random.default_rng(0).normal(0, 0.01, int(seconds * 16_000)).astype(np.float32)
    for wav in (noise, np.zeros_like(noise)):
        assert not judge_melody.ends_as_question(wav) and not judge_melody.stands_out(wav, 0.0, 0.1)


def test_the_recordings_have_the_melody_of_their_texts():
    """The first of the held-out ones; of all 120 the module's docstring has the figures."""
    rows = [json.loads(line) for line in (HELDOUT / "metadata.jsonl").read_text().splitlines()][:40]
    rises = {row["text"]: judge_melody.ends_as_question(load_audio(HELDOUT / row["file_name"])) for row in rows}
    questions = [rise for text, rise in rises.items() if text.endswith("?")]
    others = [rise for text, rise in rises.items() if not text.endswith("?")]
    assert len(questions) > 8 and sum(questions) >= 0.85 * len(questions) and sum(others) <= 0.05 * len(others)


def test_times_of_words_are_needed(tmp_path, caplog):
    evaluation(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    for clip in results["rows"][1]["clips"]:
        del clip["words"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit):
        judge_melody.main(judge_melody.parse_args([str(tmp_path)]))
    assert "has no times of words. Evaluate with --judge tiny/whisper.pt" in caplog.text


@pytest.mark.parametrize(
    ("players", "message"), [(2, "sounds.npz has 2 clips of 5 texts. Evaluate with --num_players 5"), (None, "results")]
)
def test_what_is_missing_is_named(players, message, tmp_path, caplog):
    if players:
        evaluation(tmp_path, players=players)
    with pytest.raises(SystemExit):
        judge_melody.main(judge_melody.parse_args([str(tmp_path)]))
    assert message in caplog.text
