"""From a dataset's rows to what TRL's trainers read, checked before any model is loaded."""

import logging

import datasets
import numpy as np

from speech_tokens import SpeechTokens, prompt_ids, tts_prompt

logger = logging.getLogger(__name__)

SPEECH_COLUMN = "audio_codes"
REFERENCE_COLUMNS = ("ref_text", "ref_codes")


def _prompt(row: dict) -> list[dict]:
    ref_codes = row.get("ref_codes")
    # An absent voice prompt is null in a column that others fill; parquet may make it an empty list.
    has_reference = ref_codes is not None and len(ref_codes) > 0
    return tts_prompt(row["text"], *((row["ref_text"], ref_codes) if has_reference else ()))


def _checked_prompts(rows: datasets.Dataset, name: str, tokenizer, room: int, max_length: int) -> list[list[dict]]:
    """A prompt per row; ValueError names the first row that cannot be said."""
    if "text" not in rows.column_names:
        raise ValueError(
            f"{name} has no column 'text' (it has {', '.join(rows.column_names)}); each row needs the text to say"
        )
    columns = [c for c in ("text", *REFERENCE_COLUMNS) if c in rows.column_names]
    prompts = []
    for index, row in enumerate(rows.select_columns(columns)):
        if not isinstance(row["text"], str):
            raise ValueError(f"{name}, row {index}: text is {row['text']!r}; each row needs a text to say")
        try:
            prompt = _prompt(row)
        except ValueError as error:
            raise ValueError(f"{name}, row {index}: {error}") from None
        length = len(prompt_ids(tokenizer, prompt))
        if length + room > max_length:
            raise ValueError(
                f"{name}, row {index}: the prompt is {length} tokens and its speech may take {room}, more than the "
                f"{max_length} of the context; shorten the text ({row['text'][:60]!r}…), drop the row, or lower "
                "--max_completion_length"
            )
        prompts.append(prompt)
    return prompts


def grpo_rows(
    rows: datasets.Dataset, name: str, tokenizer, max_completion_length: int, max_length: int
) -> datasets.Dataset:
    """Rows of GRPO: `prompt`, `text`, `language`; codes of recorded speech, if any, are not used."""
    prompts = _checked_prompts(rows, name, tokenizer, max_completion_length, max_length)
    languages = rows["language"] if "language" in rows.column_names else ["en"] * len(rows)
    return datasets.Dataset.from_dict({"prompt": prompts, "text": list(rows["text"]), "language": list(languages)})


def sft_rows(rows: datasets.Dataset, name: str, tokenizer, tokens: SpeechTokens, max_length: int) -> datasets.Dataset:
    """Rows of SFT: token ids of prompt + speech + END, and a mask that is 1 on the speech and END."""
    if SPEECH_COLUMN not in rows.column_names:
        raise ValueError(f"{name} has no column {SPEECH_COLUMN!r}: make it with create_dataset.py first")
    prompts = _checked_prompts(rows, name, tokenizer, 0, max_length)
    examples = {"input_ids": [], "completion_mask": []}
    too_long = 0
    for index, (prompt, codes) in enumerate(zip(prompts, rows[SPEECH_COLUMN], strict=True)):
        if not codes:
            raise ValueError(f"{name}, row {index}: no {SPEECH_COLUMN}; drop the row or encode it again")
        try:
            speech = [*tokens.ids(codes), tokens.end_id]
        except ValueError as error:
            raise ValueError(f"{name}, row {index}: {error}") from None
        opening = prompt_ids(tokenizer, prompt)
        if len(opening) + len(speech) > max_length:
            too_long += 1
            continue
        examples["input_ids"].append(opening + speech)
        examples["completion_mask"].append([0] * len(opening) + [1] * len(speech))
    if not examples["input_ids"]:
        raise ValueError(f"{name}: none of the {len(rows)} rows fits into --max_length {max_length} tokens")
    if too_long:
        logger.warning(
            "%s: %d of %d rows are longer than %d tokens and left out", name, too_long, len(rows), max_length
        )
    return datasets.Dataset.from_dict(examples)


def one_long_epoch(rows: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """`count` rows: shuffled epochs, one behind the other, the last one cut.

    TRL reshuffles each epoch from a state that no checkpoint holds, so a run resumed in its second epoch
    would go on with other prompts. In one long epoch there is nothing to lose.
    """
    rng = np.random.default_rng(seed)
    order = [rng.permutation(len(rows)) for _ in range(-(-count // len(rows)))]
    return rows.select(np.concatenate(order)[:count])
