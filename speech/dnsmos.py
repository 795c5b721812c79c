"""DNSMOS P.835, Microsoft's prediction of listeners' opinions of a clip, by the weights in the package speechmos.

Reddy, Gopal, Cutler: DNSMOS P.835 (ICASSP 2022). It works on the CPU. Of the package only the weights are used:
its own code runs a second model (P.808) as well, on a spectrogram by librosa.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cli import InputError
from speech.audio import audio_failure
from speech.tokens import SAMPLE_RATE

WINDOW_S = 9.01  # of the model; windows begin at every second
# From the model's scores to opinions, as speechmos has them: the coefficients of x², x and 1
POLYNOMIALS = {
    "ovrl": (-0.06766283, 1.11546468, 0.04602535),
    "sig": (-0.08397278, 1.22083953, 0.0052439),
    "bak": (-0.13166888, 1.60915514, -0.39604546),
}


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
        missing = [name for name in ("speechmos", "onnxruntime") if not _is_installed(name)]
        if missing:
            raise InputError(
                f"dnsmos: needs a package that is not installed ({missing[0]}). Install it: "
                "pip install -r requirements-dnsmos.txt"
            )
        import onnxruntime  # an optional package, needed only here

        [folder] = importlib.util.find_spec("speechmos").submodule_search_locations
        self._session = onnxruntime.InferenceSession(Path(folder) / "dnsmos_models" / "sig_bak_ovr.onnx")

    def score(self, wavs: list[np.ndarray]) -> list[MosScores | None]:
        """The opinions of each clip, None of one that is empty, silent or not finite.

        Args:
            wavs: mono at 16 kHz, shape (n_samples,) each; clipped to [−1, 1].
        """
        return [None if audio_failure(wav) else self._scores(wav.clip(-1, 1)) for wav in wavs]

    def _scores(self, wav: np.ndarray) -> MosScores:
        """Means over the clip's windows."""
        scores = [self._session.run(None, {"input_1": window[None]})[0][0] for window in windows(wav)]
        sig, bak, ovrl = np.array(scores, dtype=np.float64).T  # as the model orders them
        raw = {"ovrl": ovrl, "sig": sig, "bak": bak}
        return MosScores(*(float(np.polyval(POLYNOMIALS[name], raw[name]).mean()) for name in MosScores._fields))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # of a package that is None in sys.modules
        return False


def windows(wav: np.ndarray) -> list[np.ndarray]:
    """Pieces of 9.01 s, one a second, as speechmos cuts them; a shorter clip is doubled until it fills one.

    Args:
        wav: shape (n_samples,), not empty.
    Returns:
        float32, shape (144160,) each.
    """
    size = int(WINDOW_S * SAMPLE_RATE)
    while len(wav) < size:
        wav = np.concatenate([wav, wav])
    hops = int(len(wav) // SAMPLE_RATE - WINDOW_S) + 1
    pieces = [wav[i * SAMPLE_RATE : int((i + WINDOW_S) * SAMPLE_RATE)] for i in range(hops)]
    return [piece.astype(np.float32) for piece in pieces if len(piece) == size]
