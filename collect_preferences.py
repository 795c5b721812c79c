r"""Make a page for a blind A/B listening test of clips, and read its answers back as preference pairs.

    python inference.py --model_name_or_path tiny/llasa --text_file texts.txt --num_samples 2 --output clips
    python collect_preferences.py --clips clips/sample.jsonl --output page.html
    python collect_preferences.py --read anna.jsonl ben.jsonl --pages page.key.jsonl --output pairs.jsonl

The page is one file: send it, open it in any browser, no server is needed. Pairs come in random order with the sides
at random, and some are planted: their better side is known, and whoever misses too many of them is left out. Beside it
stands page.key.jsonl, the key, which alone says what is what: keep it from the listeners, and for --read.

Formats, JSON Lines; relative paths start beside the file:

    --clips    {"text", "audio"} and optionally "codes", "ref_text" and "ref_codes": what inference.py writes. One
               file: two clips of one text are a pair. Two files: the first's clip of a text against the second's
    --pairs    {"text", "audio_a", "audio_b"} and optionally "id", "codes_a", "codes_b", "ref_text", "ref_codes",
               "speaker"
    --planted  {"text", "audio"} ("file_name" in an audiofolder), a good recording, of which a degraded copy is made;
               or {"text", "chosen_audio", "rejected_audio"}, a pair whose better side you know
    --read     {"page", "item", "rater", "choice", "plays", "seconds"}: what the page saves
    --output of --read: {"id", "text", "chosen_codes", "rejected_codes", "source": "human", "chosen_audio",
               "rejected_audio", "rater"}, a row for each answer but ties and planted pairs
"""

import argparse
import logging
import random
import sys
from pathlib import Path

from common.cli import (
    HelpFormatter,
    InputError,
    add_device,
    bad_input_exits,
    check_ranges,
    check_writable,
    parse_strictly,
    pick_device,
    run_script,
    set_up_logging,
    write_whole_text,
)
from common.resumable_file import write_json_lines
from metrics.comparison import aligned
from metrics.formatting import number, percent
from metrics.listening_page import build
from metrics.listening_pairs import add_flags, check_flags, draw_pairs
from metrics.preference_answers import (
    MIN_PLANTED,
    Rater,
    choices_by_item,
    clips_without_codes,
    encode_clips,
    judge_raters,
    krippendorff_alpha,
    pair_rows,
    percent_agreement,
    preferences,
    read_answers,
    read_keys,
    report_path,
    wins,
    write_report,
)
from speech.policy import DEFAULT_CODEC

logger = logging.getLogger("collect_preferences")

# --- The page ---------------------------------------------------------------------------------------------


def key_path(page: Path) -> Path:
    return page.with_suffix(".key.jsonl")


def make_page(args: argparse.Namespace) -> None:
    page_file = Path(args.output)
    with bad_input_exits():
        rng = random.Random(args.seed)
        pairs = draw_pairs(args.clips, args.pairs, args.num_pairs, args.planted, args.num_planted, rng)
        page, key = build(pairs, args.question, args.seed)
    write_whole_text(page_file, page)
    write_json_lines(key_path(page_file), key)
    num_planted = sum(pair.better is not None for pair in pairs)
    num_asked = len(pairs) - num_planted
    logger.info("%s: %d pairs and %d planted ones, %.1f MB", page_file, num_asked, num_planted, len(page) / 1e6)
    logger.info("%s: what is what. Keep it from the listeners, and for --read", key_path(page_file))


# --- The answers ------------------------------------------------------------------------------------------


def read_back(args: argparse.Namespace) -> dict:
    """Returns the report, as it stands beside --output."""
    with bad_input_exits():
        items = read_keys(args.pages)
        answers = read_answers(args.read, items)
        raters = judge_raters(answers, items, args.min_planted)
        kept = [rater.name for rater in raters if rater.kept]
        preferred = preferences(answers, items, kept)
        codes = encode_clips(clips_without_codes(preferred), args.codec_id, pick_device(args.device))
    choices = choices_by_item(answers, items, kept)
    report = {
        "raters": [vars(rater) for rater in raters],
        "pairs": len(preferred),
        "ties": sum(rater.ties for rater in raters if rater.kept),
        "items": len(choices),
        "items_with_two_raters": sum(len(item) > 1 for item in choices),
        "agreement": percent_agreement(choices),
        "krippendorff_alpha": krippendorff_alpha(choices),
        "wins": wins(preferred),
    }
    write_report(Path(args.output), report)
    log_report(report, raters, args)
    if not preferred:
        Path(args.output).unlink(missing_ok=True)  # with --overwrite: of other answers than the report
        logger.error("no pairs were written: no rater that is kept has preferred a clip")
        sys.exit(1)
    write_json_lines(Path(args.output), pair_rows(preferred, codes, source="human"))
    logger.info("%s: %d pairs, without %d ties", args.output, report["pairs"], report["ties"])
    return report


def log_report(report: dict, raters: list[Rater], args: argparse.Namespace) -> None:
    table = [["rater", "answers", "no difference", "planted right", ""]]
    for rater in raters:
        planted = f"{rater.right} of {rater.planted}"
        table.append(
            [rater.name, str(rater.answers), str(rater.ties), planted, "" if rater.kept else "left out"],
        )
    for line in aligned(table, right=range(1, 4)):
        logger.info(line)
    left_out = [rater.name for rater in raters if not rater.kept]
    if left_out:
        logger.info(
            "left out, below --min_planted %g, or less than half of the planted pairs answered: %s",
            *(args.min_planted, ", ".join(left_out)),
        )
    logger.info(
        "agreement on %d pairs with two or more raters: %s, Krippendorff's alpha %s",
        report["items_with_two_raters"],
        percent(report["agreement"]),
        number(report["krippendorff_alpha"]),
    )
    for source, count in report["wins"].items():
        logger.info("preferred %d of %d times: %s", count, sum(report["wins"].values()), source)


# --- The script -------------------------------------------------------------------------------------------


def check_args(args: argparse.Namespace) -> None:
    check_flags(args)
    check_ranges(args, {"min_planted": (0, True, 1, True)})
    if (args.read is None) != (args.pages is None):
        raise InputError("--read and --pages go together: answers, and the keys of their pages. Add the other")
    if args.read is not None and args.planted is not None:
        raise InputError("--planted is for a new page (got --read). Leave it out")
    output = Path(args.output)
    suffix = ".html" if args.read is None else ".jsonl"
    if output.suffix != suffix:
        raise InputError(f"--output: must be a {suffix} file (got {output}). Rename it")
    beside = key_path(output) if args.read is None else report_path(output)
    for path in (output, beside):
        if path.exists() and not args.overwrite:
            raise InputError(f"--output: {path} exists. Use another name, or replace it with --overwrite")
        if path.is_dir():
            raise InputError(f"--output: {path} is a folder. Use another name")
    check_writable(output.parent)


def main(args: argparse.Namespace) -> dict | None:
    with bad_input_exits():
        check_args(args)
    return read_back(args) if args.read else make_page(args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    source = add_flags(parser, num_pairs=40)
    source.add_argument("--read", nargs="+", metavar="FILE", help="answers that listeners have saved, to be read back")
    add = parser.add_argument
    add("--output", required=True, help="page to write (.html), or with --read the pairs (.jsonl)")
    add("--overwrite", action="store_true", help="replace an existing --output, and its key or report")
    answers = parser.add_argument_group("--read")
    answers.add_argument("--pages", nargs="+", metavar="FILE", help="keys (.key.jsonl) of the answered pages")
    answers.add_argument(
        "--min_planted",
        type=float,
        default=MIN_PLANTED,
        help="fraction of the planted pairs answered, at least half, that a rater must have right; others are left out",
    )
    answers.add_argument("--codec_id", default=DEFAULT_CODEC, help="codec that encodes clips whose codes are not known")
    add_device(answers, "device of the codec")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    set_up_logging("collect_preferences", "metrics")
    run_script(main, parse_args)
