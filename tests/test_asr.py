"""Recognition end to end: rows, training, transcripts to files, and the numbers of an evaluation."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

import evaluation
import inference
import train
from metrics import recognition
from metrics.recognition import Clip, judged, summarize
from speech.policy import Policy, Transcript, load_tokenizer
from speech.tokens import asr_prompt, tts_prompt
from training.rows import grpo_asr_rows, sft_rows

CODES, TEXT = [1, 2, 3], "Anna found two boxes."
RECOGNISER = "tiny/llasa_asr"


def rows_of(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [TEXT], "audio_codes": [CODES], **columns})


@pytest.fixture(scope="module")
def llasa():
    return load_tokenizer("tiny/llasa", "asr")


# --- Rows -------------------------------------------------------------------------------------------------


def test_supervised_rows_each_way(llasa):
    tokenizer, tokens = llasa
    written = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokens.text_end_id]
    spoken = [*tokens.ids(CODES), tokens.end_id]

    def answers(task, rows=None):
        made = sft_rows(rows or rows_of(), "rows", tokenizer, tokens, 512, task)
        return [[i for i, kept in zip(row["input_ids"], row["completion_mask"], strict=True) if kept] for row in made]

    assert answers("asr") == [written]
    assert answers("tts") == [spoken]
    assert answers("both") == [spoken, written]
    named = datasets.Dataset.from_dict({"text": [TEXT] * 3, "audio_codes": [CODES] * 3, "task": ["asr", "tts", None]})
    assert answers("both", named) == [spoken, spoken, written, written]
    assert answers("asr", rows_of(text=[""])) == [[tokens.text_end_id]]  # nothing is said
    with pytest.raises(ValueError, match="row 0: task is 'sing'"):
        answers("both", rows_of(task=["sing"]))


def test_rows_of_grpo(llasa):
    tokenizer, tokens = llasa
    made = grpo_asr_rows(rows_of(keywords=[["Anna"]], language=[None]), "rows", tokenizer, tokens, 50, 512)
    assert made[0]["prompt"] == asr_prompt(CODES)
    assert (made[0]["text"], made[0]["language"], made[0]["keywords"]) == (TEXT, "en", ["Anna"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["?!"]}, r"row 0: the text '\?!' has no word in it"),
        ({"text": [None]}, "row 0: text is None"),
        ({"audio_codes": [[]]}, "row 0: no audio_codes"),
        ({"audio_codes": [[4096]]}, "row 0: code 4096 is not in"),
        ({"audio_codes": [[1] * 500]}, "row 0: the clip's prompt is 5.. tokens and its text may take 50"),
    ],
)
def test_rows_that_cannot_be_recognised(llasa, columns, message):
    with pytest.raises(ValueError, match=message):
        grpo_asr_rows(rows_of(**columns), "rows", *llasa, 50, 512)


# --- Training ---------------------------------------------------------------------------------------------


def test_grpo_moves_every_parameter_and_logs_its_rules(tmp_path):
    flags = ["--config", "configs/tiny_asr.yaml", "--output_dir", str(tmp_path), "--max_steps", "2"]
    flags += ["--per_device_train_batch_size", "16", "--sample_steps", "1"]
    train.main(train.parse_args(flags))
    before = Policy.from_pretrained(RECOGNISER).model.state_dict()
    after = load_file(tmp_path / "model.safetensors")
    assert [name for name in after if torch.equal(before[name], after[name])] == []
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    logged = {"wer", "insertions", "deletions", "substitutions", "frac_hallucination", "share_unended", "entropy"}
    assert logged <= log[0].keys() and log[0]["reward_std"] > 0
    lines = (tmp_path / "samples" / "step_000001" / "transcripts.jsonl").read_text().splitlines()
    assert {"text", "written", "wer", "failure"} <= json.loads(lines[0]).keys()
    # It is a recogniser that inference.py loads, with the codec it was made with.
    assert Policy.from_pretrained(str(tmp_path), task="asr").transcribe([asr_prompt(CODES)], max_new_tokens=5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "both"], "GRPO trains one task at a time"),
        (["--task", "asr", "--reward_config", "reward_models/whisper.json"], "whisper is a reward of --task tts"),
        (["--task", "asr"], "no column 'audio_codes'"),
    ],
)
def test_bad_input_of_train(flags, message, tmp_path, capsys, caplog):
    (tmp_path / "texts.jsonl").write_text('{"text": "Anna found two boxes."}\n')
    given = ["--model_name_or_path", "tiny/llasa", "--dataset", str(tmp_path / "texts.jsonl")]
    with pytest.raises(SystemExit) as stop:
        train.main(train.parse_args([*given, "--output_dir", str(tmp_path / "run"), *flags]))
    assert stop.value.code == 2
    assert message in caplog.text + capsys.readouterr().err


# --- Inference --------------------------------------------------------------------------------------------


def transcribe(*argv: str) -> None:
    inference.main(inference.parse_args(["--task", "asr", "--model_name_or_path", RECOGNISER, *argv]))


def test_transcripts_of_files(tmp_path):
    clips = ["tiny/heldout/slt_000.flac", "tiny/heldout/rms_001.flac"]
    transcribe("--audio", *clips, "--output", str(tmp_path / "t.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [line["audio"] for line in lines] == clips
    assert all(len(line["transcripts"]) == 1 and line["ended"] == [True] for line in lines)
    texts = [json.loads(line)["text"] for line in Path("tiny/heldout/metadata.jsonl").read_text().splitlines()[:2]]
    words = [set(text.lower().rstrip(".").split()) for text in texts]
    heard = [set(line["transcripts"][0].lower().rstrip(".").split()) for line in lines]
    assert sum(len(a & b) for a, b in zip(words, heard, strict=True)) >= 6  # of 8 words


def test_samples_of_a_data_set_are_what_select_rl_data_reads(tmp_path):
    rows_of(id=["one"]).to_parquet(tmp_path / "rows.parquet")
    output = tmp_path / "t.jsonl"
    options = ["--num_samples", "3", "--temperature", "1", "--max_new_tokens", "7"]
    transcribe("--dataset", str(tmp_path / "rows.parquet"), "--output", str(output), *options)
    [line] = [json.loads(line) for line in output.read_text().splitlines()]
    assert (line["index"], line["id"], len(line["transcripts"])) == (0, "one", 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text", "hello"], "--text or --text_file is for --task tts"),
        (["--dataset", "tiny/asr/heldout.parquet"], "give --output a .jsonl file"),
        (["--audio", "nowhere.wav"], "nowhere.wav"),
        (["--audio", "tiny/heldout/slt_000.flac", "--output", "a.wav"], "written to a .jsonl file"),
    ],
)
def test_bad_input_of_inference(argv, message, caplog):
    with pytest.raises(SystemExit) as stop:
        transcribe(*argv)
    assert stop.value.code == 2 and message in caplog.text


# --- Evaluation -------------------------------------------------------------------------------------------


def clip(text: str, seconds: float = 1.0, keywords: tuple[str, ...] = ("Zagreb", "Split")) -> Clip:
    return Clip("x", [0] * int(50 * seconds), text, "en", list(keywords))


def test_numbers_by_hand():
    entries = [
        judged(clip("from Zagreb to Split"), Transcript("from Zagreb to spit", True), 0),  # 1 S of 4
        judged(clip("Anna found green boxes", 4.0), Transcript("Anna found", True), 0),  # 2 D of 4
        judged(clip("red"), Transcript("red Zagreb hat", True), 0),  # 2 I of 1
        judged(clip("the boat was gone"), Transcript("the boat was gone", False), 0),  # right, but never ended
        judged(clip(""), Transcript("thank you", True), 0),
        judged(clip(""), Transcript("", True), 0),
    ]
    metrics = summarize(entries, 1, long_s=3.0)
    assert metrics["all"]["wer"] == pytest.approx(5 / 13)
    assert metrics["all"]["substitutions"] == pytest.approx(1 / 13)
    assert metrics["all"]["deletions"] == pytest.approx(2 / 13)
    assert metrics["all"]["insertions"] == pytest.approx(2 / 13)
    assert metrics["short"]["wer"] == pytest.approx(3 / 9) and metrics["long"]["wer"] == pytest.approx(2 / 4)
    # Said: Zagreb, Split; written: Zagreb, and Zagreb where it was not said.
    assert metrics["keyword_recall"] == 1 / 2 and metrics["keyword_precision"] == 1 / 2
    assert metrics["all"]["hallucinations"] == 1 / 4 and metrics["all"]["unended"] == 1 / 4
    assert metrics["nothing_with_words"] == 1 / 2 and metrics["words_on_nothing"] == 1.0


def test_a_keyword_of_another_clip_counts_against_precision():
    clips = recognition.all_keywords([clip("from Zagreb", keywords=("Zagreb",)), clip("red hats", keywords=())])
    assert judged(clips[1], Transcript("red Zagreb", True), None)["keywords"] == {"said": 0, "heard": 1, "hits": 0}


def test_reports(tmp_path):
    rows = datasets.Dataset.from_parquet("tiny/asr/heldout.parquet")
    said, nothing = (next(i for i, text in enumerate(rows["text"]) if bool(text) is kind) for kind in (True, False))
    rows.select([said, nothing, said]).to_parquet(tmp_path / "clips.parquet")
    argv = ["--task", "asr", "--models", f"SFT={RECOGNISER}", "--clips", str(tmp_path / "clips.parquet")]
    argv += ["--temperature", "0", "1", "--seeds", "0", "1", "--output_dir", str(tmp_path / "out"), "--long_s", "3"]
    results = evaluation.main(evaluation.parse_args(argv))
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["SFT T=0", "SFT T=1"]
    assert [len(row["clips"]) for row in written["rows"]] == [3, 6]  # greedy once, sampled once a seed
    assert results["rows"][0]["metrics"]["nothing_with_words"] is not None
    greedy = written["rows"][0]["clips"]
    assert greedy[0]["hyp_text"] == greedy[2]["hyp_text"]
    assert "| SFT T=1 |" in (tmp_path / "out" / "results.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<audio") == 3 and page.count("class=card>") == 6 and page.count("nothing is said</i>") == 1


def test_clips_may_be_recordings(tmp_path):
    codec = recognition.SpeechCodec.from_pretrained("tiny/codec")
    clips = recognition.read_clips("tiny/heldout", "train", "en", lambda: codec)
    assert len(clips) == 96 and clips[0].codes and clips[0].id == "slt_000"
    (tmp_path / "m.jsonl").write_text('{"text": "a b"}\n')
    with pytest.raises(ValueError, match="neither audio_codes nor audio"):
        recognition.read_clips(str(tmp_path / "m.jsonl"), "train", "en", lambda: codec)


def test_the_model_reads_its_own_speech(tmp_path):
    (tmp_path / "t.txt").write_text("Anna found two boxes.\nPeter bought six hats.\n")
    argv = ["--models", f"both={RECOGNISER}", "--texts", str(tmp_path / "t.txt"), "--seeds", "0", "--cycle"]
    (tmp_path / "natural.jsonl").write_text(
        json.dumps({"text": "Diana bought five boxes.", "audio": str(Path("tiny/heldout/slt_000.flac").absolute())})
    )
    argv += ["--max_length", "160", "--output_dir", str(tmp_path / "out")]
    argv += ["--references", str(tmp_path / "natural.jsonl")]
    results = evaluation.main(evaluation.parse_args(argv))
    spoken, natural, _ = results["rows"]
    assert 0 <= spoken["metrics"]["judges"]["itself"]["error_rate"] <= 2
    assert "itself" not in natural["metrics"]["judges"]
    assert "by itself" in (tmp_path / "out" / "report.html").read_text()


def test_one_model_both_ways():
    """tiny/llasa_asr recognises, and speaks again after that."""
    policy = Policy.from_pretrained(RECOGNISER, task="asr")
    codec = recognition.SpeechCodec.from_pretrained("tiny/codec")
    clips = recognition.read_clips("tiny/heldout", "train", "en", lambda: codec)
    transcripts = policy.transcribe([asr_prompt(one.codes) for one in clips], batch_size=48, max_new_tokens=40)
    entries = [judged(one, transcript, None) for one, transcript in zip(clips, transcripts, strict=True)]
    assert summarize(entries, 1, long_s=3.0)["all"]["wer"] <= 0.10  # clean recordings
    policy.turn_to("tts")
    torch.manual_seed(0)
    samples = policy.sample([tts_prompt(TEXT)] * 4, temperature=0.7, max_length=160)
    assert all(len(sample.codes) > 20 for sample in samples) and any(sample.ended for sample in samples)
