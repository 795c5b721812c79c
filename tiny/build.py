"""Build the toy setup: a synthetic corpus, and XCodec2, Whisper, Llasa and DiffRO's reward model trained on it.

    python -m tiny.build --work_dir build                        # everything, about an hour and a half on two cores
    python -m tiny.build --work_dir build --stage codec whisper  # two of its stages

The stages, in order; each reads what the ones before it wrote:

    codec        flite's recordings of the corpus, and the XCodec2 trained on them: tiny/codec
    texts        texts for RL, held-out texts and recordings, rows of SFT: tiny/texts, tiny/heldout, tiny/speech.parquet
    whisper      the reward ASR: tiny/whisper.pt
    policy       SFT of Llasa for text to speech, by train.py: tiny/llasa
    token2text   the token-to-text model, by train_token2text.py: tiny/token2text

Needs flite (Debian package `flite`). Seeds are fixed. Intermediate results are kept in --work_dir, so an interrupted
build resumes; the files that ship are written to tiny/, over those that are there. tiny/build.log is the log of the
build that made the files in the repository; a build appends to it.
"""

import argparse
import json
import logging
import multiprocessing
import pickle
import random
import shutil
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import soundfile as sf
import torch
from pyarrow import parquet
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, SeamlessM4TFeatureExtractor, Xcodec2Model

import train
import train_token2text
from common.arithmetic import set_up_arithmetic
from common.cli import HelpFormatter, bad_input_exits, check_at_least, check_writable, parse_strictly, set_up_logging
from speech.audio import load_audio
from speech.codec import SpeechCodec
from speech.tokens import CODES_PER_SECOND, HOP_LENGTH, SAMPLE_RATE
from tiny.corpus import SPEAKERS, random_word_sequences, sentences, speak_all
from tiny.llasa import new_model, new_tokenizer
from tiny.train_codec import NUM_CODES, new_codec, train_codec, train_decoder
from tiny.train_whisper import mel, train_whisper

logger = logging.getLogger("tiny.build")

TINY = Path(__file__).parent
SEED = 0
# Sentences in the shuffled order of all 14,400: the first ones are recorded for training, the next ones are texts for
# RL, and the last ones are for tests and evaluations only.
TRAIN_CLIPS = 6_000
RL_TEXTS = 3_000
HELDOUT_TEXTS = 100
HELDOUT_CLIPS = 96  # recordings of the first of them
CODEC_CLIPS = 3_000
RANDOM_WORD_CLIPS = 1_500
# Rows without a voice prompt are DEFAULT_SPEAKER's; rows with one train the policy to continue in the prompt's voice.
DEFAULT_SPEAKER = "slt"
PROMPTED_ROWS = {"slt": 800, "rms": 1_600}

# Flags of train.py, a string a round
POLICY_ROUNDS = [
    "",
    "--learning_rate 1e-3 --max_steps 500 --seed 1",  # a warm restart: before it, WER at temperature 1.0 is 58 %
]
# Flags of train_token2text.py. Noise on the embeddings makes the model smooth between codes, so that its gradient
# points to better codes.
TOKEN2TEXT_FLAGS = (
    f"--labels speaker --output_dir tiny/token2text --num_codes {NUM_CODES} --vocab_size 320 "
    "--hidden_size 128 --num_heads 4 --encoder_layers 3 --decoder_layers 2 "
    f"--steps 4000 --learning_rate 2e-3 --embedding_noise 0.5 --seed {SEED} --device cpu"
)


def clips(work_dir: Path) -> tuple[list[str], list[str], list[np.ndarray]]:
    """Training texts, their speakers and clips; every sentence is recorded once, by one of the two speakers."""
    path = work_dir / "clips.pkl"
    if not path.exists():
        texts = sentences(SEED)[:TRAIN_CLIPS]
        speakers = [list(SPEAKERS)[i % len(SPEAKERS)] for i in range(len(texts))]
        wavs = [whole_codes(wav).astype(np.float16) for wav in speak_all(texts, speakers)]
        path.write_bytes(pickle.dumps((texts, speakers, wavs)))
        seconds = sum(map(len, wavs)) / SAMPLE_RATE
        logger.info("corpus: %d clips, %.2f h, %.2f s on average", len(wavs), seconds / 3600, seconds / len(wavs))
    texts, speakers, wavs = pickle.loads(path.read_bytes())
    return texts, speakers, [wav.astype(np.float32) for wav in wavs]


def whole_codes(wav: np.ndarray) -> np.ndarray:
    """A waveform padded as the codec pads: with 1 to HOP_LENGTH zeros."""
    return np.pad(wav, (0, HOP_LENGTH - len(wav) % HOP_LENGTH))


def semantic_features(wav: np.ndarray) -> np.ndarray:
    padded = np.pad(wav, HOP_LENGTH // 2)
    return SeamlessM4TFeatureExtractor()(padded, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0]


def features(work_dir: Path, wavs: list[np.ndarray]) -> list[np.ndarray]:
    """The semantic encoder's input for every clip; extracting it is the slow part of encoding."""
    path = work_dir / "features.pkl"
    if not path.exists():
        with ProcessPoolExecutor(2) as pool:
            extracted = pool.map(semantic_features, wavs, chunksize=50)
            inputs = list(tqdm(extracted, total=len(wavs), desc="features", disable=None))
        path.write_bytes(pickle.dumps([values.astype(np.float16) for values in inputs]))
    return pickle.loads(path.read_bytes())


@torch.inference_mode()
def semantic_states(codec: Xcodec2Model, inputs: list[np.ndarray]) -> list[np.ndarray]:
    return [
        codec.semantic_encoder(torch.tensor(x[None]).float()).last_hidden_state[0].half().numpy()
        for x in tqdm(inputs, desc="semantic", disable=None)
    ]


def _encode_chunk(folder: Path, wavs: list[np.ndarray], states: list[np.ndarray]) -> list[np.ndarray]:
    torch.set_num_threads(1)
    codec = Xcodec2Model.from_pretrained(folder).float()
    codes = []
    with torch.inference_mode():
        for wav, state in zip(wavs, states, strict=True):
            latents_in = torch.cat(
                [
                    codec.semantic_adapter(torch.tensor(state.T[None]).float()),
                    codec.acoustic_encoder(torch.tensor(wav[None, None])),
                ],
                dim=1,
            )
            codes.append(codec.quantizer(codec.fc_encoder(latents_in.transpose(1, 2)))[1][0, :, 0].numpy())
    return codes


def encode(folder: Path, wavs: list[np.ndarray], states: list[np.ndarray], chunk: int = 100) -> list[np.ndarray]:
    """Codes of clips, given their semantic states, by the codec in `folder`, in two processes."""
    starts = range(0, len(wavs), chunk)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        chunks = pool.map(
            _encode_chunk,
            [folder] * len(starts),
            [wavs[s : s + chunk] for s in starts],
            [states[s : s + chunk] for s in starts],
        )
        return [codes for part in tqdm(chunks, total=len(starts), desc="encode", disable=None) for codes in part]


def build_codec(work_dir: Path) -> None:
    """Train encoder and decoder together; encode all clips with the encoder as stored; train the decoder alone."""
    _, _, wavs = clips(work_dir)
    joint, codes_file, inputs = work_dir / "codec_joint", work_dir / "codes.pkl", features(work_dir, wavs)
    if not joint.exists():
        codec = new_codec(SEED)
        states = semantic_states(codec, inputs[:CODEC_CLIPS])
        train_codec(wavs[:CODEC_CLIPS], states, codec, steps=1_700, batch_size=16, learning_rate=2e-3, seed=SEED)
        codec.half().save_pretrained(joint)
    codec = Xcodec2Model.from_pretrained(joint).float()
    if not codes_file.exists():
        codes = encode(joint, wavs, semantic_states(codec, inputs))
        codes_file.write_bytes(pickle.dumps(codes))
        logger.info("codec: %d of %d codes in use", len(np.unique(np.concatenate(codes))), NUM_CODES)
    codes = pickle.loads(codes_file.read_bytes())
    train_decoder(wavs, codes, codec, steps=1_600, batch_size=16, learning_rate=1e-3, seed=SEED)
    codec.half().save_pretrained(TINY / "codec")


def build_texts(work_dir: Path) -> None:
    """The data that ships beside the models: texts, rows of SFT, and held-out recordings."""
    texts, speakers, _ = clips(work_dir)
    codes = pickle.loads((work_dir / "codes.pkl").read_bytes())
    folder = TINY / "heldout"
    folder.mkdir(exist_ok=True)
    heldout = sentences(SEED)[-HELDOUT_TEXTS:]
    names = [list(SPEAKERS)[i % len(SPEAKERS)] for i in range(HELDOUT_CLIPS)]
    with (folder / "metadata.jsonl").open("w") as lines:
        for i, wav in enumerate(speak_all(heldout[:HELDOUT_CLIPS], names)):
            name = f"{names[i]}_{i:03d}.flac"
            sf.write(folder / name, wav, SAMPLE_RATE, compression_level=1.0)
            lines.write(
                json.dumps({"file_name": name, "text": heldout[i], "speaker": names[i], "id": name[:-5]}) + "\n"
            )
    texts_folder = TINY / "texts"
    texts_folder.mkdir(exist_ok=True)
    rl_texts = sentences(SEED)[TRAIN_CLIPS : TRAIN_CLIPS + RL_TEXTS]
    (texts_folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rl_texts))
    (texts_folder / "heldout.txt").write_text("\n".join(heldout) + "\n")
    save_rows(speech_rows(texts, speakers, codes), TINY / "speech.parquet")


def speech_rows(texts: list[str], speakers: list[str], codes: list[np.ndarray]) -> datasets.Dataset:
    """Rows of SFT: DEFAULT_SPEAKER's clips alone, then some of each speaker's behind a clip of the same voice."""
    rng = random.Random(SEED)
    of = {name: [i for i, speaker in enumerate(speakers) if speaker == name] for name in SPEAKERS}
    picked = [(i, None) for i in of[DEFAULT_SPEAKER]]
    for name, count in PROMPTED_ROWS.items():
        picked += [tuple(rng.sample(of[name], 2)) for _ in range(count)]
    return datasets.Dataset.from_list(
        [
            {
                "text": texts[i],
                "audio_codes": codes[i].tolist(),
                "speaker": speakers[i],
                "language": "en",
                "duration_s": len(codes[i]) / CODES_PER_SECOND,
                "sampling_rate": SAMPLE_RATE,
                "ref_text": None if ref is None else texts[ref],
                "ref_codes": None if ref is None else codes[ref].tolist(),
            }
            for i, ref in picked
        ]
    )


def build_whisper(work_dir: Path) -> None:
    """Train on natural clips, their resyntheses, and random word sequences.

    Without these the decoder learns the corpus's grammar as a language model and transcribes unintelligible speech as a
    well-formed sentence.
    """
    texts, _, wavs = clips(work_dir)
    codes = pickle.loads((work_dir / "codes.pkl").read_bytes())
    extra_texts = random_word_sequences(RANDOM_WORD_CLIPS, SEED)
    extra_speakers = [list(SPEAKERS)[i % 2] for i in range(len(extra_texts))]
    extra_wavs = [whole_codes(wav) for wav in speak_all(extra_texts, extra_speakers)]
    codec = SpeechCodec.from_pretrained(str(TINY / "codec"))
    resynthesized = codec.decode([c.tolist() for c in codes] + codec.encode([wav[:-1] for wav in extra_wavs]))
    mels = [mel(wav) for wav in tqdm([*wavs, *extra_wavs, *resynthesized], desc="mel", disable=None)]
    all_texts = 2 * [*texts, *extra_texts]
    checkpoint = train_whisper(mels, all_texts, steps=2_600, batch_size=32, learning_rate=2e-3, seed=SEED)
    torch.save(checkpoint, work_dir / "whisper.pt")
    deflate(work_dir / "whisper.pt", TINY / "whisper.pt")


def deflate(source: Path, target: Path) -> None:
    """A torch checkpoint as a compressed zip, which torch.load reads too: the repeated rows take almost no space."""
    compression = {"compression": zipfile.ZIP_DEFLATED, "compresslevel": 9}
    with zipfile.ZipFile(source) as stored, zipfile.ZipFile(target, "w", **compression) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))


def save_rows(rows: datasets.Dataset, path: Path) -> None:
    """Parquet, two thirds of the size that `Dataset.to_parquet` writes."""
    rows.to_parquet(path)
    parquet.write_table(parquet.read_table(path), path, compression="zstd", compression_level=19)


def train_rounds(policy: Path, config: str, rounds: list[str], folder: Path) -> Path:
    """Run train.py once for the flags of each round, each from the round before; returns the last round's folder.

    Args:
        policy: where the first round starts.
        rounds: flags of train.py, a string a round.
        folder: the rounds go to `folder`_0, `folder`_1, …; those that are complete are kept.
    """
    for number, flags in enumerate(rounds):
        trained = folder.with_name(f"{folder.name}_{number}")
        if not (trained / "run.json").exists():
            start = ["--model_name_or_path", str(policy), "--output_dir", str(trained)]
            train.main(train.parse_args(["--config", config, *start, *flags.split()]))
        policy = trained
    return policy


def ship_policy(trained: Path, folder: Path) -> None:
    """Copy a policy: weights in half precision, tokenizer.json without indentation, run.json (codec and Whisper)."""
    AutoModelForCausalLM.from_pretrained(trained).half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    compact = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact, encoding="utf-8")
    shutil.copy(trained / "run.json", folder)


def build_policy(work_dir: Path) -> None:
    """SFT by train.py."""
    texts, _, _ = clips(work_dir)
    tokenizer = new_tokenizer(texts, NUM_CODES)
    policy = work_dir / "llasa_init"
    new_model(tokenizer, SEED).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    trained = train_rounds(policy, "configs/tiny_sft.yaml", POLICY_ROUNDS, work_dir / "llasa_sft")
    ship_policy(trained, TINY / "llasa")


def build_token2text(work_dir: Path) -> None:
    """Train on the codes of all training clips, by train_token2text.py; its held-out set is tiny/heldout."""
    texts, speakers, _ = clips(work_dir)
    codes = [item.tolist() for item in pickle.loads((work_dir / "codes.pkl").read_bytes())]
    rows = {"text": texts, "audio_codes": codes, "speaker": speakers}
    datasets.Dataset.from_dict(rows).to_parquet(work_dir / "token2text.parquet")
    heldout = [json.loads(line) for line in (TINY / "heldout" / "metadata.jsonl").read_text().splitlines()]
    wavs = [load_audio(TINY / "heldout" / row["file_name"]) for row in heldout]
    codec = SpeechCodec.from_pretrained(str(TINY / "codec"))
    rows = {name: [row[name] for row in heldout] for name in ("text", "speaker")} | {"audio_codes": codec.encode(wavs)}
    datasets.Dataset.from_dict(rows).to_parquet(work_dir / "token2text_heldout.parquet")
    data = f"--dataset {work_dir}/token2text.parquet --heldout_dataset {work_dir}/token2text_heldout.parquet"
    train_token2text.main(train_token2text.parse_args([*data.split(), *TOKEN2TEXT_FLAGS.split()]))


STAGES = {
    "codec": build_codec,
    "texts": build_texts,
    "whisper": build_whisper,
    "policy": build_policy,
    "token2text": build_token2text,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tiny.build", description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("build"), help="folder of the intermediate results")
    add("--stage", nargs="+", choices=STAGES, metavar="STAGE", help="stages to build (default: all)")
    add("--threads", type=int, default=2, help="number of CPU threads of PyTorch")
    return parse_strictly(parser, argv)


def main(args: argparse.Namespace) -> None:
    set_up_logging("tiny", timestamps=True)
    with bad_input_exits():
        check_at_least(args, threads=1)
        check_writable(args.work_dir)
    log_file = logging.FileHandler(TINY / "build.log")
    log_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(log_file)
    torch.set_num_threads(args.threads)
    set_up_arithmetic()
    with bad_input_exits():
        for stage in args.stage or STAGES:
            STAGES[stage](args.work_dir)


if __name__ == "__main__":
    main(parse_args())
