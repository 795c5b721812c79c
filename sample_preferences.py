"""Make preferences by machine: sample several rollouts of each text, score them, pair the best with the worst.

    python sample_preferences.py --model_name_or_path tiny/llasa --dataset tiny/texts/train.jsonl \\
      --num_texts 200 --output pairs.jsonl
    python train.py --method dpo --model_name_or_path tiny/llasa --dataset pairs.jsonl --output_dir llasa-dpo

The two commands again, from llasa-dpo and with another --seed, are the next round of iterative DPO (docs/dpo.md).

The score of a rollout is the weighted sum of the rewards of --reward_config, each as it is, as in GRPO without
--multi_objective_aggregation normalize_then_sum. They read the columns that they read there: voice prompts, patterns of
pauses. Rollouts without an END or without codes are in no pair: as a pair's clip they would get an END that they never
had. With --max_wer so are those that Whisper understands worse: what is left differs in how it is said. A text whose
best and worst differ by less than --min_margin gives no pair. A reward that does not concern a text, such as that of
emphasis where no word is marked, counts nothing there.

An interrupted run is resumed by the same command; batches of texts have random numbers of their own, so the file is
the same to the last byte. Exit codes: 0 pairs were written; 1 there are none; 2 the input was wrong.
"""

import argparse
import logging
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from common.arithmetic import set_up_arithmetic
from common.averages import mean_of_known
from common.cli import (
    NOT_NEGATIVE,
    HelpFormatter,
    InputError,
    add_device,
    add_top_p,
    bad_input_exits,
    check_at_least,
    check_pairs_file,
    check_ranges,
    check_sampling,
    check_seed,
    check_writable,
    parse_strictly,
    pick_device,
    run_script,
    set_up_logging,
    settings_of,
)
from speech.tokens import MAX_COMPLETION_LENGTH, MAX_LENGTH

# Arguments that do not change the pairs: a resumed run may have other values of them
FREE_ARGUMENTS = ("output", "overwrite", "debug")

logger = logging.getLogger("sample_preferences")


# --- Texts ------------------------------------------------------------------------------------------------


def read_rows(args: argparse.Namespace, num_codes: int, needs_voice_prompt: bool) -> list[dict]:
    """The rows of --dataset, or --num_texts of them by chance: id, prompt, voice prompt, and what the rewards read.

    Args:
        needs_voice_prompt: whether a reward compares with the voice prompt, and so every row needs one.
    """
    from common.dataset_io import drawn_rows, load_any_dataset
    from training.rows import (
        REFERENCE_COLUMNS,
        check_tts_columns,
        columns_for_rewards,
        columns_of,
        prompt_of_row,
        row_for_rewards,
    )

    dataset = load_any_dataset(args.dataset, args.split)
    check_tts_columns(dataset, args.dataset, num_codes)
    for_rewards = columns_for_rewards(dataset, args.dataset)
    indices = drawn_rows(len(dataset), args.num_texts, args.seed)
    rows = []
    wanted = columns_of(dataset, "id", "text", "language", "speaker", *for_rewards).select(indices)
    for index, row in zip(indices, wanted, strict=True):
        row_id = str(index) if row.get("id") is None else str(row["id"])
        try:
            prompt, rewarded = prompt_of_row(row), row_for_rewards(row, for_rewards, needs_voice_prompt)
        except InputError as error:
            raise InputError(f"{args.dataset}, row {index}: {error}") from None
        voice = {name: row[name] for name in REFERENCE_COLUMNS if row.get(name)}
        if voice and row.get("speaker") is not None:  # of the prompt; without one the policy speaks as it likes
            voice["speaker"] = str(row["speaker"])
        rows.append({"id": row_id, "text": row["text"], "prompt": prompt, "voice": voice, "rewarded": rewarded})
    return rows


# --- Pairs ------------------------------------------------------------------------------------------------


def best_and_worst(scores: list[float], min_margin: float) -> tuple[int, int] | None:
    """Indices of the highest and the lowest score (the first, where several have it); NaN is no score.

    None where they are equal or differ by less than `min_margin`, or where there are fewer than two.

    >>> best_and_worst([0.2, 0.9, float("nan"), 0.1], min_margin=0.5)
    (1, 3)
    >>> best_and_worst([0.2, 0.3], min_margin=0.5)
    """
    scored = [i for i, score in enumerate(scores) if not math.isnan(score)]
    if len(scored) < 2:
        return None
    best, worst = max(scored, key=scores.__getitem__), min(scored, key=scores.__getitem__)
    margin = scores[best] - scores[worst]
    return (best, worst) if margin > 0 and margin >= min_margin else None


def weighted_scores(reward_functions: list, weights: list[float], columns: dict[str, list]) -> np.ndarray:
    """Σ weight × reward of each rollout, shape (rollouts,), as GRPO's: a reward that is None for one is left out.

    NaN where all of them are None.
    """
    from reward_models import values_of

    rewards = [values_of(function, log_metric=None, **columns) for function in reward_functions]
    rewards = np.array(rewards, dtype=np.float64)
    scores = np.nansum(np.asarray(weights, dtype=np.float64)[:, None] * rewards, axis=0)
    return np.where(np.isnan(rewards).all(axis=0), np.nan, scores)


def make_pairs(
    rows: list[dict], completions: list[list[int]], scores: np.ndarray, tokens, min_margin: float, rater: str
) -> tuple[list[dict], Counter]:
    """The pairs of a batch of rows, as docs/dpo.md describes them, and what became of each row.

    Args:
        completions, scores: of all rollouts, those of a row next to each other.
    """
    pairs, outcomes, group = [], Counter(), len(completions) // len(rows)
    for number, row in enumerate(rows):
        own = slice(number * group, (number + 1) * group)
        rollouts = [tokens.codes(ids) for ids in completions[own]]
        usable = [bool(codes) and not truncated for codes, truncated in rollouts]
        own_scores = [score if ok else math.nan for score, ok in zip(scores[own].tolist(), usable, strict=True)]
        chosen = best_and_worst(own_scores, min_margin)
        if chosen is None:
            outcomes["too_few" if np.isfinite(own_scores).sum() < 2 else "too_close"] += 1
            continue
        best, worst = chosen
        outcomes["pairs"] += 1
        pairs.append(
            {
                "id": row["id"],
                "text": row["text"],
                **row["voice"],
                "chosen_codes": rollouts[best][0],
                "rejected_codes": rollouts[worst][0],
                "chosen_score": own_scores[best],
                "rejected_score": own_scores[worst],
                "source": "machine",
                "rater": rater,
            }
        )
    return pairs, outcomes


# --- The script -------------------------------------------------------------------------------------------


def reward_model_paths(args: argparse.Namespace) -> dict[str, str | None]:
    """Hub id or folder of each model that rewards may need, by the name of its flag."""
    from speech.policy import DEFAULT_CODEC, recorded
    from speech.speaker_encoder import DEFAULT_SPEAKER_ENCODER
    from speech.whisper_checkpoint import DEFAULT_WHISPER

    policy = args.model_name_or_path
    return {
        "codec_id": args.codec_id or recorded(policy, "codec_id", DEFAULT_CODEC),
        "whisper": args.whisper or recorded(policy, "whisper", DEFAULT_WHISPER),
        "token2text": args.token2text,
        "speaker_encoder": args.speaker_encoder or DEFAULT_SPEAKER_ENCODER,
        "preference_model": args.preference_model,
    }


def digests(paths: dict[str, str | None], needed: set[str]) -> dict[str, str]:
    """Of the weights that the rewards need and that are on this disk, by flag."""
    from common.run_record import content_digest

    read = {name: path for name, path in paths.items() if path and name.removesuffix("_id") in needed}
    found = {name: content_digest(path) for name, path in read.items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def load_rewards(
    args: argparse.Namespace, config: dict, paths: dict[str, str | None], rows: list[dict], policy, device: str
) -> tuple[list, list[float], object]:
    """The reward functions of a config, their weights, and the `SpeechRolloutScorer` that they score with.

    Args:
        paths: of `reward_model_paths`.
    Raises:
        InputError: an unusable model, or --max_wer where no reward transcribes the rollouts.
    """
    from reward_models import build_rewards
    from training.models import load_rollout_scorer
    from training.recipes import ScriptArguments

    models = ScriptArguments(reward_config=args.reward_config, **paths)
    sampling = SimpleNamespace(device=device, num_generations=args.num_samples)
    languages = {row["rewarded"]["language"] for row in rows}
    scorer = load_rollout_scorer(models, sampling, config, languages, policy.tokenizer, policy.tokens)
    if args.max_wer is not None and scorer.whisper is None:
        raise InputError(f"--max_wer: no reward of {args.reward_config} transcribes the rollouts. Add whisper to it")
    return *build_rewards(config, scorer), scorer


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, num_samples=2, batch_size=1, max_length=1, max_completion_length=1, num_texts=1)
    check_sampling([args.temperature], args.top_p)
    if args.temperature == 0:
        raise InputError("--temperature: must be above 0, or all rollouts of a text are the same (got 0)")
    check_ranges(args, {"min_margin": NOT_NEGATIVE, "max_wer": NOT_NEGATIVE})
    check_seed(args.seed)
    check_pairs_file(args.output)


def main(args: argparse.Namespace) -> None:
    # Imported here: --help and bad flags need not wait for them
    from transformers import set_seed

    from common.resumable_file import ResumableFile
    from common.run_record import content_digest, short_digest
    from reward_models import load_config, models_needed, needs_voice_prompt
    from speech.policy import Policy, load_tokenizer

    set_up_logging("sample_preferences")
    set_up_arithmetic()
    with bad_input_exits():
        check_args(args)
        config = load_config(args.reward_config)
        device = pick_device(args.device)
        check_writable(Path(args.output).parent)
        _, tokens = load_tokenizer(args.model_name_or_path)
        rows = read_rows(args, tokens.num_codes, needs_voice_prompt(config, "tts"))
        run = settings_of(args, FREE_ARGUMENTS)
        run |= {"device": device, "reward": config, "weights": content_digest(args.model_name_or_path)}
        paths = reward_model_paths(args)
        run["reward_weights"] = digests(paths, models_needed(config, "tts"))
        output = ResumableFile(Path(args.output), run | {"texts": short_digest(rows)}, "pairs", args.overwrite)
        if output.finished:
            logger.info("%s: complete already, nothing to do", output.path)
            return
        policy = Policy.from_pretrained(args.model_name_or_path, device)
        policy.encode([row["prompt"] for row in rows], args.max_length)  # raises for a text too long
        reward_functions, weights, scorer = load_rewards(args, config, paths, rows, policy, device)

    done = output.finished_batches()
    step = max(1, args.batch_size // args.num_samples)
    starts = range(0, len(rows), step)
    bar = tqdm(starts[len(done) :], "sampling", initial=len(done), total=len(starts), disable=None)
    for start in bar:
        batch = rows[start : start + step]
        rollout_rows = [row for row in batch for _ in range(args.num_samples)]
        set_seed(int(np.random.SeedSequence([args.seed, start]).generate_state(1)[0]))
        completions = policy.answer(
            [row["prompt"] for row in rollout_rows],
            temperature=args.temperature,
            top_p=args.top_p,
            max_length=args.max_length,
            max_completion_length=args.max_completion_length,
            batch_size=args.batch_size,
        )
        columns = {name: [row["rewarded"][name] for row in rollout_rows] for name in rows[0]["rewarded"]}
        scores = weighted_scores(reward_functions, weights, {"completion_ids": completions, **columns})
        if args.max_wer is not None:
            wers = np.array([score.wer for score in scorer.rollouts.scores])
            scores = np.where(wers <= args.max_wer, scores, np.nan)
        pairs, outcomes = make_pairs(batch, completions, scores, tokens, args.min_margin, args.reward_config)
        done.append({"pairs": pairs, "outcomes": outcomes, "scores": scores.tolist()})
        output.add_batch(done[-1])

    pairs = [pair for batch in done for pair in batch["pairs"]]
    # A batch that an earlier version has written has no scores
    mean_score = mean_of_known(score for batch in done for score in batch.get("scores", []))
    outcomes = sum((Counter(batch["outcomes"]) for batch in done), Counter())
    logger.info(
        "%d texts × %d rollouts, mean score %.3f: %d pairs; left out: %d texts with a margin below %g, %d with fewer "
        "than two rollouts that end, have codes, earn a reward and are understood",
        *(len(rows), args.num_samples, mean_score, len(pairs)),
        *(outcomes["too_close"], args.min_margin, outcomes["too_few"]),
    )
    if not pairs:
        logger.error("nothing was written: no text gives a pair. Lower --min_margin, or raise --num_samples")
        sys.exit(1)
    output.finish(pairs)
    logger.info("%s", output.path)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="folder saved by train.py (LoRA too), or a Hub id")
    add("--dataset", required=True, help="texts, in any form of train.py's --dataset; voice prompts as there")
    add("--split", default="train", help="split of --dataset")
    add("--num_texts", type=int, help="so many of the texts, drawn by --seed (default: all)")
    add("--output", required=True, help="the .jsonl file of pairs")
    add("--overwrite", action="store_true", help="replace an --output of other settings or other texts")
    add("--reward_config", default="reward_models/whisper.json", help="JSON file of rewards and weights")
    add("--num_samples", type=int, default=8, help="number of rollouts of each text")
    add("--min_margin", type=float, default=0.1, help="least difference of the scores of a pair")
    help = "only rollouts of at most this WER are in pairs; 0: only melody and sound can differ (default: all)"
    add("--max_wer", type=float, help=help)
    add("--temperature", type=float, default=1.0, help="sampling temperature")
    add_top_p(parser)
    add("--max_length", type=int, default=MAX_LENGTH, help="tokens of prompt and speech together")
    add(
        "--max_completion_length",
        type=int,
        default=MAX_COMPLETION_LENGTH["tts"],
        help="speech codes of a rollout, 50 a second",
    )
    add("--batch_size", type=int, default=64, help="number of rollouts sampled at once; another one samples others")
    add("--codec_id", help="XCodec2, hub id or folder (default: the policy's run.json, else the hub's)")
    add("--whisper", help="Whisper of the reward (default: the policy's run.json, else large-v3)")
    add("--token2text", help="folder of the token-to-text model, for a reward that needs it")
    help = "x-vector model of the reward speaker_similarity, hub id or folder (default: microsoft/wavlm-base-plus-sv)"
    add("--speaker_encoder", help=help)
    add("--preference_model", help="folder of the preference model, for the reward preference")
    add_device(parser, "device")
    add("--seed", type=int, default=0, help="seed of the texts drawn and of the sampling")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    run_script(main, parse_args)
