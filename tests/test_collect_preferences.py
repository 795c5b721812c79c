"""collect_preferences.py: from clips to a page, through a real browser, back to pairs; bad input."""

import json
import logging
import re
import shutil
import time
from pathlib import Path

import pytest
from clips import tone, write_rows

import collect_preferences
from speech import codec as speech_codec

ATTACK = "</script><script>document.title = 'hacked'</script> \"quotes\" & <b>'bold'</b>"


def run(*argv) -> dict | None:
    return collect_preferences.main(collect_preferences.parse_args([str(word) for word in argv]))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four pairs in pairs.jsonl, and three of a known better side in planted.jsonl, of clips of a third of a second."""
    for number in range(14):
        tone(tmp_path / f"{number}.wav", hz=200 + 20 * number)
    texts = ["one", ATTACK, "three", "four"]
    rows = [
        {
            "text": text,
            "audio_a": f"{2 * i}.wav",
            "audio_b": f"{2 * i + 1}.wav",
            "codes_a": [2 * i],
            "codes_b": [i + 50],
        }
        for i, text in enumerate(texts)
    ]
    rows[0]["speaker"] = "slt"
    write_rows(tmp_path / "pairs.jsonl", rows)
    planted = [{"text": "known", "chosen_audio": f"{i}.wav", "rejected_audio": f"{i + 1}.wav"} for i in (8, 10, 12)]
    write_rows(tmp_path / "planted.jsonl", planted)
    return tmp_path


@pytest.fixture
def page(folder) -> Path:
    flags = ["--pairs", folder / "pairs.jsonl", "--planted", folder / "planted.jsonl", "--num_planted", 3]
    run(*flags, "--output", folder / "page.html")
    return folder / "page.html"


def write_answers(page: Path, rater: str, choose) -> str:
    """What the page would save; `choose` is called with the key's row of each pair."""
    key = read_rows(page.with_suffix(".key.jsonl"))
    rows = [
        {"page": row["page"], "item": row["item"], "rater": rater, "choice": choose(row), "plays": [1, 1], "seconds": 2}
        for row in key
    ]
    return write_rows(page.parent / f"{rater}.jsonl", rows)


def side_of(row: dict, source: str) -> str:
    return "AB"[[clip["source"] for clip in row["clips"]].index(source)]


# --- Without a browser ------------------------------------------------------------------------------------


def test_num_pairs_and_planted_copies(folder, caplog):
    caplog.set_level(logging.INFO)
    tone(folder / "a.wav", 1.2)
    tone(folder / "b.wav", 1.3)
    rows = [{"text": f"text {i}", "audio_a": "a.wav", "audio_b": "b.wav"} for i in range(5)]
    flags = ["--pairs", write_rows(folder / "p.jsonl", rows), "--num_pairs", 2, "--num_planted", 3]
    run(*flags, "--output", folder / "new" / "page.html")
    key = read_rows(folder / "new" / "page.key.jsonl")
    asked = {row["text"] for row in key if row["better"] is None}
    planted = {row["text"] for row in key if row["better"]}
    assert (len(asked), len(planted)) == (2, 3) and not asked & planted  # of clips that are not asked about
    assert "2 pairs and 3 planted ones" in caplog.text and "planted pairs only" not in caplog.text
    run(*flags, "--num_planted", 9, "--output", folder / "page.html")
    assert "5 planted pairs only" in caplog.text


def test_answers_become_pairs(page, folder, caplog):
    caplog.set_level(logging.INFO)
    anna = write_answers(page, "anna", lambda row: row["better"] or side_of(row, "a"))
    ben = write_answers(
        page, "ben", lambda row: row["better"] or ("none" if row["text"] == "one" else side_of(row, "b"))
    )
    wrong = {"A": "B", "B": "A"}  # and a tie, which does not count either
    guesser = write_answers(
        page, "guesser", lambda row: wrong.get(row["better"], "none" if row["text"] == "one" else "A")
    )
    output = folder / "pairs_out.jsonl"
    keys = page.with_suffix(".key.jsonl")
    assert '"slt"' not in page.read_text(encoding="utf-8")
    report = run("--read", anna, ben, guesser, "--pages", keys, "--output", output)
    rows = read_rows(output)
    assert {row["rater"] for row in rows} == {"anna", "ben"} and len(rows) == 7 == report["pairs"]
    for row in rows:
        chosen = row["chosen_codes"][0]
        assert (chosen < 50) == (row["rater"] == "anna") and Path(row["chosen_audio"]).is_file()
    [first] = [row for row in rows if row["rater"] == "anna" and row["text"] == "one"]
    assert (first["chosen_codes"], first["rejected_codes"], first["source"]) == ([0], [50], "human")
    assert Path(first["chosen_audio"]).name == "0.wav" and Path(first["rejected_audio"]).name == "1.wav"
    assert len({row["id"] for row in rows}) == 7
    assert all(row.get("speaker") == ("slt" if row["text"] == "one" else None) for row in rows)
    assert (report["ties"], report["agreement"], report["wins"]) == (1, 0, {"a": 4, "b": 3})
    assert report["krippendorff_alpha"] < 0
    assert json.loads((folder / "pairs_out.report.json").read_text()) == report
    assert "planted pairs answered: guesser" in caplog.text
    assert "guesser        4              1         0 of 3  left out" in caplog.text
    assert "preferred 4 of 7 times: a" in caplog.text and "7 pairs, without 1 ties" in caplog.text


def test_answers_without_a_preference_are_an_exit_code(page, folder, caplog):
    """The report is there, for the ties are a result; a file of pairs is not."""
    ties = write_answers(page, "anna", lambda row: row["better"] or "none")
    with pytest.raises(SystemExit) as stop:
        run("--read", ties, "--pages", page.with_suffix(".key.jsonl"), "--output", folder / "out.jsonl")
    assert stop.value.code == 1 and "no pairs were written" in caplog.text
    assert json.loads((folder / "out.report.json").read_text())["ties"] == 4 and not (folder / "out.jsonl").exists()


def test_clips_without_codes_are_encoded(folder, monkeypatch):
    rows = [{"text": "one", "audio_a": "0.wav", "audio_b": "1.wav", "codes_a": [7]}]
    page = folder / "page.html"
    run("--pairs", write_rows(folder / "p.jsonl", rows), "--num_planted", 0, "--output", page)
    answers = write_answers(page, "anna", lambda row: side_of(row, "a"))

    class Codec:
        @classmethod
        def from_pretrained(cls, codec_id, device):
            assert codec_id == "the-codec"
            return cls()

        def encode(self, wavs):
            return [[len(wav)] for wav in wavs]

    monkeypatch.setattr(speech_codec, "SpeechCodec", Codec)
    flags = ["--read", answers, "--pages", page.with_suffix(".key.jsonl"), "--codec_id", "the-codec"]
    run(*flags, "--output", folder / "out.jsonl")
    [row] = read_rows(folder / "out.jsonl")
    assert (row["chosen_codes"], row["rejected_codes"]) == ([7], [4800])


# --- In a browser -----------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    """Chromium without a window, which downloads into tmp_path / "saved"."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs tests/requirements-test.txt")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--mute-audio"):
        options.add_argument(flag)
    (tmp_path / "saved").mkdir()
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "saved")})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Listener:
    """Someone before the page: sees it and has a keyboard and a mouse."""

    def __init__(self, browser, page: Path):
        self.browser = browser
        browser.get(page.as_uri())

    def element(self, name: str):
        return self.browser.find_element("id", name)

    def press(self, key: str) -> None:
        self.browser.switch_to.active_element.send_keys(key)

    def start(self, name: str) -> None:
        self.element("name").send_keys(name + "\n")

    def wait(self, holds) -> None:
        deadline = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < deadline, self.browser.find_element("tag name", "body").text
            time.sleep(0.02)

    def hear_both(self) -> None:
        self.press(" ")
        self.wait(lambda: self.element("choose-none").is_enabled())

    def saved(self, folder: Path, count: int) -> Path:
        # Chromium reserves the file's name with an empty file before it writes the answers.
        self.wait(lambda: [path.stat().st_size > 0 for path in folder.glob("*.jsonl")] == [True] * count)
        return max(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)


def test_a_listener_with_keys_reloads_saves_and_is_read_back(page, folder, browser):
    key = read_rows(page.with_suffix(".key.jsonl"))
    wanted = [row["better"] or ("none" if row["text"] == "three" else side_of(row, "b")) for row in key]
    anna = Listener(browser, page)
    assert not anna.element("unkept").is_displayed() and not anna.element("pair").is_displayed()
    assert anna.element("total").text == "7"
    anna.start("Anna B.")
    for number, (row, choice) in enumerate(zip(key, wanted, strict=True)):
        assert anna.element("counter").text == f"Pair {number + 1} of 7"
        assert anna.element("text").text == row["text"]
        if number == 0:
            anna.press("a")  # nothing is heard yet
            assert anna.element("note").text == "Play both clips to their end first."
            anna.press("1")
            anna.wait(lambda: anna.element("play-0").text.splitlines()[-1] == "heard")
            assert not anna.element("choose-A").is_enabled()
            anna.press("2")
            anna.wait(lambda: anna.element("choose-A").is_enabled())
        else:
            anna.hear_both()
        anna.press({"A": "a", "B": "b", "none": "n"}[choice])
        if number == 3:
            browser.refresh()
            assert anna.element("rater").text == "Anna B." and anna.element("progress").get_property("value") == 4
    assert anna.element("end").is_displayed() and browser.title == "Listening test"
    anna.press("s")
    answers = anna.saved(folder / "saved", 1)
    assert answers.name == f"answers_{key[0]['page']}_Anna-B-.jsonl"
    assert {row["item"]: row["choice"] for row in read_rows(answers)} == {
        row["item"]: choice for row, choice in zip(key, wanted, strict=True)
    }
    report = run("--read", answers, "--pages", page.with_suffix(".key.jsonl"), "--output", folder / "human.jsonl")
    assert report["raters"] == [{"name": "Anna B.", "answers": 4, "ties": 1, "planted": 3, "right": 3, "kept": True}]
    rows = read_rows(folder / "human.jsonl")
    assert sorted(row["text"] for row in rows) == sorted(["one", ATTACK, "four"])
    assert all(row["chosen_codes"][0] >= 50 and row["rejected_codes"][0] < 50 for row in rows)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_listener_with_a_mouse_goes_back_and_another_one_follows(page, folder, browser):
    key = read_rows(page.with_suffix(".key.jsonl"))
    ben = Listener(browser, page)
    ben.start("Ben")
    for choice in ("A", "B"):
        for side in (0, 1):
            ben.element(f"play-{side}").click()
            ben.wait(lambda side=side: "not heard" not in ben.element(f"play-{side}").text)
            ben.wait(lambda side=side: "playing" not in ben.element(f"play-{side}").text)
        ben.element(f"choose-{choice}").click()
    ben.element("back").click()
    assert ben.element("counter").text == "Pair 2 of 7" and "chosen" in ben.element("choose-B").get_attribute("class")
    ben.hear_both()
    ben.element("choose-none").click()
    assert ben.element("counter").text == "Pair 3 of 7"
    ben.element("save").click()
    answers = read_rows(ben.saved(folder / "saved", 1))
    assert [(row["item"], row["choice"]) for row in answers] == [(key[0]["item"], "A"), (key[1]["item"], "none")]
    assert answers[0]["plays"] == [1, 1] and answers[0]["rater"] == "Ben" and 0 < answers[0]["seconds"] < 60
    ben.element("other").click()
    clara = Listener(browser, page)  # Ben's page, opened again
    clara.element("other").click()
    clara.start("Clara")
    assert clara.element("counter").text == "Pair 1 of 7" and clara.element("save").get_property("disabled")
    clara.element("other").click()
    clara.start("Ben")
    assert clara.element("counter").text == "Pair 3 of 7"


@pytest.mark.parametrize(
    "refuse",
    [
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('denied') }})",
        "Storage.prototype.setItem = () => { throw new DOMException('full') }",
    ],
)
def test_a_browser_that_keeps_nothing_says_so(refuse, page, folder, browser):
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refuse})
    dora = Listener(browser, page)
    assert dora.element("unkept").is_displayed()
    dora.start("Dora")
    dora.hear_both()
    dora.press("0")
    dora.press("s")
    [answer] = read_rows(dora.saved(folder / "saved", 1))
    assert answer["choice"] == "none" and dora.element("counter").text == "Pair 2 of 7"
    dora.hear_both()
    dora.press("0")
    assert dora.element("counter").text == "Pair 3 of 7"
    dora.element("other").click()
    dora.start("Eva")
    assert dora.element("counter").text == "Pair 1 of 7"
    dora.element("other").click()
    dora.start("Dora")
    assert dora.element("counter").text == "Pair 3 of 7"


def test_answers_of_two_tabs_are_kept_and_next_leads_forward(page, folder, browser):
    fay = Listener(browser, page)
    fay.start("Fay")
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    second = Listener(browser, page)  # goes on as Fay
    assert second.element("counter").text == "Pair 1 of 7" and not second.element("next").is_enabled()
    for choice in ("a", "b"):
        second.hear_both()
        second.press(choice)
    browser.switch_to.window(first)
    assert fay.element("counter").text == "Pair 1 of 7"
    fay.hear_both()
    fay.press("n")
    assert fay.element("counter").text == "Pair 3 of 7"  # the second one was answered in the other tab
    fay.press("s")
    assert [row["choice"] for row in read_rows(fay.saved(folder / "saved", 1))] == ["none", "B"]
    fay.element("back").click()
    fay.element("back").click()
    assert fay.element("counter").text == "Pair 1 of 7"
    fay.element("next").click()
    assert fay.element("counter").text == "Pair 2 of 7"
    fay.element("next").click()
    assert fay.element("counter").text == "Pair 3 of 7" and not fay.element("next").is_enabled()


PRESS = "document.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], code: arguments[1], bubbles: true}))"


def test_keys_of_other_keyboards(page, browser):
    greta = Listener(browser, page)
    greta.start("Greta")
    for key, code in (("&", "Digit1"), ("é", "Digit2")):  # AZERTY's 1 and 2
        browser.execute_script(PRESS, key, code)
        greta.wait(lambda side=int(code[-1]) - 1: greta.element(f"play-{side}").text.splitlines()[-1] == "heard")
    browser.execute_script(PRESS, "q", "KeyA")  # AZERTY's q stands where others have the a
    assert greta.element("counter").text == "Pair 1 of 7"
    browser.execute_script(PRESS, "ф", "KeyA")
    assert greta.element("counter").text == "Pair 2 of 7"


# --- Bad input --------------------------------------------------------------------------------------------

MAKE = "--pairs {folder}/pairs.jsonl --output {folder}/out.html"
READ = "--read {folder}/pairs.jsonl --pages {folder}/key.jsonl --output {folder}/out.jsonl"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (MAKE + " --num_pairs 0", "--num_pairs: must be >= 1"),
        (MAKE + " --num_planted -1", "--num_planted: must be >= 0"),
        (MAKE + " --seed -1", "--seed: must be in"),
        (MAKE + " --question ", "--question: is empty"),
        (MAKE + " --output {folder}/out.jsonl", "--output: must be a .html file"),
        (MAKE + " --output {folder}/there.html", "there.html exists. Use another name, or replace it with --overwrite"),
        (MAKE + " --output {folder}/half.html", "half.key.jsonl exists"),
        (MAKE + " --output {folder}/0.wav/out.html", "cannot write into"),
        (MAKE + " --pages {folder}/key.jsonl", "--read and --pages go together"),
        (MAKE + " --planted {folder}/no.jsonl", "no.jsonl: No such file"),
        (MAKE + " --planted {folder}/short.jsonl", "short.jsonl: all clips are silent or shorter than 1 s"),
        ("--clips a b c --output {folder}/out.html", "--clips: one or two files .got 3"),
        ("--clips {folder}/pairs.jsonl --output {folder}/out.html", "line 1: audio must be text"),
        ("--pairs {folder}/0.wav --output {folder}/out.html", "0.wav: not a .jsonl file"),
        ("--read {folder}/pairs.jsonl --output {folder}/out.jsonl", "--read and --pages go together"),
        (READ + " --min_planted nan", "--min_planted: must be in"),
        (READ + " --min_planted 1.5", "--min_planted: must be in"),
        (READ + " --output {folder}/out.html", "--output: must be a .jsonl file"),
        (READ + " --planted {folder}/planted.jsonl", "--planted is for a new page"),
        (READ, "key.jsonl: No such file"),
        (READ + " --pages {folder}/pairs.jsonl", "pairs.jsonl, line 1: not the key of a page"),
    ],
)
def test_bad_input(flags, message, folder, caplog):
    (folder / "there.html").write_text("mine")
    (folder / "half.key.jsonl").write_text("mine")
    write_rows(folder / "short.jsonl", [{"text": "short", "audio": "0.wav"}])
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(*[word.format(folder=folder) for word in flags.split(" ")])
    assert stop.value.code == 2
    [error] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert re.search(message, error), error
    assert sorted(folder.rglob("*")) == before and (folder / "there.html").read_text() == "mine"


def test_answers_to_another_page(page, folder, caplog):
    answers = write_answers(page, "anna", lambda row: "A")
    run("--pairs", folder / "pairs.jsonl", "--num_planted", 0, "--seed", 1, "--output", folder / "other.html")
    with pytest.raises(SystemExit):
        run("--read", answers, "--pages", folder / "other.key.jsonl", "--output", folder / "out.jsonl")
    assert "is in none of the keys. Add its key to --pages" in caplog.text and not (folder / "out.jsonl").exists()
