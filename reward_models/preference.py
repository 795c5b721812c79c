"""A learned preference for how a text is said: a small model of pairs, and the reward that it gives.

train_preference_model.py trains one on pairs of clips of a text, the better one known: by rule, by machine or by
people. It sees the text as written, with its marks and its punctuation, and the speech as the last features of a frozen
Whisper encoder, which the `whisper` reward has computed for the transcript already, and beside them the melody: voice,
F0 and level of each frame. A Whisper keeps of F0 what it needs for words (docs/experiments/preference_model.md).

Bytes of the text and frames of the speech are one sequence for a few transformer layers. Both know their place, from 0
at the beginning to 1 at the end, so that a byte finds about where it is spoken. The frames are pooled by attention into
one vector, and that into one number r, the score. Bradley & Terry (1952): P(one is preferred to the other) =
sigmoid(r_one − r_other).

A second head tells the speaker from the vector, behind a reversed gradient (Ganin et al., arXiv 1505.07818): what helps
it is taken out of the vector, so that no voice earns more than another.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from common.batches import batches_by_length
from common.cli import InputError, library_errors_are_input
from speech.checkpoint_files import UNREADABLE
from speech.pitch import PitchTrack
from speech.tokens import SAMPLE_RATE
from speech.weights import check_finite
from speech.whisper_scorer import SAMPLES_PER_FEATURE

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
BATCH_SIZE = 32  # rollouts scored at a time
MAX_WER = 0.5
FRAMES_PER_SECOND = SAMPLE_RATE // SAMPLES_PER_FEATURE  # of Whisper's encoder
MELODY_WIDTH = 3
ST_PER_UNIT, DB_PER_UNIT = 2.0, 5.0  # about the deviation within a clip: Whisper's features are normalised to 1
MELODY = f"{ST_PER_UNIT:g}st-{DB_PER_UNIT:g}dB"  # saved beside what was trained on these units


def with_pitch_features(features: torch.Tensor, track: PitchTrack) -> torch.Tensor:
    """Whisper's features of a clip, shape (frames, width), and beside them its melody: (frames, width + 3).

    Voice is 1 or 0; F0 is relative to the clip's median, in units of 2 semitones; the level is below that of the
    loudest voiced frame, in units of 5 dB. All are 0 in a frame without voice.

    F0 of 100 Hz in one frame and 200 Hz in the next, as loud: the median lies between, ±6 semitones are ±3.

    >>> import numpy as np
    >>> track = PitchTrack(np.array([0.01, 0.03]), 12 * np.log2([100, 200]), np.array([-20.0, -20.0]))
    >>> with_pitch_features(torch.zeros(3, 1), track).tolist()
    [[0.0, 1.0, -3.0, 0.0], [0.0, 1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    melody = np.zeros((len(features), MELODY_WIDTH))
    frames = (track.times * FRAMES_PER_SECOND).astype(int)
    inside = frames < len(features)
    if inside.any():
        values = [
            np.ones(len(frames)),
            (track.f0 - np.median(track.f0)) / ST_PER_UNIT,
            (track.level - track.level.max()) / DB_PER_UNIT,
        ]
        np.add.at(melody, frames[inside], np.stack(values, axis=1)[inside])
        melody /= np.maximum(melody[:, :1], 1)  # how many of the track's frames of 10 ms there are
    return torch.cat([features, torch.tensor(melody, dtype=features.dtype, device=features.device)], dim=1)


class ReversedGradient(torch.autograd.Function):
    """The identity, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


class PreferenceModel(nn.Module):
    """Score of a clip, given its text.

    Args:
        config: {"width": Whisper's n_audio_state, "whisper": its `fingerprint`, "melody": MELODY, "speakers": names,
            may be none, "hidden_size", "num_layers", "num_heads", "dropout"}.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        hidden = config["hidden_size"]
        self.normalise = nn.LayerNorm(config["width"])
        self.halve = nn.Conv1d(config["width"] + MELODY_WIDTH, hidden, kernel_size=5, stride=2, padding=2)
        self.text_embedding = nn.Embedding(256, hidden)
        self.kind_embedding = nn.Embedding(2, hidden)  # text, speech
        layer = nn.TransformerEncoderLayer(
            hidden, config["num_heads"], 4 * hidden, config["dropout"], "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, config["num_layers"], nn.LayerNorm(hidden), enable_nested_tensor=False
        )
        self.pooling = nn.Linear(hidden, 1)
        self.scoring = nn.Linear(hidden, 1)
        self.speaker_head = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, max(1, len(config["speakers"])))
        )
        # Mean score of the clips that it was trained on: only differences of scores have a meaning before.
        self.register_buffer("centre", torch.zeros(()))

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "PreferenceModel":
        """A saved model in evaluation mode, with frozen weights.

        Raises:
            InputError: the folder holds no such model.
        """
        folder = Path(folder)
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"{folder}: not a preference model, it lacks {', '.join(missing)}. Train one with "
                "train_preference_model.py"
            )
        with library_errors_are_input(f"{folder}: the preference model cannot be loaded", *UNREADABLE):
            config = json.loads((folder / CONFIG_FILE).read_text())
            if config.get("melody") != MELODY:
                raise InputError(
                    f"{folder}: this preference model hears the melody otherwise (got {config.get('melody', 'none')}, "
                    f"expected {MELODY}): it is of another version. Train it anew with train_preference_model.py"
                )
            model = cls(config)
            load_model(model, folder / WEIGHTS_FILE)  # strict: all weights, and no others
        check_finite(str(folder), model)
        return model.to(device).eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n")
        save_model(self, str(folder / WEIGHTS_FILE))

    @property
    def device(self) -> torch.device:
        return self.scoring.weight.device

    def check_whisper(self, fingerprint: str) -> None:
        """Raises InputError where the features are of another Whisper than those of its training."""
        if self.config["whisper"] != fingerprint:
            raise InputError(
                "the preference model was trained on another Whisper's features than --whisper gives. Use the Whisper "
                "that it was trained with (its run.json names it), or train a preference model with this one"
            )

    # --- Inputs and outputs -------------------------------------------------------------------------------

    def pooled(self, features: list[torch.Tensor], texts: list[str]) -> torch.Tensor:
        """One vector a clip, shape (batch, hidden size); equal to that of each clip alone.

        Args:
            features: `with_pitch_features` of each clip, shape (frames, width + 3), ragged.
            texts: as written.
        """
        speech, speech_there = self._padded([item.to(self.device, torch.float32) for item in features])
        width = self.config["width"]
        speech = torch.cat([self.normalise(speech[..., :width]), speech[..., width:]], dim=-1) * speech_there[..., None]
        speech = F.gelu(self.halve(speech.mT)).mT
        speech_there = speech_there[:, ::2]
        text_bytes = [torch.tensor(list(text.encode()), device=self.device) for text in texts]
        text, text_there = self._padded(text_bytes)
        kinds = self.kind_embedding.weight
        sequence = torch.cat(
            [
                self.text_embedding(text) + self._place(text_there) + kinds[0],
                speech + self._place(speech_there) + kinds[1],
            ],
            dim=1,
        )
        there = torch.cat([text_there, speech_there], dim=1)
        states = self.layers(sequence, src_key_padding_mask=~there)[:, text.shape[1] :]
        weights = self.pooling(states).masked_fill(~speech_there[..., None], -torch.inf).softmax(dim=1)
        return (weights * states).sum(dim=1)

    def _padded(self, items: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ragged items as one tensor, and a mask (batch, longest) that is True where there is something."""
        padded = pad_sequence(items, batch_first=True)
        lengths = torch.tensor([len(item) for item in items], device=self.device)
        return padded, torch.arange(padded.shape[1], device=self.device) < lengths[:, None]

    def _place(self, there: torch.Tensor) -> torch.Tensor:
        """Sines and cosines of the place in a text or a clip, 0 to 1: shape (batch, length, hidden size).

        From half a wave over the whole to 64 waves, some ten bytes or frames of a long sentence each.
        """
        count = there.sum(dim=1, keepdim=True)
        place = torch.arange(there.shape[1], device=self.device) / (count - 1).clamp(min=1)
        half = self.config["hidden_size"] // 2
        waves = 2 ** torch.linspace(-1, 6, half, device=self.device)
        angles = 2 * math.pi * place[..., None] * waves
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def scores(self, pooled: torch.Tensor) -> torch.Tensor:
        """r of each clip, shape (batch,)."""
        return self.scoring(pooled)[:, 0]

    def speaker_logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """Of each speaker of the training, shape (batch, speakers); what they learn is unlearnt in `pooled`."""
        return self.speaker_head(ReversedGradient.apply(pooled))

    @torch.inference_mode()
    def score(self, features: list[torch.Tensor | None], texts: list[str]) -> list[float]:
        """r − centre of any number of clips, in batches: 0 for one like the average of the training; NaN for None."""
        scores = [math.nan] * len(features)
        lengths = {i: len(item) for i, item in enumerate(features) if item is not None}
        for batch in batches_by_length(lengths, BATCH_SIZE):
            pooled = self.pooled([features[i] for i in batch], [texts[i] for i in batch])
            for i, score in zip(batch, (self.scores(pooled) - self.centre).tolist(), strict=True):
                scores[i] = score
        return scores


def preference_reward(score: float, wer: float, max_wer: float = MAX_WER) -> float:
    """sigmoid(score) where the WER is at most `max_wer`, else 0: in [0, 1].

    Under Bradley–Terry it is the probability that the clip is preferred to an average one of the training.

    >>> preference_reward(0.0, wer=0.0), round(preference_reward(2.2, wer=0.25), 3)
    (0.5, 0.9)
    >>> preference_reward(2.2, wer=0.75)
    0.0
    """
    return 0.0 if wer > max_wer else (1 + math.tanh(score / 2)) / 2  # the sigmoid, without its overflow


class PreferenceReward:
    """`preference_reward` of the preference model's score of each rollout, given its text.

    A failed rollout earns 0: truncated, without codes, silent, or with NaN in its audio. The features are those of the
    encoder pass that makes transcript and NLL; no second one is made. F0 is measured once for all rewards of melody.

    How it is hacked: a policy finds sounds that please the model and no listener, and words do not matter to a model
    that was shown the same words on both sides of its pairs. Hence the gate, `max_wer`, and in training label
    smoothing, mixup and the reversed gradient of the speaker; keep `whisper` in the sum, and a KL to the reference.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a codec, Whisper and a preference model.
        max_wer: WER above which the melody earns nothing.
    Raises:
        InputError: `max_wer` is negative.
    """

    __name__ = "preference"
    needs = ("codec", "whisper", "preference_model")

    def __init__(self, rollout_scorer, max_wer: float = MAX_WER):
        if not max_wer >= 0:
            raise InputError(f"max_wer: must be >= 0 (got {max_wer})")
        self.rollout_scorer, self.max_wer = rollout_scorer, max_wer

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float]:
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        return [
            0.0 if failure else preference_reward(preference, score.wer, self.max_wer)
            for preference, score, failure in zip(rollouts.preferences, rollouts.scores, rollouts.failures, strict=True)
        ]
