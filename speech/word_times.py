"""Times of the words of a text in a clip, from the cross-attention of a Whisper that was given the text.

As `whisper.timing.find_alignment`: the attention logits of the heads that follow the audio are normalised, smoothed and
averaged, and dynamic time warping finds the path on which each token of the text has its stretch of the audio.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from whisper.timing import dtw_cpu, median_filter

SMOOTHED_FRAMES = 7  # encoder positions of 20 ms, the library's


@dataclass(frozen=True)
class Word:
    """A word of a clip: its spelling with its punctuation, start and end in s, and NLL in nats per token, if known."""

    text: str
    start_s: float
    end_s: float
    nll: float | None = None


def token_frames(logits: torch.Tensor, num_prompt: int) -> list[int]:
    """The encoder position at which each token begins; the last is the end-of-text, where the speech ends.

    Args:
        logits: attention to the clip's encoder positions, shape (heads, input tokens, positions). Input token n is
            where token n + 1 is predicted.
        num_prompt: input tokens before the one that predicts the text's first token.
    """
    weights = logits.softmax(dim=-1)
    std, mean = torch.std_mean(weights, dim=1, keepdim=True, unbiased=False)
    weights = median_filter((weights - mean) / std.clamp(min=1e-8), SMOOTHED_FRAMES)
    matrix = weights.mean(dim=0)[num_prompt:]
    tokens, frames = cheapest_path(-matrix.double().cpu().numpy())
    return [int(frames[tokens == token][0]) for token in range(len(matrix))]


def cheapest_path(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the cheapest way through a matrix (dynamic time warping, openai-whisper's).

    Its first call starts Numba's threads, and Numba sets OpenMP's number of threads, which is PyTorch's too, to the
    number of cores. A run with OMP_NUM_THREADS=1, as torchrun starts them, would go on with all of them, and with other
    last digits than before that call, so a resumed run would differ.
    """
    threads = torch.get_num_threads()
    path = dtw_cpu(costs)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return path


def words_of_tokens(text: str, tokens: list[bytes], starts: list[float], nlls: list[float]) -> list[Word]:
    """The words of a text, divided at spaces, with the times and the mean NLL of their tokens.

    ' It rains' as b' It', b' r', b'ains' that begin at 0.1, 0.3, 0.4 s, and its end at 0.7 s: It from 0.1 to 0.3 s and
    rains from 0.3 to 0.7 s. A token belongs to the word that its last byte is in, or follows.

    Args:
        text: any text of these tokens; a space before it may be the tokens' alone.
        tokens: the bytes of each.
        starts: in s, one for each token and one for the end.
        nlls: in nats, likewise; the end's is in no word.
    """
    written = b"".join(tokens).decode(errors="replace")
    begins = [len(written[: match.start()].encode()) for match in re.finditer(r"\S+", written)]
    words, first_tokens, length = text.split(), [], 0
    for index, token in enumerate(tokens):
        length += len(token)
        if len(first_tokens) < len(begins) and length > begins[len(first_tokens)]:
            first_tokens.append(index)
    edges = [*first_tokens, len(tokens)]
    return [
        Word(word, starts[first], starts[after], sum(nlls[first:after]) / max(1, after - first))
        for word, first, after in zip(words, edges[:-1], edges[1:], strict=True)
    ]
