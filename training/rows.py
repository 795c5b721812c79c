"""From a data set's rows to what TRL's trainers read, checked before any model is loaded."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from transformers import TrainingArguments

from common.cli import InputError
from common.dataset_io import check_codes, check_keywords, check_texts, load_any_dataset
from speech.error_rate import check_reference_text
from speech.pauses import expected_pauses
from speech.speaker_encoder import MIN_SECONDS
from speech.text_marks import plain_text
from speech.tokens import CODES_PER_SECOND, TASKS, SpeechTokens, asr_prompt, prompt_ids, tts_prompt
from training.recipes import GRPORecipe, ScriptArguments, SFTRecipe
from training.row_cache import cache_folder, map_rows

logger = logging.getLogger("train")

SPEECH_COLUMN = "audio_codes"
REFERENCE_COLUMNS = ("ref_text", "ref_codes")
KEYWORDS_COLUMN = "keywords"
PAUSES_COLUMN = "pauses"
TASK_COLUMN = "task"
LENGTH_COLUMN = "prompt_length"  # tokens; not for the trainer
TEXT, CODES = datasets.Value("string"), datasets.List(datasets.Value("int32"))
REWARD_FEATURES = {"ref_text": TEXT, "ref_codes": CODES, PAUSES_COLUMN: datasets.List(TEXT)}
NO_VALUE = {"ref_text": "", "ref_codes": [], PAUSES_COLUMN: []}
PROMPT = datasets.List({"role": TEXT, "content": TEXT, "opening": TEXT})


# --- Checks and prompts -----------------------------------------------------------------------------------


def check_tts_columns(rows: datasets.Dataset, name: str, num_codes: int) -> None:
    """Raises InputError for a text, language or voice prompt of a wrong type."""
    check_texts(rows, "text", name)
    check_texts(rows, "language", name, optional=True)
    check_reference_columns(rows, name, num_codes)


def check_reference_columns(rows: datasets.Dataset, name: str, num_codes: int) -> None:
    """Raises InputError for a voice prompt of a wrong type."""
    check_texts(rows, "ref_text", name, optional=True)
    check_codes(rows, "ref_codes", num_codes, name, optional=True)


def check_asr_columns(rows: datasets.Dataset, name: str, num_codes: int) -> None:
    """Raises InputError for codes, a text ("" for a clip without speech), a language or keywords of a wrong type."""
    if SPEECH_COLUMN not in rows.column_names:
        raise InputError(f"{name}: no column {SPEECH_COLUMN!r}. Encode the recordings with create_dataset.py first")
    check_codes(rows, SPEECH_COLUMN, num_codes, name)
    check_texts(rows, "text", name)
    check_texts(rows, "language", name, optional=True)
    check_keywords(rows, KEYWORDS_COLUMN, name)


def prompt_of_row(row: dict) -> list[dict[str, str]]:
    """The prompt of TTS; one of ref_text and ref_codes without the other is an InputError."""
    # An absent voice prompt is null in a column that others fill; parquet may make it an empty list.
    return tts_prompt(row["text"], row.get("ref_text") or None, row.get("ref_codes") or None)


def check_voice_prompt(ref_codes: list[int]) -> None:
    """Raises InputError for a voice prompt that is missing, or too short to compare a voice with."""
    if len(ref_codes) < MIN_SECONDS * CODES_PER_SECOND:
        found = f"{len(ref_codes) / CODES_PER_SECOND:.2f} s of one" if ref_codes else "none"
        raise InputError(
            f"a reward compares with the row's voice prompt, of {MIN_SECONDS} s or more (got {found}). "
            "Give every row ref_text and ref_codes (docs/data.md), or leave the reward out"
        )


def columns_for_rewards(rows: datasets.Dataset, name: str) -> list[str]:
    """Those columns that rewards of TTS read beside the text and that there are: voice prompt, patterns of pauses."""
    check_keywords(rows, PAUSES_COLUMN, name)
    return [column for column in REWARD_FEATURES if column in rows.column_names]


def row_for_rewards(row: dict, columns: list[str], needs_voice_prompt: bool) -> dict:
    """Text, language and the `columns` of a row of TTS; an absent value is empty.

    Raises:
        InputError: a text that cannot be scored, a pattern of pauses that is not of its text, or no voice prompt that
            is needed, or one too short to have a voice.
    """
    text, language = row["text"], row.get("language") or "en"
    check_reference_text(text, language)
    if needs_voice_prompt:
        check_voice_prompt(row.get("ref_codes") or [])
    if row.get(PAUSES_COLUMN):
        expected_pauses(text, row[PAUSES_COLUMN])
    return {"text": text, "language": language} | {
        column: NO_VALUE[column] if row[column] is None else row[column] for column in columns
    }


def length_that_fits(tokenizer, prompt: list[dict], max_completion_length: int, max_length: int, text: str) -> int:
    """Tokens of the prompt; InputError where prompt and answer may be longer than the context."""
    length = len(prompt_ids(tokenizer, prompt))
    if length + max_completion_length > max_length:
        raise InputError(
            f"the prompt is {length} tokens and its answer may take {max_completion_length}, more than the "
            f"{max_length} of the context. Shorten the row ({text[:60]!r}…) or drop it, or lower "
            "--max_completion_length"
        )
    return length


def columns_of(rows: datasets.Dataset, *names: str) -> datasets.Dataset:
    """Those of the columns that there are: others may hold audio, which would be decoded."""
    return rows.select_columns([name for name in names if name in rows.column_names])


# --- RL ---------------------------------------------------------------------------------------------------


@dataclass
class GRPORows:
    """What GRPO trains on.

    Attributes:
        train: the run's rows in the order they are used.
        held_out: those of --eval_dataset, or None.
        longest: tokens of the longest prompt and completion together.
        epoch_steps: optimizer steps of one pass over the data set.
        languages: of all rows.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset | None
    longest: int
    epoch_steps: int
    languages: set[str]


def grpo_dataset(
    script_args: ScriptArguments,
    training_args: GRPORecipe,
    tokenizer,
    tokens: SpeechTokens,
    needs_voice_prompt: bool = False,
) -> GRPORows:
    """The rows of --dataset and --eval_dataset, checked; fills in the run's number of steps.

    Args:
        needs_voice_prompt: see `grpo_rows`.
    """
    with training_args.main_process_first(desc="rows"):
        cache = cache_folder(training_args)
        make = partial(_grpo_rows, script_args, training_args, tokenizer, tokens, needs_voice_prompt)
        train, held_out = make(script_args.dataset, script_args.split, cache / "train.arrow"), None
        if script_args.eval_dataset:
            held_out = make(script_args.eval_dataset, script_args.eval_split, cache / "held_out.arrow")
    prompts, micro_batches = one_generation(training_args)
    accumulation = training_args.gradient_accumulation_steps
    needed = prompts * math.ceil(accumulation / micro_batches)
    if len(train) < needed:
        raise InputError(
            f"--dataset {script_args.dataset}: has {len(train)} rows and the first step takes {needed} prompts "
            f"({prompts} of one generation: per_device_train_batch_size × steps_per_generation × processes / "
            "num_generations). Add texts or lower the batch size"
        )
    epoch_steps = len(train) // prompts * micro_batches // accumulation
    steps = training_args.max_steps
    if steps <= 0:
        steps = math.ceil(training_args.num_train_epochs * epoch_steps)
    num_rows = prompts * math.ceil(steps * accumulation / micro_batches)  # TRL drops what is no whole generation
    seed = training_args.seed if training_args.shuffle_dataset else None
    training_args.max_steps, training_args.num_train_epochs = steps, 1
    parts = [rows for rows in (train, held_out) if rows is not None]
    longest = max(max(rows[LENGTH_COLUMN]) for rows in parts)
    return GRPORows(
        one_long_epoch(train.remove_columns(LENGTH_COLUMN), num_rows, seed),
        held_out and held_out.remove_columns(LENGTH_COLUMN),
        longest + training_args.max_completion_length,
        epoch_steps,
        {language for rows in parts for language in rows.select_columns("language").unique("language")},
    )


def _grpo_rows(
    script_args: ScriptArguments,
    training_args: GRPORecipe,
    tokenizer,
    tokens: SpeechTokens,
    needs_voice_prompt: bool,
    name: str,
    split: str,
    cache: Path,
) -> datasets.Dataset:
    rows = load_any_dataset(name, split)
    lengths = training_args.max_completion_length, training_args.max_length
    if script_args.task == "asr":
        return grpo_asr_rows(rows, name, tokenizer, tokens, *lengths, cache)
    return grpo_rows(rows, name, tokenizer, tokens, *lengths, script_args.diffro_labels, cache, needs_voice_prompt)


def one_generation(training_args: GRPORecipe) -> tuple[int, int]:
    """Prompts whose rollouts are sampled together, on all processes, and the micro-batches of a process that use them.

    Raises:
        InputError: groups that are not whole, or a run that could not resume.
    """
    group, micro_batch = training_args.num_generations, training_args.per_device_train_batch_size
    accumulation = training_args.gradient_accumulation_steps
    local_rollouts = micro_batch * training_args.steps_per_generation
    if local_rollouts % group:
        raise InputError(
            f"--per_device_train_batch_size {micro_batch} × {training_args.steps_per_generation} micro-batches: must "
            f"be a multiple of --num_generations {group}, since a group is scored together (got {local_rollouts})"
        )
    # Between these a checkpoint would lose the rollouts not yet used.
    micro_batches = training_args.steps_per_generation * training_args.num_iterations
    steps_per_batch = micro_batches // math.gcd(micro_batches, accumulation)
    if training_args.save_strategy == "steps" and steps_per_batch > 1 and training_args.save_steps % steps_per_batch:
        raise InputError(
            f"--save_steps: must be a multiple of {steps_per_batch}, the optimizer steps after which no rollouts are "
            f"left over, or a resumed run would not repeat the original (got {training_args.save_steps})"
        )
    return local_rollouts * training_args.world_size // group, micro_batches


def grpo_rows(
    rows: datasets.Dataset,
    name: str,
    tokenizer,
    tokens: SpeechTokens,
    max_completion_length: int,
    max_length: int,
    labels: list[str] = (),
    cache: Path | None = None,
    needs_voice_prompt: bool = False,
) -> datasets.Dataset:
    """Rows of RL for TTS: `prompt`, its length, `text`, `language`, the columns `labels`, and where the data set has
    them the voice prompt and the patterns of pauses, for rewards.

    Args:
        needs_voice_prompt: whether a reward compares with the voice prompt, and so every row needs one.
    Raises:
        InputError: a row that no prompt can be made of, or too long for the context; a missing column; a pattern of
            pauses that is not of its text; no voice prompt that is needed, or one too short to have a voice.
    """
    check_tts_columns(rows, name, tokens.num_codes)
    for_rewards = columns_for_rewards(rows, name)
    for label in labels:
        if label not in rows.column_names:
            raise InputError(f"--diffro_labels: {name} has no column {label!r} (got {', '.join(rows.column_names)})")

    def make(row: dict) -> dict:
        prompt, rewarded = prompt_of_row(row), row_for_rewards(row, for_rewards, needs_voice_prompt)
        length = length_that_fits(tokenizer, prompt, max_completion_length, max_length, row["text"])
        return {"prompt": prompt, LENGTH_COLUMN: length} | rewarded | {label: row[label] for label in labels}

    features = {"prompt": PROMPT, LENGTH_COLUMN: datasets.Value("int32"), "text": TEXT, "language": TEXT}
    features |= {column: REWARD_FEATURES[column] for column in for_rewards}
    features |= {label: rows.features[label] for label in labels}
    rows = columns_of(rows, "text", "language", *REWARD_FEATURES, *labels)
    return map_rows(rows, name, make, datasets.Features(features), cache)


def grpo_asr_rows(
    rows: datasets.Dataset,
    name: str,
    tokenizer,
    tokens: SpeechTokens,
    max_completion_length: int,
    max_length: int,
    cache: Path | None = None,
) -> datasets.Dataset:
    """Rows of RL for ASR: `prompt`, its length, `text` (the reference), `language`, `keywords` where there are any.

    Raises:
        InputError: a row without codes, whose text cannot be scored, or too long for the context.
    """
    check_asr_columns(rows, name, tokens.num_codes)
    has_keywords = KEYWORDS_COLUMN in rows.column_names

    def make(row: dict) -> dict:
        text, language, prompt = row["text"], row.get("language") or "en", asr_prompt(row[SPEECH_COLUMN])
        if text.strip():  # "" is a clip without speech
            check_reference_text(text, language)
        length = length_that_fits(tokenizer, prompt, max_completion_length, max_length, text)
        columns = {"prompt": prompt, LENGTH_COLUMN: length, "text": text, "language": language}
        return columns | ({KEYWORDS_COLUMN: row[KEYWORDS_COLUMN] or []} if has_keywords else {})

    features = {"prompt": PROMPT, LENGTH_COLUMN: datasets.Value("int32"), "text": TEXT, "language": TEXT}
    features |= {KEYWORDS_COLUMN: datasets.List(TEXT)} if has_keywords else {}
    rows = columns_of(rows, "text", "language", SPEECH_COLUMN, KEYWORDS_COLUMN)
    return map_rows(rows, name, make, datasets.Features(features), cache)


def one_long_epoch(rows: datasets.Dataset, count: int, seed: int | None) -> datasets.Dataset:
    """`count` rows: epochs, one behind the other, the last one cut; shuffled by the seed, or for None in their order.

    TRL reshuffles each epoch from a state that no checkpoint holds, so a run resumed in its second epoch
    would continue with other prompts. In one long epoch there is nothing to lose.
    """
    rng = np.random.default_rng(seed)
    epochs = range(math.ceil(count / len(rows)))
    order = [np.arange(len(rows)) if seed is None else rng.permutation(len(rows)) for _ in epochs]
    return rows.select(np.concatenate(order)[:count])


# --- SFT --------------------------------------------------------------------------------------------------


def prepared_datasets(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    prepare: Callable[[datasets.Dataset, str, Path], datasets.Dataset],
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """--dataset and --eval_dataset, None without one, each through `prepare(rows, name, cache file)` once a machine."""
    with training_args.main_process_first(desc="rows"):
        cache, parts = cache_folder(training_args), []
        for name, split in (
            (script_args.dataset, script_args.split),
            (script_args.eval_dataset, script_args.eval_split),
        ):
            if name is None:
                parts.append(None)
                continue
            parts.append(prepare(load_any_dataset(name, split), name, cache / f"{len(parts)}.arrow"))
    return tuple(parts)


def sft_datasets(
    script_args: ScriptArguments, training_args: SFTRecipe, tokenizer, tokens: SpeechTokens
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The examples of --dataset and of --eval_dataset, None without one."""

    def prepare(rows: datasets.Dataset, name: str, file: Path) -> datasets.Dataset:
        return sft_rows(rows, name, tokenizer, tokens, training_args.max_length, script_args.task, file)

    return prepared_datasets(script_args, training_args, prepare)


def sft_rows(
    rows: datasets.Dataset,
    name: str,
    tokenizer,
    tokens: SpeechTokens,
    max_length: int,
    task: str = "tts",
    cache: Path | None = None,
) -> datasets.Dataset:
    """Rows of SFT: token ids of prompt + answer + END, and a mask that is 1 on the answer and END.

    Args:
        task: "tts" answers with the speech, "asr" with the text; "both" makes an example of each of every row, or
            of the one that the row's column `task` names: noisy speech is good to transcribe and bad to synthesize. A
            row without speech, whose text is empty, is one of "asr".
    """
    check_asr_columns(rows, name, tokens.num_codes)
    if task != "asr":
        check_reference_columns(rows, name, tokens.num_codes)

    def tts_example(row: dict) -> tuple[list[int], list[int]]:
        return prompt_ids(tokenizer, prompt_of_row(row)), [*tokens.ids(row[SPEECH_COLUMN]), tokens.end_id]

    def asr_example(row: dict) -> tuple[list[int], list[int]]:
        text_ids = tokenizer(plain_text(row["text"]).strip(), add_special_tokens=False)["input_ids"]
        return prompt_ids(tokenizer, asr_prompt(row[SPEECH_COLUMN])), [*text_ids, tokens.text_end_id]

    def fitting(example: Callable, row: dict) -> dict | None:
        prompt, answer = example(row)
        if len(prompt) + len(answer) > max_length:
            return None
        return {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}

    features = datasets.Features({"input_ids": CODES, "completion_mask": datasets.List(datasets.Value("int8"))})
    parts, total = [], 0
    for answer_task, example in (("tts", tts_example), ("asr", asr_example)):
        chosen = _rows_of_task(rows, name, task, answer_task)
        total += len(chosen)
        if len(chosen):
            chosen = columns_of(chosen, "text", SPEECH_COLUMN, *REFERENCE_COLUMNS)
            file = cache and cache.with_stem(f"{cache.stem}-{answer_task}")
            parts.append(map_rows(chosen, name, partial(fitting, example), features, file))
    examples = datasets.concatenate_datasets(parts)
    if len(examples) == 0:
        raise InputError(f"{name}: none of the {len(rows)} rows fits into --max_length {max_length} tokens")
    if len(examples) < total:
        too_long = total - len(examples)
        logger.warning("%s: %d of %d examples are longer than %d tokens, left out", name, too_long, total, max_length)
    return examples


def _rows_of_task(rows: datasets.Dataset, name: str, task: str, answer_task: str) -> datasets.Dataset:
    """The rows that --task `task` makes examples of `answer_task` of."""
    if task != "both":
        return rows if task == answer_task else rows.select([])
    named = rows[TASK_COLUMN] if TASK_COLUMN in rows.column_names else [None] * len(rows)
    chosen = []
    for index, (value, text) in enumerate(zip(named, rows["text"], strict=True)):
        if value not in (None, *TASKS):
            raise InputError(
                f"{name}, row {index}: {TASK_COLUMN} must be one of {', '.join(TASKS)}, or null (got {value!r})"
            )
        unnamed = value is None and (answer_task == "asr" or text.strip())  # noise is transcribed, not synthesized
        if value == answer_task or unnamed:
            chosen.append(index)
    return rows.select(chosen)
