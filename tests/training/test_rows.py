"""From a data set's rows to prompts, ids and masks; what cannot be used is refused with its row."""

import re
from types import SimpleNamespace

import datasets
import pytest
from trl.trainer.utils import RepeatSampler

import train
import training.rows
from common.cli import InputError
from speech.policy import load_tokenizer
from speech.tokens import asr_prompt
from training.rows import grpo_asr_rows, grpo_dataset, grpo_rows, one_generation, one_long_epoch, sft_rows

CODES, TEXT = [1, 2, 3], "Anna found two boxes."


def rows_of(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [TEXT], "audio_codes": [CODES], **columns})


@pytest.fixture(scope="module")
def llasa():
    return load_tokenizer("tiny/llasa", "asr")


def test_sft_rows_of_each_task(llasa):
    tokenizer, tokens = llasa
    text_answer = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokens.text_end_id]
    speech_answer = [*tokens.ids(CODES), tokens.end_id]

    def answers(task, rows=None):
        examples = sft_rows(rows or rows_of(), "rows", tokenizer, tokens, 512, task)
        return [
            [i for i, kept in zip(row["input_ids"], row["completion_mask"], strict=True) if kept] for row in examples
        ]

    assert answers("asr") == [text_answer]
    assert answers("tts") == [speech_answer]
    assert answers("both") == [speech_answer, text_answer]
    named = datasets.Dataset.from_dict({"text": [TEXT] * 3, "audio_codes": [CODES] * 3, "task": ["asr", "tts", None]})
    assert answers("both", named) == [speech_answer, speech_answer, text_answer, text_answer]
    assert answers("asr", rows_of(text=[""])) == [[tokens.text_end_id]]  # a clip without speech
    assert answers("both", rows_of(text=[""])) == [[tokens.text_end_id]]
    with pytest.raises(ValueError, match="row 0: task must be one of tts, asr, or null .got 'sing'"):
        answers("both", rows_of(task=["sing"]))


def test_a_wrong_voice_prompt_is_refused_where_speech_is_the_answer(llasa):
    rows = rows_of(ref_text=[7], ref_codes=[CODES])
    for task in ("tts", "both"):
        with pytest.raises(ValueError, match="row 0: ref_text must be"):
            sft_rows(rows, "rows", *llasa, 512, task)
    assert len(sft_rows(rows, "rows", *llasa, 512, "asr")) == 1  # which has no use for it


def test_each_column_is_checked_once(llasa, monkeypatch):
    checked = []
    check_texts = training.rows.check_texts
    monkeypatch.setattr(
        training.rows,
        "check_texts",
        lambda rows, column, *a, **k: checked.append(column) or check_texts(rows, column, *a, **k),
    )
    sft_rows(rows_of(), "rows", *llasa, 512, "both")
    assert sorted(checked) == ["language", "ref_text", "text"]


def test_sft_mask_covers_codes_and_end():
    tokenizer, tokens = load_tokenizer("tiny/llasa")
    columns = {"text": ["Hi.", "You."], "audio_codes": [[1, 2], [3] * 600]}
    rows = datasets.Dataset.from_dict(columns | {"ref_text": [None, None], "ref_codes": [None, None]})
    examples = sft_rows(rows, "rows", tokenizer, tokens, max_length=512)
    assert len(examples) == 1  # the second one is too long, and a warning counts it
    ids = [i for i, kept in zip(examples[0]["input_ids"], examples[0]["completion_mask"], strict=True) if kept]
    assert ids == [tokens.first_code_id + 1, tokens.first_code_id + 2, tokens.end_id]
    length = len(examples[0]["input_ids"])
    assert len(sft_rows(rows, "rows", tokenizer, tokens, max_length=length)) == 1  # it just fits
    with pytest.raises(InputError, match=f"none of the 2 rows fits into --max_length {length - 1} tokens"):
        sft_rows(rows, "rows", tokenizer, tokens, max_length=length - 1)


def test_rows_of_rl_for_asr(llasa):
    rows = grpo_asr_rows(rows_of(keywords=[["Anna"]], language=[None]), "rows", *llasa, 50, 512)
    assert rows[0]["prompt"] == asr_prompt(CODES)
    assert (rows[0]["text"], rows[0]["language"], rows[0]["keywords"]) == (TEXT, "en", ["Anna"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["?!"]}, r"row 0: reference text '\?!' is empty after"),
        ({"text": [None]}, "row 0: text must be text .got None"),
        ({"audio_codes": [[]]}, "row 0: audio_codes must be a list of whole numbers from 0 to 4095 .got \\[\\]"),
        ({"audio_codes": [[4096]]}, "row 0: audio_codes must be .* .got 4096 among them"),
        ({"audio_codes": [[1] * 500]}, "row 0: the prompt is 5.. tokens and its answer may take 50"),
    ],
)
def test_rows_that_cannot_be_transcribed(llasa, columns, message):
    with pytest.raises(ValueError, match=message):
        grpo_asr_rows(rows_of(**columns), "rows", *llasa, 50, 512)


def test_rows_of_rl_keep_what_rewards_need(llasa):
    columns = {"ref_text": ["Hi."], "ref_codes": [[1, 2]], "pauses": [[f"{TEXT} |"]], "speaker": ["a"]}
    [row] = grpo_rows(rows_of(**columns), "rows", *llasa, 50, 512)
    kept = {"ref_text": "Hi.", "ref_codes": [1, 2], "pauses": [f"{TEXT} |"], "text": TEXT, "language": "en"}
    assert {name: row[name] for name in row if name not in ("prompt", "prompt_length")} == kept
    [row] = grpo_rows(rows_of(ref_text=[None], ref_codes=[None], pauses=[None]), "rows", *llasa, 50, 512)
    assert (row["ref_text"], row["ref_codes"], row["pauses"]) == ("", [], [])


@pytest.mark.parametrize(
    ("pauses", "message"),
    [
        ([["Other | words."]], "column 'pauses': a pattern is the text with |"),
        (["a | b"], "a list of strings"),
    ],
)
def test_pauses_that_do_not_fit_are_refused(llasa, pauses, message):
    with pytest.raises(InputError, match=re.escape(message)):
        grpo_rows(rows_of(pauses=pauses), "rows", *llasa, 50, 512)


def test_marks_of_emphasis_are_for_speech_alone(llasa):
    tokenizer, tokens = llasa
    marked, plain = (
        sft_rows(datasets.Dataset.from_dict({"text": [text], "audio_codes": [CODES]}), "rows", *llasa, 512, task="both")
        for text in ("I *never* said so.", "I never said so.")
    )
    assert len(marked) == len(plain) == 2
    same = [a["input_ids"] == b["input_ids"] for a, b in zip(marked, plain, strict=True)]
    assert sorted(same) == [False, True]  # the prompt of TTS has the mark, the answer of ASR has not


def test_one_long_epoch_uses_each_row_equally_often():
    rows = datasets.Dataset.from_dict({"i": list(range(5))})
    order = one_long_epoch(rows, 12, seed=0)["i"]
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and len(order) == 12
    assert order[:5] != order[5:10]
    assert one_long_epoch(rows, 7, seed=None)["i"] == [0, 1, 2, 3, 4, 0, 1]  # --shuffle_dataset false


@pytest.mark.parametrize(
    ("steps", "accumulation", "generated", "iterations"),
    [(1, 8, 8, 2), (1, 8, 16, 1), (6, 8, 8, 3), (5, 3, 3, 2), (5, 8, 8, 1), (7, 8, 4, 1), (2, 2, 4, 2), (4, 4, 1, 1)],
)
def test_the_rows_of_a_run_are_enough_for_its_steps(llasa, tmp_path, steps, accumulation, generated, iterations):
    """By TRL's own sampler, which drops what is no whole generation: else a run ends early, or repeats its prompts."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "It is {i}."}}\n' for i in range(40)))
    flags = f"--dataset {texts} --output_dir {tmp_path}/run --per_device_train_batch_size 4 --num_generations 4 "
    flags += f"--max_steps {steps} --gradient_accumulation_steps {accumulation} --steps_per_generation {generated} "
    flags += f"--num_iterations {iterations} --max_completion_length 50 --save_strategy no"
    script_args, training_args, _ = train.parse_args(flags.split())
    rows = grpo_dataset(script_args, training_args, *llasa)

    def steps_of(data) -> float:
        """The loader draws a whole generation, which has `generated` groups of 4, for every micro-batch of 4."""
        sampler = RepeatSampler(data, 4, batch_size=generated, repeat_count=iterations * generated)
        return len([*sampler]) / (4 * generated) / accumulation

    assert steps_of(rows.train) >= steps > steps_of(rows.train.select(range(len(rows.train) - generated)))
    assert rows.epoch_steps == int(steps_of(range(40))) > 0


def test_fewer_rows_than_a_generation_takes_are_refused(llasa, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "It is."}\n' * 15)
    flags = f"--dataset {texts} --output_dir {tmp_path}/run --per_device_train_batch_size 4 --num_generations 4 "
    flags += "--gradient_accumulation_steps 8 --steps_per_generation 16 --max_completion_length 50 --save_strategy no"
    script_args, training_args, _ = train.parse_args(flags.split())
    with pytest.raises(InputError, match="has 15 rows and the first step takes 16 prompts"):
        grpo_dataset(script_args, training_args, *llasa)


def test_a_reward_of_the_voice_needs_a_voice_prompt_in_every_row():
    llasa = load_tokenizer("tiny/llasa")
    columns = {"text": ["Hi.", "You."], "ref_text": ["One.", "Two."], "ref_codes": [[5] * 25, [6] * 30]}
    rows = grpo_rows(datasets.Dataset.from_dict(columns), "rows", *llasa, 50, 512, needs_voice_prompt=True)
    assert rows["ref_codes"][:] == columns["ref_codes"]
    for ref, found in (({"ref_text": [None] * 2, "ref_codes": [None] * 2}, "none"), ({}, "none")):
        bare = datasets.Dataset.from_dict({"text": columns["text"]} | ref)
        with pytest.raises(ValueError, match=rf"rows, row 0: a reward compares with .* \(got {found}\). Give"):
            grpo_rows(bare, "rows", *llasa, 50, 512, needs_voice_prompt=True)
    short = datasets.Dataset.from_dict(columns | {"ref_codes": [[5] * 25, [6] * 24]})
    with pytest.raises(ValueError, match=r"rows, row 1: .* of 0.5 s or more \(got 0.48 s of one\)"):
        grpo_rows(short, "rows", *llasa, 50, 512, needs_voice_prompt=True)


@pytest.mark.parametrize(
    ("steps_per_generation", "iterations", "accumulation", "multiple"),
    [(8, 1, 8, 1), (4, 1, 8, 1), (16, 1, 8, 2), (8, 2, 8, 2), (12, 1, 8, 3), (12, 2, 8, 3), (3, 1, 8, 3)],
)
def test_no_checkpoint_between_the_steps_of_one_batch(steps_per_generation, iterations, accumulation, multiple):
    """A batch of rollouts is 12 micro-batches, a step takes 8: after 3 steps, of 24, nothing is left over."""

    def generation(save_steps: int) -> tuple[int, int]:
        args = SimpleNamespace(
            num_generations=4, per_device_train_batch_size=4, world_size=1, save_strategy="steps", save_steps=save_steps
        )
        args.steps_per_generation, args.num_iterations = steps_per_generation, iterations
        args.gradient_accumulation_steps = accumulation
        return one_generation(args)

    used = steps_per_generation, steps_per_generation * iterations
    assert generation(multiple) == generation(2 * multiple) == used
    if multiple > 1:
        with pytest.raises(InputError, match=f"--save_steps: must be a multiple of {multiple}, "):
            generation(multiple + 1)
