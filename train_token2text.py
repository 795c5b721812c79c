"""Train the reward model of DiffRO, P(text | speech codes), on a data set made by create_dataset.py.

    python train_token2text.py --dataset tokenized_dataset --labels speaker --output_dir token2text

Rows need `text` and `audio_codes`; `language` (Whisper's code) is English where there is none. --labels names columns
(speaker, emotion, …) that get a head each, for the multi-task reward of arXiv 2507.05911.

A reward that policies are trained against is attacked by them, so it is trained on more than clean speech: label
smoothing, codes replaced at random, noise on the embeddings (as arXiv 2512.04552 found for emotions). The last also
makes the reward smooth, and its gradient in the codes is worth no more than that; too much of it costs accuracy. A CTC
loss on the encoder makes it find out early which codes say which text.

Held-out rows are of texts that training never sees. Prints and writes to run.json, on these rows: the WER of greedy
transcripts from clean codes and from codes of which a tenth is random; the mean log P per token of the right text and
of another row's; the accuracy of each label.

A run that was stopped goes on with --resume_from_checkpoint true, from the last of every --save_steps steps, and ends
with the weights it would have had.

Exit code 2: the input was wrong.
"""

import argparse
import logging
import os
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from common.cli import (
    HelpFormatter,
    InputError,
    bad_input_exits,
    check_at_least,
    check_writable,
    parse_strictly,
    pick_device,
)
from common.dataset_io import load_any_dataset
from common.run_record import write_run
from reward_models.token2text import BATCH_SIZE, IGNORED, PAD, Token2Text, new_text_tokenizer
from speech.error_rate import error_rate, language_code, normalize_text

logger = logging.getLogger("train_token2text")

CODES_COLUMN = "audio_codes"
POOL_BATCHES = 50  # batches are cut from so many rows sorted by length, so that little is padded
TESTED_NOISE = 0.1  # share of random codes in the second held-out WER
CHECKPOINT = "checkpoint.pt"  # in the output folder while training
MAY_CHANGE = ("output_dir", "device", "logging_steps", "save_steps", "resume_from_checkpoint")  # between its parts


# --- The data ---------------------------------------------------------------------------------------------


def open_rows(name: str, split: str, labels: list[str]) -> datasets.Dataset:
    """The rows that can be learnt from, with the columns text, language, audio_codes and the labels.

    Raises:
        OSError, ValueError: no such set, a column is missing, a label is, a row's codes or text are, or a language
            that Whisper does not know.
    """
    rows = load_any_dataset(name, split)
    for column in ("text", CODES_COLUMN, *labels):
        if column not in rows.column_names:
            raise InputError(
                f"{name}: no column {column!r} (there: {', '.join(rows.column_names)}); create_dataset.py makes "
                f"text and {CODES_COLUMN}, and --labels may only name columns that are there"
            )
    if "language" not in rows.column_names:
        rows = rows.add_column("language", ["en"] * len(rows))
    rows = rows.select_columns(["text", "language", CODES_COLUMN, *labels])
    scorable = []
    for index, row in enumerate(rows):
        if not row[CODES_COLUMN]:
            raise InputError(f"{name}, row {index}: no {CODES_COLUMN}; drop the row or encode it again")
        for column in labels:
            if row[column] is None:
                raise InputError(f"{name}, row {index}: no {column}; fill it in or leave {column} out of --labels")
        language_code(row["language"])
        if row["text"] and normalize_text(row["text"], row["language"]):
            scorable.append(index)
    if len(scorable) < len(rows):
        logger.warning("%s: %d of %d rows have no word in their text", name, len(rows) - len(scorable), len(rows))
    if not scorable:
        raise InputError(f"{name}: no row has a text with a word in it")
    return rows.select(scorable)


def split_by_text(rows: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out rows; no text is in both."""
    texts = sorted(set(rows["text"]))
    count = max(1, round(share * len(texts)))
    if not 0 < share < 1 or count == len(texts):
        raise InputError(
            f"--heldout_share {share} of {len(texts)} different texts leaves nothing on one side; give a share "
            "between 0 and 1, more texts, or --heldout_dataset"
        )
    heldout = {texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[:count]}
    kept = [i for i, text in enumerate(rows["text"]) if text not in heldout]
    out = [i for i, text in enumerate(rows["text"]) if text in heldout]
    return rows.select(kept), rows.select(out)


def epoch_batches(lengths: list[int], batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Row numbers, batch after batch, each row once; the rows of a batch are of similar length."""
    order = rng.permutation(len(lengths))
    pool = POOL_BATCHES * batch_size
    cut = []
    for first in range(0, len(order), pool):
        by_length = sorted(order[first : first + pool].tolist(), key=lambda i: lengths[i])
        cut += [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    return [cut[i] for i in rng.permutation(len(cut))]


def with_noise(codes: list[list[int]], share: float, num_codes: int, rng: np.random.Generator) -> list[list[int]]:
    """Codes, `share` of them replaced by any of the codebook: so codes that no clip uses are learnt to say nothing."""
    noisy = []
    for item in map(np.asarray, codes):
        replaced = rng.random(len(item)) < share
        noisy.append(np.where(replaced, rng.integers(num_codes, size=len(item)), item).tolist())
    return noisy


# --- Training ---------------------------------------------------------------------------------------------


def new_token2text(rows: datasets.Dataset, num_codes: int, args: argparse.Namespace) -> Token2Text:
    """An untrained model, its text vocabulary and labels those of the rows."""
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
    return Token2Text(config, new_text_tokenizer(texts, args.vocab_size))


def losses(model: Token2Text, rows: dict[str, list], args: argparse.Namespace, rng: np.random.Generator) -> dict:
    """What a batch costs: {"text": …, "ctc": …, a column of labels: …}, scalars."""
    # Up to the share given: clean speech is to be read best
    noisy = with_noise(rows[CODES_COLUMN], args.code_noise * rng.random(), model.config["num_codes"], rng)
    codes, mask = model.pad(noisy)
    embeddings = model.embed(codes)
    spread = model.embedding.weight.detach().std()
    embeddings = embeddings + args.embedding_noise * spread * torch.randn_like(embeddings)
    states, mask = model.encode(embeddings, mask)
    text_ids = model.text_ids(rows["text"], rows["language"])
    logits = model.text_logits(states, mask, text_ids).flatten(0, 1)
    found = {
        "text": F.cross_entropy(logits, text_ids.flatten(), ignore_index=IGNORED, label_smoothing=args.label_smoothing),
        "ctc": ctc_loss(model, states, mask, text_ids),
    }
    for column, log_probs in model.label_log_probs(states, mask).items():
        labels = model.label_ids(column, rows[column])
        found[column] = F.cross_entropy(log_probs, labels, label_smoothing=args.label_smoothing)
    return found


def ctc_loss(model: Token2Text, states: torch.Tensor, mask: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
    """Per token; a text with more tokens than its speech has states counts 0."""
    tokens = (text_ids != IGNORED).sum(1) - 1  # CTC needs no END
    log_probs = model.ctc(states).log_softmax(-1).transpose(0, 1)
    targets = text_ids[:, :-1].clamp(min=PAD)
    return F.ctc_loss(log_probs, targets, mask.sum(1), tokens, blank=PAD, zero_infinity=True)


def train(
    model: Token2Text, rows: datasets.Dataset, args: argparse.Namespace, device: str | torch.device
) -> dict[str, float]:
    """Train in place; returns the last logged means of the losses."""
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    model.to(device).train()
    weights = {"text": 1.0, "ctc": args.ctc_weight} | dict.fromkeys(args.labels, args.label_weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.1)
    lengths = [len(codes) for codes in rows[CODES_COLUMN]]
    start, done, to_come, recent, means = time.time(), 0, [], [], {}
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    path = Path(args.output_dir) / CHECKPOINT
    if path.exists():
        done, to_come, recent = load_checkpoint(path, parts, rng)
        logger.info("going on after step %d", done)
    for step in tqdm(range(done + 1, args.steps + 1), "token2text", initial=done, total=args.steps, mininterval=30):
        to_come = to_come or epoch_batches(lengths, args.batch_size, rng)
        found = losses(model, rows[to_come.pop(0)], args, rng)
        optimizer.zero_grad()
        sum(weights[name] * loss for name, loss in found.items()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append({name: loss.item() for name, loss in found.items()})
        if step % args.logging_steps == 0 or step == args.steps:
            means = {name: float(np.mean([losses[name] for losses in recent])) for name in found}
            shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            logger.info("token2text step %d: loss of %s, %.0f s", step, shown, time.time() - start)
            recent.clear()
        if step % args.save_steps == 0 and step < args.steps:
            save_checkpoint(path, args, parts, rng, (step, to_come, recent))
    return means


def save_checkpoint(path: Path, args: argparse.Namespace, parts: dict, rng: np.random.Generator, at: tuple) -> None:
    """All that training depends on; whole or not at all."""
    saved = {
        "args": vars(args),
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "numpy": rng.bit_generator.state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),  # empty without a GPU
        "at": at,
    }
    torch.save(saved, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def load_checkpoint(path: Path, parts: dict, rng: np.random.Generator) -> tuple[int, list, list]:
    """Puts `parts` and all random generators where they were; returns what `save_checkpoint` was given as `at`."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved["parts"][name])
    rng.bit_generator.state = saved["numpy"]
    torch.set_rng_state(saved["torch"])
    torch.cuda.set_rng_state_all(saved["cuda"])
    return saved["at"]


def check_resumable(args: argparse.Namespace) -> None:
    """ValueError where a checkpoint is in the way, or is another run's."""
    path = Path(args.output_dir) / CHECKPOINT
    if not path.exists():
        return
    if args.resume_from_checkpoint == "false":
        raise InputError(
            f"{path} is of a run that was stopped; go on with --resume_from_checkpoint true, or give another "
            "--output_dir"
        )
    before = torch.load(path, map_location="cpu", weights_only=True)["args"]
    changed = [name for name, value in vars(args).items() if name not in MAY_CHANGE and before.get(name) != value]
    if changed:
        told = ", ".join(f"--{name} {before.get(name)} before, {getattr(args, name)} now" for name in changed)
        raise InputError(f"{path} is of a run with other settings: {told}; give the same, or another --output_dir")


# --- Held-out rows ----------------------------------------------------------------------------------------


def evaluate(model: Token2Text, rows: datasets.Dataset, seed: int) -> dict[str, float]:
    """What the model is worth on held-out rows; see the module's docstring.

    Returns:
        "wer" and "wer_noisy" (edits over reference words; characters for languages written without spaces),
        "log_prob" and "log_prob_wrong_text" (nats per text token), "accuracy_<column>" of each column of labels.
    """
    model.eval()
    rng = np.random.default_rng(seed)
    rows = rows[:]
    texts, languages, codes = rows["text"], rows["language"], rows[CODES_COLUMN]
    noisy = with_noise(codes, TESTED_NOISE, model.config["num_codes"], rng)
    found = {
        name: word_errors(model, heard, texts, languages) for name, heard in (("wer", codes), ("wer_noisy", noisy))
    }
    found["log_prob"] = float(np.mean(model.score(codes, texts, languages)))
    # The next row's: another text, and of the same kind
    others = [*texts[1:], texts[0]], [*languages[1:], languages[0]]
    found["log_prob_wrong_text"] = float(np.mean(model.score(codes, *others)))
    for column in model.config["labels"]:
        parts = [model.labels(part)[column] for part in in_batches(codes)]
        guesses = [guess for part in parts for guess in part]
        right = [guess == str(value) for guess, value in zip(guesses, rows[column], strict=True)]
        found[f"accuracy_{column}"] = float(np.mean(right))
    return found


def in_batches(items: list) -> list[list]:
    return [items[first : first + BATCH_SIZE] for first in range(0, len(items), BATCH_SIZE)]


def word_errors(model: Token2Text, codes: list[list[int]], texts: list[str], languages: list[str]) -> float:
    hyps = [hyp for part in in_batches(codes) for hyp in model.transcribe(part)]
    errors = [error_rate(*item) for item in zip(texts, hyps, languages, strict=True)]
    return sum(error.edits for error in errors) / sum(error.ref_length for error in errors)


# --- The script -------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder, file or hub id with text and audio_codes")
    parser.add_argument("--split", default="train", help="of --dataset and --heldout_dataset")
    parser.add_argument("--heldout_dataset", help="rows to evaluate on; else a share of --dataset's texts")
    parser.add_argument("--heldout_share", type=float, default=0.02, help="of the different texts")
    parser.add_argument("--labels", nargs="*", default=[], help="columns that get a head, such as speaker")
    parser.add_argument("--output_dir", required=True, help="where the model goes")
    parser.add_argument("--num_codes", type=int, default=65_536, help="size of the codec's codebook")
    parser.add_argument("--vocab_size", type=int, default=1_000, help="of the text's byte-level BPE, from 258 on")
    parser.add_argument("--hidden_size", type=int, default=512, help="width")
    parser.add_argument("--num_heads", type=int, default=8, help="of attention")
    parser.add_argument("--encoder_layers", type=int, default=8, help="at 25 states a second")
    parser.add_argument("--decoder_layers", type=int, default=4, help="over the text")
    parser.add_argument("--dropout", type=float, default=0.1, help="in every layer")
    parser.add_argument("--steps", type=int, default=50_000, help="of the optimizer")
    parser.add_argument("--batch_size", type=int, default=32, help="clips a step")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="peak; one cycle with 10 %% of warm-up")
    parser.add_argument("--label_smoothing", type=float, default=0.1, help="of the text and the labels")
    parser.add_argument("--code_noise", type=float, default=0.3, help="random codes: up to this share of a batch's")
    parser.add_argument("--embedding_noise", type=float, default=0.2, help="in their own deviations; smooths")
    parser.add_argument("--ctc_weight", type=float, default=0.3, help="beside the text's 1")
    parser.add_argument("--label_weight", type=float, default=0.1, help="of each column of --labels")
    parser.add_argument("--logging_steps", type=int, default=200, help="how often losses are shown")
    parser.add_argument("--save_steps", type=int, default=1_000, help="how often to save what resuming needs")
    parser.add_argument(
        "--resume_from_checkpoint", choices=["true", "false"], default="false", help="go on, if stopped"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise, order and split")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    return parse_strictly(parser, argv)


def check(args: argparse.Namespace) -> None:
    check_at_least(
        args, num_codes=1, vocab_size=258, hidden_size=1, num_heads=1, encoder_layers=1, decoder_layers=1, steps=1
    )
    check_at_least(args, batch_size=1, logging_steps=1, save_steps=1)
    if args.hidden_size % args.num_heads:
        raise InputError(f"--hidden_size {args.hidden_size} must be a multiple of --num_heads {args.num_heads}")
    for name in ("dropout", "label_smoothing", "code_noise"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: give a share, from 0 up to below 1")
    for name in ("embedding_noise", "ctc_weight", "label_weight"):
        if not getattr(args, name) >= 0:
            raise InputError(f"--{name} {getattr(args, name)}: give 0 or more")
    if not args.learning_rate > 0:
        raise InputError(f"--learning_rate {args.learning_rate}: give a number above 0")


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    torch.set_flush_denormal(True)  # on a CPU, weights near zero cost a hundred times as much
    with bad_input_exits():
        check(args)
        device = pick_device(args.device)
        check_writable(Path(args.output_dir))
        check_resumable(args)
        rows = open_rows(args.dataset, args.split, args.labels)
        if args.heldout_dataset:
            heldout = open_rows(args.heldout_dataset, args.split, args.labels)
            rows = rows.filter(lambda text, seen=frozenset(heldout["text"]): text not in seen, input_columns="text")
        else:
            rows, heldout = split_by_text(rows, args.heldout_share, args.seed)
        model = new_token2text(rows, args.num_codes, args)
        for part in (rows, heldout):
            for codes in part[CODES_COLUMN]:
                model.pad([codes])  # codes of another codec are found before training
            for column in args.labels:
                model.label_ids(column, part[column])
    size = sum(weights.numel() for weights in model.parameters())
    logger.info("%d clips to train on, %d held out; %.1f M weights", len(rows), len(heldout), size / 1e6)
    train_losses = train(model, rows, args, device)
    model.save_pretrained(args.output_dir)
    (Path(args.output_dir) / CHECKPOINT).unlink(missing_ok=True)
    # As it is stored, in half precision
    found = evaluate(Token2Text.from_pretrained(args.output_dir, device), heldout, args.seed)
    logger.info("held out: %s", ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    write_run(args.output_dir, args=vars(args), losses=train_losses, heldout=found)


if __name__ == "__main__":
    main(parse_args())
