"""Texts and speakers of the toy setup: four-word sentences, synthesized by flite.

Every sentence is `name verb number noun`; flite (Debian package `flite`) synthesizes it in a female voice (slt) and a
male one (rms). The words are among those that pocketsphinx's English model recognizes in both voices, so that there is
a held-out ASR. Speech is somewhat faster than flite's default, for short rollouts.
"""

import random
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

from common.cli import InputError
from speech.tokens import SAMPLE_RATE

NAMES = "Anna Peter Robert Sarah Michael Susan David Oliver Laura Martin Helen Diana".split()
VERBS = "found bought painted carried opened counted washed dropped visited finished".split()
NUMBERS = "two three five six seven nine eleven thirty twenty forty".split()
NOUNS = "boxes apples books gardens shoes hats horses pencils baskets birds houses oranges".split()

# flite's voice -> its duration relative to flite's default
SPEAKERS = {"slt": 0.75, "rms": 0.70}
EDGE_SILENCE_S = 0.04  # kept on both sides; flite's own is 0.2 s, and silence costs codes to sample
SILENCE_LEVEL = 0.02  # relative to the peak


def sentences(seed: int) -> list[str]:
    """All 14,400 sentences, shuffled."""
    every = [f"{' '.join(words)}." for words in product(NAMES, VERBS, NUMBERS, NOUNS)]
    random.Random(seed).shuffle(every)
    return every


def random_word_sequences(count: int, seed: int) -> list[str]:
    """Two to five of the words in any order, for an ASR model that must not learn the grammar."""
    rng = random.Random(seed)
    words = NAMES + VERBS + NUMBERS + NOUNS
    return [f"{' '.join(rng.choices(words, k=rng.randint(2, 5)))}." for _ in range(count)]


def speak(text: str, speaker: str) -> np.ndarray:
    """One clip, float32 mono at 16 kHz, silence trimmed, peak at 0.5."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.wav"
        command = ["flite", "-voice", speaker, "--setf", f"duration_stretch={SPEAKERS[speaker]}"]
        subprocess.run([*command, "-t", text, "-o", str(path)], check=True)
        wav, rate = sf.read(path, dtype="float32")
    assert rate == SAMPLE_RATE, f"flite's voice {speaker} has {rate} Hz"
    wav *= 0.5 / np.abs(wav).max()
    loud = np.flatnonzero(np.abs(wav) > SILENCE_LEVEL * 0.5)
    edge = int(EDGE_SILENCE_S * SAMPLE_RATE)
    return wav[max(0, loud[0] - edge) : loud[-1] + edge]


def speak_all(texts: list[str], speakers: list[str]) -> list[np.ndarray]:
    """Clips of the texts, in their order; InputError without flite."""
    if not shutil.which("flite"):
        raise InputError("flite: is not installed. Install the Debian package flite")
    # Each flite is a process of its own, so threads suffice.
    with ThreadPoolExecutor(2) as pool:
        return list(tqdm(pool.map(speak, texts, speakers), total=len(texts), desc="flite", disable=None))
