"""Whether the clips of an evaluation have the voice of their prompts, by a speaker encoder that no reward uses.

    python evaluation.py … --texts tiny/texts/heldout_voices.jsonl --num_players 120 --output_dir runs/voices
    python -m tiny.judge_voice runs/voices

The encoder is GE2E (Wan et al., arXiv 1710.10467), trained on people's speech, with the weights of the resemblyzer
package, which are downloaded once into build/ge2e. A clip is compared with the recording of its voice prompt (cosine),
and with the three voices of the toy setup, each the mean of its held-out recordings: the nearest should be the
prompt's. The last two rows are what recordings reach: those of the prompt's voice, and those of the other two. Like
tiny/judge_melody.py it judges the clips on the page, so give evaluation.py as many players as there are texts, and
takes evaluations with other --seeds as further samplings.

With --voice, for a policy that speaks in one voice whatever the prompt, such as a LoRA of a voice, every clip is
compared with the recordings of that voice, and the texts may be any.
"""

import argparse
import json
import logging
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from common.cli import (
    HelpFormatter,
    InputError,
    bad_input_exits,
    check_writable,
    parse_strictly,
    run_script,
    set_up_logging,
)
from common.tables import markdown_table
from metrics.texts import read_items
from speech.audio import audio_failure, load_audio
from speech.tokens import SAMPLE_RATE
from tiny.judge_melody import Clips, SampledRow, sampled_rows
from tiny.voices import SPEAKERS
from tiny.whisper_weights import Weights, fetch

logger = logging.getLogger("tiny.judge_voice")

TINY = Path(__file__).parent
REQUIREMENTS = TINY / "requirements-judges.txt"
HELDOUT = TINY / "heldout"
TEXTS = TINY / "texts" / "heldout_voices.jsonl"
GE2E = Weights(
    packages=("resemblyzer",),
    parts={"pretrained.pt": ("resemblyzer/pretrained.pt",)},
    sha256={"pretrained.pt": "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"},
)

# The encoder's own: mel frames of 25 ms every 10 ms, windows of 1.6 s that overlap by about a half, a level of -30 dBFS
FRAME, HOP, NUM_MELS = 400, 160, 40
WINDOW_FRAMES, STEP_FRAMES = 160, 77
MIN_COVERAGE = 0.75  # of a last window by the clip
LEVEL_DBFS = -30.0


# --- GE2E -------------------------------------------------------------------------------------------------


class Ge2e(torch.nn.Module):
    """The speaker encoder: three LSTM layers over 40 mel bands, one linear layer, 256 numbers of length 1."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        self.lstm = torch.nn.LSTM(NUM_MELS, 256, 3, batch_first=True)
        self.linear = torch.nn.Linear(256, 256)
        self.load_state_dict({name: state[name] for name in self.state_dict()})
        self.filters = mel_filter_bank(FRAME // 2 + 1, NUM_MELS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, "slaney", "slaney")

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Ge2e":
        """Loads resemblyzer's weights from `folder`, where they are put first if they are not there.

        Raises:
            InputError: the package cannot be had, or the folder holds other weights.
        """
        fetch(GE2E, folder, REQUIREMENTS)
        checkpoint = torch.load(folder / "pretrained.pt", map_location="cpu", weights_only=True)
        return cls(checkpoint["model_state"]).eval()

    @torch.inference_mode()
    def embed(self, wav: np.ndarray) -> np.ndarray:
        """Mean of the embeddings of the clip's windows, float32, shape (256,), of length 1.

        resemblyzer's own without its voice activity detection, which shortens long pauses.

        Args:
            wav: float32 mono at 16 kHz, shape (n_samples,), not silent.
        """
        level = 10 * math.log10(np.mean(np.square(wav, dtype=np.float64)))
        wav = wav * 10 ** (max(LEVEL_DBFS - level, 0.0) / 20)  # only ever louder
        starts = window_starts(len(wav))
        wav = np.pad(wav, (0, max(0, (starts[-1] + WINDOW_FRAMES) * HOP - len(wav))))
        window = window_function(FRAME, "hann")
        mels = spectrogram(wav, window, FRAME, HOP, power=2.0, pad_mode="constant", mel_filters=self.filters).T
        windows = np.stack([mels[start : start + WINDOW_FRAMES] for start in starts])
        _, (hidden, _) = self.lstm(torch.from_numpy(windows).float())
        embeddings = torch.nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=1)
        return torch.nn.functional.normalize(embeddings.mean(0), dim=0).numpy()


def window_starts(num_samples: int) -> list[int]:
    """First frames of the windows of which the clip covers three quarters or more; of a short clip one window.

    A clip of 2 s, 200 frames, covers 123 frames of the window that begins at frame 77, 0.77 of it.

    >>> window_starts(8_000), window_starts(32_000), window_starts(31_000)
    ([0], [0, 77], [0])
    """
    last = num_samples / HOP - MIN_COVERAGE * WINDOW_FRAMES
    return list(range(0, int(max(last, 0)) + 1, STEP_FRAMES))


# --- Judgements -------------------------------------------------------------------------------------------


def voices_of_recordings(encoder: Ge2e) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The held-out recordings' embeddings by their file names, and their speakers."""
    lines = (HELDOUT / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    speakers = {row["file_name"]: row["speaker"] for row in map(json.loads, lines)}
    return {name: encoder.embed(load_audio(HELDOUT / name)) for name in speakers}, speakers


def mean_voices(recordings: dict[str, np.ndarray], speakers: dict[str, str]) -> dict[str, np.ndarray]:
    """Each speaker's mean recording, of length 1."""
    means = {}
    for speaker in set(speakers.values()):
        mean = np.mean([recordings[name] for name in recordings if speakers[name] == speaker], axis=0)
        means[speaker] = mean / np.linalg.norm(mean)
    return means


def nearest_voice(embedding: np.ndarray, voices: dict[str, np.ndarray]) -> str:
    """The speaker of `mean_voices` whose voice is nearest."""
    return max(voices, key=lambda speaker: voices[speaker] @ embedding)


def prompts_of(clips: Clips, folder: Path) -> list[str]:
    """The file name of each clip's voice prompt; InputError where the texts are not those of TEXTS."""
    prompts = {item.id: (item.text, Path(item.ref_audio).name) for item in read_items(str(TEXTS), "en")}
    if {clip["id"]: clip["text"] for clip, _ in clips} != {row_id: text for row_id, (text, _) in prompts.items()}:
        raise InputError(
            f"{folder}: is not an evaluation of these texts. Use --texts {TEXTS.relative_to(TINY.parent)}, "
            "or --voice to compare all clips with one voice"
        )
    return [prompts[clip["id"]][1] for clip, _ in clips]


def judged(
    row: SampledRow, encoder: Ge2e, recordings: dict, speakers: dict, voice: str | None
) -> tuple[dict[str, float], list[bool]]:
    """By text the mean over its samplings of the clips' cosines, and of every clip whether its voice is the right one.

    A clip that failed has no voice: cosine 0, and not the right one.

    Args:
        voice: the right one of every clip, compared with the mean of its recordings' cosines; None is the prompt's.

    Raises:
        InputError: without a `voice`, other texts.
    """
    voices = mean_voices(recordings, speakers)
    if voice is not None:  # the cosine with it is the mean of the recordings' cosines
        own_mean = np.mean([recordings[file] for file, speaker in speakers.items() if speaker == voice], axis=0)
    cosines, right = {}, []
    for clips in row.samplings:
        if voice is None:
            targets = [(recordings[prompt], speakers[prompt]) for prompt in prompts_of(clips, row.folder)]
        else:
            targets = [(own_mean, voice)] * len(clips)
        for (clip, wav), (target, speaker) in zip(clips, targets, strict=True):
            of_text = cosines.setdefault(clip["text"], [])
            if clip["failure"] or audio_failure(wav):
                of_text.append(0.0)
                right.append(False)
                continue
            embedding = encoder.embed(wav)
            of_text.append(float(embedding @ target))
            right.append(nearest_voice(embedding, voices) == speaker)
    return {text: statistics.mean(values) for text, values in cosines.items()}, right


def of_recordings(
    recordings: dict[str, np.ndarray], speakers: dict[str, str], same: bool, voice: str | None = None
) -> list[float]:
    """Cosines of all pairs of recordings of one voice, or of two voices; with a `voice`, where it is one of them."""
    names = list(recordings)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i] if (speakers[a] == speakers[b]) == same]
    pairs = [(a, b) for a, b in pairs if voice in (None, speakers[a], speakers[b])]
    return [float(recordings[a] @ recordings[b]) for a, b in pairs]


def change(values: dict[str, float], first: dict[str, float]) -> str:
    """Mean difference from the first row by text, with its 95 % interval (1.96 standard errors)."""
    differences = np.array([value - first[text] for text, value in values.items()])
    error = 1.96 * differences.std(ddof=1) / math.sqrt(len(differences))
    return f"{differences.mean():+.3f} ± {error:.3f}"


def main(args: argparse.Namespace) -> None:
    with bad_input_exits():
        check_writable(args.weights)
        encoder = Ge2e.from_pretrained(args.weights)
        recordings, speakers = voices_of_recordings(encoder)
        rows = sampled_rows(args.evaluations)
        judgements = [judged(row, encoder, recordings, speakers, args.voice) for row in rows]
    cells, first = [], judgements[0][0] if judgements else {}
    for row, (cosines, right) in zip(rows, judgements, strict=True):
        difference = change(cosines, first) if cells and cosines.keys() == first.keys() else ""
        similarity = statistics.mean(cosines.values())
        cells.append([row.folder, row.name, f"{similarity:.3f}", difference, f"{100 * statistics.mean(right):.1f}"])
    for name, same in (("recordings of the same voice", True), ("recordings of two voices", False)):
        cosines = of_recordings(recordings, speakers, same, args.voice)
        cells.append(["", name, f"{statistics.mean(cosines):.3f}", "", ""])
    whose = args.voice or "the prompt"
    header = ["evaluation", "row", "similarity", "change from the first", f"voice is {whose}'s, %"]
    logger.info("%s", markdown_table(header, cells))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tiny.judge_voice", description=__doc__, formatter_class=HelpFormatter)
    help = "--output_dir of evaluation.py; without any, the recordings alone"
    parser.add_argument("evaluations", type=Path, nargs="*", metavar="FOLDER", help=help)
    help = "compare every clip with this voice, in place of its prompt's"
    parser.add_argument("--voice", choices=SPEAKERS, help=help)
    parser.add_argument("--weights", type=Path, default=Path("build/ge2e"), help="folder of the encoder's weights")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    set_up_logging(logger.name)
    run_script(main, parse_args)
