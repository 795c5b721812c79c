"""ASR training: rows, and GRPO of tiny/llasa_asr."""

import json

import datasets
import pytest
import torch
from safetensors.torch import load_file

import train
from speech.policy import Policy, load_tokenizer
from speech.tokens import asr_prompt
from training.rows import grpo_asr_rows, sft_rows

CODES, TEXT = [1, 2, 3], "Anna found two boxes."
MULTITASK_MODEL = "tiny/llasa_asr"


def rows_of(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [TEXT], "audio_codes": [CODES], **columns})


@pytest.fixture(scope="module")
def llasa():
    return load_tokenizer("tiny/llasa", "asr")


# --- Rows -------------------------------------------------------------------------------------------------


def test_supervised_rows_of_each_task(llasa):
    tokenizer, tokens = llasa
    text_ids = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokens.text_end_id]
    speech_ids = [*tokens.ids(CODES), tokens.end_id]

    def answers(task, rows=None):
        prepared = sft_rows(rows or rows_of(), "rows", tokenizer, tokens, 512, task)
        return [
            [i for i, kept in zip(row["input_ids"], row["completion_mask"], strict=True) if kept] for row in prepared
        ]

    assert answers("asr") == [text_ids]
    assert answers("tts") == [speech_ids]
    assert answers("both") == [speech_ids, text_ids]
    named = datasets.Dataset.from_dict({"text": [TEXT] * 3, "audio_codes": [CODES] * 3, "task": ["asr", "tts", None]})
    assert answers("both", named) == [speech_ids, speech_ids, text_ids, text_ids]
    assert answers("asr", rows_of(text=[""])) == [[tokens.text_end_id]]  # non-speech
    with pytest.raises(ValueError, match="row 0: task must be one of tts, asr, or null .got 'sing'."):
        answers("both", rows_of(task=["sing"]))


def test_grpo_rows_hold_prompt_text_language_and_keywords(llasa):
    tokenizer, tokens = llasa
    prepared = grpo_asr_rows(rows_of(keywords=[["Anna"]], language=[None]), "rows", tokenizer, tokens, 50, 512)
    assert prepared[0]["prompt"] == asr_prompt(CODES)
    assert (prepared[0]["text"], prepared[0]["language"], prepared[0]["keywords"]) == (TEXT, "en", ["Anna"])


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
def test_bad_rows_of_asr_are_named(llasa, columns, message):
    with pytest.raises(ValueError, match=message):
        grpo_asr_rows(rows_of(**columns), "rows", *llasa, 50, 512)


# --- Training ---------------------------------------------------------------------------------------------


def test_grpo_updates_every_parameter_and_logs_its_rules(tmp_path):
    flags = ["--config", "configs/tiny_asr.yaml", "--output_dir", str(tmp_path), "--max_steps", "2"]
    flags += ["--per_device_train_batch_size", "16", "--sample_steps", "1"]
    train.main(train.parse_args(flags))
    before = Policy.from_pretrained(MULTITASK_MODEL).model.state_dict()
    after = load_file(tmp_path / "model.safetensors")
    assert [name for name in after if torch.equal(before[name], after[name])] == []
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    logged = {"wer", "insertions", "deletions", "substitutions", "frac_hallucination", "frac_truncated", "entropy"}
    assert logged <= log[0].keys() and log[0]["reward_std"] > 0
    lines = (tmp_path / "samples" / "step_000001" / "transcripts.jsonl").read_text().splitlines()
    assert {"text", "transcript", "wer", "failure"} <= json.loads(lines[0]).keys()
    # inference.py loads it, with the codec of its run.json.
    assert Policy.from_pretrained(str(tmp_path), task="asr").transcribe([asr_prompt(CODES)], max_completion_length=5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "both"], "RL trains one task at a time"),
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
