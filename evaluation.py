r"""Measure checkpoints on held-out texts: error rates by outside judges, prosody, failures, speed, a page to hear.

    python evaluation.py --models SFT=tiny/llasa GRPO=llasa-grpo-exp1 --texts tiny/texts/heldout.txt \
      --seeds 0 1 2 --judge tiny/whisper.pt pocketsphinx --best_of 4 --output_dir report

    python evaluation.py --task asr --models SFT=tiny/llasa_asr RL=llasa-asr --clips tiny/asr/heldout.parquet \
      --temperature 0 --long_s 3 --output_dir report

With --task asr the checkpoints transcribe --clips instead: evaluation_asr.py says what is measured.
Writes results.json (every clip), results.md (the table) and report.html (one page with players, no other file
needed), anew after each row. The texts, one row of numbers per checkpoint and temperature:

    .txt    one text a line
    .jsonl  {"text": …} and, if there are any, "id", "language", "ref_audio" and "ref_text" (voice prompt), "audio"
            (a natural reading; an audiofolder's metadata.jsonl, with "file_name", will do)
    .lst    seed-tts-eval's meta.lst: id|ref_text|ref_audio|text, and |audio where there is a natural reading
"""

import argparse
import logging
from pathlib import Path

from common.cli import (
    HelpFormatter,
    InputError,
    bad_input_exits,
    check_at_least,
    check_sampling,
    check_writable,
    parse_strictly,
    pick_device,
)
from metrics import recognition, synthesis
from speech.policy import DEFAULT_CODEC, DEFAULT_WHISPER, MAX_COMPLETION_LENGTH
from speech.tokens import TASKS

logger = logging.getLogger(__name__)


# --- The script -------------------------------------------------------------------------------------------


def named_models(models: list[str]) -> dict[str, str]:
    """NAME=path, or a path that is its own name."""
    named = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals or "/" in name:  # a path may hold a =
            name = path = model
        if not name or not path or name in named:
            raise InputError(f"--models {model}: give NAME=path, each name once")
        named[name] = path
    return named


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, best_of=1, batch_size=1, max_length=1, max_completion_length=1, num_players=0)
    check_sampling(args.temperature, args.top_p)
    if (args.clips is None) == (args.task == "asr") or (args.texts is None) == (args.task == "tts"):
        raise InputError("--task tts takes --texts, --task asr takes --clips")
    for name in ("seeds", "temperature", "judge"):
        given = getattr(args, name) or []
        if len(set(given)) < len(given):
            raise InputError(f"--{name}: one is given twice")


def main(args: argparse.Namespace) -> dict:
    """Returns what results.json holds."""
    with bad_input_exits():
        check_args(args)
        models = named_models(args.models)
        check_writable(Path(args.output_dir))
        args.device = pick_device(args.device)
    return (recognition.evaluate if args.task == "asr" else synthesis.evaluate_speech)(args, models)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="[NAME=]PATH", help="checkpoints; the first is the baseline")
    add("--task", choices=TASKS, default="tts", help="tts: text to speech; asr: speech to text")
    add("--texts", help="tts: a .txt, .jsonl or .lst file, see above")
    add("--clips", help="asr: a data set of create_dataset.py, or of audio and text; text '' where nothing is said")
    add("--split", default="train", help="of --clips")
    add("--long_s", type=float, default=20.0, help="asr: clips above so many seconds are reported apart")
    add("--max_completion_length", type=int, default=MAX_COMPLETION_LENGTH, help="asr: tokens of a transcript")
    add(
        "--references", help="a .jsonl or .lst file with natural readings: rows for them, as they are and resynthesised"
    )
    add("--output_dir", default="evaluation", help="folder of results.json, results.md and report.html")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each text is said once for each seed")
    add(
        "--judge",
        nargs="+",
        action="extend",
        help="Whisper names or paths, and pocketsphinx; default: the reward's Whisper",
    )
    add(
        "--temperature",
        type=float,
        nargs="+",
        help="several give a row each; 0 is greedy. Default: 1 for tts, 0 for asr",
    )
    add(
        "--cycle",
        action="store_true",
        help='tts: each checkpoint reads its own speech back, as the judge "itself"; for models of --task both',
    )
    add("--token2text", help="tts: a folder of train_token2text.py; adds its score of the codes, DiffRO's reward")
    add("--best_of", type=int, default=1, help="from 2 on: a row for the baseline's best of so many, by the reward")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest codes that make up this share")
    add("--max_length", type=int, default=2048, help="tokens of prompt and answer together")
    add("--batch_size", type=int, default=16, help="clips sampled at a time")
    add("--num_players", type=int, default=8, help="texts, or clips, to listen to on the page")
    add("--language", default="en", help="of texts that do not say")
    add("--device", default="auto", help="auto is a GPU where there is one")
    add("--codec_id", help=f"default: what the first model's run.json says, else {DEFAULT_CODEC}")
    add("--whisper", help=f"the reward's; default: what the first model's run.json says, else {DEFAULT_WHISPER}")
    args = parse_strictly(parser, argv)
    args.temperature = args.temperature or [0.0 if args.task == "asr" else 1.0]
    return args


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    main(parse_args())
