"""From a data set's rows to what TRL's trainers read, checked before any model is loaded."""

import logging
import math
from collections.abc import Iterator

import datasets
import numpy as np

from common.cli import InputError
from common.dataset_io import load_any_dataset
from speech.error_rate import check_reference_text, normalize_text
from speech.tokens import TASKS, SpeechTokens, asr_prompt, prompt_ids, tts_prompt
from training.recipes import GRPORecipe, ScriptArguments

logger = logging.getLogger("train")

SPEECH_COLUMN = "audio_codes"
REFERENCE_COLUMNS = ("ref_text", "ref_codes")
KEYWORDS_COLUMN = "keywords"
TASK_COLUMN = "task"


# --- One row ----------------------------------------------------------------------------------------------


def _tts_prompts(rows: datasets.Dataset, name: str, tokenizer, room: int, max_length: int) -> list[list[dict]]:
    """A prompt per row; InputError names the first row that no prompt can be made of.

    Args:
        room: tokens to leave for the answer, of the `max_length` tokens of prompt and answer.
    """
    if "text" not in rows.column_names:
        raise InputError(
            f"{name}: no column 'text' (it has {', '.join(rows.column_names)}). Each row needs the text to synthesize"
        )
    columns = [c for c in ("text", *REFERENCE_COLUMNS) if c in rows.column_names]
    prompts = []
    for index, row in enumerate(rows.select_columns(columns)):
        if not isinstance(row["text"], str):
            raise InputError(f"{name}, row {index}: text is {row['text']!r}. Each row needs the text to synthesize")
        try:
            prompt = _tts_prompt(row)
        except InputError as error:
            raise InputError(f"{name}, row {index}: {error}") from None
        length = len(prompt_ids(tokenizer, prompt))
        if length + room > max_length:
            raise InputError(
                f"{name}, row {index}: the prompt is {length} tokens and its speech may take {room}, more than the "
                f"{max_length} of the context. Shorten the text ({row['text'][:60]!r}…), drop the row, or lower "
                "--max_completion_length"
            )
        prompts.append(prompt)
    return prompts


def _tts_prompt(row: dict) -> list[dict]:
    ref_codes = row.get("ref_codes")
    # An absent voice prompt is null in a column that others fill; parquet may make it an empty list.
    if ref_codes is None or len(ref_codes) == 0:
        return tts_prompt(row["text"])
    return tts_prompt(row["text"], row["ref_text"], ref_codes)


def _speech(rows: datasets.Dataset, name: str, tokens: SpeechTokens) -> list[list[int]]:
    """The rows' codes; InputError names the first row whose codes are missing or another codec's."""
    if SPEECH_COLUMN not in rows.column_names:
        raise InputError(f"{name}: no column {SPEECH_COLUMN!r}. Encode the recordings with create_dataset.py first")
    speech = list(rows[SPEECH_COLUMN])
    for index, codes in enumerate(speech):
        if not codes:
            raise InputError(f"{name}, row {index}: no {SPEECH_COLUMN}. Drop the row or encode it again")
        try:
            tokens.ids(codes)
        except InputError as error:
            raise InputError(f"{name}, row {index}: {error}") from None
    return speech


def _transcripts(rows: datasets.Dataset, name: str) -> list[str]:
    """The rows' texts, "" for clips without speech; InputError names the first row without one."""
    if "text" not in rows.column_names:
        raise InputError(
            f"{name}: no column 'text' (it has {', '.join(rows.column_names)}). Each row needs its transcript"
        )
    texts = list(rows["text"])
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"{name}, row {index}: text is {text!r}. Use the clip's transcript, '' for a clip without speech"
            )
    return texts


def _languages(rows: datasets.Dataset) -> list[str]:
    if "language" not in rows.column_names:
        return ["en"] * len(rows)
    return [language or "en" for language in rows["language"]]


# --- RL ---------------------------------------------------------------------------------------------------


def grpo_dataset(
    script_args: ScriptArguments, training_args: GRPORecipe, tokenizer, tokens: SpeechTokens
) -> tuple[datasets.Dataset, int]:
    """The run's rows in the order they are used, and the tokens of its longest prompt and completion together."""
    rows = load_any_dataset(script_args.dataset, script_args.split)
    lengths = training_args.max_completion_length, training_args.max_length
    if script_args.task == "asr":
        rows = grpo_asr_rows(rows, script_args.dataset, tokenizer, tokens, *lengths)
    else:
        rows = grpo_rows(rows, script_args.dataset, tokenizer, *lengths, script_args.diffro_labels)
    per_step = prompts_per_step(training_args)
    if len(rows) < per_step:
        raise InputError(
            f"--dataset {script_args.dataset}: has {len(rows)} rows and one step takes {per_step} prompts "
            "(per_device_train_batch_size × gradient_accumulation_steps × processes / num_generations). "
            "Add texts or lower the batch size"
        )
    epoch_steps = math.ceil(training_args.num_train_epochs * (len(rows) // per_step))
    steps = training_args.max_steps if training_args.max_steps > 0 else epoch_steps
    training_args.max_steps, training_args.num_train_epochs, training_args.shuffle_dataset = steps, 1, False
    longest_prompt = max(len(prompt_ids(tokenizer, prompt)) for prompt in rows["prompt"])
    rows = one_long_epoch(rows, steps * per_step, training_args.seed)
    return rows, longest_prompt + training_args.max_completion_length


def prompts_per_step(training_args: GRPORecipe) -> int:
    """Different prompts behind one optimizer step; InputError for a run that could not resume or learn."""
    group, micro_batch = training_args.num_generations, training_args.per_device_train_batch_size
    accumulation = training_args.gradient_accumulation_steps
    if group < 2:
        raise InputError(f"--num_generations: must be >= 2, an advantage needs a group (got {group})")
    local_rollouts = micro_batch * training_args.steps_per_generation
    if local_rollouts % group:
        raise InputError(
            f"--per_device_train_batch_size {micro_batch} × {training_args.steps_per_generation} micro-batches: must "
            f"be a multiple of --num_generations {group}, since a group is scored together (got {local_rollouts})"
        )
    # Between these a checkpoint would lose the rollouts not yet used.
    steps_per_batch = max(1, training_args.steps_per_generation * training_args.num_iterations // accumulation)
    if training_args.save_strategy == "steps" and training_args.save_steps % steps_per_batch:
        raise InputError(
            f"--save_steps: must be a multiple of {steps_per_batch}, the optimizer steps made from one batch of "
            f"rollouts, or a resumed run would not repeat the original (got {training_args.save_steps})"
        )
    rollouts = micro_batch * training_args.world_size * accumulation
    return max(1, rollouts // group // training_args.num_iterations)


def grpo_rows(
    rows: datasets.Dataset, name: str, tokenizer, max_completion_length: int, max_length: int, labels: list[str] = ()
) -> datasets.Dataset:
    """Rows of RL for TTS: `prompt`, `text`, `language`, and the columns `labels`; recorded codes are not used.

    Raises:
        InputError: a row that no prompt can be made of, or too long for the context; a missing column.
    """
    prompts = _tts_prompts(rows, name, tokenizer, max_completion_length, max_length)
    columns = {"prompt": prompts, "text": list(rows["text"]), "language": _languages(rows)}
    for index, (text, language) in enumerate(zip(columns["text"], columns["language"], strict=True)):
        try:
            check_reference_text(text, language)
        except InputError as error:
            raise InputError(f"{name}, row {index}: {error}") from None
    for label in labels:
        if label not in rows.column_names:
            raise InputError(f"--diffro_labels: {name} has no column {label!r} (it has {', '.join(rows.column_names)})")
        columns[label] = list(rows[label])
    return datasets.Dataset.from_dict(columns)


def grpo_asr_rows(
    rows: datasets.Dataset, name: str, tokenizer, tokens: SpeechTokens, max_completion_length: int, max_length: int
) -> datasets.Dataset:
    """Rows of RL for ASR: `prompt`, `text` (the reference), `language`, and `keywords` where there are any.

    Raises:
        InputError: a row without codes, whose text cannot be scored, or too long for the context.
    """
    speech, texts, languages = _speech(rows, name, tokens), _transcripts(rows, name), _languages(rows)
    prompts = [asr_prompt(codes) for codes in speech]
    for index, (prompt, text, language) in enumerate(zip(prompts, texts, languages, strict=True)):
        if text.strip() and not normalize_text(text, language):
            raise InputError(
                f"{name}, row {index}: the text {text!r} has no word in it, so no error rate can be computed. Use '' "
                "for a clip without speech, or drop the row"
            )
        length = len(prompt_ids(tokenizer, prompt))
        if length + max_completion_length > max_length:
            raise InputError(
                f"{name}, row {index}: the clip's prompt is {length} tokens and its text may take "
                f"{max_completion_length}, more than the {max_length} of the context. Drop the row, or lower "
                "--max_completion_length"
            )
    columns = {"prompt": prompts, "text": texts, "language": languages}
    if KEYWORDS_COLUMN in rows.column_names:
        columns[KEYWORDS_COLUMN] = [list(words or []) for words in rows[KEYWORDS_COLUMN]]
    return datasets.Dataset.from_dict(columns)


def one_long_epoch(rows: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """`count` rows: shuffled epochs, one behind the other, the last one cut.

    TRL reshuffles each epoch from a state that no checkpoint holds, so a run resumed in its second epoch
    would continue with other prompts. In one long epoch there is nothing to lose.
    """
    rng = np.random.default_rng(seed)
    order = [rng.permutation(len(rows)) for _ in range(-(-count // len(rows)))]
    return rows.select(np.concatenate(order)[:count])


# --- SFT --------------------------------------------------------------------------------------------------


def sft_rows(
    rows: datasets.Dataset, name: str, tokenizer, tokens: SpeechTokens, max_length: int, task: str = "tts"
) -> datasets.Dataset:
    """Rows of SFT: token ids of prompt + answer + END, and a mask that is 1 on the answer and END.

    Args:
        task: "tts" answers with the speech, "asr" with the text; "both" makes an example of each of every row, or
            of the one that the row's column `task` names: noisy speech is good to transcribe and bad to synthesize.
    """
    examples, total = {"input_ids": [], "completion_mask": []}, 0
    for answer_task, answers in (("tts", _tts_examples), ("asr", _asr_examples)):
        chosen = _rows_of_task(rows, name, task, answer_task)
        total += len(chosen)
        for prompt, answer in answers(chosen, name, tokenizer, tokens, max_length) if len(chosen) else ():
            if len(prompt) + len(answer) <= max_length:
                examples["input_ids"].append(prompt + answer)
                examples["completion_mask"].append([0] * len(prompt) + [1] * len(answer))
    too_long = total - len(examples["input_ids"])
    if too_long == total:
        raise InputError(f"{name}: none of the {len(rows)} rows fits into --max_length {max_length} tokens")
    if too_long:
        logger.warning("%s: %d of %d examples are longer than %d tokens, left out", name, too_long, total, max_length)
    return datasets.Dataset.from_dict(examples)


def _rows_of_task(rows: datasets.Dataset, name: str, task: str, answer_task: str) -> datasets.Dataset:
    """The rows that --task `task` makes examples of `answer_task` of."""
    if task != "both":
        return rows if task == answer_task else rows.select([])
    if TASK_COLUMN not in rows.column_names:
        return rows
    named = rows[TASK_COLUMN]
    for index, value in enumerate(named):
        if value not in (None, *TASKS):
            raise InputError(
                f"{name}, row {index}: {TASK_COLUMN} must be one of {', '.join(TASKS)}, or null (got {value!r})"
            )
    return rows.select([index for index, value in enumerate(named) if value in (None, answer_task)])


Example = tuple[list[int], list[int]]  # ids of the prompt, and of the answer with END


def _tts_examples(rows, name: str, tokenizer, tokens: SpeechTokens, max_length: int) -> Iterator[Example]:
    speech = _speech(rows, name, tokens)
    for prompt, codes in zip(_tts_prompts(rows, name, tokenizer, 0, max_length), speech, strict=True):
        yield prompt_ids(tokenizer, prompt), [*tokens.ids(codes), tokens.end_id]


def _asr_examples(rows, name: str, tokenizer, tokens: SpeechTokens, max_length: int) -> Iterator[Example]:
    for codes, text in zip(_speech(rows, name, tokens), _transcripts(rows, name), strict=True):
        text_ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        yield prompt_ids(tokenizer, asr_prompt(codes)), [*text_ids, tokens.text_end_id]
