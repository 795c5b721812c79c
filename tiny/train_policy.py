"""The toy setup's policies: Llama learns to speak and to transcribe, its attention shown which word is due.

The likelihood alone teaches a small Llama to follow the text last of all, since a code depends far more on the codes
before it. The times of the words are known here, so one attention head is told for each code which word it speaks, and
a second one where that word ends, since there stands the mark that decides on its melody: `?` or `*`. This is guided
attention (arXiv 1710.08969, whose guide is a diagonal for want of times); the weight of its loss falls to 0 before the
end. In speech recognition each token of the text is told the codes of its word, and the last of them. The embeddings
of codes start from the codes' levels, so that codes that sound alike are neighbours.

Batches are of one stream at a time: rows of one task and kind.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from common.cli import InputError, write_whole, write_whole_text
from speech.tokens import (
    CODES_PER_SECOND,
    SPEECH_UNDERSTANDING_START,
    TEXT_UNDERSTANDING_END,
    TEXT_UNDERSTANDING_START,
    SpeechTokens,
    code_token,
)
from tiny.llasa import MAX_LENGTH, new_model, new_tokenizer
from tiny.train_codec import LEVELS
from training.loop import epoch_batches
from training.rows import sft_rows

logger = logging.getLogger(__name__)

VOCAB_SIZE = 1_100  # of the text's BPE: a token for each word of the corpus
EMBEDDING_STD = 0.02  # Llama's own start
GUIDED_LAYER, WORD_HEAD, WORD_END_HEAD = 1, 0, 1
GUIDED_UNTIL = 0.9  # of the steps
WARMUP_STEPS = 200
BETAS, WEIGHT_DECAY = (0.9, 0.98), 0.1
IGNORED = -100
UNFINISHED = "unfinished.pt"  # in the folder of a policy


class Example(NamedTuple):
    """A row of SFT.

    Attributes:
        ids: (length,), prompt and answer.
        answer: number of its last tokens that are the answer: codes or text, and END.
        target_word: (length,), number of the prompt's word that the next token answers; -1 where there is none.
        prompt_word: (length,), number of the word that a token of the prompt belongs to; -2 elsewhere.
    """

    ids: torch.Tensor
    answer: int
    target_word: torch.Tensor
    prompt_word: torch.Tensor


class Batch(NamedTuple):
    """Examples, padded on the right, where causal attention doesn't see the padding: all of shape (rows, length)."""

    ids: torch.Tensor
    targets: torch.Tensor  # the next token if it is the answer's, else IGNORED
    target_word: torch.Tensor
    prompt_word: torch.Tensor


def new_policy(texts: list[str], seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A small Llama with random weights, and its tokenizer."""
    tokenizer = new_tokenizer([*texts, *(f" {text}" for text in texts)], math.prod(LEVELS), VOCAB_SIZE)
    model = new_model(tokenizer, seed)
    first_code = tokenizer.convert_tokens_to_ids(code_token(0))
    with torch.no_grad():
        by_level = embeddings_by_level(model.config.hidden_size, seed)
        model.model.embed_tokens.weight[first_code : first_code + len(by_level)] += by_level
    return model, tokenizer


def embeddings_by_level(size: int, seed: int) -> torch.Tensor:
    """A vector for each code, shape (codes, size): codes with neighbouring levels have neighbouring vectors."""
    generator = torch.Generator().manual_seed(seed)
    codes, vectors = torch.arange(math.prod(LEVELS)), 0
    for levels in LEVELS:
        steps = torch.randn(levels - 1, size, generator=generator)
        climbed = torch.arange(levels)[:, None] > torch.arange(levels - 1)  # level k has climbed k steps
        vectors = vectors + ((2.0 * climbed - 1) @ steps)[codes % levels]
        codes = codes // levels
    return vectors * (EMBEDDING_STD / vectors.std())


def tts_examples(
    rows: datasets.Dataset, times: dict[str, list], tokenizer: PreTrainedTokenizerFast, tokens: SpeechTokens
) -> list[Example]:
    """What `train_policy` reads of rows of SFT for text to speech.

    Args:
        times: by the row's id, the clip's words: (word, start in s, end in s).
    Raises:
        InputError: a row longer than MAX_LENGTH tokens.
    """
    examples = []
    for row, encoded in encoded_rows(rows, tokenizer, tokens, "tts"):
        ids, answer = encoded["input_ids"], sum(encoded["completion_mask"])
        target_word, prompt_word = no_words(ids)
        start, end = map(tokenizer.convert_tokens_to_ids, (TEXT_UNDERSTANDING_START, TEXT_UNDERSTANDING_END))
        text = slice(ids.index(start) + 1, ids.index(end))
        prompt_word[text] = torch.tensor(words_of_tokens(ids[text], tokenizer))
        before = len((row.get("ref_text") or "").split())
        target_word[-answer - 1 : -2] = before + torch.tensor(words_of_codes(times[row["id"]], answer - 1))
        examples.append(Example(torch.tensor(ids), answer, target_word, prompt_word))
    return examples


def asr_examples(
    rows: datasets.Dataset, times: dict[str, list], tokenizer: PreTrainedTokenizerFast, tokens: SpeechTokens
) -> list[Example]:
    """What `train_policy` reads of rows of SFT for speech recognition; see `tts_examples`."""
    examples = []
    for row, encoded in encoded_rows(rows, tokenizer, tokens, "asr"):
        ids, answer, codes = encoded["input_ids"], sum(encoded["completion_mask"]), len(row["audio_codes"])
        target_word, prompt_word = no_words(ids)
        first = ids.index(tokenizer.convert_tokens_to_ids(SPEECH_UNDERSTANDING_START)) + 1
        if times[row["id"]]:  # it has speech
            prompt_word[first : first + codes] = torch.tensor(words_of_codes(times[row["id"]], codes))
            target_word[-answer - 1 : -2] = torch.tensor(words_of_tokens(ids[-answer:-1], tokenizer))
        examples.append(Example(torch.tensor(ids), answer, target_word, prompt_word))
    return examples


def encoded_rows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, tokens: SpeechTokens, task: str
) -> Iterator[tuple[dict, dict]]:
    """Each row and its example of SFT; InputError for a row longer than MAX_LENGTH tokens, which `sft_rows` drops."""
    encoded = sft_rows(rows, "rows", tokenizer, tokens, MAX_LENGTH, task)
    if len(encoded) < len(rows):
        raise InputError(
            f"{len(rows) - len(encoded)} of {len(rows)} rows of {task} are longer than {MAX_LENGTH} tokens. "
            "Shorten the clips"
        )
    return zip(rows, encoded, strict=True)


def no_words(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """target_word and prompt_word of an example without any."""
    return torch.full((len(ids),), -1), torch.full((len(ids),), -2)


def words_of_codes(words: list, codes: int) -> list[int]:
    """Number of the word at the middle of each code; a pause belongs to the word before it.

    >>> words_of_codes([("no", 0.0, 0.04), ("way", 0.04, 0.1)], 5)
    [0, 0, 1, 1, 1]
    """
    numbers, word = [], 0
    for code in range(codes):
        while word < len(words) - 1 and (code + 0.5) / CODES_PER_SECOND >= words[word + 1][1]:
            word += 1
        numbers.append(word)
    return numbers


def words_of_tokens(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Number of the word of each token of a text: a word begins with a space."""
    numbers, number = [], 0
    for token in ids:
        number += tokenizer.decode([token]).startswith(" ")
        numbers.append(number)
    return numbers


def batch_of(rows: list[Example], device: torch.device) -> Batch:
    targets = []
    for row in rows:
        shifted = torch.full_like(row.ids, IGNORED)
        shifted[-row.answer - 1 : -1] = row.ids[-row.answer :]
        targets.append(shifted)
    columns = [
        ([row.ids for row in rows], 0),
        (targets, IGNORED),
        ([row.target_word for row in rows], -1),
        ([row.prompt_word for row in rows], -2),
    ]
    return Batch(*(pad_sequence(column, True, padding).to(device) for column, padding in columns))


def losses(
    model: LlamaForCausalLM, batch: Batch, answer_ids: torch.Tensor, guided: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood of the answers' tokens, and the guided heads' loss, 0 if not `guided`.

    A head's is −log of its attention on the tokens of the target word, or on the last of them.

    Args:
        answer_ids: what an answer may consist of, sorted; the likelihood is among them.
    """
    with torch.autocast(batch.ids.device.type, torch.bfloat16):
        out = model.model(input_ids=batch.ids, use_cache=False, output_attentions=guided)
        known = batch.targets != IGNORED
        logits = torch.nn.functional.linear(out.last_hidden_state[known], model.lm_head.weight[answer_ids])
    targets = torch.searchsorted(answer_ids, batch.targets[known])
    nll = torch.nn.functional.cross_entropy(logits.float(), targets)
    has_target = batch.target_word >= 0
    if not guided or not has_target.any():  # clips without speech
        return nll, nll.new_zeros(())
    attention = out.attentions[GUIDED_LAYER].float()  # (rows, heads, length, length)
    at_end = batch.prompt_word != batch.prompt_word.roll(-1, dims=-1)
    word_end = batch.prompt_word.where(at_end, -2)
    attention_loss = nll.new_zeros(())
    for head, words in ((WORD_HEAD, batch.prompt_word), (WORD_END_HEAD, word_end)):
        is_target = batch.target_word[:, :, None] == words[:, None, :]
        on_target = (attention[:, head] * is_target).sum(-1)[has_target]
        attention_loss = attention_loss - on_target.clamp(min=1e-6).log().mean() / 2
    return nll, attention_loss


def batches(rows: list[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Without end, the batches of one epoch after the other."""
    rng = np.random.default_rng(seed)
    lengths = [len(row.ids) for row in rows]
    while True:
        for numbers in epoch_batches(lengths, batch_size, rng):
            yield [rows[i] for i in numbers]


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, rows: list[Example], answer_ids: torch.Tensor) -> float:
    """Nats a token, over all tokens of the answers."""
    total = count = 0
    for start in range(0, len(rows), 32):
        chunk = rows[start : start + 32]
        tokens = sum(row.answer for row in chunk)
        total += tokens * losses(model, batch_of(chunk, answer_ids.device), answer_ids, guided=False)[0].item()
        count += tokens
    return total / count


def with_prompts_of_others(rows: list[Example]) -> list[Example]:
    """Each answer behind the prompt of the next row: how much the loss rises says what the policy reads of a prompt.

    Their words are no longer those of the prompts, so they are for the likelihood alone.
    """
    return [
        row._replace(ids=torch.cat([other.ids[: -other.answer], row.ids[-row.answer :]]))
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]


class Stream(NamedTuple):
    """Rows of one task and kind.

    Attributes:
        answer_ids: see `losses`.
    """

    rows: list[Example]
    heldout: list[Example]
    answer_ids: torch.Tensor


@dataclass
class Progress:
    """Of a training: its settings, steps taken, of each stream and in all, seconds, lowest held-out loss."""

    settings: dict[str, float]
    steps: dict[str, int] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    best: float = math.inf


def save_unfinished(path: Path, done: Progress, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    saved = {"done": asdict(done), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    write_whole(path, lambda temporary: torch.save(saved, temporary))


def load_unfinished(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Progress:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return Progress(**saved["done"])


def train_policy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    streams: dict[str, Stream],
    choose_stream: Callable[[int, float], str],
    folder: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    eval_steps: int,
    max_seconds: float = math.inf,
) -> None:
    """Train, and save to `folder` the weights with the lowest held-out loss, and curve.jsonl with a line an evaluation.

    An interrupted training resumes from its last evaluation, which unfinished.pt has; the caller deletes that file.

    Args:
        streams: by name; the held-out loss of the first decides which weights are kept.
        choose_stream: the name of a step's stream, of its number and of the progress from 0 to 1.
        max_seconds: the training is shortened to them.
    Raises:
        InputError: the training that was interrupted had other settings.
    """
    device = next(model.parameters()).device
    model.set_attn_implementation("eager")  # faster than SDPA on a CPU at these lengths, and it shows its attention
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    done, curve, unfinished = Progress(settings, dict.fromkeys(streams, 0)), folder / "curve.jsonl", folder / UNFINISHED
    if unfinished.exists():
        done = load_unfinished(unfinished, model, optimizer)
        if done.settings != settings:
            raise InputError(f"{unfinished}: is of a training with {done.settings}, not {settings}. Delete it")
        logger.info("policy: resuming at step %d", done.step)
    lines = curve.read_text().splitlines(keepends=True) if curve.exists() else []
    write_whole_text(curve, "".join(line for line in lines if json.loads(line)["step"] <= done.step))
    batches_of = {
        name: islice(batches(part.rows, batch_size, seed), done.steps[name], None) for name, part in streams.items()
    }
    start, total, logged = time.monotonic() - done.seconds, torch.zeros(2), done.step
    progress = max(done.step / steps, done.seconds / max_seconds)
    while progress < 1:
        name = choose_stream(done.step, progress)
        weight = max(0.0, 1 - progress / GUIDED_UNTIL)
        cooling = (1 + math.cos(math.pi * max(0.0, 2 * progress - 1))) / 2  # from the middle on
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, done.step / WARMUP_STEPS) * cooling
        batch = batch_of(next(batches_of[name]), device)
        nll, attention_loss = losses(model, batch, streams[name].answer_ids, guided=weight > 0)
        optimizer.zero_grad()
        (nll + weight * attention_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        total += torch.stack([nll, attention_loss]).detach().cpu()
        done.step, done.steps[name], done.seconds = done.step + 1, done.steps[name] + 1, time.monotonic() - start
        progress = max(done.step / steps, done.seconds / max_seconds)
        if done.step % eval_steps == 0 or progress >= 1:
            nll, attention_loss = (total / (done.step - logged)).tolist()
            line = {
                "step": done.step,
                "loss": nll,
                "attention": attention_loss,
                **evaluate(model, streams),
                "seconds": done.seconds,
            }
            logger.info("policy %s", ", ".join(f"{key} {round(value, 3)}" for key, value in line.items()))
            with open(curve, "a") as file:
                file.write(json.dumps(line) + "\n")
            total, logged = torch.zeros(2), done.step
            loss = line[f"heldout_{next(iter(streams))}"]
            if loss < done.best:
                done.best = loss
                model.save_pretrained(folder)
            save_unfinished(unfinished, done, model, optimizer)


def evaluate(model: LlamaForCausalLM, streams: dict[str, Stream]) -> dict[str, float]:
    """By stream, the held-out loss, and by how much prompts of others raise it, in nats a token."""
    model.eval()
    line = {}
    for name, (_, heldout, answer_ids) in streams.items():
        line[f"heldout_{name}"] = heldout_loss(model, heldout, answer_ids)
        line[f"mismatched_prompt_{name}"] = (
            heldout_loss(model, with_prompts_of_others(heldout), answer_ids) - line[f"heldout_{name}"]
        )
    model.train()
    return line
