"""Train the reward `preference`: which of two clips of a text is said better, from pairs of them.

    python make_preferences.py --dataset tiny/heldout --output made/pairs.jsonl
    python train_preference_model.py --pairs made/pairs.jsonl --whisper tiny/whisper.pt --output_dir preference_model
    python train.py --config configs/tiny.yaml --reward_config reward_models/preference.json \\
      --preference_model preference_model

--pairs takes one or more files of pairs: made (make_preferences.py), by machine (sample_preferences.py) and by people
(collect_preferences.py). A row has `text`, and its two clips as `chosen_audio` and `rejected_audio` (paths that start
beside the file) or, with --codec_id, as `chosen_codes` and `rejected_codes`, which are decoded: as the reward hears the
rollouts, so prefer them where there are both. Optional: `source`, `kind`, `speaker`.

The model (reward_models/preference.py) sees features of a frozen Whisper encoder, and the melody beside them: use the
Whisper that scores the rollouts later. The features are computed once and kept in --features_dir.

Loss: that of Bradley & Terry, −log sigmoid(r_chosen − r_rejected). Against a policy that exploits its weaknesses, as in
RRPO (arXiv 2512.04552): --label_smoothing keeps the scores apart by a few units at most, --mixup compares mixtures of a
pair's features, and --speaker_weight takes the speaker out of the model, where rows have one.

Differs from RRPO: there the model classifies emotions, and the mixup is of waveforms and adapts to their energy; here
both clips of a pair are mixed with each other, in the features, and the label is the mixture's. RRPO's adversarial
noise on the embeddings is left out.

Held-out pairs have texts that are not in the training pairs. Pair accuracy on them, by source and by kind, is logged
at every --save_steps and written to report.json. An interrupted run resumes with --resume_from_checkpoint true, and
ends with the weights of an uninterrupted run. Exit code 2: the input was wrong.
"""

import argparse
import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

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
    write_whole,
    write_whole_text,
)
from common.dataset_io import check_codes, check_texts, load_any_dataset
from common.run_record import content_digest, short_digest, write_run
from reward_models.preference import MELODY, WEIGHTS_FILE, PreferenceModel, with_pitch_features
from speech.audio import load_audio
from speech.codec import SpeechCodec
from speech.pitch import pitch_track
from speech.whisper_checkpoint import DEFAULT_WHISPER
from speech.whisper_scorer import WhisperScorer
from training.loop import CHECKPOINT, check_same_rows, checkpoint_to_resume, drawn_texts, text_key, train

logger = logging.getLogger("train_preference_model")

SIDES = ("chosen", "rejected")
CLIPS_AT_A_TIME = 32  # that are read, decoded and encoded together
REPORT_FILE = "report.json"


# --- The data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two clips of a text, the better one first, each by the file of its features."""

    text: str
    chosen: Path
    rejected: Path
    source: str
    kind: str | None
    speaker: str | None


@dataclass(frozen=True)
class Clip:
    """A clip that is not encoded yet: a name for its content, and what reads its waveform."""

    name: str
    codes: tuple[int, ...] | None
    path: Path | None


def read_rows(name: str, codec: SpeechCodec | None) -> list[tuple[dict, Clip, Clip]]:
    """The rows of a file of pairs, and the two clips of each.

    Raises:
        InputError: no such file, a missing column, text that is none, codes of another codec, or clips that are not
            there.
    """
    rows = load_any_dataset(name)
    check_texts(rows, "text", name)
    for column in ("source", "kind", "speaker", "chosen_audio", "rejected_audio"):
        check_texts(rows, column, name, optional=True)
    if codec is not None:
        for side in SIDES:
            check_codes(rows, f"{side}_codes", codec.codebook_size, name, optional=True)
    folder, read = Path(name).parent, []
    for index, row in enumerate(rows):
        if not row["text"].strip():
            raise InputError(f"{name}, row {index}: its text is empty. Fill it in, or drop the row")
        try:
            read.append((row, *(clip_of(row, side, folder, codec) for side in SIDES)))
        except InputError as error:
            raise InputError(f"{name}, row {index}: {error}") from None
    return read


def clip_of(row: dict, side: str, folder: Path, codec: SpeechCodec | None) -> Clip:
    codes, path = row.get(f"{side}_codes"), row.get(f"{side}_audio")
    if codec is not None and codes:
        return Clip(hashlib.sha256(json.dumps(codes).encode()).hexdigest(), tuple(codes), None)
    if not path:
        hint = ". Decode its codes with --codec_id" if codes else f". Add the path, or {side}_codes and --codec_id"
        raise InputError(f"no {side}_audio{hint}")
    if not (folder / path).is_file():
        raise InputError(f"{side}_audio: {folder / path} is no file. Paths start beside the file of pairs")
    with open(folder / path, "rb") as file:
        return Clip(hashlib.file_digest(file, "sha256").hexdigest(), None, folder / path)


def encode_clips(clips: list[Clip], whisper: WhisperScorer, codec: SpeechCodec | None, folder: Path) -> set[str]:
    """Write `with_pitch_features` of each clip that has no features yet, float16, to `folder`/<name>.npy.

    Returns:
        The names of the clips that have none: unreadable, silent or not finite.
    """
    missing = [
        clip for clip in {clip.name: clip for clip in clips}.values() if not (folder / f"{clip.name}.npy").exists()
    ]
    failed = set()
    bar = tqdm(total=len(missing), desc="features", mininterval=30, disable=None)
    for first in range(0, len(missing), CLIPS_AT_A_TIME):
        batch = missing[first : first + CLIPS_AT_A_TIME]
        wavs = read_waveforms(batch, codec)
        for clip, wav, features in zip(batch, wavs, whisper.encode(wavs), strict=True):
            if features is None:
                failed.add(clip.name)
                continue
            array = with_pitch_features(features, pitch_track(wav)).half().cpu().numpy()
            write_whole(folder / f"{clip.name}.npy", partial(save_array, array=array))
        bar.update(len(batch))
    bar.close()
    return failed


def save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to a name
        np.save(file, array)


def read_waveforms(clips: list[Clip], codec: SpeechCodec | None) -> list[np.ndarray]:
    """Those of a batch of clips; empty ones where a file cannot be read."""
    coded = [clip for clip in clips if clip.codes is not None]
    decoded = dict(zip(coded, codec.decode([list(clip.codes) for clip in coded]) if coded else [], strict=True))
    wavs = []
    for clip in clips:
        if clip in decoded:
            wavs.append(decoded[clip])
            continue
        try:
            wavs.append(load_audio(clip.path))
        except InputError as error:
            logger.warning("%s", error)
            wavs.append(np.zeros(0, np.float32))
    return wavs


def read_pairs(
    names: list[str],
    whisper: WhisperScorer,
    codec: SpeechCodec | None,
    folder: Path,
    heldout_texts: frozenset[str] = frozenset(),
) -> list[Pair]:
    """The pairs of these files, with features in `folder`; those with a clip that has none are left out and counted.

    Args:
        heldout_texts: `text_key`s, whose pairs are left out and counted too.
    Raises:
        InputError: see `read_rows`; or no pair is left.
    """
    given = [row for name in names for row in read_rows(name, codec)]
    rows = [row for row in given if text_key(row[0]["text"]) not in heldout_texts]
    if not rows:
        raise InputError("--heldout_pairs: has every text of --pairs. Use other texts")
    if len(rows) < len(given):
        logger.info("%d of %d pairs left out: their texts are held out", len(given) - len(rows), len(given))
    folder.mkdir(parents=True, exist_ok=True)
    failed = encode_clips([clip for _, *clips in rows for clip in clips], whisper, codec, folder)
    pairs, equal = [], 0
    for row, chosen, rejected in rows:
        if chosen.name == rejected.name:
            equal += 1
        elif not {chosen.name, rejected.name} & failed:
            files = (folder / f"{clip.name}.npy" for clip in (chosen, rejected))
            source = row.get("source") or "not stated"
            pairs.append(Pair(row["text"], *files, source, row.get("kind"), row.get("speaker")))
    left_out = f"{equal} of equal clips, {len(rows) - len(pairs) - equal} with a clip that is unreadable or silent"
    if not pairs:
        raise InputError(f"{', '.join(names)}: no pair can be used: {left_out}")
    if len(pairs) < len(rows):
        logger.warning("%s: %d of %d pairs left out: %s", ", ".join(names), len(rows) - len(pairs), len(rows), left_out)
    return pairs


def split_pairs(pairs: list[Pair], heldout_frac: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs without a common text."""
    heldout_texts = drawn_texts([pair.text for pair in pairs], heldout_frac, seed)
    return (
        [pair for pair in pairs if text_key(pair.text) not in heldout_texts],
        [pair for pair in pairs if text_key(pair.text) in heldout_texts],
    )


def features_of(path: Path) -> torch.Tensor:
    """float32, shape (frames, width + 3)."""
    return torch.from_numpy(np.load(path).astype(np.float32))


# --- Training ---------------------------------------------------------------------------------------------


def preference_loss(margins: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """−p log σ(margin) − (1 − p) log σ(−margin), where p is the target brought by the smoothing ε into [ε, 1 − ε].

    It is least at the margin ln(p / (1 − p)): for ε = 0.1 and a plain pair (target 1) at 2.197, without ε at infinity.

    Args:
        margins: r_chosen − r_rejected, shape (batch,).
        targets: how sure it is that the first is preferred, 1 for a plain pair, shape (batch,).
    """
    p = targets * (1 - label_smoothing) + (1 - targets) * label_smoothing
    return F.binary_cross_entropy_with_logits(margins, p)


def mixed(chosen: torch.Tensor, rejected: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of features, (1 − share) of each with `share` of the other, which is stretched to its length.

    At a share of 0 it is the pair; at 0.5 two equal mixtures, if the clips have one length, and no preference.
    """

    def stretched(features: torch.Tensor, length: int) -> torch.Tensor:
        return F.interpolate(features.T[None], size=length, mode="linear", align_corners=True)[0].T

    return (
        (1 - share) * chosen + share * stretched(rejected, len(chosen)),
        (1 - share) * rejected + share * stretched(chosen, len(rejected)),
    )


def losses(
    model: PreferenceModel, pairs: list[Pair], args: argparse.Namespace, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """The losses of a batch, scalars: "preference", and "speaker" where the model knows speakers."""
    shares = np.zeros(len(pairs))
    if args.mixup:
        shares = rng.beta(args.mixup, args.mixup, len(pairs))
        shares = np.minimum(shares, 1 - shares)  # the first is the better one still
    sides = [
        mixed(features_of(pair.chosen), features_of(pair.rejected), share)
        for pair, share in zip(pairs, shares.tolist(), strict=True)
    ]
    texts = [pair.text for pair in pairs]
    pooled = model.pooled([chosen for chosen, _ in sides] + [rejected for _, rejected in sides], 2 * texts)
    better, worse = model.scores(pooled).chunk(2)
    targets = torch.tensor(1 - shares, dtype=torch.float32, device=model.device)
    batch_losses = {"preference": preference_loss(better - worse, targets, args.label_smoothing)}
    if has_speaker_branch(model, args):
        numbers = speaker_numbers(model, 2 * pairs)
        total = F.cross_entropy(model.speaker_logits(pooled), numbers, ignore_index=-1, reduction="sum")
        batch_losses["speaker"] = total / (numbers >= 0).sum().clamp(min=1)  # 0 in a batch without a known speaker
    return batch_losses


def has_speaker_branch(model: PreferenceModel, args: argparse.Namespace) -> bool:
    """Whether there are speakers to take out of the model."""
    return args.speaker_weight > 0 and len(model.config["speakers"]) > 1


def speaker_numbers(model: PreferenceModel, pairs: list[Pair]) -> torch.Tensor:
    """Index of each pair's speaker, shape (pairs,); −1 for an unknown one."""
    known = model.config["speakers"]
    numbers = [known.index(pair.speaker) if pair.speaker in known else -1 for pair in pairs]
    return torch.tensor(numbers, device=model.device)


@torch.inference_mode()
def set_centre(model: PreferenceModel, pairs: list[Pair]) -> None:
    """Let the mean score of the clips of the training pairs be 0."""
    model.eval()
    model.centre.zero_()
    model.centre.fill_(float(np.mean(pair_scores(model, pairs))))


# --- Held-out pairs ---------------------------------------------------------------------------------------


def pair_scores(model: PreferenceModel, pairs: list[Pair]) -> np.ndarray:
    """Scores of the better and the worse clip of each pair, shape (pairs, 2)."""
    scores = []
    for first in range(0, len(pairs), CLIPS_AT_A_TIME):
        batch = pairs[first : first + CLIPS_AT_A_TIME]
        features = [features_of(path) for pair in batch for path in (pair.chosen, pair.rejected)]
        scores += model.score(features, [pair.text for pair in batch for _ in SIDES])
    return np.array(scores).reshape(-1, 2)


@torch.inference_mode()
def evaluate(model: PreferenceModel, pairs: list[Pair], args: argparse.Namespace) -> dict:
    """Of held-out pairs: how many are ordered rightly (a tie is not), of all, by source and by kind, and by speaker.

    Returns:
        "pairs", "accuracy", "margin" (mean of r_chosen − r_rejected), "by_source", "by_kind" and "by_speaker"
        ({name: {"pairs", "accuracy", "margin"}}); where the model knows speakers, "speaker_accuracy" of the head that
        is to be fooled and "speaker_chance", the share of the most frequent one.
    """
    model.eval()
    scores = pair_scores(model, pairs)
    margins = scores[:, 0] - scores[:, 1]

    def summary(chosen: list[bool]) -> dict:
        own = margins[np.array(chosen)]
        return {"pairs": len(own), "accuracy": float(np.mean(own > 0)), "margin": float(np.mean(own))}

    report = summary([True] * len(pairs))
    for name in ("source", "kind", "speaker"):
        values = [getattr(pair, name) for pair in pairs]
        known = sorted(set(values) - {None})
        report[f"by_{name}"] = {value: summary([value == other for other in values]) for value in known}
    numbers = speaker_numbers(model, pairs)
    if has_speaker_branch(model, args) and (numbers >= 0).any():
        pooled = []
        for first in range(0, len(pairs), CLIPS_AT_A_TIME):
            batch = pairs[first : first + CLIPS_AT_A_TIME]
            pooled.append(model.pooled([features_of(pair.chosen) for pair in batch], [pair.text for pair in batch]))
        right = model.speaker_logits(torch.cat(pooled)).argmax(dim=1) == numbers
        report["speaker_accuracy"] = float(right[numbers >= 0].float().mean())
        report["speaker_chance"] = max(Counter(numbers[numbers >= 0].tolist()).values()) / int((numbers >= 0).sum())
    return report


def shown(report: dict) -> str:
    """A report as a line of the log."""
    parts = [f"accuracy {report['accuracy']:.3f} of {report['pairs']} pairs"]
    for name in ("by_source", "by_kind", "by_speaker"):
        parts += [f"{value} {part['accuracy']:.3f} of {part['pairs']}" for value, part in report[name].items()]
    if "speaker_accuracy" in report:
        parts.append(f"speaker told {report['speaker_accuracy']:.3f} (chance {report['speaker_chance']:.3f})")
    return "  ".join(parts)


# --- The script -------------------------------------------------------------------------------------------


def new_model(pairs: list[Pair], whisper: WhisperScorer, args: argparse.Namespace) -> PreferenceModel:
    """An untrained model for the features of this Whisper, with the speakers of the pairs."""
    torch.manual_seed(args.seed)
    return PreferenceModel(
        {
            "width": whisper.model.dims.n_audio_state,
            "whisper": whisper.fingerprint(),
            "melody": MELODY,
            "speakers": sorted({pair.speaker for pair in pairs} - {None}),
            "hidden_size": args.hidden_size,
            "num_layers": args.num_layers,
            "num_heads": args.num_heads,
            "dropout": args.dropout,
        }
    )


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, hidden_size=2, num_layers=1, num_heads=1, steps=1, batch_size=1, logging_steps=1, save_steps=1)
    check_seed(args.seed)
    if args.hidden_size % args.num_heads or args.hidden_size % 2:
        raise InputError(
            f"--hidden_size: must be even and a multiple of --num_heads {args.num_heads} (got {args.hidden_size})"
        )
    ranges = {
        "dropout": FRACTION,
        "label_smoothing": (0, True, 0.5, False),
        "mixup": NOT_NEGATIVE,
        "speaker_weight": NOT_NEGATIVE,
        "heldout_frac": (0, False, 1, False),
        "learning_rate": POSITIVE,
    }
    check_ranges(args, ranges)


def main(args: argparse.Namespace) -> None:
    set_up_logging("train_preference_model", timestamps=True)
    set_up_arithmetic()
    with bad_input_exits():
        check_args(args)
        device = pick_device(args.device)
        check_writable(Path(args.output_dir))
        checkpoint = checkpoint_to_resume(args, WEIGHTS_FILE)
        for name in [*args.pairs, *(args.heldout_pairs or [])]:
            if not Path(name).is_file():
                raise InputError(f"{name}: no such file of pairs. Make one with make_preferences.py")
        codec = SpeechCodec.from_pretrained(args.codec_id, device) if args.codec_id else None
        whisper = WhisperScorer(args.whisper, device)
        folder = Path(args.features_dir or Path(args.output_dir) / "features") / f"{whisper.fingerprint()}-{MELODY}"
        if codec is not None:
            folder = folder / (content_digest(args.codec_id) or args.codec_id.replace("/", "--"))
        heldout_rows = [row for name in args.heldout_pairs or [] for row in read_rows(name, codec)]
        heldout_texts = frozenset(text_key(row["text"]) for row, *_ in heldout_rows)
        pairs = read_pairs(args.pairs, whisper, codec, folder, heldout_texts)
        if args.heldout_pairs:
            heldout = read_pairs(args.heldout_pairs, whisper, codec, folder)
        else:
            pairs, heldout = split_pairs(pairs, args.heldout_frac, args.seed)
        rows_digest = short_digest(
            [pair.text, pair.speaker, pair.chosen.name, pair.rejected.name] for pair in [*pairs, *heldout]
        )
        check_same_rows(args, checkpoint, rows_digest)
        model = new_model(pairs, whisper, args)
    whisper_record = {"whisper": args.whisper, "fingerprint": whisper.fingerprint()}
    del whisper, codec  # room for the training
    num_weights = sum(weights.numel() for weights in model.parameters())
    logger.info("%d pairs to train on, %d held out; %.2f M weights", len(pairs), len(heldout), num_weights / 1e6)
    train_losses = train(
        "preference",
        model,
        [len(np.load(pair.chosen, mmap_mode="r")) for pair in pairs],
        lambda batch, rng: losses(model, [pairs[i] for i in batch], args, rng),
        {"preference": 1.0, "speaker": args.speaker_weight},
        args,
        device,
        logger,
        rows_digest,
        checkpoint,
        lambda: shown(evaluate(model, heldout, args)),
    )
    set_centre(model, pairs)
    model.save_pretrained(args.output_dir)
    give_usual_mode(Path(args.output_dir))
    report = evaluate(PreferenceModel.from_pretrained(args.output_dir, device), heldout, args)
    logger.info("held out: %s", shown(report))
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_whole_text(Path(args.output_dir) / REPORT_FILE, text)
    write_run(args.output_dir, args=vars(args), losses=train_losses, heldout=report, **whisper_record)
    (Path(args.output_dir) / CHECKPOINT).unlink(missing_ok=True)  # last: without it the run counts as finished


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--pairs", nargs="+", required=True, metavar="FILE", help="one or more files of pairs to train on")
    add("--heldout_pairs", nargs="+", metavar="FILE", help="pairs to evaluate on (default: those of --heldout_frac)")
    add("--heldout_frac", type=float, default=0.1, help="fraction of the distinct texts of --pairs to hold out")
    add("--whisper", default=DEFAULT_WHISPER, help="Whisper of the features, as in docs/rewards.md")
    add("--codec_id", help="XCodec2, hub id or folder, that decodes codes (default: the clips are audio files)")
    add("--output_dir", required=True, help="folder of the trained model")
    add("--features_dir", help="folder of the features, for several runs (default: features in --output_dir)")
    add("--hidden_size", type=int, default=128, help="width of the model")
    add("--num_layers", type=int, default=2, help="number of transformer layers over text and speech")
    add("--num_heads", type=int, default=4, help="number of attention heads")
    add("--dropout", type=float, default=0.1, help="dropout rate of every layer")
    add("--steps", type=int, default=1_000, help="number of optimizer steps")
    add("--batch_size", type=int, default=32, help="number of pairs per step")
    add("--learning_rate", type=float, default=5e-4, help="peak learning rate; one cycle with 10 %% of warm-up")
    add("--label_smoothing", type=float, default=0.1, help="fraction of the labels that is taken as wrong")
    add("--mixup", type=float, default=0.4, help="alpha of the Beta distribution of the mixtures; 0: no mixup")
    add("--speaker_weight", type=float, default=0.1, help="weight of the reversed loss of the speaker; 0: none")
    add("--logging_steps", type=int, default=50, help="number of steps between two lines of the log")
    add("--save_steps", type=int, default=200, help="number of steps between two checkpoints and their evaluations")
    add(
        "--resume_from_checkpoint",
        choices=["true", "false"],
        default="false",
        help="whether to resume the interrupted run in --output_dir",
    )
    add("--seed", type=int, default=0, help="random seed of the weights, the mixtures, the order, the held-out texts")
    add_device(parser, "where to train")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    run_script(main, parse_args)
