"""judge_preferences.py against a server on this machine: judges of all kinds, faults, a resumed run, bad input."""

import doctest
import json
import logging
import re
import time
from pathlib import Path

import pytest
from clips import tone, write_rows
from fake_judge import FakeJudge, pitch_hz, prefers_the_higher, prompt_of

import judge_preferences
from metrics import chat_judge
from speech import codec as speech_codec
from speech.audio import load_audio, save_audio

NUM_PAIRS = 6


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """pairs.jsonl, six pairs of tones: clip b is the higher one in the second half."""
    monkeypatch.setattr(chat_judge, "FIRST_WAIT_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    rows = []
    for i in range(NUM_PAIRS):
        hz = (400, 300) if i < NUM_PAIRS // 2 else (300, 400)
        clips = {f"audio_{side}": tone(tmp_path / f"{i}{side}.wav", hz=hz["ab".index(side)] + 10 * i) for side in "ab"}
        rows.append({"id": f"p{i}", "text": f"text {i}", **clips, "codes_a": [i, 1], "codes_b": [i, 2]})
    rows[0]["speaker"] = "slt"
    write_rows(tmp_path / "pairs.jsonl", rows)
    return tmp_path


def run(folder: Path, url: str, *flags, output: str = "out.jsonl") -> dict | None:
    given = [] if "--clips" in flags else ["--pairs", folder / "pairs.jsonl"]
    given += ["--judge_url", url, "--judge_model", "judge", "--num_planted", "0", "--output", folder / output, *flags]
    return judge_preferences.main(judge_preferences.parse_args([str(word) for word in given]))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refused(folder: Path, url: str, caplog, *flags) -> tuple[int, str]:
    """Exit code, and the error's line."""
    with pytest.raises(SystemExit) as stop:
        run(folder, url, *flags)
    [error] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    return stop.value.code, error


# --- Judges -----------------------------------------------------------------------------------------------


def test_a_judge_that_hears(folder, caplog):
    caplog.set_level(logging.INFO)
    prices = ["--price_per_million_input", "10", "--price_per_million_output", "1000"]
    with FakeJudge() as judge:
        report = run(folder, judge.url, "--question", "Which is higher?", *prices)
    rows = sorted(read_rows(folder / "out.jsonl"), key=lambda row: row["text"])
    assert [row["text"] for row in rows] == [f"text {i}" for i in range(NUM_PAIRS)]
    for i, row in enumerate(rows):
        better = 1 if i < NUM_PAIRS // 2 else 2
        assert (row["chosen_codes"], row["rejected_codes"]) == ([i, better], [i, 3 - better])
        assert (row["source"], row["rater"]) == ("machine", "judge")
        assert Path(row["chosen_audio"]).name == f"{i}{' ab'[better]}.wav" and "ref_codes" not in row
    assert len({row["id"] for row in rows}) == NUM_PAIRS
    assert [row.get("speaker") for row in rows] == ["slt"] + [None] * (NUM_PAIRS - 1)
    assert len(judge.requests) == 12 and report["requests"] == 12
    assert (report["consistency"], report["first_chosen"], report["pairs"]) == (1, 0.5, 6)
    # 12 × 100 tokens at 10 a million and 12 × 2 at 1000: 0.012 + 0.024
    assert report["cost"] == pytest.approx(0.036) and "1,200 in, 24 out; cost 0.036" in caplog.text
    assert json.loads((folder / "out.report.json").read_text()) == report
    prompts = [prompt_of(request) for request in judge.requests]
    assert all("Which is higher?" in prompt and "one letter" in prompt for prompt in prompts)
    assert sorted(re.search(r"text \d", prompt)[0] for prompt in prompts) == sorted(
        2 * [f"text {i}" for i in range(NUM_PAIRS)]
    )
    assert judge.requests[0]["temperature"] == 0 and judge.requests[0]["max_tokens"] == 256


def test_clips_are_at_one_loudness(folder):
    save_audio(folder / "0a.wav", 0.2 * load_audio(folder / "0a.wav"))
    levels = []

    def choose(first, second):
        levels.extend([first.std(), second.std()])
        return prefers_the_higher(first, second)

    with FakeJudge(choose) as judge:
        run(folder, judge.url)
    assert len(levels) == 24 and max(levels) / min(levels) < 1.01


@pytest.mark.parametrize("letter, first_chosen", [("A", 1), ("B", 0)])
def test_a_judge_that_prefers_a_place_makes_no_pair(letter, first_chosen, folder, caplog):
    caplog.set_level(logging.INFO)
    with FakeJudge(lambda *_: letter) as judge:
        code, error = refused(folder, judge.url, caplog)
    assert code == 1 and "nothing was written" in error and not (folder / "out.jsonl").exists()
    report = json.loads((folder / "out.report.json").read_text())
    assert (report["disagrees"], report["consistency"], report["first_chosen"]) == (NUM_PAIRS, 0, first_chosen)
    assert "6 where the judge disagrees with itself, 0 ties, 0 unreadable" in caplog.text


def test_ties_and_answers_that_are_no_letter_are_dropped(folder, caplog):
    answers = {3: "As a language model I cannot hear.", 4: "C", 5: None}

    def choose(first, second):
        number = round((min(pitch_hz(first), pitch_hz(second)) - 300) / 10)
        return answers.get(number, prefers_the_higher(first, second))

    with FakeJudge(choose) as judge:
        report = run(folder, judge.url)
    assert (report["pairs"], report["ties"], report["unreadable"], report["disagrees"]) == (3, 1, 2, 0)
    assert {row["text"] for row in read_rows(folder / "out.jsonl")} == {"text 0", "text 1", "text 2"}
    assert "not a letter, such as" in caplog.text


def test_planted_pairs_check_the_judge(folder, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"text": "known", "chosen_audio": f"{i}a.wav", "rejected_audio": f"{i}b.wav"} for i in range(NUM_PAIRS)]
    flags = ["--planted", write_rows(folder / "planted.jsonl", rows), "--num_planted", "6"]
    with FakeJudge() as judge:
        report = run(folder, judge.url, *flags)
        assert (report["planted"], report["planted_right"], report["asked"]) == (6, 3, 6)
        assert "planted pairs right: 3 of 6" in caplog.text and "do not train on these pairs" in caplog.text
        caplog.clear()
        right = ["--planted", write_rows(folder / "right.jsonl", rows[:3]), "--num_planted", "3"]
        report = run(folder, judge.url, *right, output="other.jsonl")
    assert (report["planted_right"], report["pairs"]) == (3, 6) and "do not train" not in caplog.text
    assert "known" not in {row["text"] for row in read_rows(folder / "out.jsonl")}


def test_two_checkpoints_and_clips_without_codes(folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    paths = []
    for side in "ab":
        rows = [{"text": f"text {i}", "audio": f"{i}{side}.wav"} for i in range(NUM_PAIRS)]
        for row in rows[:1]:
            row |= {"ref_text": "Hello.", "ref_codes": [7]}
        paths.append(write_rows(folder / f"{side}.jsonl", rows))

    class Codec:
        from_pretrained = classmethod(lambda cls, codec_id, device: cls())

        def encode(self, wavs):
            return [[len(wav)] for wav in wavs]

    monkeypatch.setattr(speech_codec, "SpeechCodec", Codec)
    with FakeJudge() as judge:
        report = run(folder, judge.url, "--clips", *paths)
    assert report["wins"] == {paths[0]: 3, paths[1]: 3} and f"preferred 3 of 6 times: {paths[0]}" in caplog.text
    rows = read_rows(folder / "out.jsonl")
    assert all(row["chosen_codes"] == [4800] for row in rows)
    assert [row["ref_codes"] for row in rows if "ref_codes" in row] == [[7]]


# --- Faults -----------------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again(folder, caplog):
    with FakeJudge() as judge:
        run(folder, judge.url)
    faults = [(429, {"Retry-After": "0.02"}), (500, {}), (503, {}), (429, {})]
    with FakeJudge(faults=faults) as flaky:
        run(folder, flaky.url, output="flaky.jsonl")
    assert (folder / "flaky.jsonl").read_bytes() == (folder / "out.jsonl").read_bytes()
    assert len(flaky.requests) == 16 and "HTTP 429: not now; asking again in 0.02 s" in caplog.text


def test_a_server_that_stays_broken_ends_the_run(folder, caplog):
    with FakeJudge(faults=[(500, {})] * 100) as judge:
        code, error = refused(folder, judge.url, caplog, "--num_workers", "1")
    assert code == 1 and "HTTP 500: not now, after 6 tries. What it has judged is kept" in error
    assert len(judge.requests) == chat_judge.MAX_TRIES


def test_a_server_that_is_not_there_or_does_not_answer(folder, caplog):
    with FakeJudge() as gone:
        pass
    code, error = refused(folder, gone.url, caplog)
    assert code == 1 and "Connection refused" in error
    caplog.clear()
    with FakeJudge(lambda *_: time.sleep(0.5)) as slow:
        code, error = refused(folder, slow.url, caplog, "--timeout_s", "0.05", "--num_workers", "1")
    assert code == 1 and "timed out" in error


def test_a_killed_run_resumes_and_writes_the_same_file(folder, monkeypatch):
    with FakeJudge() as judge:
        run(folder, judge.url, output="whole.jsonl")
    add_batch, added = judge_preferences.ResumableFile.add_batch, []

    def interrupted(self, batch):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(batch["pair"])
        add_batch(self, batch)

    monkeypatch.setattr(judge_preferences.ResumableFile, "add_batch", interrupted)
    with FakeJudge() as judge, pytest.raises(KeyboardInterrupt):
        run(folder, judge.url, "--num_workers", "1")
    monkeypatch.setattr(judge_preferences.ResumableFile, "add_batch", add_batch)
    with (folder / "out.jsonl.partial").open("a") as file:
        file.write('{"pair": 5, "repl')  # the line that was being written
    with FakeJudge() as other_port:
        report = run(folder, other_port.url, "--num_workers", "3")
        assert len(other_port.requests) == 2 * (NUM_PAIRS - 2) and report["requests"] == 12
        assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
        assert run(folder, other_port.url) is None, "complete already"
        assert len(other_port.requests) == 8


def test_other_settings_are_another_run(folder, caplog):
    with FakeJudge() as judge:
        run(folder, judge.url)
        code, error = refused(folder, judge.url, caplog, "--question", "Which is lower?")
        assert code == 2 and "has the pairs of a run with other question" in error
        caplog.clear()
        tone(folder / "0a.wav", hz=100)  # the same name, another clip
        code, error = refused(folder, judge.url, caplog)
        assert code == 2 and "a run with other drawn" in error
        assert run(folder, judge.url, "--overwrite")["pairs"] == NUM_PAIRS


def test_an_interrupted_run_that_overwrites_resumes_by_the_same_command(folder, monkeypatch):
    """Else what was judged, and paid for, would be asked again."""
    with FakeJudge() as judge:
        run(folder, judge.url)
        add_batch = judge_preferences.ResumableFile.add_batch

        def killed(self, batch):
            add_batch(self, batch)
            raise KeyboardInterrupt

        again = ("--overwrite", "--question", "Which is lower?")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(judge_preferences.ResumableFile, "add_batch", killed)
            run(folder, judge.url, *again)
        asked = len(judge.requests)
        assert not (folder / "out.jsonl").exists()
        assert run(folder, judge.url, *again)["pairs"] == NUM_PAIRS
        assert len(judge.requests) - asked <= 2 * (NUM_PAIRS - 1)


# --- Keys -------------------------------------------------------------------------------------------------

KEY = "sk-very-secret"


def test_the_key_is_sent_and_written_nowhere(folder, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeJudge(key=KEY) as judge:
        assert run(folder, judge.url)["pairs"] == NUM_PAIRS
    with FakeJudge(key="another") as judge:
        code, error = refused(folder, judge.url, caplog, "--overwrite")
    assert code == 2 and "HTTP 401: Incorrect API key provided: Bearer …" in error and "is not valid here" in error
    assert KEY not in caplog.text
    assert all(KEY not in path.read_text() for path in folder.glob("out*"))


def test_no_key_where_one_is_wanted(folder, caplog):
    with FakeJudge(key=KEY) as judge:
        code, error = refused(folder, judge.url, caplog)
    assert code == 2 and "The environment variable OPENAI_API_KEY is not set" in error


def test_a_key_that_cannot_be_sent_is_not_shown(folder, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nx")
    code, error = refused(folder, "http://127.0.0.1:9/v1", caplog)
    assert code == 2 and "OPENAI_API_KEY: has characters" in error and KEY not in caplog.text


def test_a_redirect_is_not_followed(folder, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeJudge() as elsewhere, FakeJudge(faults=[(302, {"Location": elsewhere.url})] * 12) as judge:
        code, error = refused(folder, judge.url, caplog)
    assert code == 2 and f"leads on to {elsewhere.url}" in error and not elsewhere.requests


# --- Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "flags", "message"),
    [
        ("/v1", ["--judge_model", "other"], "HTTP 404: The model other does not exist. It must be what stands before"),
        ("/v2", [], "HTTP 404: {'?\"?detail'?\"?: '?\"?Not Found"),
    ],
)
def test_a_wrong_model_or_path(path, flags, message, folder, caplog):
    with FakeJudge() as judge:
        code, error = refused(folder, judge.url.replace("/v1", path), caplog, *flags)
    assert code == 2 and re.search(message, error), error


def test_an_answer_that_is_no_chat_completion(folder, caplog, monkeypatch):
    monkeypatch.setattr(FakeJudge, "answer", lambda self, handler, _: self.send(handler, 200, {"hello": "world"}))
    with FakeJudge() as judge:
        code, error = refused(folder, judge.url, caplog)
    assert code == 2 and 'the answer is no chat completion (got \'{"hello": "world"}\')' in error


def test_a_refused_request_is_told_in_the_servers_words(folder, caplog):
    with FakeJudge(faults=[(400, {})] * 12) as judge:
        code, error = refused(folder, judge.url, caplog)
    assert code == 2 and "refuses the request (HTTP 400: not now)" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge_url", "localhost:8000/v1"], "--judge_url: must begin with http"),
        (["--judge_url", "http://me:secret@host/v1"], "--judge_url: holds a query or a user name"),
        (["--judge_url", "https://host/v1?key=secret"], "--judge_url: holds a query"),
        (["--judge_url", "http://[::1"], "--judge_url: Invalid IPv6 URL"),
        (["--judge_url", "http://localhost:port/v1"], "--judge_url: Port could not be cast"),
        (["--judge_url", "http://localhost:9/v 1"], "--judge_url: must begin with http"),
        (["--timeout_s", "1e12"], "--timeout_s: must be in"),
        (["--output", "pairs.csv"], "not a .jsonl file"),
        (["--question", " "], "--question: is empty"),
        (["--num_workers", "0"], "--num_workers: must be >= 1"),
        (["--num_pairs", "0"], "--num_pairs: must be >= 1"),
        (["--timeout_s", "0"], "--timeout_s: must be in"),
        (["--price_per_million_input", "-1"], "--price_per_million_input: must be in"),
        (["--seed", "-1"], "--seed: must be in"),
        (["--clips", "a", "b", "c"], "--clips: one or two files .got 3"),
        (["--clips", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    ],
)
def test_bad_input(flags, message, folder, caplog):
    code, error = refused(folder, "http://127.0.0.1:9/v1", caplog, *flags)
    assert code == 2 and re.search(message, error), error


def test_worked_examples():
    for module, least in ((judge_preferences, 3), (chat_judge, 2)):
        failed, attempted = doctest.testmod(module)
        assert attempted >= least and failed == 0
