"""Use a Llasa checkpoint: text, and a voice prompt if there is one, to wav; or the other way round, speech to text.

    python inference.py --model_name_or_path llasa-grpo-exp1 --text "…" --output sample.wav
    python inference.py --task asr --model_name_or_path llasa-asr --audio a.wav b.flac --output transcripts.jsonl

One random seed serves the whole run, so the same command writes the same clips on the same machine; another
--batch_size draws others. Exit codes: 0 something was written; 1 nothing could be; 2 the input was wrong.

Differs from Llasa's model card: the policy is confined to speech codes and END, or text and END (the distribution it
was trained on), and a voice prompt's own codes are never decoded, so the wav starts with the new text.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
from transformers import set_seed

from common.cli import (
    HelpFormatter,
    InputError,
    bad_input_exits,
    check_at_least,
    check_sampling,
    check_writable,
    parse_strictly,
    pick_device,
    read_text,
)
from speech.audio import load_audio, save_audio
from speech.policy import (
    DEFAULT_CODEC,
    DEFAULT_WHISPER,
    MAX_COMPLETION_LENGTH,
    Policy,
    Sample,
    Transcript,
    recorded,
    reward_parameters,
)
from speech.tokens import CODES_PER_SECOND, TASKS, asr_prompt, tts_prompt

logger = logging.getLogger(__name__)


def read_texts(args: argparse.Namespace) -> list[str]:
    """The texts of --text, or the lines of --text_file that are not blank."""
    if args.text is not None:
        return args.text
    texts = [line.strip() for line in read_text(args.text_file).splitlines() if line.strip()]
    if not texts:
        raise InputError(f"{args.text_file}: no text in it; give one text a line")
    return texts


def output_paths(output: str, num_texts: int, num_samples: int) -> list[Path]:
    """Where the clips go, text by text; the rule is the help of --output."""
    path = Path(output)
    if path.suffix.lower() != ".wav":
        path = path / "sample.wav"
        numbered = True
    else:
        numbered = num_texts * num_samples > 1
    if not numbered:
        return [path]
    return [
        path.with_name(f"{path.stem}_{text:03d}" + (f"_{k}" if num_samples > 1 else "") + path.suffix)
        for text in range(num_texts)
        for k in range(num_samples)
    ]


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, num_samples=1, best_of=1, batch_size=1, max_length=1, max_completion_length=1)
    check_sampling([args.temperature], args.top_p)
    spoken = args.text is not None or args.text_file is not None
    if spoken != (args.task == "tts"):
        given = "--text or --text_file" if spoken else "--audio or --dataset"
        raise InputError(f"{given} is for --task {'tts' if spoken else 'asr'}; this is --task {args.task}")
    if (args.ref_audio is None) != (args.ref_text is None):
        raise InputError(
            "a voice prompt needs both --ref_audio and --ref_text (what is said in it); only "
            f"{'--ref_audio' if args.ref_text is None else '--ref_text'} was given"
        )


def write_clips(paths: list[Path], texts: list[str], samples: list[Sample], wavs: list[np.ndarray]) -> int:
    """Write every clip that has sound and say what is wrong with the others; the number written."""
    written = 0
    for path, text, sample, wav in zip(paths, texts, samples, wavs, strict=True):
        if not len(wav):
            logger.warning("%s: empty, not written: the policy ended without a code: %r", path, text)
            continue
        if sample.truncated:
            logger.warning("%s: truncated before END, at the end of the context: %r", path, text)
        save_audio(path, wav)
        logger.info("%s  %.2f s  %r", path, len(sample.codes) / CODES_PER_SECOND, text)
        written += 1
    return written


def speak(args: argparse.Namespace) -> None:
    # Here: --help and bad input need not wait for it
    from speech.codec import SpeechCodec, check_codebook, decode_rollouts

    with bad_input_exits():
        texts = read_texts(args)
        for text in texts:
            tts_prompt(text)
        ref_wav = load_audio(args.ref_audio) if args.ref_audio else None
        paths = output_paths(args.output or "sample.wav", len(texts), args.num_samples)
        check_writable(paths[0].parent)

        device = pick_device(args.device)
        policy = Policy.from_pretrained(args.model_name_or_path, device)
        codec_id = args.codec_id or recorded(args.model_name_or_path, "codec_id", DEFAULT_CODEC)
        codec = SpeechCodec.from_pretrained(codec_id, device)
        check_codebook(codec, policy.tokens)
        ref_codes = None if ref_wav is None else codec.encode([ref_wav])[0]
        prompts = [tts_prompt(text, args.ref_text, ref_codes) for text in texts]
        policy.encode(prompts, args.max_length)  # a text too long is known before Whisper is loaded
        scorer = None
        if args.best_of > 1:
            from reward_models.whisper import best_of_n
            from speech.whisper_scorer import WhisperScorer

            whisper = args.whisper or recorded(args.model_name_or_path, "whisper", DEFAULT_WHISPER)
            scorer = WhisperScorer(whisper, device)

    set_seed(args.seed)
    times = args.num_samples * args.best_of
    samples = policy.sample(
        [prompt for prompt in prompts for _ in range(times)],
        temperature=args.temperature,
        top_p=args.top_p,
        max_length=args.max_length,
        batch_size=args.batch_size,
        progress="sampling",
    )
    wavs = decode_rollouts(codec, [sample.codes for sample in samples])
    if scorer is not None:
        repeated = [text for text in texts for _ in range(times)]
        kept = best_of_n(
            scorer,
            samples,
            wavs,
            repeated,
            [args.language] * len(repeated),
            args.best_of,
            **reward_parameters(args.model_name_or_path),
        )
        samples, wavs = [samples[i] for i in kept], [wavs[i] for i in kept]
    clip_texts = [text for text in texts for _ in range(args.num_samples)]
    if not write_clips(paths, clip_texts, samples, wavs):
        logger.error("nothing was written: no clip has sound")
        sys.exit(1)


# --- Speech to text ---------------------------------------------------------------------------------------


def speech_to_read(args: argparse.Namespace, codec_id: str, device: str) -> tuple[list[dict], list[list[int]]]:
    """What names each clip in the output (its "audio", or "index" and "id" in the data set), and its codes."""
    from speech.codec import SpeechCodec

    if args.audio is not None:
        wavs = [load_audio(path) for path in args.audio]
        codec = SpeechCodec.from_pretrained(codec_id, device)
        return [{"audio": path} for path in args.audio], codec.encode(wavs)
    from common.dataset_io import load_any_dataset

    rows = load_any_dataset(args.dataset, args.split)
    if "audio_codes" not in rows.column_names:
        raise InputError(f"{args.dataset} has no column 'audio_codes'; make it with create_dataset.py, or give --audio")
    names = [{"index": i} for i in range(len(rows))]
    if "id" in rows.column_names:
        names = [name | {"id": row_id} for name, row_id in zip(names, rows["id"], strict=True)]
    return names, list(rows["audio_codes"])


def read(args: argparse.Namespace) -> None:
    """Transcripts to the terminal (of --audio) and to --output, one line of JSON per clip."""
    with bad_input_exits():
        output = args.output and Path(args.output)
        if args.dataset is not None and output is None:
            raise InputError("--dataset: give --output a .jsonl file for the transcripts")
        if output is not None:
            if output.suffix != ".jsonl":
                raise InputError(f"--output {output}: transcripts are written to a .jsonl file")
            check_writable(output.parent)
        device = pick_device(args.device)
        codec_id = args.codec_id or recorded(args.model_name_or_path, "codec_id", DEFAULT_CODEC)
        names, codes = speech_to_read(args, codec_id, device)
        policy = Policy.from_pretrained(args.model_name_or_path, device, task="asr")
        for clip in codes:
            policy.tokens.ids(clip)  # another codec's codes
        prompts = [asr_prompt(clip) for clip in codes]
        policy.encode(prompts, args.max_length)

    set_seed(args.seed)
    transcripts = policy.transcribe(
        [prompt for prompt in prompts for _ in range(args.num_samples)],
        temperature=args.temperature,
        top_p=args.top_p,
        max_length=args.max_length,
        max_completion_length=args.max_completion_length,
        batch_size=args.batch_size,
        progress="transcribing",
    )
    write_transcripts(output, names, transcripts, args.num_samples, shown=args.audio is not None)


def write_transcripts(
    output: Path | None, names: list[dict], transcripts: list[Transcript], num_samples: int, shown: bool
) -> None:
    lines = []
    for number, name in enumerate(names):
        own = transcripts[number * num_samples : (number + 1) * num_samples]
        texts, truncated = [one.text for one in own], [one.truncated for one in own]
        lines.append(json.dumps({**name, "transcripts": texts, "truncated": truncated}, ensure_ascii=False) + "\n")
        for one in own if shown else ():
            logger.info("%s  %r%s", name["audio"], one.text, "  (truncated)" if one.truncated else "")
    if output is not None:
        output.write_text("".join(lines), encoding="utf-8")
        logger.info("%d clips, %d transcripts each: %s", len(names), num_samples, output)


def main(args: argparse.Namespace) -> None:
    with bad_input_exits():
        check_args(args)
    (read if args.task == "asr" else speak)(args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="folder saved by train.py (LoRA too), or a Hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", help="what to say; may be given several times")
    source.add_argument("--text_file", help="a UTF-8 file with one text a line; - is stdin")
    source.add_argument("--audio", nargs="+", help="--task asr: clips to transcribe (wav, flac, ogg, mp3)")
    source.add_argument("--dataset", help="--task asr: a data set with speech codes, from create_dataset.py")
    add("--task", choices=TASKS, default="tts", help="tts: text to speech; asr: speech to text")
    add(
        "--output",
        help="tts: a .wav file (default sample.wav); several clips are numbered from it, text by text: "
        "sample_000.wav, sample_001.wav, with --num_samples sample_000_0.wav, sample_000_1.wav. Anything else is a "
        "folder for such clips. asr: a .jsonl file with the transcripts, a line a clip, which select_rl_data.py reads",
    )
    add("--split", default="train", help="of --dataset")
    add("--ref_audio", help="voice prompt: the clip to speak like (wav, flac, ogg, mp3)")
    add("--ref_text", help="voice prompt: what is said in --ref_audio")
    add("--num_samples", type=int, default=1, help="clips per text, or transcripts per clip")
    add("--best_of", type=int, default=1, help="draw so many for each clip and keep Whisper's favourite")
    add("--temperature", type=float, help="of sampling; 0 takes the likeliest token. Default: 0.8 for tts, 0 for asr")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that make up this share")
    add("--max_length", type=int, default=2048, help="tokens of prompt and answer together")
    add("--max_completion_length", type=int, default=MAX_COMPLETION_LENGTH, help="asr: tokens of a transcript")
    add("--seed", type=int, default=0, help="of sampling")
    add("--batch_size", type=int, default=16, help="clips sampled at a time")
    add("--device", default="auto", help="auto is a GPU where there is one")
    add("--language", default="en", help="of the texts, for --best_of")
    add("--codec_id", help=f"default: what the model's run.json says, else {DEFAULT_CODEC}")
    add("--whisper", help=f"for --best_of; default: what the model's run.json says, else {DEFAULT_WHISPER}")
    args = parse_strictly(parser, argv)
    if args.temperature is None:
        args.temperature = 0.0 if args.task == "asr" else 0.8
    return args


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    main(parse_args())
