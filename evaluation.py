r"""Evaluate checkpoints: error rates by held-out ASR, melody, failures and speed, and a page to listen to.

    python evaluation.py --models SFT=tiny/llasa GRPO=runs/words --texts tiny/texts/heldout.txt \
      --seeds 0 1 2 --judge tiny/whisper.pt pocketsphinx --best_of 4 --output_dir report

    python evaluation.py --task asr --models SFT=tiny/llasa_asr RL=llasa-asr \
      --clips tiny/asr/heldout.parquet --temperature 0 --long_s 3.2 --output_dir report

--task tts synthesizes --texts with every checkpoint, at every temperature, once per seed. It measures the corpus WER
(CER for zh, ja, ko and the like) and the NLL of the text by the evaluation ASRs (--judge), duration, speaking rate,
movement of F0 and pauses, the fractions of truncated, empty, silent and repetitive clips, and the real-time factor;
where the texts have *marked* words or questions, how many are emphasised or rise; with several seeds, Pass@K, Failure@K
and the diversity of the codes. All models share one codec. An ASR that no reward of these checkpoints has used is
held-out; prefer it to the reward's own, whose score training optimises.

--task asr transcribes --clips. It measures the corpus WER (CER) with its insertions and deletions, for short and long
clips apart, hallucinations (on non-speech too), truncated transcripts, and keyword recall and precision.

Error rates and means have 95 % bootstrap intervals; changes from the first row are paired by text. Writes results.json
(every clip), results.md (the table), report.html (one file, players and F0 contours included) and, of several
checkpoints, pareto.png, anew after each row, and ends with a comparison of the rows on the terminal.

Formats of --texts:

    .txt    one text a line
    .jsonl  {"text": …} and optionally "id", "language", "ref_audio" and "ref_text" (voice prompt), "audio" (a natural
            reading; the metadata.jsonl of an audiofolder, with "file_name", works too)
    .lst    meta.lst of seed-tts-eval: id|ref_text|ref_audio|text, and |audio for a natural reading
"""

import argparse
from pathlib import Path

from common.arithmetic import set_up_arithmetic
from common.cli import (
    NOT_NEGATIVE,
    HelpFormatter,
    InputError,
    add_device,
    add_top_p,
    bad_input_exits,
    check_at_least,
    check_flags_of_tasks,
    check_ranges,
    check_sampling,
    check_seed,
    check_writable,
    parse_strictly,
    pick_device,
    run_script,
    set_up_logging,
)
from metrics import recognition, synthesis
from speech.policy import DEFAULT_CODEC
from speech.tokens import MAX_COMPLETION_LENGTH, MAX_LENGTH, TASKS
from speech.whisper_checkpoint import DEFAULT_WHISPER

FLAGS_OF_TASKS = {  # which the other task would ignore; --cycle of tts reads --max_completion_length
    "tts": tuple("judge whisper references best_of adapters cycle speaker_encoder dnsmos token2text".split()),
    "asr": ("split", "long_s"),
}


def named_models(models: list[str]) -> dict[str, str]:
    """Name -> path, of NAME=path, or of a path that is its own name."""
    named = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals or "/" in name:  # a path may have a = in it
            name = path = model
        if not name or not path or name in named:
            raise InputError(f"--models {model}: no name, no path, or a name used twice. Use NAME=path, each name once")
        named[name] = path
    return named


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, best_of=1, batch_size=1, max_length=1, max_completion_length=1, num_players=0)
    check_sampling(args.temperature, args.top_p)
    check_ranges(args, {"long_s": NOT_NEGATIVE})
    for seed in args.seeds:
        check_seed(seed)
    if (args.clips is None) == (args.task == "asr") or (args.texts is None) == (args.task == "tts"):
        raise InputError("--task tts needs --texts (and no --clips), --task asr needs --clips (and no --texts)")
    for name in ("seeds", "temperature", "judge"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            raise InputError(f"--{name}: a value is given twice (got {' '.join(map(str, values))}). Use each once")


def main(args: argparse.Namespace) -> dict:
    """Returns the content of results.json."""
    set_up_arithmetic()
    with bad_input_exits():
        check_args(args)
        models = named_models(args.models)
        check_writable(Path(args.output_dir))
        args.device = pick_device(args.device)
    evaluate = recognition.evaluate if args.task == "asr" else synthesis.evaluate
    return evaluate(args, models)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="[NAME=]PATH", help="checkpoints; the first is the baseline")
    add("--task", choices=TASKS, default="tts", help="tts: text to speech; asr: speech to text")
    add(
        "--output_dir",
        default="evaluation",
        help="folder of results.json, results.md and report.html; the same command again resumes an interrupted run",
    )
    add("--overwrite", action="store_true", help="replace the results of other settings in --output_dir")
    add(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="sampling seeds; each text or clip is sampled with each"
    )
    add(
        "--temperature",
        type=float,
        nargs="+",
        help="sampling temperatures, a row of the results for each; 0 is greedy. Default: 1 for tts, 0 for asr",
    )
    add_top_p(parser)
    add("--max_length", type=int, default=MAX_LENGTH, help="maximum number of tokens of prompt and answer together")
    add("--batch_size", type=int, default=16, help="number of rollouts sampled at a time")
    add("--num_players", type=int, default=8, help="number of texts, or clips, to listen to on the page")
    add("--language", default="en", help="language of texts without one of their own, Whisper's code or name")
    add_device(parser, "device")
    add("--codec_id", help=f"codec; default: the one in the first model's run.json, else {DEFAULT_CODEC}")

    tts = parser.add_argument_group("--task tts")
    tts.add_argument("--texts", help="held-out texts to synthesize: a .txt, .jsonl or .lst file, see above")
    tts.add_argument(
        "--judge",
        nargs="+",
        action="extend",
        help="evaluation ASRs: Whispers by openai-whisper (large-v3, a .pt file, a folder or hub id), Whispers by "
        "faster-whisper (faster-whisper:large-v3, or faster-whisper: and a folder in CTranslate2's format), and "
        "pocketsphinx; default: the reward's Whisper. Those that no reward of the models has used are held-out ASRs, "
        "and are listed first. The first one by openai-whisper tells the times of the words, which emphasis needs",
    )
    tts.add_argument(
        "--whisper",
        help=f"the reward's Whisper; default: the one in the first model's run.json, else {DEFAULT_WHISPER}",
    )
    tts.add_argument(
        "--references",
        help="a .jsonl or .lst file with natural readings: adds a row for them as recorded, and one after the codec",
    )
    tts.add_argument(
        "--best_of",
        type=int,
        default=1,
        help="if > 1: adds a row for the baseline's best of so many rollouts by reward",
    )
    tts.add_argument(
        "--adapters",
        nargs="+",
        action="append",
        metavar="FOLDER[=WEIGHT]",
        help="adds a row for the baseline with these LoRA folders added, as in inference.py; may be given several "
        "times: --adapters slow=0.5 --adapters slow lively",
    )
    tts.add_argument(
        "--cycle",
        action="store_true",
        help="adds the round-trip error rate: each checkpoint transcribes its own speech; for models of --task both",
    )
    tts.add_argument(
        "--speaker_encoder",
        help="an x-vector model of transformers, hub id (microsoft/wavlm-base-plus-sv) or folder: adds the similarity "
        "of voices, of each clip and its voice prompt; another one than the reward's is fairer",
    )
    tts.add_argument(
        "--dnsmos",
        action="store_true",
        help="adds predicted opinions of the sound, DNSMOS P.835; needs requirements-dnsmos.txt",
    )
    tts.add_argument(
        "--token2text",
        help="a folder of train_token2text.py: adds the token-to-text score of the codes, DiffRO's reward",
    )

    asr = parser.add_argument_group("--task asr")
    asr.add_argument(
        "--clips", help="a dataset of create_dataset.py, or one of audio and text; text '' for clips without speech"
    )
    asr.add_argument("--split", default="train", help="split of --clips")
    asr.add_argument("--long_s", type=float, default=20.0, help="seconds above which a clip counts as long")
    asr.add_argument(
        "--max_completion_length",
        type=int,
        default=MAX_COMPLETION_LENGTH["asr"],
        help="maximum number of tokens of a transcript",
    )
    args = parse_strictly(parser, argv)
    with bad_input_exits():
        check_flags_of_tasks(parser, args, FLAGS_OF_TASKS)
    args.temperature = args.temperature or [0.0 if args.task == "asr" else 1.0]
    return args


if __name__ == "__main__":
    set_up_logging("metrics")
    run_script(main, parse_args)
