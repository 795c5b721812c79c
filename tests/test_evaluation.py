"""evaluation.py: texts, judges, hand-worked numbers, and what the reports hold."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from test_inference import NUM_CODES, ToneCodec, save_policy
from test_token2text import small

import evaluation
from metrics import html_page, judges, report
from metrics.judges import PocketsphinxJudge, spoken_words
from speech.audio import load_audio, save_audio
from speech.error_rate import error_rate
from speech.policy import Sample
from speech.whisper_scorer import MAX_NLL, Score


class DeafJudge:
    """Stands in for a Whisper: hears every text without its first word, at an NLL of the clip's length."""

    def __init__(self, name="deaf", device="cpu"):
        assert name in ("deaf", "the-whisper")

    def score(self, wavs, texts, languages):
        scores = []
        for wav, text in zip(wavs, texts, strict=True):
            hyp_text = " ".join(text.split()[1:]) if len(wav) else ""
            errors = error_rate(text, hyp_text, "en")
            scores.append(Score(hyp_text, errors.rate, len(wav) / 16_000, errors.edits, errors.ref_length))
        return scores


@pytest.fixture(scope="module")
def policy_paths(tmp_path_factory):
    return [save_policy(tmp_path_factory.mktemp("policy"), seed) for seed in (0, 1)]


@pytest.fixture
def small_world(monkeypatch):
    monkeypatch.setattr(evaluation, "SpeechCodec", ToneCodec)
    monkeypatch.setattr(evaluation, "WhisperScorer", DeafJudge)
    monkeypatch.setattr(judges, "WhisperScorer", DeafJudge)


def evaluate(tmp_path, models, *options, texts="red hats\nbig blue shoes\n"):
    (tmp_path / "t.txt").write_text(texts, encoding="utf-8")
    argv = ["--models", *models, "--texts", str(tmp_path / "t.txt"), "--output_dir", str(tmp_path / "out")]
    return evaluation.main(evaluation.parse_args([*argv, "--max_length", "150", *options]))


# --- The texts --------------------------------------------------------------------------------------------


def test_reads_txt(tmp_path):
    (tmp_path / "t.txt").write_text("One.\n\n Two. \n", encoding="utf-8")
    items = evaluation.read_items(str(tmp_path / "t.txt"), "en")
    assert [(item.id, item.text, item.language, item.ref_audio) for item in items] == [
        ("1", "One.", "en", None),
        ("3", "Two.", "en", None),
    ]


def test_reads_jsonl_with_paths_beside_the_file(tmp_path):
    save_audio(tmp_path / "a.wav", np.zeros(100))
    rows = [
        {"text": "One.", "id": 7, "ref_audio": "a.wav", "ref_text": "Ref.", "speaker": "unused"},
        {"text": "Eins.", "language": "de", "audio": str(tmp_path / "a.wav")},
        {"text": "Two.", "file_name": "a.wav"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two, three = evaluation.read_items(str(tmp_path / "t.jsonl"), "en")
    assert three.audio == str(tmp_path / "a.wav")
    assert (one.id, one.ref_audio, one.ref_text, one.language) == ("7", str(tmp_path / "a.wav"), "Ref.", "en")
    assert (two.id, two.audio, two.language, two.ref_audio) == ("2", str(tmp_path / "a.wav"), "de", None)


def test_reads_the_meta_lst_of_seed_tts_eval(tmp_path):
    for name in ("prompt-wavs/p.wav", "wavs/n.wav"):
        save_audio(tmp_path / name, np.zeros(100))
    (tmp_path / "meta.lst").write_text(
        "x-1|We asked people.|prompt-wavs/p.wav|Get the trust fund.\n"
        "x-2|We asked people.|prompt-wavs/p.wav|Get it.|wavs/n.wav\n"
    )
    one, two = evaluation.read_items(str(tmp_path / "meta.lst"), "en")
    assert (one.id, one.ref_text, one.text, one.audio) == ("x-1", "We asked people.", "Get the trust fund.", None)
    assert one.ref_audio == str(tmp_path / "prompt-wavs/p.wav") and two.audio == str(tmp_path / "wavs/n.wav")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "text", "give texts as .txt, .jsonl, .lst"),
        ("t.txt", " \n", "no text in it"),
        ("t.txt", "ok\n<|s_1|>", "line 2: text holds a control token"),
        ("t.txt", "…!", "line 1: reference text .* is empty"),
        ("t.jsonl", '{"text": "a"}\n{"txt": "b"}', "line 2: a row without text; it has: txt"),
        ("t.jsonl", '{"text": ""}', "line 1: text is empty"),
        ("t.jsonl", "[1]", "line 1: expected an object"),
        ("t.jsonl", "{", "line 1: Expecting"),
        ("t.jsonl", '{"text": "a", "language": "xx"}', "line 1: unknown language 'xx'"),
        ("t.jsonl", '{"text": "a", "ref_text": "b"}', "line 1: a voice prompt needs both"),
        (
            "t.jsonl",
            '{"text": "a", "ref_audio": "no.wav", "ref_text": "b"}',
            "line 1: ref_audio .*no.wav: no such file",
        ),
        ("meta.lst", "a|b|c", "line 1: expected id"),
    ],
)
def test_bad_texts_name_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        evaluation.read_items(str(tmp_path / name), "en")


def test_words_and_characters_do_not_mix():
    english, chinese = evaluation.Item("1", "a", "en"), evaluation.Item("2", "你好", "zh")
    assert evaluation.units_of([english]) == "words" and evaluation.units_of([chinese]) == "characters"
    with pytest.raises(ValueError, match="evaluate them apart"):
        evaluation.units_of([english, chinese])


# --- Numbers ----------------------------------------------------------------------------------------------


def row_of(edits, lengths):
    """A row with one list of counts per seed."""
    clips = [
        {"text": str(i), "judges": {"j": {"edits": e, "ref_length": n}}}
        for seed_edits, seed_lengths in zip(edits, lengths, strict=True)
        for i, (e, n) in enumerate(zip(seed_edits, seed_lengths, strict=True))
    ]
    return {"seeds": list(range(len(edits))), "clips": clips}


def test_error_rate_is_the_corpus_s():
    """Texts of 1 and 9 words. Seed 0: 1 and 0 edits, 1/10. Seed 1: 0 and 3 edits, 3/10. Together 4/20, and not
    the mean of the clips' rates, (1 + 0 + 0 + 1/3) / 4 = 1/3. Std of 0.1 and 0.3 with n - 1: 0.1414."""
    metrics = report.error_metrics(report.edit_counts(row_of([[1, 0], [0, 3]], [[1, 9], [1, 9]]), "j"))
    assert metrics["error_rate"] == pytest.approx(0.2)
    assert metrics["per_seed"] == pytest.approx([0.1, 0.3])
    assert metrics["seed_mean"] == pytest.approx(0.2)
    assert metrics["seed_std"] == pytest.approx(0.1414, abs=1e-4)


def test_interval_resamples_texts_with_all_their_seeds():
    """Two texts of one word, one always right and one always wrong: a draw gives 0, 1/2 or 1 with chances 1/4, 1/2
    and 1/4, so the interval is [0, 1]. Drawing the 2 x 50 clips singly would give about [0.4, 0.6]."""
    many_seeds = row_of([[0, 1]] * 50, [[1, 1]] * 50)
    assert report.error_metrics(report.edit_counts(many_seeds, "j"))["interval"] == [0.0, 1.0]


def test_interval_of_100_texts_is_the_binomial_s():
    """30 of 100 one-word texts wrong: 0.3 +- 1.96 sqrt(0.3 * 0.7 / 100) = [0.21, 0.39]."""
    counts = report.edit_counts(row_of([[1] * 30 + [0] * 70], [[1] * 100]), "j")
    assert report.error_metrics(counts)["interval"] == pytest.approx([0.21, 0.39], abs=0.011)


def test_one_seed_has_no_spread_and_no_error_has_no_width():
    metrics = report.error_metrics(report.edit_counts(row_of([[0, 0]], [[2, 3]]), "j"))
    assert metrics["seed_std"] is None and metrics["interval"] == [0.0, 0.0]


def test_change_is_paired_by_text():
    """Half of the errors of each text gone: -50 % in every draw, however the texts differ."""
    first, row = row_of([[2, 0, 8]], [[4, 4, 9]]), row_of([[1, 0, 4]], [[4, 4, 9]])
    result = report.change(row, first, "j")
    assert result["relative"] == pytest.approx(-0.5)
    assert result["interval"] == pytest.approx([-0.5, -0.5])
    assert report.change(first, row_of([[0, 0, 0]], [[4, 4, 9]]), "j") is None  # no error to lose
    assert report.change(first, row_of([[2]], [[4]]), "j") is None  # other texts


# --- Judges -----------------------------------------------------------------------------------------------


def test_spoken_words():
    assert spoken_words("“Don’t stop,” she said: 'now'!") == ["don't", "stop", "she", "said", "now"]


def test_pocketsphinx_names_what_it_cannot_judge():
    with pytest.raises(ValueError, match="lacks '7', 'xqzzt'"):
        PocketsphinxJudge(["Anna bought 7 xqzzt."], ["en"])
    with pytest.raises(ValueError, match="English only.*'de'"):
        PocketsphinxJudge(["Hallo."], ["de"])


def test_pocketsphinx_counts_silence_as_all_words_deleted():
    judge = PocketsphinxJudge(["Anna bought apples."], ["en"])
    for wav, failure in ((np.zeros(0, np.float32), "empty"), (np.zeros(16_000, np.float32), "silent")):
        score = judge.score([wav], ["Anna bought apples."], ["en"])[0]
        assert (score.hyp_text, score.edits, score.ref_length, score.failure) == ("", 3, 3, failure)
        assert np.isnan(score.nll)


def test_pocketsphinx_hears_flite_in_any_order(tmp_path):
    if not shutil.which("flite"):
        pytest.skip("flite is not installed: nothing speaks the known clips")
    texts = ["Mary sold eight old boats near the river.", "Anna sees four small cats."]
    for i, text in enumerate(texts):
        subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", tmp_path / f"{i}.wav"], check=True)
    wavs = [load_audio(tmp_path / f"{i}.wav") for i in range(2)]
    judge = PocketsphinxJudge(texts, ["en"] * 2)
    heard = [judge.transcribe(wav) for wav in wavs]
    assert heard == ["mary sold eight old boats near the river", "anna sees four small cats"]
    assert [judge.transcribe(wav) for wav in wavs[::-1]] == heard[::-1]


# --- The whole ------------------------------------------------------------------------------------------


def test_results_hold_every_row_and_clip(policy_paths, small_world, tmp_path):
    save_audio(tmp_path / "n.wav", 0.1 * np.sin(np.arange(8_000) * 0.1))
    (tmp_path / "natural.jsonl").write_text(json.dumps({"text": "red hats", "audio": "n.wav"}))
    models = [f"SFT={policy_paths[0]}", f"GRPO={policy_paths[1]}"]
    options = ["--seeds", "3", "4", "--temperature", "1.0", "0.7", "--best_of", "2", "--judge", "deaf"]
    returned = evaluate(tmp_path, models, *options, "--references", str(tmp_path / "natural.jsonl"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert [row["name"] for row in results["rows"]] == [
        "SFT T=1", "SFT T=1, best of 2", "SFT T=0.7", "GRPO T=1", "GRPO T=0.7", "natural", "codec resynthesis",
    ]  # fmt: skip
    assert results["num_texts"] == 2 and results["units"] == "words" and results["arguments"]["seeds"] == [3, 4]
    for row in results["rows"][:5]:
        assert [(clip["seed"], clip["id"]) for clip in row["clips"]] == [(3, "1"), (3, "2"), (4, "1"), (4, "2")]
        judged = row["metrics"]["judges"]["deaf"]
        # The first word of 'red hats' and of 'big blue shoes' is lost, by any clip with sound: 2 of 5 words.
        if not row["metrics"]["empty"]:
            assert judged["error_rate"] == pytest.approx(2 / 5)
            assert judged["per_seed"] == pytest.approx([2 / 5, 2 / 5])
        assert row["metrics"]["speech_per_compute_s"] > 0
    natural, resynthesis = results["rows"][5:]
    assert natural["seeds"] == [None] and natural["metrics"]["truncated"] is None
    assert natural["metrics"]["duration_s"] == 0.5 and natural["metrics"]["units_per_second"] == 4
    assert resynthesis["clips"][0]["num_codes"] == 3 and resynthesis["metrics"]["truncated"] == 0
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| WER by deaf |" in table and "| SFT T=1, best of 2 |" in table


def test_best_of_n_is_the_reward_s_choice(policy_paths, small_world, tmp_path):
    """DeafJudge's NLL is the clip's length, and its WER is the same for all: the shortest that ended wins."""
    rows = evaluate(tmp_path, [policy_paths[0]], "--seeds", "0", "--best_of", "6")["rows"]
    plain, best = (row["metrics"] for row in rows)
    assert best["duration_s"] < plain["duration_s"] and best["truncated"] == 0


def test_same_seeds_give_the_same_clips(policy_paths, small_world, tmp_path):
    runs = [evaluate(tmp_path, [policy_paths[0]], "--seeds", "0", "1")["rows"][0]["clips"] for _ in range(2)]
    assert runs[0] == runs[1]


def test_results_survive_a_later_failure(policy_paths, small_world, tmp_path, monkeypatch):
    load = evaluation.Policy.from_pretrained
    monkeypatch.setattr(
        evaluation.Policy, "from_pretrained", lambda path, *_: load(path) if path == policy_paths[0] else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        evaluate(tmp_path, [f"A={policy_paths[0]}", f"B={policy_paths[1]}"], "--seeds", "0")
    assert [row["name"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]] == ["A"]
    assert (tmp_path / "out" / "report.html").is_file()


def test_failures_are_counted():
    items = [evaluation.Item(str(i), "red hats", "en") for i in range(4)]
    samples = [Sample([], True), Sample([5] * 40, False), Sample([1, 2, 3], True), Sample([4, 5], True)]
    sound = 0.1 * np.sin(np.arange(8_000) * 0.1).astype(np.float32)
    wavs = [np.zeros(0, np.float32), sound, np.zeros(8_000, np.float32), sound]
    clips = evaluation.judge_clips({"deaf": DeafJudge()}, items, samples, wavs, 0)
    row = {"seeds": [0], "compute_s": 2.0, "clips": clips}
    metrics = report.summarize(row, row)
    assert {name: metrics[name] for name in ("truncated", "empty", "silent", "repetitive")} == {
        "truncated": 0.25, "empty": 0.25, "silent": 0.25, "repetitive": 0.25,
    }  # fmt: skip
    assert metrics["speech_per_compute_s"] == 0.5  # two clips of half a second in 2 s
    assert metrics["units_per_second"] == 4


def test_token_to_text_score_stands_beside_the_judges(policy_paths, small_world, tmp_path, caplog):
    model = small(num_codes=NUM_CODES)
    samples = [Sample([1, 2, 3], True), None, Sample([], True)]  # a natural reading has no codes
    clips = [{} for _ in samples]
    evaluation.read_codes(model, [evaluation.Item(str(i), "red hats", "en") for i in range(3)], samples, clips)
    assert clips[0]["token2text"] == pytest.approx(model.log_prob([[1, 2, 3]], ["red hats"]).item())
    assert clips[1:] == [{}, {"token2text": -MAX_NLL}]

    model.save_pretrained(tmp_path / "token2text")
    options = ("--seeds", "0", "--token2text", str(tmp_path / "token2text"))
    row = evaluate(tmp_path, [policy_paths[0]], *options)["rows"][0]
    scores = [clip["token2text"] for clip in row["clips"]]
    assert row["metrics"]["token2text"] == pytest.approx(np.mean(scores)) and max(scores) < 0
    assert "| token-to-text |" in (tmp_path / "out" / "results.md").read_text()

    small(num_codes=NUM_CODES + 1).save_pretrained(tmp_path / "token2text")
    with pytest.raises(SystemExit):
        evaluate(tmp_path, [policy_paths[0]], *options)
    assert "do not belong together" in caplog.text


def test_page_is_self_contained_and_escaped(policy_paths, small_world, tmp_path):
    hostile = "<script>alert('x')</script> & more | words"
    evaluate(tmp_path, [f"<b>A|B={policy_paths[0]}"], "--seeds", "0", texts=f"plain\n{hostile}\n")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>A|B" not in page
    assert "src='data:audio/wav;base64," in page
    assert not [link for link in ("http://", "https://", "<link", "@import", "url(") if link in page]
    assert "A\\|B" in (tmp_path / "out" / "results.md").read_text()


def test_num_players(policy_paths, small_world, tmp_path):
    for asked, heard in (("0", 0), ("1", 1), ("9", 3)):
        evaluate(tmp_path, [policy_paths[0]], "--seeds", "0", "1", "--num_players", asked, texts="a\nb\nc\n")
        assert (tmp_path / "out" / "report.html").read_text().count("<p class=said>") == heard


def test_marked_words():
    assert html_page.marked("Anna found two hats.", "anna <i> two hats") == "anna <mark>&lt;i&gt;</mark> two hats"
    assert html_page.marked("Anna", "") == ""


def test_reward_curve_is_found_or_drawn(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    assert html_page.reward_curve(str(checkpoint)) is None
    log = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.3}, {"step": 2, "train_runtime": 1}]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert html_page.reward_curve(str(checkpoint)).startswith(b"\x89PNG")
    (tmp_path / "run" / "reward_curve.png").write_bytes(b"drawn by train.py")
    assert html_page.reward_curve(str(checkpoint)) == b"drawn by train.py"


# --- Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["no-such-run"], [], "no such model: 'no-such-run'"),
        (["A={good}", "B=no-such-run"], [], "no such model: 'no-such-run'"),
        (["A={good}", "A={good}"], [], "each name once"),
        (["A="], [], "give NAME=path"),
        (["{good}"], ["--texts", "no.txt"], "no.txt: No such file"),
        (["{good}"], ["--references", "{tmp}/t.txt"], "no audio for '1'"),
        (["{good}"], ["--output_dir", "{tmp}/t.txt/out"], "cannot write into"),
        (["{good}"], ["--judge", "pocketsphinx", "--texts", "{tmp}/odd.txt"], "lacks 'xqzzt'"),
        (["{good}"], ["--best_of", "0"], "--best_of 0"),
        (["{good}"], ["--temperature", "-1"], "--temperature -1"),
        (["{good}"], ["--seeds", "1", "1"], "--seeds: one is given twice"),
        (["{good}"], ["--device", "gpu"], "--device gpu"),
        (["{good}"], ["--language", "klingon"], "unknown language 'klingon'"),
    ],
)
def test_bad_input_exits_2_before_a_policy_is_loaded(
    models, options, message, policy_paths, small_world, tmp_path, monkeypatch, caplog
):
    (tmp_path / "odd.txt").write_text("xqzzt")
    monkeypatch.setattr(evaluation.Policy, "from_pretrained", lambda *_: pytest.fail("a policy was loaded"))

    def fill(texts):
        return [text.replace("{good}", policy_paths[0]).replace("{tmp}", str(tmp_path)) for text in texts]

    with pytest.raises(SystemExit) as exit:
        evaluate(tmp_path, fill(models), *fill(options))
    assert exit.value.code == 2
    assert message in caplog.text


def test_text_too_long_and_another_codec_exit_2(policy_paths, small_world, tmp_path, monkeypatch, caplog):
    with pytest.raises(SystemExit) as exit:
        evaluate(tmp_path, [policy_paths[0]], texts="wordy " * 40)
    assert exit.value.code == 2 and "too long" in caplog.text
    monkeypatch.setattr(ToneCodec, "codebook_size", NUM_CODES + 1)
    with pytest.raises(SystemExit) as exit:
        evaluate(tmp_path, [policy_paths[0]])
    assert exit.value.code == 2 and "do not belong together" in caplog.text
