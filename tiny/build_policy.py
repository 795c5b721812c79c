"""The policies of the toy setup: rows, SFT for text to speech, and for both tasks.

Stages of tiny/build.py.
"""

import argparse
import json
import logging
import pickle
import random
import shutil
from pathlib import Path

import datasets
import torch
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from common.run_record import write_run
from speech.codec import SpeechCodec
from speech.policy import load_tokenizer, recorded
from speech.tokens import SAMPLE_RATE, SpeechTokens
from tiny.asr_data import clips_of, clips_without_speech, rows_of, with_few_rare_names
from tiny.train_policy import UNFINISHED, Stream, asr_examples, new_policy, train_policy, tts_examples
from tiny.work_dir import DEVICE, SEED, clip_rows, load_codes, made, of_split
from training.rows import REFERENCE_COLUMNS

logger = logging.getLogger(__name__)

POLICY_BATCH, EVAL_STEPS = 8, 1_000  # many small steps: what takes long to learn is to follow the text
WITHOUT_PROMPTS = 0.5  # of the policy's steps
FRAC_ASR_SFT = 0.5  # of the recordings, for SFT of speech recognition; RL has ASR_POOL of the rest
ASR_POOL = 3_000
NON_SPEECH = {"sft": 400, "pool": 150, "heldout": 40}  # clips without speech beside them
# Half of its rows have no voice prompt, so that it is the voice without one; a voice prompt selects any voice.
DEFAULT_SPEAKER = "joe"


def build_rows(args: argparse.Namespace) -> None:
    """Rows of SFT, and those of the held-out clips for its held-out loss."""
    rows, codes = clip_rows(args.work_dir), load_codes(args.work_dir)
    for split, name in (("train", "speech.parquet"), ("heldout", "speech_heldout.parquet")):
        save_rows(speech_rows(*of_split(split, rows, codes)), args.work_dir / name)


def save_rows(rows: datasets.Dataset, path: Path) -> None:
    """Parquet, two thirds of the size that `Dataset.to_parquet` writes."""
    rows.to_parquet(path)
    parquet.write_table(parquet.read_table(path), path, compression="zstd", compression_level=19)


def speech_rows(rows: list[dict], codes: list[list[int]]) -> datasets.Dataset:
    """A row a clip; all but half of DEFAULT_SPEAKER's have another clip of the same voice as their voice prompt."""
    rng = random.Random(SEED)
    of = {name: [i for i, row in enumerate(rows) if row["speaker"] == name] for name in {r["speaker"] for r in rows}}
    place = {i: number for numbers in of.values() for number, i in enumerate(numbers)}

    def voice_prompt(i: int) -> dict:
        speaker = rows[i]["speaker"]
        if speaker == DEFAULT_SPEAKER and rng.random() < 0.5:
            return {"ref_text": None, "ref_codes": None}
        other = rng.randrange(len(of[speaker]) - 1)
        ref = of[speaker][other + (other >= place[i])]
        return {"ref_text": rows[ref]["text"], "ref_codes": codes[ref]}

    return datasets.Dataset.from_list(
        [
            {name: row[name] for name in ("id", "text", "speaker", "form", "melody", "duration_s")}
            | {"audio_codes": codes[i], "language": "en", "sampling_rate": SAMPLE_RATE}
            | voice_prompt(i)
            for i, row in enumerate(rows)
        ]
    )


def build_policy(args: argparse.Namespace) -> None:
    """SFT of Llasa for text to speech.

    Voice prompts double the length of a row, so the first part of the steps does without.
    """
    codec, whisper = made(args.work_dir / "codec", "decoder"), made(args.work_dir / "whisper.pt", "whisper")
    rows, heldout = (
        datasets.Dataset.from_parquet(str(made(args.work_dir / f"{name}.parquet", "rows")))
        for name in ("speech", "speech_heldout")
    )
    trained = args.work_dir / "llasa_sft"
    if not (trained / "run.json").exists():
        model, tokenizer = new_policy(list(rows["text"]), SEED)
        times = {row["id"]: row["words"] for row in clip_rows(args.work_dir)}
        streams = {
            "prompted": stream_of_rows("tts", rows, heldout, times, tokenizer),
            "alone": stream_of_rows("tts", *map(without_voice_prompts, (rows, heldout)), times, tokenizer),
        }

        def choose_stream(step: int, progress: float) -> str:
            return "alone" if progress < WITHOUT_PROMPTS else "prompted"

        steps = args.policy_steps
        train_policy(
            model.to(DEVICE), tokenizer, streams, choose_stream, trained, steps, learning_rate=1.5e-3, **settings(args)
        )
        finish(trained, steps, {"codec_id": codec, "whisper": whisper})
    ship_policy(trained, args.work_dir / "llasa")


def ship_policy(trained: Path, folder: Path) -> None:
    """Copy a policy: weights in half precision, tokenizer.json without indentation, run.json (codec and Whisper)."""
    AutoModelForCausalLM.from_pretrained(trained).half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    compact = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact, encoding="utf-8")
    shutil.copy(trained / "run.json", folder)


def without_voice_prompts(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.remove_columns(list(REFERENCE_COLUMNS))


def stream_of_rows(
    task: str,
    rows: datasets.Dataset,
    heldout: datasets.Dataset,
    times: dict[str, list],
    tokenizer: PreTrainedTokenizerFast,
) -> Stream:
    tokens = SpeechTokens.from_tokenizer(tokenizer)
    examples = {"tts": tts_examples, "asr": asr_examples}[task]
    answer_ids = torch.tensor(sorted(tokens.answer_ids(task)), device=DEVICE)
    return Stream(*(examples(part, times, tokenizer, tokens) for part in (rows, heldout)), answer_ids)


def settings(args: argparse.Namespace) -> dict:
    """What both trainings of `train_policy` share."""
    return {"batch_size": POLICY_BATCH, "seed": SEED, "eval_steps": EVAL_STEPS, "max_seconds": args.max_seconds}


def finish(folder: Path, steps: int, record: dict) -> None:
    """Mark a training as complete."""
    write_run(str(folder), **record, seed=SEED, steps=steps)
    (folder / UNFINISHED).unlink(missing_ok=True)


def build_asr_rows(args: argparse.Namespace) -> None:
    """Rows of SFT for speech recognition, a pool to pick RL data from, and held-out ones."""
    codec = SpeechCodec.from_pretrained(str(made(args.work_dir / "codec", "decoder")), DEVICE)
    rows = clip_rows(args.work_dir)
    train, heldout = (of_split(split, rows)[0] for split in ("train", "asr_heldout"))
    split = round(FRAC_ASR_SFT * len(train))
    sets = {
        "sft": (with_few_rare_names(train[:split], SEED), NON_SPEECH["sft"]),
        "pool": (train[split:][:ASR_POOL], NON_SPEECH["pool"]),
        "heldout": (heldout, NON_SPEECH["heldout"]),
    }
    words = {}
    for number, (name, (chosen, non_speech)) in enumerate(sets.items()):
        mixed = clips_of(chosen, SEED + number) + clips_without_speech(non_speech, SEED + number)
        encoded, times = rows_of(name, mixed, args.work_dir / "speech", codec, SEED + number)
        if name != "heldout":
            encoded = encoded.remove_columns("keywords")  # select_rl_data.py finds them
        save_rows(encoded, args.work_dir / f"asr_{name}.parquet")
        logger.info("asr_rows: %s, %d rows, %.0f s", name, len(encoded), sum(encoded["duration_s"]))
        words |= times
    (args.work_dir / "asr_words.pkl").write_bytes(pickle.dumps(words))


def build_asr_policy(args: argparse.Namespace) -> None:
    """SFT of the policy on both tasks; every third step is of text to speech, which it would forget."""
    start = made(args.work_dir / "llasa_sft" / "run.json", "policy").parent
    words = made(args.work_dir / "asr_words.pkl", "asr_rows")
    asr_rows, asr_heldout, speech, speech_heldout = (
        datasets.Dataset.from_parquet(str(made(args.work_dir / f"{name}.parquet", stage)))
        for name, stage in (
            ("asr_sft", "asr_rows"),
            ("asr_heldout", "asr_rows"),
            ("speech", "rows"),
            ("speech_heldout", "rows"),
        )
    )
    trained = args.work_dir / "llasa_asr_sft"
    if not (trained / "run.json").exists():
        model, tokenizer = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32), load_tokenizer(str(start))[0]
        times = {row["id"]: row["words"] for row in clip_rows(args.work_dir)}
        times |= pickle.loads(words.read_bytes())
        streams = {
            "asr": stream_of_rows("asr", asr_rows, asr_heldout, times, tokenizer),
            "tts": stream_of_rows("tts", speech, speech_heldout, times, tokenizer),
        }

        def choose_stream(step: int, progress: float) -> str:
            return "tts" if step % 3 == 0 else "asr"

        steps = args.asr_policy_steps
        train_policy(
            model.to(DEVICE), tokenizer, streams, choose_stream, trained, steps, learning_rate=1e-3, **settings(args)
        )
        finish(trained, steps, {name: recorded(str(start), name) for name in ("codec_id", "whisper")})
    ship_policy(trained, args.work_dir / "llasa_asr")
