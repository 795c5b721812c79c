"""Make the small world: corpus, XCodec2, Whisper, the texts and codes, and a supervised Llasa.

    python -m tiny.build --work_dir build            # everything, about an hour and a half on two cores
    python -m tiny.build --work_dir build --stage codec whisper

Needs flite (Debian package `flite`). Seeds are fixed; what a stage makes is kept in --work_dir, so that an
interrupted build goes on, and what users need is written beside this file. tiny/build.log is the log of the
build that made the files in the repository.
"""

import argparse
import logging
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import SeamlessM4TFeatureExtractor, Xcodec2Model

from speech_tokens import HOP_LENGTH, SAMPLE_RATE
from tiny.corpus import SPEAKERS, sentences, speak_all
from tiny.train_codec import encode_latents, new_codec, train_codec, train_decoder

logger = logging.getLogger("tiny.build")

TINY = Path(__file__).parent
SEED = 0
# Sentences in the shuffled order of all 14,400: nobody ever sees the last ones but the tests and evaluations.
TRAIN_CLIPS = 6_000
HELDOUT_TEXTS = 400
CODEC_CLIPS = 3_000


def clips(work_dir: Path) -> tuple[list[str], list[str], list[np.ndarray]]:
    """Training texts, their speakers and clips; every sentence is spoken once, by one of the two."""
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
    """Padded as the codec pads: one to HOP_LENGTH zeros."""
    return np.pad(wav, (0, HOP_LENGTH - len(wav) % HOP_LENGTH))


def semantic_features(wav: np.ndarray) -> np.ndarray:
    padded = np.pad(wav, HOP_LENGTH // 2)
    return SeamlessM4TFeatureExtractor()(padded, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0]


def features(work_dir: Path, wavs: list[np.ndarray]) -> list[np.ndarray]:
    """The semantic encoder's input for every clip; extracting it is the slow part of encoding."""
    path = work_dir / "features.pkl"
    if not path.exists():
        with ProcessPoolExecutor(2) as pool:
            found = list(tqdm(pool.map(semantic_features, wavs, chunksize=50), total=len(wavs), mininterval=30))
        path.write_bytes(pickle.dumps([f.astype(np.float16) for f in found]))
    return pickle.loads(path.read_bytes())


@torch.inference_mode()
def semantic_states(codec: Xcodec2Model, inputs: list[np.ndarray]) -> list[np.ndarray]:
    return [
        codec.semantic_encoder(torch.tensor(x[None]).float()).last_hidden_state[0].half().numpy()
        for x in tqdm(inputs, desc="semantic", mininterval=30)
    ]


@torch.inference_mode()
def encode(codec: Xcodec2Model, wavs: list[np.ndarray], states: list[np.ndarray]) -> list[np.ndarray]:
    """Codes of clips from semantic states at hand; equals SpeechCodec.encode (a test holds it)."""
    codes = []
    for wav, state in tqdm(zip(wavs, states, strict=True), total=len(wavs), desc="encode", mininterval=30):
        hidden = torch.cat(
            [
                codec.semantic_adapter(torch.tensor(state.T[None]).float()),
                codec.acoustic_encoder(torch.tensor(wav[None, None])),
            ],
            dim=1,
        )
        codes.append(codec.quantizer(codec.fc_encoder(hidden.transpose(1, 2)))[1][0, :, 0].numpy())
    return codes


def build_codec(work_dir: Path) -> None:
    _, _, wavs = clips(work_dir)
    inputs = features(work_dir, wavs)
    codec = new_codec(SEED)
    states = semantic_states(codec, inputs[:CODEC_CLIPS])
    wavs = wavs[:CODEC_CLIPS]
    train_codec(wavs, states, codec, steps=1_700, batch_size=16, learning_rate=2e-3, seed=SEED)
    codec.save_pretrained(work_dir / "codec_joint")
    codes = encode(codec, wavs, states)
    logger.info("codec: %d of %d codes in use", len(np.unique(np.concatenate(codes))), 4**6)
    train_decoder(wavs, codes, codec, steps=3_000, batch_size=16, learning_rate=1e-3, seed=SEED)
    codec.half().save_pretrained(TINY / "codec")


STAGES = {"codec": build_codec}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("build"), help="what a stage makes on the way")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="which parts to make")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    args.work_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(TINY / "build.log")],
    )
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # else a CPU crawls when weights get tiny
    for stage in args.stage:
        STAGES[stage](args.work_dir)


if __name__ == "__main__":
    main(parse_args())
