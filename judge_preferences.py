"""Make preferences by an audio model: two clips of a text, judged in both orders, become pairs for --method dpo.

    python inference.py --model_name_or_path tiny/llasa --text_file tiny/texts/heldout.txt --num_samples 2 \\
      --max_length 240 --output runs/judged/clips
    python judge_preferences.py --clips runs/judged/clips/sample.jsonl --judge_url http://localhost:8000/v1 \\
      --judge_model Qwen/Qwen2.5-Omni-7B --output runs/judged/pairs.jsonl

The judge is any model that hears, behind an endpoint with OpenAI's chat completions (OpenAI, vLLM, …). It is asked
which of two clips is better, then again with the clips swapped. Both times the same clip: a pair. Otherwise, where it
hears no difference, or where the answer is no letter, the pair is dropped and counted: such judges often prefer a place
rather than a clip (arXiv 2507.12705). Planted pairs, whose better side is known, tell whether it hears anything at all.

The key is read from the environment variable OPENAI_API_KEY only; it is in no file and no log. Clips are sent to
--judge_url, at one loudness. --clips, --pairs and --planted are those of collect_preferences.py.

An interrupted run is resumed by the same command; a pair that is judged is not asked about again. Beside --output
stands a report, pairs.report.json. Exit codes: 0 pairs were written; 1 there are none, or the judge does not answer; 2
the input was wrong, or the judge refuses it.
"""

import argparse
import logging
import os
import random
import re
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from tqdm import tqdm

from common.cli import (
    NOT_NEGATIVE,
    HelpFormatter,
    InputError,
    add_device,
    bad_input_exits,
    check_at_least,
    check_pairs_file,
    check_ranges,
    check_writable,
    parse_strictly,
    pick_device,
    run_script,
    set_up_logging,
    settings_of,
)
from common.resumable_file import ResumableFile
from common.run_record import content_digest, short_digest
from metrics.chat_judge import ANSWER, NO_DIFFERENCE, PROMPT, ChatJudge, JudgeUnavailableError
from metrics.formatting import percent
from metrics.listening_page import at_level, sound_of
from metrics.listening_pairs import ClipPair, add_flags, check_flags, draw_pairs
from metrics.preference_answers import MIN_PLANTED, encode_clips, pair_rows, wins, write_report
from speech.audio import wav_bytes
from speech.policy import DEFAULT_CODEC

# Arguments that do not change the pairs: a resumed run may have other values of them
FREE_ARGUMENTS = ("output", "overwrite", "debug", "judge_url", "num_workers", "timeout_s", "device")
FREE_ARGUMENTS += ("price_per_million_input", "price_per_million_output")

MAX_TIMEOUT_S = 86_400.0  # of one answer: a day

logger = logging.getLogger("judge_preferences")


# --- Judgements -------------------------------------------------------------------------------------------


def verdict(first: str | None, swapped: str | None) -> tuple[str, int | None]:
    """What two answers come to: "pair" and the better side, or why there is none.

    Args:
        first, swapped: the letter of the answer to the clips as they are, and with their sides swapped.

    >>> verdict("A", "B"), verdict("B", "A"), verdict("A", "A")
    (('pair', 0), ('pair', 1), ('disagrees', None))
    >>> verdict("A", "C"), verdict("C", None)
    (('tie', None), ('unreadable', None))
    """
    if first is None or swapped is None:
        return "unreadable", None
    if NO_DIFFERENCE in (first, swapped):
        return "tie", None
    return ("pair", "AB".index(first)) if first != swapped else ("disagrees", None)


def judge_all(
    judge: ChatJudge, pairs: list[ClipPair], output: ResumableFile, num_workers: int, seed: int
) -> list[list[dict]]:
    """The two replies to each pair, from what an interrupted run left and from the judge.

    Raises:
        InputError, JudgeUnavailableError: the judge's; what it has judged is kept in `output`.
    """
    replies = {batch["pair"]: batch["replies"] for batch in output.finished_batches()}
    sounding = threading.Lock()  # Praat, which hurries planted copies, has one random generator

    def judge_pair(number: int) -> list[dict]:
        pair = pairs[number]
        with sounding:
            noise = np.random.default_rng([seed, number])
            first, second = (wav_bytes(at_level(sound_of(clip, noise))) for clip in pair.clips)
        return [vars(judge.compare(pair.text, *order)) for order in ((first, second), (second, first))]

    todo = [number for number in range(len(pairs)) if number not in replies]
    pool = ThreadPoolExecutor(num_workers)
    try:
        futures = {pool.submit(judge_pair, number): number for number in todo}
        bar = tqdm(as_completed(futures), "judging", initial=len(replies), total=len(pairs), disable=None)
        for future in bar:
            number = futures[future]
            replies[number] = future.result()
            output.add_batch({"pair": number, "replies": replies[number]})
    finally:
        judge.stopped.set()
        pool.shutdown(cancel_futures=True)
    return [replies[number] for number in range(len(pairs))]


def report_of(pairs: list[ClipPair], replies: list[list[dict]], args: argparse.Namespace) -> dict:
    """Counts and rates of all judgements; planted pairs count among those asked about only in tokens and cost."""
    asked, planted, letters = Counter(), Counter(), Counter()
    for pair, both in zip(pairs, replies, strict=True):
        outcome, side = verdict(*(reply["letter"] for reply in both))
        if pair.better is None:
            asked[outcome] += 1
            letters.update(reply["letter"] for reply in both)
        else:
            planted[side == pair.better] += 1
    consistent, chosen = asked["pair"] + asked["disagrees"], letters["A"] + letters["B"]
    all_replies = [reply for both in replies for reply in both]
    report = {
        "judge_model": args.judge_model,
        "question": args.question,
        "asked": asked.total(),
        "pairs": asked["pair"],
        "disagrees": asked["disagrees"],
        "ties": asked["tie"],
        "unreadable": asked["unreadable"],
        "consistency": asked["pair"] / consistent if consistent else None,
        "first_chosen": letters["A"] / chosen if chosen else None,
        "planted": planted.total(),
        "planted_right": planted[True],
        "requests": len(all_replies),
        "input_tokens": total(all_replies, "input_tokens"),
        "output_tokens": total(all_replies, "output_tokens"),
    }
    return report | {"cost": cost_of(report, args.price_per_million_input, args.price_per_million_output)}


def total(replies: list[dict], name: str) -> int | None:
    """Sum over replies; None where the server has not counted all."""
    counts = [reply[name] for reply in replies]
    return None if None in counts else sum(counts)


def cost_of(report: dict, price_input: float | None, price_output: float | None) -> float | None:
    """Tokens times prices, in the prices' currency; None without prices or counts.

    >>> cost_of({"input_tokens": 2_000_000, "output_tokens": 1_000}, 2.5, 10.0)  # 5 + 0.01
    5.01
    """
    tokens = (report["input_tokens"], report["output_tokens"])
    if None in tokens or (price_input is None and price_output is None):
        return None
    return sum(count * (price or 0.0) for count, price in zip(tokens, (price_input, price_output), strict=True)) / 1e6


def log_report(report: dict, unread: list[str]) -> None:
    logger.info(
        "%d pairs asked about: %d judged alike in both orders; dropped: %d where the judge disagrees with itself, %d "
        "ties, %d unreadable answers",
        *(report["asked"], report["pairs"], report["disagrees"], report["ties"], report["unreadable"]),
    )
    logger.info(
        "consistency %s (of pairs with a choice in both orders); the first clip is chosen %s of the time",
        *(percent(report["consistency"]), percent(report["first_chosen"])),
    )
    for source, count in report["wins"].items():
        logger.info("preferred %d of %d times: %s", count, report["pairs"], source)
    if unread:
        logger.warning("not a letter, such as %r. A model that thinks first needs a higher --max_tokens", unread[0])
    if report["planted"]:
        logger.info("planted pairs right: %d of %d", report["planted_right"], report["planted"])
        if report["planted_right"] < MIN_PLANTED * report["planted"]:
            logger.warning("a listener with so few right would be left out: do not train on these pairs unheard")
    tokens = [report[name] for name in ("input_tokens", "output_tokens")]
    counted = "not counted by the server" if None in tokens else "{:,} in, {:,} out".format(*tokens)
    cost = "" if report["cost"] is None else f"; cost {report['cost']:.4g} in the prices' currency"
    logger.info("%d requests, tokens: %s%s", report["requests"], counted, cost)


# --- The script -------------------------------------------------------------------------------------------


def api_key() -> str | None:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):  # http.client's error would show it
        raise InputError(
            "OPENAI_API_KEY: has characters that are in no key. Set it anew, or unset it if none is needed"
        )
    return key or None


def open_output(args: argparse.Namespace, pairs: list[ClipPair]) -> tuple[ResumableFile, str]:
    """--output, and a digest of the pairs; InputError if it has pairs of other settings or of other clips."""
    sounds = {path: content_digest(path) for path in sorted({clip.audio for pair in pairs for clip in pair.clips})}
    listed = [
        [pair.id, pair.text, pair.better, pair.ref_text, pair.ref_codes]
        + ([pair.speaker] if pair.speaker else [])  # without one the digest is that of earlier versions
        + [[sounds[clip.audio], clip.codes, clip.degraded] for clip in pair.clips]
        for pair in pairs
    ]
    run = settings_of(args, FREE_ARGUMENTS)
    run |= {"prompt": [PROMPT, ANSWER], "drawn": short_digest(listed)}
    return ResumableFile(Path(args.output), run, "pairs", args.overwrite), run["drawn"]


def main(args: argparse.Namespace) -> dict | None:
    """Returns the report, as it stands beside --output; None where nothing was left to do."""
    set_up_logging("judge_preferences", "metrics")
    with bad_input_exits():
        check_args(args)
        check_writable(Path(args.output).parent)
        rng = random.Random(args.seed)
        pairs = draw_pairs(args.clips, args.pairs, args.num_pairs, args.planted, args.num_planted, rng)
        output, digest = open_output(args, pairs)
        if output.finished:
            logger.info("%s: complete already, nothing to do", output.path)
            return None
        without = {clip.audio for pair in pairs if pair.better is None for clip in pair.clips if not clip.codes}
        codes = encode_clips(sorted(without), args.codec_id, pick_device(args.device))
        key = api_key()
        judge = ChatJudge(args.judge_url, args.judge_model, args.question, args.max_tokens, args.timeout_s, key)
        try:
            replies = judge_all(judge, pairs, output, args.num_workers, args.seed)
        except JudgeUnavailableError as error:
            logger.error("%s. What it has judged is kept: the same command resumes", error)
            sys.exit(1)

    preferred = []
    for pair, both in zip(pairs, replies, strict=True):
        _, side = verdict(*(reply["letter"] for reply in both))
        if pair.better is None and side is not None:
            row = {**vars(pair), "clips": [vars(clip) for clip in pair.clips], "page": digest}
            preferred.append((args.judge_model, row, side))
    report = report_of(pairs, replies, args) | {"wins": wins(preferred)}
    write_report(output.path, report)
    log_report(report, [reply["text"] for both in replies for reply in both if reply["letter"] is None])
    if not preferred:
        logger.error("nothing was written: the judge has preferred no clip in both orders")
        sys.exit(1)
    output.finish(pair_rows(preferred, codes, source="machine"))
    logger.info("%s: %d pairs", output.path, len(preferred))
    return report


def check_args(args: argparse.Namespace) -> None:
    check_flags(args)
    check_at_least(args, num_workers=1, max_tokens=1)
    check_ranges(args, {"price_per_million_input": NOT_NEGATIVE, "price_per_million_output": NOT_NEGATIVE})
    check_ranges(args, {"timeout_s": (0, False, MAX_TIMEOUT_S, True)})
    try:
        url = urlsplit(args.judge_url)
        _ = url.port
    except ValueError as error:
        raise InputError(f"--judge_url: {error} (got {args.judge_url})") from error
    if url.scheme not in ("http", "https") or not url.netloc or re.search(r"\s", args.judge_url):
        raise InputError(f"--judge_url: must begin with http:// or https://, without spaces (got {args.judge_url})")
    if url.query or url.username:  # argv is recorded
        raise InputError(
            "--judge_url: holds a query or a user name. Give the key in OPENAI_API_KEY, the URL without it"
        )
    check_pairs_file(args.output)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_flags(parser, num_pairs=None)
    add = parser.add_argument
    add("--judge_url", required=True, help="endpoint, what stands before /chat/completions: http://localhost:8000/v1")
    add("--judge_model", required=True, help="name of the audio model, as the endpoint knows it")
    add("--output", required=True, help="the .jsonl file of pairs")
    add("--overwrite", action="store_true", help="replace an --output of other settings or other clips")
    add("--max_tokens", type=int, default=256, help="longest answer; raise it for a model that thinks first")
    add("--num_workers", type=int, default=4, help="number of pairs judged at once, each by one request at a time")
    add("--timeout_s", type=float, default=120.0, help="seconds to wait for an answer; a late one is asked for again")
    add("--price_per_million_input", type=float, help="price of a million input tokens, to print the cost")
    add("--price_per_million_output", type=float, help="price of a million output tokens")
    add("--codec_id", default=DEFAULT_CODEC, help="codec that encodes clips whose codes are not known")
    add_device(parser, "device of the codec")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    run_script(main, parse_args)
