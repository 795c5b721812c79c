"""evaluation.py: the rows, files and comparison that a run leaves, and the exit code of each bad input."""

import base64
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from fake_policy import NUM_CODES, FirstWordLostASR, ToneCodec, save_lora, save_policy
from fake_speaker_encoder import save_speaker_encoder
from fake_token2text import small

import evaluation
from metrics import judges, recognition, synthesis
from metrics.clip_measures import MEASUREMENTS
from metrics.formatting import relative_change
from speech.audio import audio_failure, load_audio, save_audio
from speech.dnsmos import MosScores
from speech.policy import Policy

MULTITASK_MODEL = "tiny/llasa_asr"


@pytest.fixture(scope="module")
def policy_paths(tmp_path_factory):
    return [save_policy(tmp_path_factory.mktemp("policy"), seed) for seed in (0, 1)]


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(synthesis, "SpeechCodec", ToneCodec)
    monkeypatch.setattr(synthesis, "WhisperScorer", FirstWordLostASR)
    monkeypatch.setattr(judges, "WhisperScorer", FirstWordLostASR)


class Opinion:
    """Stands in for DNSMOS."""

    def score(self, wavs):
        return [None if audio_failure(wav) else MosScores(3.0, 3.5, 4.0) for wav in wavs]


def evaluate(tmp_path, models, *options, texts="red hats\nbig blue shoes\n"):
    (tmp_path / "t.txt").write_text(texts, encoding="utf-8")
    argv = ["--models", *models, "--texts", str(tmp_path / "t.txt"), "--output_dir", str(tmp_path / "out")]
    return evaluation.main(evaluation.parse_args([*argv, "--max_length", "150", *options]))


# --- Results and reports ----------------------------------------------------------------------------------


def test_results_hold_every_row_and_clip(policy_paths, fakes, tmp_path):
    save_audio(tmp_path / "n.wav", 0.1 * np.sin(np.arange(8_000) * 0.1))
    (tmp_path / "natural.jsonl").write_text(json.dumps({"text": "red hats", "audio": "n.wav"}))
    models = [f"SFT={policy_paths[0]}", f"GRPO={policy_paths[1]}"]
    options = ["--seeds", "3", "4", "--temperature", "1.0", "0.7", "--best_of", "2", "--judge", "other-asr"]
    returned = evaluate(tmp_path, models, *options, "--references", str(tmp_path / "natural.jsonl"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert [row["name"] for row in results["rows"]] == [
        "SFT T=1", "SFT T=1, best of 2", "SFT T=0.7", "GRPO T=1", "GRPO T=0.7", "natural", "codec resynthesis",
    ]  # fmt: skip
    assert results["num_texts"] == 2 and results["units"] == "words" and results["arguments"]["seeds"] == [3, 4]
    for row in results["rows"][:5]:
        assert [(clip["seed"], clip["id"]) for clip in row["clips"]] == [(3, "1"), (3, "2"), (4, "1"), (4, "2")]
        metrics = row["metrics"]["asr"]["other-asr"]
        # The first word of 'red hats' and of 'big blue shoes' is lost, by any clip with sound: 2 of 5 words.
        if not row["metrics"]["empty"]:
            assert metrics["error_rate"] == pytest.approx(2 / 5)
            assert metrics["per_seed"] == pytest.approx([2 / 5, 2 / 5])
        assert row["metrics"]["real_time_factor"] > 0
    natural, resynthesis = results["rows"][5:]
    assert natural["seeds"] == [None] and natural["metrics"]["truncated"] is None
    assert natural["metrics"]["duration_s"] == 0.5 and natural["metrics"]["units_per_second"] == 4
    assert resynthesis["clips"][0]["num_codes"] == 3 and resynthesis["metrics"]["truncated"] == 0
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| WER, other-asr (held-out) |" in table and "| SFT T=1, best of 2 |" in table


def test_best_of_n_has_the_highest_reward(policy_paths, fakes, tmp_path):
    """The fake ASR's NLL is the clip's length, its WER is the same for all: the shortest not truncated is the best."""
    rows = evaluate(tmp_path, [policy_paths[0]], "--seeds", "0", "--best_of", "6")["rows"]
    plain, best = (row["metrics"] for row in rows)
    assert best["duration_s"] < plain["duration_s"] and best["truncated"] == 0


def test_adapters_are_rows_of_the_first_model(policy_paths, fakes, tmp_path, caplog):
    slow, lively = (save_lora(policy_paths[0], tmp_path / name, seed) for seed, name in enumerate(("slow", "lively")))
    models = [f"SFT={policy_paths[0]}", f"B={policy_paths[1]}"]
    options = ["--seeds", "0", "--judge", "other-asr", "the-whisper", "--adapters", f"{slow}=0"]
    options += ["--adapters", f"{slow}=9.5", lively]
    Path(lively, "run.json").write_text(json.dumps({"whisper": "other-asr"}))
    results = evaluate(tmp_path, models, *options)
    rows = results["rows"]
    assert [row["name"] for row in rows] == ["SFT", "B", f"SFT + {slow}=0", f"SFT + {slow}=9.5 + {lively}"]
    assert [row.get("adapters") for row in rows] == [None, None, [f"{slow}=0"], [f"{slow}=9.5", lively]]
    assert rows[2]["clips"] == rows[0]["clips"] != rows[3]["clips"]
    assert results["asr_roles"] == {"other-asr": "reward's ASR", "the-whisper": "reward's ASR"}  # of lively; of SFT
    save_lora(policy_paths[0], lively, seed=7)
    with pytest.raises(SystemExit):
        evaluate(tmp_path, models, *options)
    assert f"with other content of {lively}" in caplog.records[-1].message


def test_a_base_without_a_record_has_its_adapters_codec_and_whisper(tmp_path):
    """A hub's model has no run.json."""
    for name in ("base", "slow", "lively"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "slow" / "run.json").write_text(json.dumps({"codec_id": "its-codec", "whisper": "its-whisper"}))

    def chosen(*flags: str) -> tuple[str, str]:
        argv = ["--models", "x", "--texts", "t.txt", "--output_dir", "out", "--adapters", str(tmp_path / "slow")]
        args = evaluation.parse_args([*argv, "--adapters", str(tmp_path / "lively"), *flags])
        models = {"base": str(tmp_path / "base")}
        return synthesis.codec_of(args, models), synthesis.reward_whisper_of(args, models)

    assert chosen() == ("its-codec", "its-whisper")
    assert chosen("--codec_id", "a", "--whisper", "b") == ("a", "b")
    (tmp_path / "base" / "run.json").write_text(json.dumps({"codec_id": "the-codec"}))
    assert chosen() == ("the-codec", "its-whisper")


def test_same_seeds_give_the_same_clips(policy_paths, fakes, tmp_path):
    options = ("--seeds", "0", "1", "--overwrite")
    runs = [evaluate(tmp_path, [policy_paths[0]], *options)["rows"][0]["clips"] for _ in range(2)]
    assert runs[0] == runs[1]


def test_results_survive_a_later_failure(policy_paths, fakes, tmp_path, monkeypatch):
    load = Policy.from_pretrained
    monkeypatch.setattr(
        Policy, "from_pretrained", lambda path, *_, **__: load(path) if path == policy_paths[0] else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        evaluate(tmp_path, [f"A={policy_paths[0]}", f"B={policy_paths[1]}"], "--seeds", "0")
    assert [row["name"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]] == ["A"]
    assert (tmp_path / "out" / "report.html").is_file()


def without_times(row: dict) -> dict:
    metrics = {name: value for name, value in row["metrics"].items() if name != "real_time_factor"}
    return {**row, "metrics": metrics, "compute_s": None}


def page_below_the_heading(folder: Path) -> list[str]:
    """Without the date and the command, and the table, which has a speed."""
    page = (folder / "report.html").read_text().partition("</code>")[2]
    return [line for line in page.split("\n") if "<h2>Metrics" not in line]


def test_an_interrupted_evaluation_resumes(policy_paths, fakes, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="metrics")
    save_audio(tmp_path / "n.wav", 0.1 * np.sin(np.arange(8_000) * 0.1))
    (tmp_path / "natural.jsonl").write_text(json.dumps({"text": "red hats", "audio": "n.wav"}))
    models = [f"A={policy_paths[0]}", f"B={policy_paths[1]}"]
    options = ["--seeds", "0", "1", "--best_of", "2", "--references", str(tmp_path / "natural.jsonl")]
    whole = evaluate(tmp_path, models, *options)
    page = page_below_the_heading(tmp_path / "out")
    assert "<audio" in "".join(page)
    (tmp_path / "out").rename(tmp_path / "whole")

    sampled = []
    sample = Policy.sample

    def spy(self, prompts, **sampling):
        if len(sampled) == 4:  # A and its best of 2, at two seeds; then B begins
            raise KeyboardInterrupt
        sampled.append(len(prompts))
        return sample(self, prompts, **sampling)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Policy, "sample", spy)
        evaluate(tmp_path, models, *options)
    begun = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in begun["rows"]] == ["A", "A, best of 2"]
    loaded, load = [], Policy.from_pretrained
    monkeypatch.setattr(Policy, "from_pretrained", lambda path, *_, **__: loaded.append(path) or load(path))
    for _ in range(2):  # resumed, and then complete
        caplog.clear()
        resumed = evaluate(tmp_path, models, *options)
        assert loaded == [policy_paths[1]]
        assert resumed == json.loads((tmp_path / "out" / "results.json").read_text())
        assert resumed["date"] == begun["date"] and resumed["rows"][:2] == begun["rows"]
        assert list(map(without_times, resumed["rows"])) == list(
            map(without_times, json.loads(json.dumps(whole))["rows"])
        )
        assert page_below_the_heading(tmp_path / "out") == page
        assert terminal(caplog)[0].startswith("A: 4 clips") and terminal(caplog)[0].endswith("(done before)")
        assert terminal(caplog)[-1].startswith("Listen: ")
    assert "B: 4 clips" in terminal(caplog)[2] and terminal(caplog)[2].endswith("(done before)")


def test_results_of_other_settings_are_not_overwritten(policy_paths, fakes, tmp_path, monkeypatch, caplog):
    model = save_policy(tmp_path / "policy", seed=2)
    evaluate(tmp_path, [model], "--seeds", "0")
    before = (tmp_path / "out" / "results.json").read_bytes()

    def refused(message, *options, texts="red hats\nbig blue shoes\n"):
        with pytest.raises(SystemExit) as stop:
            evaluate(tmp_path, [model], *options, texts=texts)
        assert stop.value.code == 2 and message in caplog.records[-1].message, caplog.text
        assert "--overwrite" in caplog.records[-1].message and "\n" not in caplog.records[-1].message
        assert (tmp_path / "out" / "results.json").read_bytes() == before

    with monkeypatch.context() as patch:
        patch.setattr(synthesis, "load_models", lambda *_: pytest.fail("models were loaded"))
        refused("other seeds ([0], now [0, 1])", "--seeds", "0", "1")
        refused("other texts (", "--seeds", "0", texts="red hats\n")
        save_policy(tmp_path / "policy", seed=3)
        refused(f"other content of {model} (", "--seeds", "0")
    evaluate(tmp_path, [model], "--seeds", "0", "--overwrite")
    assert (tmp_path / "out" / "results.json").read_bytes() != before

    sounds, results = tmp_path / "out" / "sounds.npz", tmp_path / "out" / "results.json"
    before = results.read_bytes()
    for content in (sounds.read_bytes()[:-9], b"garbage", b""):
        sounds.write_bytes(content)
        refused("sounds.npz of its rows is missing or broken", "--seeds", "0")
    earlier = json.loads(before)
    results.write_text(json.dumps(earlier | {"digests": earlier["digests"] | {"measurements": 1}}))
    before = results.read_bytes()
    refused(f"other measurements (1, now {MEASUREMENTS})", "--seeds", "0")
    for broken in ("{", "[]", '{"rows": []}', '{"rows": 1, "arguments": {}, "digests": {}}'):
        results.write_text(broken)
        before = results.read_bytes()
        refused("its results.json does not tell what settings", "--seeds", "0")


def test_token_to_text_score_is_a_column(policy_paths, fakes, tmp_path, caplog):
    small(num_codes=NUM_CODES).save_pretrained(tmp_path / "token2text")
    options = ("--seeds", "0", "--token2text", str(tmp_path / "token2text"))
    row = evaluate(tmp_path, [policy_paths[0]], *options)["rows"][0]
    scores = [clip["token2text"] for clip in row["clips"]]
    assert row["metrics"]["token2text"] == pytest.approx(np.mean(scores)) and max(scores) < 0
    assert "| token-to-text |" in (tmp_path / "out" / "results.md").read_text()

    small(num_codes=NUM_CODES + 1).save_pretrained(tmp_path / "token2text")
    with pytest.raises(SystemExit):
        evaluate(tmp_path, [policy_paths[0]], *options, "--overwrite")
    assert "the token-to-text model has 65 codes and the policy has 64" in caplog.text


def test_page_is_self_contained_and_escaped(policy_paths, fakes, tmp_path):
    hostile = "<script>alert('x')</script> & more | words"
    evaluate(tmp_path, [f"<b>A|B={policy_paths[0]}"], "--seeds", "0", texts=f"plain\n{hostile}\n")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>A|B" not in page
    assert "src='data:audio/wav;base64," in page
    assert not [link for link in ("http://", "https://", "<link", "@import", "url(") if link in page]
    assert "A\\|B" in (tmp_path / "out" / "results.md").read_text()


def test_num_players(policy_paths, fakes, tmp_path):
    for asked, shown in (("0", 0), ("1", 1), ("9", 3)):
        options = ("--seeds", "0", "1", "--num_players", asked, "--overwrite")
        evaluate(tmp_path, [policy_paths[0]], *options, texts="a\nb\nc\n")
        assert (tmp_path / "out" / "report.html").read_text().count("<p class=reference>") == shown


def test_voices_and_quality_are_columns(policy_paths, fakes, tmp_path, monkeypatch):
    """Every clip and the voice prompt are one tone: similarity 1 wherever there is a voice prompt."""
    monkeypatch.setattr(synthesis, "Dnsmos", Opinion)
    save_audio(tmp_path / "voice.wav", 0.1 * np.sin(np.arange(16_000) * 0.1))
    texts = [{"text": "red hats", "ref_audio": "voice.wav", "ref_text": "shoes"}, {"text": "big blue shoes"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    models = [f"before={policy_paths[0]}", f"after={policy_paths[1]}"]
    options = ["--texts", str(tmp_path / "t.jsonl"), "--seeds", "2", "1", "3", "--dnsmos"]
    options += ["--speaker_encoder", save_speaker_encoder(tmp_path / "encoder")]
    before, after = evaluate(tmp_path, models, *options)["rows"]
    for clip in [*before["clips"], *after["clips"]]:
        has_voice = clip["text"] == "red hats" and clip["duration_s"] >= 0.5
        assert clip["speaker_similarity"] == (pytest.approx(1.0, abs=0.01) if has_voice else None)
        assert clip["dnsmos"] == (None if clip["failure"] else {"ovrl": 3.0, "sig": 3.5, "bak": 4.0})
    assert after["metrics"]["speaker_similarity"]["mean"] == pytest.approx(1.0, abs=0.01)
    assert after["metrics"]["dnsmos"]["bak"]["change"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    page = (tmp_path / "out" / "report.html").read_text()
    for title in ("speaker similarity", "vs first, speaker similarity", "DNSMOS OVRL", "vs first, DNSMOS BAK"):
        assert f"| {title} |" in (tmp_path / "out" / "results.md").read_text() and f">{title}<" in page
    on_page = [clip for row in (before, after) for clip in row["clips"][:2]]  # the first seed's
    voices = [clip for clip in on_page if clip["speaker_similarity"]]
    assert page.count("· speaker similarity ") == len(voices) > 0
    assert page.count("· DNSMOS 3.00") == len([clip for clip in on_page if clip["dnsmos"]]) > 0


def test_melody_and_samples_are_columns_contours_and_a_plot(policy_paths, fakes, tmp_path):
    """Clips are a tone: no rise, no emphasis, F0 without movement. Two samples of each text."""
    models = [f"before={policy_paths[0]}", f"after={policy_paths[1]}"]
    texts = "Is it *red*?\nIt is.\n"
    results = evaluate(tmp_path, models, "--seeds", "3", "4", "--judge", "other-asr", texts=texts)
    assert results["word_timer"] == "other-asr"
    table, page = ((tmp_path / "out" / name).read_text() for name in ("results.md", "report.html"))
    titles = ["emphasis realised", "question realised", "statements that rise", "Pass@1", "Pass@2", "Failure@2"]
    for title in [*titles, "code diversity", "F0 movement, st", "real-time factor"]:
        assert f"| {title} |" in table and f"<td>{title}</td>" in page, title
    for row in results["rows"]:
        metrics = row["metrics"]
        assert metrics["question"]["mean"] == metrics["emphasis"]["mean"] == metrics["statement_rise"]["mean"] == 0
        assert 0 < metrics["code_distance"]["mean"] <= 1 and metrics["pass_at_k"]["Pass@2"]["mean"] == 0
    on_page = [clip for row in results["rows"] for clip in row["clips"][:2]]  # the first seed's
    audible = {clip["text"] for clip in on_page if clip["failure"] is None}
    assert page.count("<svg class='contours'") == len(audible) > 0
    voiced = [clip for clip in on_page if clip["f0_range_st"] is not None]
    assert page.count("<polyline") == len(voiced) > 0
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "<h2>Error rate against melody</h2><img" in page and "times by other-asr (held-out)" in page

    one_checkpoint = evaluate(tmp_path, models[:1], "--seeds", "3", "--overwrite", texts="red hats\n")
    assert not (tmp_path / "out" / "pareto.png").exists()  # the earlier one is not this evaluation's
    table = (tmp_path / "out" / "results.md").read_text()
    assert not [title for title in (*titles, "code diversity") if title in table]
    assert one_checkpoint["rows"][0]["metrics"]["pass_at_k"] == {}


def test_without_a_whisper_there_is_no_emphasis(policy_paths, fakes, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="metrics")
    options = ("--seeds", "0", "--judge", "pocketsphinx")
    results = evaluate(tmp_path, [policy_paths[0]], *options, texts="Is it *red*?\n")
    assert results["word_timer"] is None and "emphasis realised" not in (tmp_path / "out" / "results.md").read_text()
    assert "No emphasis is measured: only a --judge by openai-whisper" in caplog.text
    assert "no ASR here tells their times" in (tmp_path / "out" / "report.html").read_text()


# --- The comparison on the terminal -----------------------------------------------------------------------


def terminal(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("metrics")]


def test_the_comparison_has_the_held_out_asr_first(policy_paths, fakes, tmp_path, caplog):
    """2 of the 5 words are lost by every clip with sound, and all words by an empty clip."""
    caplog.set_level(logging.INFO, logger="metrics")
    models = [f"before={policy_paths[0]}", f"after={policy_paths[1]}"]
    results = evaluate(tmp_path, models, "--seeds", "0", "1", "--judge", "the-whisper", "other-asr")
    assert results["asr_roles"] == {"other-asr": "held-out", "the-whisper": "reward's ASR"}
    before, after = (row["metrics"]["asr"]["other-asr"] for row in results["rows"])
    rates = [f"{100 * metrics['error_rate']:.1f} %" for metrics in (before, after)]
    title, held_out, reward, listen = terminal(caplog)[-4:]
    assert title.split() == ["Held-out", "WER", "(2", "×", "2", "texts)", "before", "after", "change"]
    assert held_out.startswith("  other-asr (held-out)  ") and held_out.split("  ")[-3:-1] == rates
    assert held_out.endswith(relative_change(after["change"]))
    assert reward.startswith("  the-whisper (reward's ASR)  ")
    assert listen == f"Listen: {(tmp_path / 'out' / 'report.html').resolve()}"
    assert terminal(caplog)[0] == f"before: 4 clips, WER other-asr {rates[0]}, the-whisper {rates[0]}"
    assert max(map(len, terminal(caplog)[:-1])) <= 100


@pytest.mark.skipif(not Path("tiny/llasa/run.json").is_file(), reason="tiny/llasa is not built: python -m tiny.build")
def test_a_log_file_gets_few_short_lines(tmp_path):
    """What `make demo` prints of an evaluation: no progress bars, at most 20 lines."""
    (tmp_path / "t.txt").write_text("Anna found two boxes.\nPeter bought six hats.\n")
    flags = (
        "--models before=tiny/llasa after=tiny/llasa --max_length 160 --seeds 0 --judge tiny/whisper.pt pocketsphinx"
    )
    files = ["--texts", str(tmp_path / "t.txt"), "--output_dir", str(tmp_path / "out")]
    argv = [sys.executable, "evaluation.py", *flags.split(), *files]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert done.stdout == "" and len(lines) <= 20 and max(map(len, lines)) <= 120, done.stderr
    assert lines[-3].startswith("  pocketsphinx (held-out)") and lines[-2].startswith(
        "  tiny/whisper.pt (reward's ASR)"
    )


# --- ASR --------------------------------------------------------------------------------------------------


def seeds_only(transcribed_clips):
    def checked(policy, args, clips, temperature, seed, label):
        assert seed is not None, "the greedy row was computed again"
        return transcribed_clips(policy, args, clips, temperature, seed, label)

    return checked


def test_reports_of_asr(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="metrics")
    rows = datasets.Dataset.from_parquet("tiny/asr/heldout.parquet").remove_columns("id")  # one clip twice
    with_speech, non_speech = (
        next(i for i, text in enumerate(rows["text"]) if bool(text) is has_text) for has_text in (True, False)
    )
    rows.select([with_speech, non_speech, with_speech]).to_parquet(tmp_path / "clips.parquet")
    argv = ["--task", "asr", "--models", f"SFT={MULTITASK_MODEL}", "--clips", str(tmp_path / "clips.parquet")]
    argv += ["--temperature", "0", "1", "--seeds", "0", "1", "--output_dir", str(tmp_path / "out"), "--long_s", "3"]
    results = evaluation.main(evaluation.parse_args(argv))
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert [row["name"] for row in written["rows"]] == ["SFT T=0", "SFT T=1"]
    assert [len(row["clips"]) for row in written["rows"]] == [3, 6]  # greedy once, sampled once a seed
    assert results["rows"][0]["metrics"]["nonspeech_hallucinations"] is not None
    greedy = written["rows"][0]["clips"]
    assert greedy[0]["hyp_text"] == greedy[2]["hyp_text"]
    assert "| SFT T=1 |" in (tmp_path / "out" / "results.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<audio") == 3 and page.count("class=card>") == 6 and page.count("<i>non-speech</i>") == 1
    comparison = terminal(caplog)[2:]
    (tmp_path / "out" / "results.json").write_text(json.dumps(written | {"rows": written["rows"][:1]}))
    with monkeypatch.context() as patch:  # the greedy row is kept
        patch.setattr(recognition, "transcribed_clips", seeds_only(recognition.transcribed_clips))
        assert evaluation.main(evaluation.parse_args(argv)) == written
    with pytest.raises(SystemExit):
        evaluation.main(evaluation.parse_args([*argv, "--long_s", "2"]))
    assert "other long_s (3.0, now 2.0)" in caplog.records[-1].message
    assert comparison[0].split("  ")[0] == "3 clips" and comparison[1].startswith("  WER  ")
    assert comparison[-1].endswith("report.html") and max(map(len, comparison[:-1])) <= 100


def evaluate_clips(tmp_path, model, *rows, options=()):
    """--task asr over rows of a .jsonl file."""
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--task", "asr", "--models", f"A={model}", "--clips", str(tmp_path / "clips.jsonl"), "--num_players", "0"]
    argv += ["--max_length", "150", "--max_completion_length", "6", "--output_dir", str(tmp_path / "out"), *options]
    return evaluation.main(evaluation.parse_args(argv))


def test_characters_are_counted_and_named(policy_paths, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recognition, "SpeechCodec", ToneCodec)
    caplog.set_level(logging.INFO, logger="metrics")
    row = {"text": "今天天气", "audio_codes": [1] * 5, "language": "zh"}
    results = evaluate_clips(tmp_path, policy_paths[0], row, options=["--num_players", "1"])
    assert results["units"] == "characters" and results["rows"][0]["clips"][0]["ref_length"] == 4
    table, page = ((tmp_path / "out" / name).read_text() for name in ("results.md", "report.html"))
    assert "| all: CER / ins / del, % [95 %] |" in table and "WER" not in table
    assert "<h2>Character error rate</h2>" in page and "character errors in 4 characters" in page
    assert terminal(caplog)[0].startswith("A: 1 transcripts, CER ") and terminal(caplog)[2].startswith("  CER ")


@pytest.mark.parametrize("ids", [["same"] * 3, ["1", None, None], [None, None, "1"]])
def test_clips_with_equal_ids_are_heard_with_their_own_texts(ids, policy_paths, tmp_path, monkeypatch):
    monkeypatch.setattr(recognition, "SpeechCodec", ToneCodec)
    texts, lengths = ["one", "two", "three"], [3, 4, 5]
    rows = zip(texts, lengths, ids, strict=True)
    rows = [{"text": text, "audio_codes": [1] * length, "id": clip_id} for text, length, clip_id in rows]
    options = ["--num_players", "3", "--temperature", "1", "--seeds", "0", "1"]
    evaluate_clips(tmp_path, policy_paths[0], *rows, options=options)
    page = (tmp_path / "out" / "report.html").read_text()
    players = re.findall("<p class=reference>“(.*?)” <audio controls src='data:audio/wav;base64,(.*?)'", page)
    assert [text for text, _ in players] == texts
    assert [len(load_audio(base64.b64decode(wav))) // 320 for _, wav in players] == lengths


# --- Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["no-such-run"], [], "no such model: 'no-such-run'"),
        (["A={good}", "B=no-such-run"], [], "no such model: 'no-such-run'"),
        (["A={good}", "A={good}"], [], "a name used twice"),
        (["A="], [], "no path"),
        (["{good}"], ["--texts", "no.txt"], "no.txt: No such file"),
        (["{good}"], ["--references", "{tmp}/t.txt"], "no audio for '1'"),
        (["{good}"], ["--output_dir", "{tmp}/t.txt/out"], "cannot write into"),
        (["{good}"], ["--judge", "pocketsphinx", "--texts", "{tmp}/odd.txt"], "lacks 'xqzzt'"),
        (["{good}"], ["--speaker_encoder", "{tmp}/encoder"], "--speaker_encoder: no text has a voice prompt"),
        (["{good}"], ["--speaker_encoder", "{good}"], "is no such model (got"),
        (
            ["{good}"],
            ["--speaker_encoder", "{tmp}/encoder", "--texts", "{tmp}/short.jsonl"],
            "short.wav: silent, or sh",
        ),
        (["{good}"], ["--dnsmos"], "pip install -r requirements-dnsmos.txt"),
        (["{good}"], ["--split", "test"], "--split: is for --task asr (got --task tts). Leave it out"),
        (["{good}"], ["--long_s", "3"], "--long_s: is for --task asr"),
        (["{good}"], ["--best_of", "0"], "--best_of: must be >= 1 (got 0)"),
        (["{good}"], ["--temperature", "-1"], "--temperature: must be finite and >= 0"),
        (["{good}"], ["--seeds", "1", "1"], "--seeds: a value is given twice (got 1 1)"),
        (["{good}"], ["--device", "gpu"], "--device gpu"),
        (["{good}"], ["--language", "klingon"], "unknown language 'klingon'"),
        (["{good}"], ["--adapters", "no-such-lora"], "--adapters no-such-lora: no LoRA folder"),
        (["{other}"], ["--adapters", "{tmp}/lora"], "/lora: a LoRA of another base"),
        (["{tmp}/lora"], ["--adapters", "{tmp}/lora"], "is a LoRA itself"),
        (["{good}"], ["--adapters", "{tmp}/lora", "--adapters", "{tmp}/lora=1"], "there is a row"),
        (["{good}"], ["--adapters", "{tmp}/lora", "{tmp}/lora=1"], "the folder is given twice"),
    ],
)
def test_bad_input_exits_2_before_a_policy_is_loaded(
    models, options, message, policy_paths, fakes, tmp_path, monkeypatch, caplog
):
    (tmp_path / "odd.txt").write_text("xqzzt")
    save_speaker_encoder(tmp_path / "encoder")
    save_lora(policy_paths[0], tmp_path / "lora", seed=0)
    save_audio(tmp_path / "short.wav", 0.1 * np.sin(np.arange(7_000) * 0.1))
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "a", "ref_text": "b", "ref_audio": "short.wav"}))
    monkeypatch.setitem(sys.modules, "speechmos", None)  # as if it were not installed
    monkeypatch.setattr(Policy, "from_pretrained", lambda *_, **__: pytest.fail("a policy was loaded"))

    def fill(texts):
        return [text.format(good=policy_paths[0], other=policy_paths[1], tmp=tmp_path) for text in texts]

    with pytest.raises(SystemExit) as exit:
        evaluate(tmp_path, fill(models), *fill(options))
    assert exit.value.code == 2
    assert message in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"audio_codes": [NUM_CODES]}, "audio_codes must be a list of whole numbers from 0 to 63 (got 64 among them)"),
        ({"audio_codes": [1] * 120}, "a clip is too long: its prompt takes"),
    ],
)
def test_a_bad_clip_is_named(row, message, policy_paths, tmp_path, caplog):
    with pytest.raises(SystemExit) as stop:
        evaluate_clips(tmp_path, policy_paths[0], {"text": "a", "audio_codes": [1]}, {"text": "b"} | row)
    assert stop.value.code == 2
    assert f"error: --clips {tmp_path}/clips.jsonl, row 1: {message}" in caplog.records[-1].message


@pytest.mark.parametrize(
    "options", [["--judge", "large-v3"], ["--best_of", "4"], ["--dnsmos"], ["--adapters", "x"], ["--references", "x"]]
)
def test_asr_refuses_the_flags_of_tts(options, tmp_path, caplog):
    with pytest.raises(SystemExit) as stop:
        evaluate_clips(tmp_path, "x", {"text": "a", "audio_codes": [1]}, options=options)
    message = f"error: {options[0]}: is for --task tts (got --task asr). Leave it out"
    assert stop.value.code == 2 and caplog.records[-1].message == message


def test_text_too_long_and_another_codec_exit_2(policy_paths, fakes, tmp_path, monkeypatch, caplog):
    with pytest.raises(SystemExit) as exit:
        evaluate(tmp_path, [policy_paths[0]], texts="wordy " * 40)
    assert exit.value.code == 2 and "too long" in caplog.text
    monkeypatch.setattr(ToneCodec, "codebook_size", NUM_CODES + 1)
    with pytest.raises(SystemExit) as exit:
        evaluate(tmp_path, [policy_paths[0]])
    assert exit.value.code == 2 and "the codec has 65 codes and the policy has 64" in caplog.text
