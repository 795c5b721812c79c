"""From a file of preferences to what DPOTrainer reads, checked before any model is loaded.

A row is one pair: text, chosen_codes and rejected_codes (speech codes, 50 a second), and where both were spoken after
a voice prompt ref_text and ref_codes. Other columns (id, source, rater, paths of audio) are for people.
"""

import logging
from pathlib import Path

import datasets

from common.cli import InputError
from common.dataset_io import check_codes
from speech.tokens import SpeechTokens, prompt_ids
from training.recipes import DPORecipe, ScriptArguments
from training.row_cache import map_rows
from training.rows import (
    CODES,
    REFERENCE_COLUMNS,
    check_tts_columns,
    columns_of,
    prepared_datasets,
    prompt_of_row,
)

logger = logging.getLogger("train")

CHOSEN_COLUMN, REJECTED_COLUMN = "chosen_codes", "rejected_codes"


def preference_datasets(
    script_args: ScriptArguments, training_args: DPORecipe, tokenizer, tokens: SpeechTokens
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The pairs of --dataset and of --eval_dataset, None without one."""

    def prepare(rows: datasets.Dataset, name: str, file: Path) -> datasets.Dataset:
        return preference_rows(rows, name, tokenizer, tokens, training_args.max_length, file)

    return prepared_datasets(script_args, training_args, prepare)


def preference_rows(
    rows: datasets.Dataset,
    name: str,
    tokenizer,
    tokens: SpeechTokens,
    max_length: int,
    cache: Path | None = None,
) -> datasets.Dataset:
    """Rows of DPO: `prompt_ids`, the prompt of every other method, `chosen_ids` and `rejected_ids`, each with END.

    Pairs of equal codes, which prefer nothing, and pairs longer than `max_length` tokens with their prompt are left
    out, with a warning that counts them.

    Raises:
        InputError: a missing column; codes that are empty or of another codebook; a row that no prompt can be made
            of; no pair is left.
    """
    for column in (CHOSEN_COLUMN, REJECTED_COLUMN):
        if column not in rows.column_names:
            raise InputError(
                f"{name}: no column {column!r} (got {', '.join(rows.column_names)}). Pairs are made by "
                "sample_preferences.py; their format is in docs/dpo.md"
            )
        check_codes(rows, column, tokens.num_codes, name)
    check_tts_columns(rows, name, tokens.num_codes)
    equal, too_long = [], []

    def make(row: dict) -> dict | None:
        prompt, chosen, rejected = prompt_ids(tokenizer, prompt_of_row(row)), row[CHOSEN_COLUMN], row[REJECTED_COLUMN]
        if chosen == rejected:
            equal.append(row)
            return None
        if len(prompt) + max(len(chosen), len(rejected)) + 1 > max_length:
            too_long.append(row)
            return None
        return {
            "prompt_ids": prompt,
            "chosen_ids": [*tokens.ids(chosen), tokens.end_id],
            "rejected_ids": [*tokens.ids(rejected), tokens.end_id],
        }

    features = datasets.Features({"prompt_ids": CODES, "chosen_ids": CODES, "rejected_ids": CODES})
    used = columns_of(rows, "text", CHOSEN_COLUMN, REJECTED_COLUMN, *REFERENCE_COLUMNS)
    pairs = map_rows(used, name, make, features, cache)
    if len(pairs) == 0:
        raise InputError(
            f"{name}: none of the {len(rows)} pairs can be used: their codes are equal, or they are longer than "
            f"--max_length {max_length} tokens"
        )
    if equal or too_long:  # counted by the process that made the rows; the others read them
        left_out = f"{len(equal)} of equal codes, {len(too_long)} longer than --max_length {max_length} tokens"
        logger.warning("%s: %d of %d pairs left out: %s", name, len(equal) + len(too_long), len(rows), left_out)
    return pairs
