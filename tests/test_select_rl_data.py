"""select_rl_data.py: each kind of rows by hand, the added columns, and every kind of bad input."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

import select_rl_data
from common import dataset_io
from select_rl_data import disagreement

ROOT = Path(__file__).parent.parent
TEXTS = [
    "The boat was gone.",
    "The boat was here.",
    "We came to Zagreb.",
    "We came to Split, and to Zagreb.",
    "The harbour was empty.",
    "We came here.",
    "The boat came here.",
    "New York was empty.",
]


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Eight rows of 1 to 8 s as create_dataset.py --format json writes them."""
    rows = [
        {"text": text, "audio_codes": [i, i + 1], "duration_s": i + 1.0, "sampling_rate": 16_000, "id": f"clip{i}"}
        for i, text in enumerate(TEXTS)
    ]
    return write_lines(tmp_path / "corpus.jsonl", rows)


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def run(corpus: Path, output: Path, *more: str) -> datasets.Dataset:
    select_rl_data.main(select_rl_data.parse_args([f"--dataset={corpus}", f"--output={output}", *more]))
    return dataset_io.load_any_dataset(str(output))


def select(corpus: Path, *more: str, name: str = "out.jsonl") -> datasets.Dataset:
    return run(corpus, corpus.parent / name, "--overwrite", *more)


def refusal(caplog, corpus: Path, *more: str) -> str:
    """The one line of a run that must end with exit code 2."""
    caplog.clear()
    with pytest.raises(SystemExit) as end:
        select(corpus, *more)
    assert end.value.code == 2
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    return record.getMessage()


def test_random_rows_keep_their_columns(corpus):
    rows = select(corpus, "--select", "random", "--num=3")
    assert rows.column_names == [
        "text", "audio_codes", "duration_s", "sampling_rate", "id", "selected_by", "why",
    ]  # fmt: skip
    assert len(rows) == 3 and rows["id"][:] == sorted(rows["id"])  # in the data set's order
    for row in rows:
        i = int(row["id"].removeprefix("clip"))
        assert (row["text"], row["audio_codes"], row["duration_s"]) == (TEXTS[i], [i, i + 1], i + 1)
        assert (row["selected_by"], row["why"]) == (["random"], "drawn at random")
    assert select(corpus, "--select", "random", "--num=3")[:] == rows[:]
    others = {tuple(select(corpus, "--select", "random", "--num=3", f"--seed={seed}")["id"]) for seed in range(5)}
    assert len(others) > 2
    assert len(select(corpus, "--select", "random")) == 8  # --num is at most
    with_long = select(corpus, "--select", "long", "random", "--num=3", "--min_long_s=6")
    assert [row["id"] for row in with_long if "random" in row["selected_by"]] == rows["id"][:]


def test_long_rows(corpus):
    rows = select(corpus, "--select", "long", "--min_long_s=6")
    assert rows["id"][:] == ["clip6", "clip7"]  # 7 and 8 s; 6 s is not over 6 s
    assert rows["why"][:] == ["7.0 s, over 6 s", "8.0 s, over 6 s"]
    rows = select(corpus, "--select", "long", "--longest_frac=0.3")
    assert rows["id"][:] == ["clip6", "clip7"]  # 0.3 * 8 = 2.4
    assert rows["why"][0] == "7.0 s, among the longest 30 %"
    assert select(corpus, "--select", "long", "--longest_frac=0.01")["id"][:] == ["clip7"]
    assert len(select(corpus, "--select", "long", "--longest_frac=1", "--num=5")) == 5


def test_without_durations_the_codes_count(corpus):
    rows = [{"text": text, "audio_codes": [0] * (50 * i + 25)} for i, text in enumerate(TEXTS[:3])]
    write_lines(corpus, rows)
    assert select(corpus, "--select", "long", "--min_long_s=2")["why"][:] == ["2.5 s, over 2 s"]


def test_without_a_usable_duration_the_codes_count(corpus, caplog):
    """As after a join of two datasets of which one has durations."""
    caplog.set_level(logging.INFO)
    codes = [0] * 150
    durations_s = (9.0, None, math.nan, -1.0, math.inf)
    rows = [{"text": "a", "audio_codes": codes, "duration_s": duration_s} for duration_s in durations_s]
    write_lines(corpus, rows)
    selected = select(corpus, "--select", "long", "--min_long_s=1")
    assert selected["why"][:] == ["9.0 s, over 1 s"] + 4 * ["3.0 s, over 1 s"]
    assert "5 rows, 4.2 s on average" in caplog.text


def test_keywords_of_a_file(corpus):
    words = corpus.parent / "words.txt"
    words.write_text("zagreb\n\nNew York\nYork\nLisbon\n")
    rows = select(corpus, "--select", "keywords", f"--keywords={words}")
    assert rows["id"][:] == ["clip2", "clip3", "clip7"]
    assert rows["keywords"][:] == [["zagreb"], ["zagreb"], ["New York", "York"]]
    assert rows["why"][:] == ["keyword 'zagreb'", "keyword 'zagreb'", "keyword 'New York', 'York'"]
    # A row selected for another reason has its keywords too; a row without any has an empty list.
    rows = select(corpus, "--select", "keywords", "long", f"--keywords={words}", "--num=1", "--longest_frac=1")
    assert {name: len(rows) for name in rows.column_names}["keywords"] == len(rows) <= 2
    everything = select(corpus, "--select", "keywords", "random", f"--keywords={words}", name="out.parquet")
    assert everything["keywords"][:] == [[], [], ["zagreb"], ["zagreb"], [], [], [], ["New York", "York"]]
    assert everything["selected_by"][2] == ["random", "keywords"]
    assert everything["why"][2] == "drawn at random; keyword 'zagreb'"


def test_rarest_words(corpus):
    # In one row: gone, split, and, harbour (which the normaliser writes the American way), new, york; in two: zagreb,
    # empty; "we" and "to" are too short
    rows = select(corpus, "--select", "keywords", "--rarest_words=6")
    assert rows["keywords"][:] == [["gone"], ["and", "split"], ["harbor"], ["new", "york"]]
    rows = select(corpus, "--select", "keywords", "--rarest_words=8")
    assert rows["keywords"][2] == ["and", "split", "zagreb"]
    assert len(select(corpus, "--select", "keywords")) == 8
    texts = ("Boats, boats, boats.", "Gone.", "Gone, here.", "Here.")
    write_lines(corpus, [{"text": text, "audio_codes": [1]} for text in texts])
    # "boats" is in one row, though three times; the others are in two
    assert select(corpus, "--select", "keywords", "--rarest_words=1")["keywords"][:] == [["boats"]]


def test_equally_rare_words_are_drawn(corpus):
    draws = {
        str(select(corpus, "--select", "keywords", "--rarest_words=2", f"--seed={s}")["keywords"][:]) for s in "012"
    }
    assert len(draws) > 1  # which of six equally rare words is drawn


def test_keywords_in_other_languages(corpus, caplog):
    texts = [("我住在上海", "zh"), ("我们去公园", "zh"), ("Ich wohne in Köln", "de"), ("I live in Split", None)]
    rows = [{"text": text, "audio_codes": [1], "duration_s": 1.0, "language": language} for text, language in texts]
    write_lines(corpus, rows)
    words = corpus.parent / "words.txt"
    words.write_text("上海\nköln\nSPLIT\n")
    assert select(corpus, "--select", "keywords", f"--keywords={words}")["keywords"][:] == [
        ["上海"], ["köln"], ["SPLIT"],
    ]  # fmt: skip
    assert "rows in zh" in refusal(caplog, corpus, "--select", "keywords")


def test_disagreement_by_hand():
    assert disagreement(["a b c d", "a b c d", "a x c d"], "de") == pytest.approx((0 + 1 / 4 + 1 / 4) / 3)
    assert disagreement(["A, b c d!", "a b c d"], "de") == 0.0
    assert disagreement(["a b", "a b c d"], "de") == disagreement(["a b c d", "a b"], "de") == 0.5  # 2 / 4
    assert disagreement(["a b", ""], "de") == 1.0
    assert disagreement(["", "..."], "de") == disagreement(["a"], "de") == 0.0
    assert disagreement(["今天天气", "今天天汽"], "zh") == 0.25
    assert disagreement(["今天天气", "今天 天气"], "zh") == 0.0


@pytest.fixture
def transcripts(corpus) -> Path:
    loop = "the boat the boat the boat the boat the boat"
    lines = [
        {"index": 0, "transcripts": ["the boat was gone", "The boat was gone!", "the boat was gone."]},  # agree
        {"index": 1, "transcripts": ["the boat was here", "a boat was here", "the boat was here"], "seed": 1},
        {"id": "clip2", "transcripts": ["we came to Zagreb", "become the grab", ""]},
        {"index": 4, "transcripts": [loop, loop, loop]},  # agree, and all loop
        {"index": 6, "transcripts": ["the boat came here"]},
    ]
    return write_lines(corpus.parent / "transcripts.jsonl", lines)


def test_hard_rows(corpus, transcripts):
    rows = select(corpus, "--select", "hard", f"--transcripts={transcripts}")
    assert rows["id"][:] == ["clip1", "clip2", "clip4"]
    assert rows["why"][0] == "1 of 3 transcripts differ: 'the boat was here', 'a boat was here'"
    assert rows["why"][1] == "2 of 3 transcripts differ: 'we came to zagreb', 'become the grab'"
    assert rows["why"][2] == "3 of 3 transcripts repeat themselves: 'the boat the boat the boat the boat the boat'"
    # clip4: all loop, 1. clip2: (4/4 + 1 + 1) / 3 = 1, the earlier goes first. clip1: (1/4 + 0 + 1/4) / 3
    assert select(corpus, "--select", "hard", f"--transcripts={transcripts}", "--num=2")["id"][:] == ["clip2", "clip4"]


def test_transcripts_of_several_asr_models(corpus):
    a = write_lines(corpus.parent / "a.jsonl", [{"index": i, "transcripts": [TEXTS[i]]} for i in range(8)])
    b = write_lines(corpus.parent / "b.jsonl", [{"index": 5, "transcripts": ["we game\u2028here"]}])
    rows = select(corpus, "--select", "hard", "--transcripts", str(a), str(b))
    assert rows["why"][:] == ["1 of 2 transcripts differ: 'we came here', 'we game here'"]


def test_an_id_that_two_rows_have_names_neither(corpus, caplog):
    write_lines(corpus, [{"text": text, "audio_codes": [1], "id": "one"} for text in TEXTS[:2]])
    lines = [{"id": "one", "transcripts": ["the boat was gone", "a boat was gone"]}]
    path = write_lines(corpus.parent / "transcripts.jsonl", lines)
    assert "more than one, has the id 'one'" in refusal(caplog, corpus, "--select", "hard", f"--transcripts={path}")


def test_summary_in_the_log(corpus, transcripts, caplog):
    caplog.set_level(logging.INFO)
    select(corpus, "--select", "long", "hard", f"--transcripts={transcripts}", "--longest_frac=0.5", "--num=3")
    lines = [record.getMessage() for record in caplog.records if record.name == "select_rl_data"]
    assert lines[0] == "hard: 5 of 8 rows have transcripts, 3 are hard"
    assert lines[1] == "hard: 3 rows, 3.3 s on average"  # 2, 3 and 5 s
    assert lines[2].startswith("long: 3 rows, ")
    assert lines[3].startswith("hard and long: ") and lines[3].endswith(" rows are both")
    assert "out.jsonl: " in lines[4] and lines[4].endswith(" 0.01 hours")
    caplog.clear()
    select(corpus, "--select", "hard", f"--transcripts={transcripts}", "--num=100")
    assert "hard: 3 rows, 3.3 s on average (--num 100)" in caplog.text


def test_rows_without_a_word_are_ignored(corpus, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"text": text, "audio_codes": [1], "duration_s": 1.0} for text in ("one", "...", "", "two")]
    write_lines(corpus, rows)
    assert select(corpus, "--select", "random")["text"][:] == ["one", "two"]
    assert "ignored: 1 of 4 rows" in caplog.text
    picked = select(corpus, "--select", "non_speech", "random", "--num", "1")
    assert len(picked) == 2
    assert dict(zip(picked["text"], picked["why"], strict=True))[""] == "a clip without speech"
    write_lines(corpus, rows[1:3])
    assert "no row has a text with a word" in refusal(caplog, corpus, "--select", "random")
    write_lines(corpus, rows[:2])
    assert "--select non_speech: no row has an empty text" in refusal(caplog, corpus, "--select", "non_speech")


def test_saved_folders_and_parquet(corpus, tmp_path):
    expected = select(corpus, "--select", "long", "--longest_frac=0.5")
    dataset_io.load_any_dataset(str(corpus)).save_to_disk(tmp_path / "saved")
    rows = run(tmp_path / "saved", tmp_path / "rows.parquet", "--select", "long", "--longest_frac=0.5")
    assert rows[:] == expected[:]
    assert not list(tmp_path.glob("*.tmp"))


def test_bad_arguments(corpus, caplog):
    cases = {
        ("--select", "random", "--num=0"): "--num: must be >= 1 (got 0)",
        ("--select", "hard"): "--select hard: needs --transcripts",
        ("--select", "long", "--transcripts=x"): "--transcripts: is for --select hard",
        ("--select", "random", "--longest_frac=0.5"): "--longest_frac: is for --select long",
        ("--select", "random", "--rarest_words=5"): "--rarest_words: is for --select keywords",
        ("--select", "long", "--longest_frac=20"): "--longest_frac: must be in (0, 1] (got 20",
        ("--select", "long", "--min_long_s=nan"): "--min_long_s: must be in [0, inf) (got nan)",
        ("--select", "long"): "no row is over 20 s (the longest has 8.0 s)",
        ("--select", "random", "--language=klingon"): "unknown language 'klingon'",
        ("--select", "random", "--split=test"): "no split 'test'",
        ("--select", "keywords", "--rarest_words=0"): "--rarest_words: must be >= 1 (got 0)",
        ("--select", "keywords", "--keywords=none.txt"): "none.txt: No such file",
        ("--select", "hard", "--transcripts=none.jsonl"): "none.jsonl: No such file",
    }
    for arguments, message in cases.items():
        assert message in refusal(caplog, corpus, *arguments)
    for content, message in (
        ("\n \n", "is empty. Write one keyword per line"),
        ("Lisbon\n", "no row has any of the keywords"),
    ):
        (corpus.parent / "words.txt").write_text(content)
        assert message in refusal(caplog, corpus, "--select", "keywords", f"--keywords={corpus.parent / 'words.txt'}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", 'expected {"index": 0'),
        ("{}", 'expected {"index": 0'),
        ('{"transcripts": ["a"]}', 'expected {"index": 0'),
        ('{"index": 0, "transcripts": "a"}', 'expected {"index": 0'),
        ('{"index": 0, "transcripts": []}', 'expected {"index": 0'),
        ('{"index": 0, "transcripts": [null]}', 'expected {"index": 0'),
        ('{"index": 8, "transcripts": ["a"]}', "index must be in [0, 8) (got 8)"),
        ('{"index": "1", "transcripts": ["a"]}', "index must be in [0, 8) (got '1')"),
        ('{"index": true, "transcripts": ["a"]}', "index must be in [0, 8) (got True)"),
        ('{"id": "other", "transcripts": ["a"]}', "has the id 'other'"),
        ("oops", "not JSON: Expecting value"),
    ],
)
def test_bad_transcripts(corpus, caplog, line, message):
    path = corpus.parent / "transcripts.jsonl"
    path.write_text('{"index": 0, "transcripts": ["a"]}\n' + line + "\n")
    error = refusal(caplog, corpus, "--select", "hard", f"--transcripts={path}")
    assert error.startswith(f"error: --transcripts: {path}, line 2: ") and message in error
    path.write_text("\n")
    assert f"no transcripts in {path}" in refusal(caplog, corpus, "--select", "hard", f"--transcripts={path}")
    path.write_text('{"index": 0, "transcripts": ["a"]}\n')
    assert "in none of the 1 rows" in refusal(caplog, corpus, "--select", "hard", f"--transcripts={path}")


def test_the_faulty_row_is_named(corpus, caplog):
    good = {"text": "a", "audio_codes": [1], "language": "en"}
    write_lines(corpus, [good, good, good | {"language": "xx"}])
    assert "corpus.jsonl, row 2: unknown language 'xx'" in refusal(caplog, corpus, "--select", "random")
    write_lines(corpus, [good, good | {"audio_codes": None}])
    assert "corpus.jsonl, row 1: audio_codes must be" in refusal(caplog, corpus, "--select", "random")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "no column 'audio_codes' (got text). Use a dataset from create_dataset.py"),
        ({"audio_codes": [1]}, "no column 'text'"),
        ({"text": 7, "audio_codes": [1]}, "corpus.jsonl, row 0: text must be text (got 7). Correct the row"),
        ({"text": "a", "audio_codes": [1], "why": "so"}, "has a column 'why' already, which would be overwritten"),
        ({"text": "a", "audio_codes": [1], "language": "xx"}, "corpus.jsonl, row 0: unknown language 'xx'"),
        ({"text": "a", "audio_codes": [1], "language": 5}, "row 0: language must be text (got 5)"),
        ({"text": "a", "audio_codes": "114 632 81"}, "row 0: audio_codes must be a list of whole numbers from 0 to"),
        ({"text": "a", "audio_codes": None}, "from 0 to 65535 (got None)"),
        ({"text": "a", "audio_codes": [1], "duration_s": "2.0 s"}, "duration_s must be a number of seconds (got '2.0"),
    ],
)
def test_bad_data_sets(corpus, caplog, row, message):
    write_lines(corpus, [row])
    assert message in refusal(caplog, corpus, "--select", "random")


def test_output_is_checked_before_the_work(corpus, caplog, monkeypatch):
    monkeypatch.setattr(select_rl_data, "load_any_dataset", lambda *args: pytest.fail("too late"))
    (corpus.parent / "folder.jsonl").mkdir()
    for output, message in (
        ("out.txt", "must be a .jsonl or a .parquet file"),
        ("corpus.jsonl", "--overwrite replaces"),
        ("folder.jsonl", "folder.jsonl: is a folder. Use another name"),
    ):
        overwrite = ["--overwrite"] if "folder" in output else []
        with pytest.raises(SystemExit) as end:
            run(corpus, corpus.parent / output, "--select", "random", *overwrite)
        assert end.value.code == 2 and message in caplog.records[-1].getMessage()


def test_an_input_can_be_replaced(corpus):
    assert len(run(corpus, corpus, "--select", "random", "--num=3", "--overwrite")) == 3


def test_command_line(tmp_path, capsys):
    """One line on stderr, exit code 2, no traceback; a misspelt flag names the nearest; --help explains."""
    command = [sys.executable, "select_rl_data.py"]
    arguments = ["--dataset=./none.jsonl", "--select", "random", f"--output={tmp_path / 'out.jsonl'}"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ./none.jsonl: no such dataset")
    assert done.stderr.count("\n") == 1
    for wrong, message in (
        (["--transcript=a"], "Did you mean '--transcripts'"),
        (["--select", "hardest"], "invalid choice: 'hardest'"),
        (["--min_long_s=1", "--longest_frac=1"], "not allowed with"),
        (["--keywords=a", "--rarest_words=1"], "not allowed with"),
    ):
        with pytest.raises(SystemExit) as end:
            select_rl_data.parse_args([*arguments, *wrong])
        assert end.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        select_rl_data.parse_args(["--help"])
    assert end.value.code == 0 and '{"index": 0, "transcripts": [' in capsys.readouterr().out
