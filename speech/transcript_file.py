"""The transcripts of inference.py --task asr: a file that is whole or not there, and what an interrupted run left.

A resumed run goes on as if it had never stopped: each finished batch is kept with the random state after it.
"""

import base64
from pathlib import Path

import torch

from common.resumable_file import ResumableFile
from speech.policy import Transcript


class TranscriptFile(ResumableFile):
    """A `ResumableFile` of transcripts.

    Args:
        device: where they are sampled.
    """

    def __init__(self, path: Path, run: dict, device: str, overwrite: bool):
        super().__init__(path, run, "transcripts", overwrite)
        self.device = torch.device(device)

    def resume(self) -> list[dict[int, Transcript]]:
        """The batches that are done, by the rollouts' indices; torch's random state is then that after the last one."""
        batches = self.finished_batches()
        if batches:
            set_random_state(batches[-1]["random_state"], self.device)
        return [{i: Transcript(text, truncated) for i, text, truncated in batch["rollouts"]} for batch in batches]

    def add(self, batch: dict[int, Transcript]) -> None:
        """Append a batch that has just been sampled."""
        rollouts = [[i, transcript.text, transcript.truncated] for i, transcript in batch.items()]
        self.add_batch({"rollouts": rollouts, "random_state": random_state(self.device)})


def random_state(device: torch.device) -> str:
    """The state of the generator that a device samples with, as text: 16 bytes of a GPU, 5 KB of a CPU."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return base64.b64encode(state.numpy().tobytes()).decode()


def set_random_state(text: str, device: torch.device) -> None:
    state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
