"""DNSMOS P.835, Microsoft's prediction of listeners' opinions of a clip, by the package speechmos.

Reddy, Gopal, Cutler: DNSMOS P.835 (ICASSP 2022). It works on the CPU, in windows of 9.01 s, to which the package fills
a shorter clip by repeating it.
"""

from typing import NamedTuple

import numpy as np

from common.cli import InputError
from speech.audio import audio_failure
from speech.tokens import SAMPLE_RATE


class MosScores(NamedTuple):
    """Predicted mean opinions, on a scale from 1 (bad) to 5 (excellent).

    Attributes:
        ovrl: overall; sig: of the speech alone; bak: of the background, 5 where none is heard.
    """

    ovrl: float
    sig: float
    bak: float


class Dnsmos:
    """The model.

    Raises:
        InputError: a package is not installed.
    """

    def __init__(self):
        try:
            from speechmos import dnsmos  # an optional package, needed only here
        except ModuleNotFoundError as error:
            raise InputError(
                f"dnsmos: needs a package that is not installed ({error.name}). Install it: "
                "pip install -r requirements-dnsmos.txt"
            ) from error
        self._run = dnsmos.run

    def score(self, wavs: list[np.ndarray]) -> list[MosScores | None]:
        """The opinions of each clip, None of one that is empty, silent or not finite.

        Args:
            wavs: mono at 16 kHz, shape (n_samples,) each; clipped to [−1, 1].
        """
        return [None if audio_failure(wav) else self._scores(wav.clip(-1, 1)) for wav in wavs]

    def _scores(self, wav: np.ndarray) -> MosScores:
        mos = self._run(wav, SAMPLE_RATE)
        return MosScores(*(float(mos[f"{name}_mos"]) for name in MosScores._fields))
