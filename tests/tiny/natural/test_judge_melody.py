"""tiny/natural/judge_melody.py: its counts on clips of known melody, and what it says of an evaluation without them."""

import json

import pytest
from fake_vowel import falling

from metrics.result_files import write_sounds
from tiny.natural import judge_melody
from tiny.natural.melody import with_emphasis, with_question

TEXTS = ["Did Peter lose it?", "Did Peter take it?", "Peter lost it.", "Peter *lost* it.", "Peter *took* it."]


def evaluation(folder, seeds: int = 1, players: int = 5):
    """The first question rises and the first marked word is emphasised; the statement rises too."""
    neutral = falling(1.2, 130, 110)
    risen, (emphasised, _) = with_question(neutral), with_emphasis(neutral, 0.4, 0.8)
    words = [["Peter", 0.0, 0.4], ["lost", 0.4, 0.8], ["it.", 0.8, 1.2]]
    clips = [{"text": text, "failure": None, "words": words} for text in TEXTS]
    row = {"name": "after", "seeds": list(range(seeds)), "clips": clips * seeds}
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"rows": [{**row, "name": "before"}, row]}))
    wavs = [risen, neutral, risen, emphasised, neutral][:players]
    after = {f"1_{i}": wav for i, wav in enumerate(wavs)}
    write_sounds(folder, after | {f"0_{i}": neutral for i in range(players)})


def test_it_counts_what_the_rule_says(tmp_path, caplog):
    evaluation(tmp_path / "run", seeds=2)  # sounds.npz has the first seed's clips
    judge_melody.main(judge_melody.parse_args([str(tmp_path / "run")]))
    header, _, before, after = [line[2:-2].split(" | ") for line in caplog.messages[-1].splitlines()]
    assert header == ["evaluation", "row", "questions that rise", "others that rise", "words emphasised"]
    assert before[1:] == ["before", "0.0 % of 2", "0.0 % of 3", "0.0 % of 2"]
    assert after[1:] == ["after", "50.0 % of 2", "33.3 % of 3", "50.0 % of 2"]


def test_failed_clips_have_no_melody(tmp_path):
    evaluation(tmp_path)
    (name, found), _ = judge_melody.judged(tmp_path)
    clips = [({"text": TEXTS[0], "failure": "silent", "words": None}, falling(0.1, 130, 110))]
    assert name == "before" and judge_melody.judgements(clips)["question"] == [False]


@pytest.mark.parametrize(
    ("players", "message"), [(2, "sounds.npz has 2 clips of 5 texts. Evaluate with --num_players 5"), (None, "results")]
)
def test_what_is_missing_is_named(players, message, tmp_path, caplog):
    if players:
        evaluation(tmp_path, players=players)
    with pytest.raises(SystemExit):
        judge_melody.main(judge_melody.parse_args([str(tmp_path)]))
    assert message in caplog.text
