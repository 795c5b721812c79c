"""Sample from a Llasa checkpoint: text to wav (TTS), in the voice of a prompt if there is one, or audio to text (ASR).

    python inference.py --model_name_or_path llasa-grpo-exp1 --text "…" --output sample.wav
    python inference.py --model_name_or_path tiny/llasa --adapters slow=0.5 lively --text "…" --output sample.wav
    python inference.py --task asr --model_name_or_path llasa-asr --audio a.wav b.flac --output transcripts.jsonl

The seed is set once, before sampling: the same command writes the same clips on the same machine; another --batch_size
samples other ones. Clips are written batch by batch, and an interrupted run keeps those, without the list. Exit codes:
0 something was written; 1 nothing could be written; 2 the input was wrong.

Differs from Llasa's model card: sampling is confined to speech codes and END, or to text and END (the distribution
that training used), and the codes of the voice prompt are never decoded, so the wav starts with the new text.
"""

import argparse
import logging
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from transformers import set_seed

from common.arithmetic import set_up_arithmetic
from common.cli import (
    HelpFormatter,
    InputError,
    add_device,
    add_top_p,
    bad_input_exits,
    check_at_least,
    check_flags_of_tasks,
    check_sampling,
    check_seed,
    check_writable,
    parse_strictly,
    pick_device,
    read_lines,
    run_script,
    set_up_logging,
    settings_of,
)
from common.resumable_file import write_json_lines
from common.run_record import content_digest, short_digest
from reward_models.whisper import best_of_n
from speech.adapters import parse_adapters
from speech.audio import load_short_audio, save_audio
from speech.codec import SpeechCodec, check_codebook, decode_rollouts
from speech.error_rate import check_reference_text
from speech.policy import (
    DEFAULT_CODEC,
    Policy,
    Sample,
    Transcript,
    load_tokenizer,
    recorded_with_adapters,
    reward_parameters,
)
from speech.tokens import (
    CODES_PER_SECOND,
    MAX_COMPLETION_LENGTH,
    MAX_LENGTH,
    TASKS,
    SpeechTokens,
    asr_prompt,
    tts_prompt,
)
from speech.transcript_file import TranscriptFile
from speech.whisper_checkpoint import DEFAULT_WHISPER
from speech.whisper_scorer import WhisperScorer

FLAGS_OF_TASKS = {  # which the other task would ignore
    "tts": ("ref_audio", "ref_text", "best_of", "language", "whisper"),
    "asr": ("split", "max_completion_length"),
}
# Arguments that do not change the transcripts: a resumed run may have other values of them
FREE_ARGUMENTS = ("output", "overwrite", "debug")

logger = logging.getLogger("inference")


# --- Text to speech ---------------------------------------------------------------------------------------


def read_texts(args: argparse.Namespace) -> list[str]:
    """The texts of --text, or the lines of --text_file that are not blank."""
    if args.text is not None:
        return args.text
    texts = [line.strip() for line in read_lines(args.text_file) if line.strip()]
    if not texts:
        raise InputError(f"--text_file {args.text_file}: no text in the file. Write one text per line")
    return texts


def check_texts(texts: list[str]) -> None:
    """Raises InputError for a text of which no prompt can be built: empty, or with a control token."""
    for text in texts:
        tts_prompt(text)


def output_paths(output: str, num_texts: int, num_samples: int) -> list[Path]:
    """Paths of the clips, text by text; the help of --output states the rule."""
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


def list_path(output: str) -> Path:
    """Path of the list of several clips: sample.jsonl beside sample_000.wav."""
    path = Path(output)
    return path.with_suffix(".jsonl") if path.suffix.lower() == ".wav" else path / "sample.jsonl"


def check_no_folders(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            raise InputError(f"--output {path}: is a folder. Use another name, or remove the folder")


def write_clips(
    paths: list[Path], texts: list[str], samples: list[Sample], wavs: list[np.ndarray], voice_prompt: dict
) -> dict[Path, dict]:
    """Write every clip with samples, warn of truncated and empty ones; a row for the list of clips of each written."""
    written = {}
    for path, text, sample, wav in zip(paths, texts, samples, wavs, strict=True):
        if not len(wav):
            logger.warning("%s: empty, not written: the rollout has no speech codes: %r", path, text)
            continue
        if sample.truncated:
            logger.warning("%s: truncated before END, at --max_length or the model's context: %r", path, text)
        save_audio(path, wav)
        logger.info("%s  %.2f s  %r", path, len(sample.codes) / CODES_PER_SECOND, text)
        row = {"text": text, "audio": path.name, "codes": sample.codes, "truncated": sample.truncated}
        written[path] = row | voice_prompt
    return written


def whole_texts(batch: Iterable[int], rollouts: dict[int, Sample], size: int) -> list[int]:
    """The texts, by number, of which a batch had the last of `size` rollouts that were missing.

    >>> whole_texts([1, 3, 4], dict.fromkeys([0, 1, 3, 4]), size=2)
    [0]
    """
    numbers = sorted({i // size for i in batch})
    return [number for number in numbers if all(number * size + k in rollouts for k in range(size))]


def write_list(path: Path, rows: list[dict]) -> None:
    """Write what the clips say and their codes, a line of JSON for each, as collect_preferences.py reads them."""
    write_json_lines(path, rows)


def synthesize(args: argparse.Namespace) -> None:
    """Text to wav files; exits with 1 if none could be written."""
    with bad_input_exits():
        texts = read_texts(args)
        check_texts(texts)
        if args.best_of > 1:
            for text in texts:  # Whisper is to score it
                check_reference_text(text, args.language)
        ref_wav = load_short_audio(args.ref_audio, args.max_length) if args.ref_audio else None
        paths = output_paths(args.output or "sample.wav", len(texts), args.num_samples)
        check_no_folders([*paths, list_path(args.output or "sample.wav")])
        check_writable(paths[0].parent)

        adapters = parse_adapters(args.adapters)
        device = pick_device(args.device)
        policy = Policy.from_pretrained(args.model_name_or_path, device, adapters=adapters)
        recorded = partial(recorded_with_adapters, args.model_name_or_path, adapters)
        codec_id = args.codec_id or recorded("codec_id", DEFAULT_CODEC)
        codec = SpeechCodec.from_pretrained(codec_id, device)
        check_codebook(codec, policy.tokens)
        ref_codes = None if ref_wav is None else codec.encode([ref_wav])[0]
        prompts = [tts_prompt(text, args.ref_text, ref_codes) for text in texts]
        policy.encode(prompts, args.max_length)  # raises for a text too long, before Whisper is loaded
        scorer = None
        if args.best_of > 1:
            whisper = args.whisper or recorded("whisper", DEFAULT_WHISPER)
            scorer = WhisperScorer(whisper, device)
            scorer.check_languages([args.language])
            parameters = reward_parameters(args.model_name_or_path)

    list_path(args.output or "sample.wav").unlink(missing_ok=True)  # of other clips of these names
    set_seed(args.seed)
    rollouts_per_text = args.num_samples * args.best_of
    voice_prompt = {} if ref_codes is None else {"ref_text": args.ref_text, "ref_codes": ref_codes}
    rollouts, written = {}, {}
    batches = policy.samples_by_batch(
        [prompt for prompt in prompts for _ in range(rollouts_per_text)],
        temperature=args.temperature,
        top_p=args.top_p,
        max_length=args.max_length,
        batch_size=args.batch_size,
        progress="sampling",
    )
    for batch in batches:  # written as they come: an interrupted run keeps what it has made
        rollouts |= batch
        numbers = whole_texts(batch, rollouts, rollouts_per_text)
        if not numbers:
            continue
        samples = [rollouts.pop(n * rollouts_per_text + k) for n in numbers for k in range(rollouts_per_text)]
        wavs = decode_rollouts(codec, [sample.codes for sample in samples])
        if scorer is not None:
            rollout_texts = [texts[n] for n in numbers for _ in range(rollouts_per_text)]
            languages = [args.language] * len(rollout_texts)
            best = best_of_n(scorer, samples, wavs, rollout_texts, languages, args.best_of, **parameters)
            samples, wavs = [samples[i] for i in best], [wavs[i] for i in best]
        clip_texts = [texts[n] for n in numbers for _ in range(args.num_samples)]
        clip_paths = [paths[n * args.num_samples + k] for n in numbers for k in range(args.num_samples)]
        written |= write_clips(clip_paths, clip_texts, samples, wavs, voice_prompt)
    if not written:
        logger.error("nothing was written: no rollout has speech codes")
        sys.exit(1)
    if len(paths) > 1:
        write_list(list_path(args.output or "sample.wav"), [written[path] for path in paths if path in written])


# --- Speech to text ---------------------------------------------------------------------------------------


def load_clips(
    args: argparse.Namespace, codec_id: str, device: str, tokens: SpeechTokens
) -> tuple[list[dict], list[list[int]]]:
    """The clips to transcribe: what identifies each in the output ("audio", or "index" and "id"), and its codes.

    Raises:
        InputError: no such clips, or codes that the policy's `tokens` lack.
    """
    if args.audio is not None:
        wavs = [load_short_audio(path, args.max_length) for path in args.audio]
        codes = SpeechCodec.from_pretrained(codec_id, device).encode(wavs)
        for clip_codes in codes:
            tokens.ids(clip_codes)  # raises for the codes of another codec
        return [{"audio": path} for path in args.audio], codes
    from common.dataset_io import check_codes, load_any_dataset

    rows = load_any_dataset(args.dataset, args.split)
    if "audio_codes" not in rows.column_names:
        raise InputError(
            f"--dataset {args.dataset}: no column 'audio_codes' (got {', '.join(rows.column_names)}). "
            "Encode it with create_dataset.py, or use --audio"
        )
    check_codes(rows, "audio_codes", tokens.num_codes, args.dataset)
    ids = [{"index": i} for i in range(len(rows))]
    if "id" in rows.column_names:
        ids = [{**clip, "id": row_id} for clip, row_id in zip(ids, rows["id"], strict=True)]
    return ids, list(rows["audio_codes"])


def transcribe(args: argparse.Namespace) -> None:
    """Transcripts to the terminal (of --audio) and to --output, one line of JSON per clip."""
    with bad_input_exits():
        if args.output:
            check_writable(Path(args.output).parent)
        adapters = parse_adapters(args.adapters)
        device = pick_device(args.device)
        recorded = partial(recorded_with_adapters, args.model_name_or_path, adapters)
        codec_id = args.codec_id or recorded("codec_id", DEFAULT_CODEC)
        tokens = load_tokenizer(args.model_name_or_path, "asr")[1]
        ids, codes = load_clips(args, codec_id, device, tokens)
        output = open_output(args, device, ids, codes) if args.output else None
        if output is not None and output.finished:
            logger.info("%s: complete already, nothing to do", output.path)
            return
        policy = Policy.from_pretrained(args.model_name_or_path, device, task="asr", adapters=adapters)
        prompts = [asr_prompt(clip_codes) for clip_codes in codes]
        names = args.audio or [f"{args.dataset}, row {i}" for i in range(len(ids))]
        policy.encode(prompts, args.max_length, names)  # raises for a clip too long

    set_seed(args.seed)
    done = output.resume() if output is not None else []
    batches = policy.transcripts_by_batch(
        [prompt for prompt in prompts for _ in range(args.num_samples)],
        temperature=args.temperature,
        top_p=args.top_p,
        max_length=args.max_length,
        max_completion_length=args.max_completion_length,
        batch_size=args.batch_size,
        progress="transcribing",
        first_batch=len(done),
    )
    for batch in batches:
        done.append(batch)
        if output is not None:
            output.add(batch)
    rollouts = {i: transcript for batch in done for i, transcript in batch.items()}
    by_clip = [[rollouts[clip * args.num_samples + k] for k in range(args.num_samples)] for clip in range(len(ids))]
    if args.audio is not None:
        log_transcripts(args.audio, by_clip)
    if output is not None:
        output.finish(transcript_records(ids, by_clip))
        logger.info("%d clips, %d transcripts each: %s", len(ids), args.num_samples, output.path)


def open_output(args: argparse.Namespace, device: str, ids: list[dict], codes: list[list[int]]) -> TranscriptFile:
    """--output; InputError if it has transcripts of other settings, of another model or of other clips."""
    run = settings_of(args, FREE_ARGUMENTS)
    run["device"] = device
    run["weights"] = content_digest(args.model_name_or_path)
    if args.adapters:
        run["adapter weights"] = [content_digest(adapter.folder) for adapter in parse_adapters(args.adapters)]
    run["clips"] = short_digest(zip(ids, codes, strict=True))
    return TranscriptFile(Path(args.output), run, device, args.overwrite)


def log_transcripts(audio: list[str], by_clip: list[list[Transcript]]) -> None:
    for path, transcripts in zip(audio, by_clip, strict=True):
        for transcript in transcripts:
            logger.info("%s  %r%s", path, transcript.text, "  (truncated)" if transcript.truncated else "")


def transcript_records(ids: list[dict], by_clip: list[list[Transcript]]) -> list[dict]:
    """One record per clip, as select_rl_data.py reads them."""
    return [
        {
            **clip_id,
            "transcripts": [transcript.text for transcript in transcripts],
            "truncated": [transcript.truncated for transcript in transcripts],
        }
        for clip_id, transcripts in zip(ids, by_clip, strict=True)
    ]


# --- The script -------------------------------------------------------------------------------------------


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, num_samples=1, best_of=1, batch_size=1, max_length=1, max_completion_length=1)
    check_sampling([args.temperature], args.top_p)
    check_seed(args.seed)
    has_text = args.text is not None or args.text_file is not None
    if has_text != (args.task == "tts"):
        flags = "--text or --text_file" if has_text else "--audio or --dataset"
        raise InputError(f"{flags} is for --task {'tts' if has_text else 'asr'} (got --task {args.task})")
    if (args.ref_audio is None) != (args.ref_text is None):
        missing = "--ref_text" if args.ref_text is None else "--ref_audio"
        raise InputError(f"a voice prompt needs both --ref_audio and --ref_text, its transcript. Add {missing}")
    if args.task == "asr":
        check_transcripts_path(args)


def check_transcripts_path(args: argparse.Namespace) -> None:
    if args.dataset is not None and args.output is None:
        raise InputError("--dataset: no file for the transcripts. Add --output with a .jsonl file")
    if args.output is not None and Path(args.output).suffix != ".jsonl":
        raise InputError(f"--output {args.output}: not a .jsonl file, which transcripts are written to. Rename it")
    if args.output is not None:
        check_no_folders([Path(args.output)])


def main(args: argparse.Namespace) -> None:
    set_up_arithmetic()
    with bad_input_exits():
        check_args(args)
    if args.task == "asr":
        transcribe(args)
    else:
        synthesize(args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="folder saved by train.py (LoRA too), or a Hub id")
    add(
        "--adapters",
        nargs="+",
        metavar="FOLDER[=WEIGHT]",
        help="LoRA folders of train.py whose base is the model, added to it, each times its weight (default 1; "
        "negative: away from what was learnt): slow=0.5 lively (docs/adaptation.md)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", help="tts: text to synthesize; may be given several times")
    source.add_argument("--text_file", help="tts: a UTF-8 file with one text per line; - is stdin")
    source.add_argument("--audio", nargs="+", help="asr: clips to transcribe (wav, flac, ogg, mp3)")
    source.add_argument("--dataset", help="asr: a dataset with speech codes, from create_dataset.py, to transcribe")
    add("--task", choices=TASKS, default="tts", help="tts: text to speech; asr: speech to text")
    add(
        "--output",
        help="tts: a .wav file (default sample.wav); several clips are numbered from it, text by text: "
        "sample_000.wav, sample_001.wav, with --num_samples sample_000_0.wav, sample_000_1.wav. Anything else is a "
        "folder for such clips. Several are listed with their texts and codes in sample.jsonl, for "
        "collect_preferences.py. asr: a .jsonl file of transcripts, one line per clip, for select_rl_data.py; the same "
        "command again resumes an interrupted run",
    )
    add("--overwrite", action="store_true", help="asr: replace an --output of other settings or other clips")
    add("--split", default="train", help="asr: split of --dataset")
    add("--ref_audio", help="tts: voice prompt, a clip whose voice is to be continued (wav, flac, ogg, mp3)")
    add("--ref_text", help="tts: transcript of --ref_audio")
    add("--num_samples", type=int, default=1, help="number of clips per text, or of transcripts per clip")
    add("--best_of", type=int, default=1, help="tts: number of rollouts per clip, of which the best by reward is kept")
    add("--temperature", type=float, help="sampling temperature; 0 is greedy. Default: 0.8 for tts, 0 for asr")
    add_top_p(parser)
    add("--max_length", type=int, default=MAX_LENGTH, help="maximum number of tokens of prompt and answer together")
    add(
        "--max_completion_length",
        type=int,
        default=MAX_COMPLETION_LENGTH["asr"],
        help="asr: maximum number of tokens of a transcript",
    )
    add("--seed", type=int, default=0, help="sampling seed")
    add("--batch_size", type=int, default=16, help="number of rollouts sampled at a time")
    add_device(parser, "device")
    add("--language", default="en", help="tts: language of the texts for --best_of, Whisper's code or name")
    add("--codec_id", help=f"codec; default: the one in the model's run.json, else {DEFAULT_CODEC}")
    add(
        "--whisper", help=f"tts: Whisper of --best_of; default: the one in the model's run.json, else {DEFAULT_WHISPER}"
    )
    args = parse_strictly(parser, argv)
    with bad_input_exits():
        check_flags_of_tasks(parser, args, FLAGS_OF_TASKS)
    if args.temperature is None:
        args.temperature = 0.0 if args.task == "asr" else 0.8
    return args


if __name__ == "__main__":
    set_up_logging("inference")
    run_script(main, parse_args)
