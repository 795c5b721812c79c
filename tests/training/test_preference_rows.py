"""From pairs of preferences to ids: the prompt of the other methods, END after both; what cannot be used."""

import datasets
import pytest

from speech.policy import load_tokenizer
from speech.tokens import prompt_ids, tts_prompt
from training.preference_rows import preference_rows

TEXT = "Anna found two boxes."


@pytest.fixture(scope="module")
def llasa():
    return load_tokenizer("tiny/llasa")


def pairs_of(*pairs: tuple[list, list], **columns) -> datasets.Dataset:
    chosen, rejected = zip(*pairs, strict=True)
    text = [TEXT] * len(pairs)
    return datasets.Dataset.from_dict({"text": text, "chosen_codes": chosen, "rejected_codes": rejected, **columns})


def test_ids_of_a_pair(llasa):
    tokenizer, tokens = llasa
    [row] = preference_rows(pairs_of(([1, 2], [3])), "pairs", tokenizer, tokens, 512)
    assert row["prompt_ids"] == prompt_ids(tokenizer, tts_prompt(TEXT))
    first, end = tokens.first_code_id, tokens.end_id
    assert (row["chosen_ids"], row["rejected_ids"]) == ([first + 1, first + 2, end], [first + 3, end])


def test_a_voice_prompt_is_part_of_the_prompt(llasa):
    tokenizer, tokens = llasa
    voices = {"ref_text": ["Hello.", None], "ref_codes": [[7, 8], None], "source": ["human", "made"]}
    rows = preference_rows(pairs_of(([1], [2]), ([1], [2]), **voices), "pairs", tokenizer, tokens, 512)
    assert rows[0]["prompt_ids"] == prompt_ids(tokenizer, tts_prompt(TEXT, "Hello.", [7, 8]))
    assert rows[1]["prompt_ids"] == prompt_ids(tokenizer, tts_prompt(TEXT))


def test_pairs_left_out_are_counted(llasa, caplog):
    pairs = pairs_of(([1], [2]), ([3], [3]), ([4] * 600, [5]), ([6], [7] * 600))
    assert len(preference_rows(pairs, "pairs", *llasa, 512)) == 1
    assert "3 of 4 pairs left out: 1 of equal codes, 2 longer than --max_length 512 tokens" in caplog.text
    with pytest.raises(ValueError, match="pairs: none of the 1 pairs can be used: their codes are equal, or"):
        preference_rows(pairs_of(([3], [3])), "pairs", *llasa, 512)


def test_the_longest_pair_that_fits(llasa):
    length = len(prompt_ids(llasa[0], tts_prompt(TEXT))) + 3 + 1  # three codes and END
    pairs = pairs_of(([1, 2, 3], [2]), ([1, 2, 3, 4], [2]))
    assert len(preference_rows(pairs, "pairs", *llasa, length)) == 1


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (pairs_of(([1], [4096])), "row 0: rejected_codes must be .* .got 4096 among them"),
        (pairs_of(([1], [2]), ([], [2])), r"row 1: chosen_codes must be .* .got \[\]"),
        (pairs_of(([1], [2]), text=[None]), "row 0: text must be text .got None"),
        (pairs_of(([1], [2]), text=[" "]), "row 0: text is empty"),
        (pairs_of(([1], [2]), ref_text=["Hello."], ref_codes=[None]), "row 0: .*ref_"),
        (pairs_of(([1], [2])).remove_columns("rejected_codes"), "no column 'rejected_codes' .got text, chosen_codes.*"),
    ],
)
def test_pairs_that_are_refused(llasa, pairs, message):
    with pytest.raises(ValueError, match=f"pairs.*{message}"):
        preference_rows(pairs, "pairs", *llasa, 512)
