"""Train the reward model of DiffRO, P(text | speech codes), on a dataset from create_dataset.py.

    python train_token2text.py --dataset tokenized_dataset --labels speaker --output_dir token2text

Rows need the columns `text` and `audio_codes`; `language` (Whisper's code) is English where there is none. --labels
names columns (speaker, emotion, …) that get a classifier head each, for the multi-task reward of arXiv 2507.05911.

Policies exploit the weaknesses of a reward model they are trained against, so this one is trained on more than clean
speech: label smoothing, random codes, noise on the embeddings (as in arXiv 2512.04552 for emotions). The last also
makes the reward smooth in the codes, and a gradient is useful only where the reward is smooth; too much noise costs
accuracy. A CTC loss on the encoder makes it align codes with text early in training.

Held-out rows have texts that are not in the training rows. Logged and written to run.json, on these rows:

    wer, wer_noisy                         WER of greedy transcripts, from clean codes and with a tenth of them random
    log_prob, log_prob_mismatched_text     mean log P per token of the reference text, and of another row's text
    accuracy_<column>                      accuracy of each label

An interrupted run resumes with --resume_from_checkpoint true from its last checkpoint (one per --save_steps steps),
and ends with the weights of an uninterrupted run. Exit code 2: the input was wrong.
"""

import argparse
import logging
import math
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F

from common.arithmetic import set_up_arithmetic
from common.cli import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    HelpFormatter,
    InputError,
    add_device,
    bad_input_exits,
    check_at_least,
    check_ranges,
    check_seed,
    check_writable,
    give_usual_mode,
    parse_strictly,
    pick_device,
    run_script,
    set_up_logging,
)
from common.dataset_io import check_codes, check_texts, load_any_dataset
from common.run_record import short_digest, write_run
from reward_models.token2text import BATCH_SIZE, IGNORED, PAD, WEIGHTS_FILE, Token2Text, new_text_tokenizer
from speech.error_rate import error_rate, language_code, normalize_text, sum_errors
from speech.tokens import XCODEC2_CODES
from training.loop import CHECKPOINT, check_same_rows, checkpoint_to_resume, drawn_texts, text_key, train

logger = logging.getLogger("train_token2text")

CODES_COLUMN = "audio_codes"
EVALUATION_NOISE = 0.1  # fraction of random codes in wer_noisy
FSQ_LEVELS = 4  # of each dimension of XCodec2's quantizer, whose codebook has 4**8 codes
OWN_STD = 0.1  # of what an embedding starts with besides, its codes' levels having 1


# --- The data ---------------------------------------------------------------------------------------------


def open_rows(name: str, split: str, labels: list[str], num_codes: int) -> datasets.Dataset:
    """The rows with a word in their text, with the columns text, language, audio_codes and the labels.

    Raises:
        InputError: no such dataset, a missing column, codes that are none of `num_codes`, a row without a label, an
            unknown language, or no row with a word.
    """
    rows = load_any_dataset(name, split)
    for column in ("text", CODES_COLUMN, *labels):
        if column not in rows.column_names:
            raise InputError(
                f"{name}: no column {column!r} (got {', '.join(rows.column_names)}). create_dataset.py writes text and "
                f"{CODES_COLUMN}; --labels must be columns of the dataset"
            )
    check_texts(rows, "text", name, optional=True)
    check_texts(rows, "language", name, optional=True)
    check_codes(rows, CODES_COLUMN, num_codes, name)
    languages = ["en"] * len(rows)
    if "language" in rows.column_names:
        languages = [language or "en" for language in rows["language"]]
        rows = rows.remove_columns("language")
    rows = rows.add_column("language", languages).select_columns(["text", "language", CODES_COLUMN, *labels])
    scorable = []
    for index, row in enumerate(rows.remove_columns(CODES_COLUMN)):
        for column in labels:
            if row[column] is None:
                raise InputError(f"{name}, row {index}: no {column}. Fill it in or leave {column} out of --labels")
        language = language_code(row["language"])
        if row["text"] and normalize_text(row["text"], language):
            scorable.append(index)
    if len(scorable) < len(rows):
        logger.warning("%s: ignored %d of %d rows, whose text has no word", name, len(rows) - len(scorable), len(rows))
    if not scorable:
        raise InputError(f"{name}: no row has a text with a word in it. Use a dataset with transcribed speech")
    return rows.select(scorable)


def split_by_text(rows: datasets.Dataset, heldout_frac: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out rows without a common text; arguments and errors of `drawn_texts`."""
    heldout_texts = drawn_texts(rows["text"][:], heldout_frac, seed)
    kept = [i for i, text in enumerate(rows["text"]) if text_key(text) not in heldout_texts]
    heldout = [i for i, text in enumerate(rows["text"]) if text_key(text) in heldout_texts]
    return rows.select(kept), rows.select(heldout)


def with_noise(codes: list[list[int]], frac: float, num_codes: int, rng: np.random.Generator) -> list[list[int]]:
    """The codes with a fraction `frac` of them replaced by random ones.

    Uniform over the codebook, so that the model also learns to ignore the codes that no clip has.
    """
    noisy = []
    for item in codes:
        replaced = rng.random(len(item)) < frac
        random_codes = rng.integers(num_codes, size=len(item))
        noisy.append(np.where(replaced, random_codes, item).tolist())
    return noisy


# --- Training ---------------------------------------------------------------------------------------------


def new_token2text(rows: datasets.Dataset, num_codes: int, args: argparse.Namespace) -> Token2Text:
    """An untrained model with the text vocabulary and the labels of the rows."""
    texts = [normalize_text(row["text"], row["language"]) for row in rows.select_columns(["text", "language"])]
    config = {
        "num_codes": num_codes,
        "labels": {column: sorted(map(str, set(rows[column]))) for column in args.labels},
        "t5": {
            "d_model": args.hidden_size,
            "d_kv": args.hidden_size // args.num_heads,
            "d_ff": 2 * args.hidden_size,
            "num_heads": args.num_heads,
            "num_layers": args.encoder_layers,
            "num_decoder_layers": args.decoder_layers,
            "dropout_rate": args.dropout,
        },
    }
    torch.manual_seed(args.seed)
    model = Token2Text(config, new_text_tokenizer(texts, args.vocab_size))
    start_from_levels(model.embedding)
    return model


def start_from_levels(embedding: torch.nn.Embedding) -> None:
    """Codes that differ little start with embeddings that differ little, in place.

    XCodec2's quantizer (FSQ) has FSQ_LEVELS levels a dimension, and a code is a number whose digits they are. Unless it
    is told so, the model has to learn of each code by itself what it sounds like. A codebook of another size keeps its
    random embeddings.
    """
    num_codes, width = embedding.weight.shape
    dimensions = round(math.log(num_codes, FSQ_LEVELS))
    if FSQ_LEVELS**dimensions != num_codes:
        return
    digits = torch.arange(num_codes)[:, None] // FSQ_LEVELS ** torch.arange(dimensions) % FSQ_LEVELS
    levels = (digits - (FSQ_LEVELS - 1) / 2) / math.sqrt((FSQ_LEVELS**2 - 1) / 12)  # mean 0, variance 1
    with torch.no_grad():
        shared = levels @ torch.randn(dimensions, width) / math.sqrt(dimensions)
        embedding.weight.copy_(shared + OWN_STD * torch.randn_like(embedding.weight))


def losses(
    model: Token2Text, rows: dict[str, list], args: argparse.Namespace, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """The losses of a batch, scalars: "text", "ctc", and one per column of labels."""
    # A random fraction up to --code_noise, so that the model also sees nearly clean speech
    noisy = with_noise(rows[CODES_COLUMN], args.code_noise * rng.random(), model.config["num_codes"], rng)
    codes, mask = model.pad(noisy)
    embeddings = model.embed(codes)
    spread = model.embedding.weight.detach().std()
    embeddings = embeddings + args.embedding_noise * spread * torch.randn_like(embeddings)
    states, mask = model.encode(embeddings, mask)
    text_ids = model.text_ids(rows["text"], rows["language"])
    logits = model.text_logits(states, mask, text_ids).flatten(0, 1)
    batch_losses = {
        "text": F.cross_entropy(logits, text_ids.flatten(), ignore_index=IGNORED, label_smoothing=args.label_smoothing),
        "ctc": ctc_loss(model, states, mask, text_ids),
    }
    for column, log_probs in model.label_log_probs(states, mask).items():
        labels = model.label_ids(column, rows[column])
        batch_losses[column] = F.cross_entropy(log_probs, labels, label_smoothing=args.label_smoothing)
    return batch_losses


def ctc_loss(model: Token2Text, states: torch.Tensor, mask: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
    """CTC loss of the encoder, per token; 0 for a text with more tokens than its speech has states."""
    num_tokens = (text_ids != IGNORED).sum(1) - 1  # CTC needs no END
    log_probs = model.ctc(states).log_softmax(-1).transpose(0, 1)
    targets = text_ids[:, :-1].clamp(min=PAD)
    return F.ctc_loss(log_probs, targets, mask.sum(1), num_tokens, blank=PAD, zero_infinity=True)


# --- Held-out rows ----------------------------------------------------------------------------------------


def rows_with_other_texts(texts: list[str]) -> list[int]:
    """For each row the number of the next one with another text: mismatched, but from the same distribution.

    >>> rows_with_other_texts(["a", "a", "b", "c"])
    [2, 2, 3, 0]
    """
    keys = [text_key(text) for text in texts]
    numbers = [0] * len(keys)
    for i in [*reversed(range(len(keys)))] * 2:  # from the end, and again, since behind the last row comes the first
        following = (i + 1) % len(keys)
        numbers[i] = numbers[following] if keys[following] == keys[i] else following
    return numbers


def evaluate(model: Token2Text, rows: datasets.Dataset, seed: int) -> dict[str, float]:
    """Metrics on held-out rows.

    Returns:
        "wer" and "wer_noisy" (edits over reference words; characters for CER_LANGUAGES), "log_prob" and
        "log_prob_mismatched_text" (nats per text token), "accuracy_<column>" of each column of labels.
    """
    model.eval()
    rng = np.random.default_rng(seed)
    rows = rows[:]
    texts, languages, codes = rows["text"], rows["language"], rows[CODES_COLUMN]
    noisy = with_noise(codes, EVALUATION_NOISE, model.config["num_codes"], rng)
    others = rows_with_other_texts(texts)
    other_texts, other_languages = [texts[i] for i in others], [languages[i] for i in others]
    metrics = {
        "wer": corpus_error_rate(model, codes, texts, languages),
        "wer_noisy": corpus_error_rate(model, noisy, texts, languages),
        "log_prob": float(np.mean(model.score(codes, texts, languages))),
        "log_prob_mismatched_text": float(np.mean(model.score(codes, other_texts, other_languages))),
    }
    for column in model.config["labels"]:
        labels = [label for batch in in_batches(codes) for label in model.labels(batch)[column]]
        correct = [label == str(value) for label, value in zip(labels, rows[column], strict=True)]
        metrics[f"accuracy_{column}"] = float(np.mean(correct))
    return metrics


def in_batches(items: list) -> list[list]:
    return [items[first : first + BATCH_SIZE] for first in range(0, len(items), BATCH_SIZE)]


def corpus_error_rate(model: Token2Text, codes: list[list[int]], texts: list[str], languages: list[str]) -> float:
    """WER of greedy transcripts over the whole corpus (CER for CER_LANGUAGES)."""
    hyps = [hyp for batch in in_batches(codes) for hyp in model.transcribe(batch)]
    return sum_errors([error_rate(*item) for item in zip(texts, hyps, languages, strict=True)]).rate


# --- The script -------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--dataset", required=True, help="folder, file or hub id of a dataset with text and audio_codes")
    add("--split", default="train", help="split of --dataset and of --heldout_dataset")
    add("--heldout_dataset", help="dataset to evaluate on; default: a fraction of the texts of --dataset")
    add("--heldout_frac", type=float, default=0.02, help="fraction of the distinct texts of --dataset to hold out")
    add("--labels", nargs="*", default=[], help="columns that get a classifier head each, such as speaker")
    add("--output_dir", required=True, help="folder of the trained model")
    add("--num_codes", type=int, default=XCODEC2_CODES, help="size of the codec's codebook")
    add("--vocab_size", type=int, default=1_000, help="size of the text's byte-level BPE vocabulary, at least 258")
    add("--hidden_size", type=int, default=512, help="width of the model")
    add("--num_heads", type=int, default=8, help="number of attention heads")
    add("--encoder_layers", type=int, default=8, help="number of encoder layers, which see 25 states per second")
    add("--decoder_layers", type=int, default=4, help="number of decoder layers, which see the text")
    add("--dropout", type=float, default=0.1, help="dropout rate of every layer")
    add("--steps", type=int, default=50_000, help="number of optimizer steps")
    add("--batch_size", type=int, default=32, help="number of clips per step")
    add("--learning_rate", type=float, default=5e-4, help="peak learning rate; one cycle with 10 %% of warm-up")
    add("--label_smoothing", type=float, default=0.1, help="label smoothing of the text and the labels")
    add("--code_noise", type=float, default=0.3, help="largest fraction of a batch's codes to replace by random ones")
    add("--embedding_noise", type=float, default=0.2, help="noise on the embeddings, in their standard deviations")
    add("--ctc_weight", type=float, default=0.3, help="weight of the CTC loss; that of the text's loss is 1")
    add("--label_weight", type=float, default=0.1, help="weight of the loss of each column of --labels")
    add("--logging_steps", type=int, default=200, help="number of steps between two lines of the log")
    add("--save_steps", type=int, default=1_000, help="number of steps between two checkpoints to resume from")
    add(
        "--resume_from_checkpoint",
        choices=["true", "false"],
        default="false",
        help="whether to resume the interrupted run in --output_dir",
    )
    add("--seed", type=int, default=0, help="random seed of the weights, the noise, the order and the held-out texts")
    add_device(parser, "where to train")
    return parse_strictly(parser, argv)


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for arguments out of range."""
    layers = {"num_heads": 1, "encoder_layers": 1, "decoder_layers": 1}
    check_at_least(args, num_codes=1, vocab_size=258, hidden_size=1, **layers)
    check_seed(args.seed)
    check_at_least(args, steps=1, batch_size=1, logging_steps=1, save_steps=1)
    if args.hidden_size % args.num_heads:
        raise InputError(f"--hidden_size: must be a multiple of --num_heads {args.num_heads} (got {args.hidden_size})")
    ranges = {
        "dropout": FRACTION,
        "label_smoothing": FRACTION,
        "code_noise": FRACTION,
        "embedding_noise": NOT_NEGATIVE,
        "ctc_weight": NOT_NEGATIVE,
        "label_weight": NOT_NEGATIVE,
        "heldout_frac": (0, False, 1, False),
        "learning_rate": POSITIVE,
    }
    check_ranges(args, ranges)


def main(args: argparse.Namespace) -> None:
    set_up_logging("train_token2text", timestamps=True)
    set_up_arithmetic()
    with bad_input_exits():
        check_args(args)
        device = pick_device(args.device)
        check_writable(Path(args.output_dir))
        checkpoint = checkpoint_to_resume(args, WEIGHTS_FILE)
        rows = open_rows(args.dataset, args.split, args.labels, args.num_codes)
        if args.heldout_dataset:
            heldout = open_rows(args.heldout_dataset, args.split, args.labels, args.num_codes)
            heldout_texts = {text_key(text) for text in heldout["text"]}
            rows = rows.select([i for i, text in enumerate(rows["text"]) if text_key(text) not in heldout_texts])
            if len(rows) == 0:
                raise InputError(
                    f"--heldout_dataset: {args.heldout_dataset} has every text of --dataset. Use other texts"
                )
        else:
            rows, heldout = split_by_text(rows, args.heldout_frac, args.seed)
        rows_digest = short_digest(row for part in (rows, heldout) for row in part)
        check_same_rows(args, checkpoint, rows_digest)
        model = new_token2text(rows, args.num_codes, args)
        for column in args.labels:
            model.label_ids(column, heldout[column])  # raises for one that is not in the training rows
    num_weights = sum(weights.numel() for weights in model.parameters())
    logger.info("%d clips to train on, %d held out; %.1f M weights", len(rows), len(heldout), num_weights / 1e6)
    train_losses = train(
        "token2text",
        model,
        [len(codes) for codes in rows[CODES_COLUMN]],
        lambda batch, rng: losses(model, rows[batch], args, rng),
        {"text": 1.0, "ctc": args.ctc_weight} | dict.fromkeys(args.labels, args.label_weight),
        args,
        device,
        logger,
        rows_digest,
        checkpoint,
    )
    model.save_pretrained(args.output_dir)
    give_usual_mode(Path(args.output_dir))
    # The model as saved, in half precision
    metrics = evaluate(Token2Text.from_pretrained(args.output_dir, device), heldout, args.seed)
    logger.info("held out: %s", "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    write_run(args.output_dir, args=vars(args), losses=train_losses, heldout=metrics)
    (Path(args.output_dir) / CHECKPOINT).unlink(missing_ok=True)  # last: without it the run counts as finished


if __name__ == "__main__":
    run_script(main, parse_args)
