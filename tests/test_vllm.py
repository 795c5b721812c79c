"""vLLM, really run, on a CPU: it samples from the policy that is being trained, and gives speech and nothing else.

    make test-vllm

Each run is three steps of train.py. Before the third the weights are kept from vLLM: it samples with those of the step
before, as it would if the trained ones never came, and the bound that holds for the first two must break.
"""

import json
import re
import shlex
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import train
from speech.policy import load_tokenizer
from speech.tokens import SpeechTokens
from training.grpo_trainer import SpeechGRPOTrainer

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

from trl.generation import vllm_generation
from vllm import _custom_ops
from vllm.distributed import cleanup_dist_env_and_memory

STALE = 2  # the step, counted from 0, that samples with the weights of the step before
LENGTH = 115  # codes: some rollouts end, some do not
FLAGS = [
    *("--config", "configs/tiny.yaml", "--use_vllm", "true", "--vllm_mode", "colocate", "--sample_steps", "0"),
    *("--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", str(LENGTH)),
    *("--max_steps", "3", "--save_strategy", "no", "--vllm_gpu_memory_utilization", "0.3"),
]
RUNS = {
    "all weights": ["--learning_rate", "1e-3"],
    # the temperature: vLLM's log-probs are those of the tempered distribution, as ours are
    "LoRA": ["--use_peft", "true", "--lora_r", "8", "--learning_rate", "1e-2", "--temperature", "0.8"],
    "bfloat16": ["--bf16", "true", "--use_cpu", "true", "--learning_rate", "1e-3"],
}
# How far an importance ratio may be from 1. Measured: 0.013, and 0.071 in bfloat16 (docs/experiments/vllm.md).
BOUNDS = {"all weights": 0.05, "LoRA": 0.05, "bfloat16": 0.15}
COMPILED = "all weights"  # as TRL starts vLLM; the others do without the compilation, which takes half a minute each


@dataclass
class Step:
    """A batch of rollouts: its token ids, which of them are not padding, log-probs by vLLM and by the trainer.

    All have shape (rollouts, tokens).
    """

    ids: torch.Tensor
    mask: torch.Tensor
    sampled: torch.Tensor
    scored: torch.Tensor

    @property
    def ratios(self) -> torch.Tensor:
        """The importance ratio of each token."""
        return (self.scored - self.sampled).exp()[self.mask]

    def rollouts(self) -> list[list[int]]:
        """Ids without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]

    def __str__(self):
        difference = (self.scored - self.sampled).abs()[self.mask]
        return (
            f"importance ratios {self.ratios.min():.4f} to {self.ratios.max():.4f}, |sampled - scored| "
            f"{difference.mean():.5f} nats on average"
        )


@dataclass
class Run:
    """The three steps of one run, and the bound of its importance ratios."""

    bound: float
    steps: list[Step]


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> Run:
    steps, syncs = [], []
    score, sync = SpeechGRPOTrainer._generate_and_score_completions, vllm_generation.VLLMGeneration.sync_weights

    def score_and_keep(self, inputs):
        out = score(self, inputs)
        names = ("completion_ids", "completion_mask", "sampling_per_token_logps", "old_per_token_logps")
        ids, mask, sampled, scored = (out[name].clone() for name in names)
        steps.append(Step(ids, mask.bool(), sampled, scored))
        return out

    def sync_but_once(self):
        if len(syncs) != STALE:
            sync(self)
        syncs.append(len(syncs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeechGRPOTrainer, "_generate_and_score_completions", score_and_keep)
        patch.setattr(vllm_generation.VLLMGeneration, "sync_weights", sync_but_once)
        # Several runs in one process: the next one must find neither vLLM's process groups nor TRL's variables.
        patch.setattr(SpeechGRPOTrainer, "end", lambda self: cleanup_dist_env_and_memory())
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        # Where oneDNN knows their format (on this CPU or that) vLLM packs the weights, and then none can be synced.
        patch.setattr(_custom_ops, "_supports_onednn", False)
        if request.param != COMPILED:
            patch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, enforce_eager=True))
        folder = tmp_path_factory.mktemp("run")
        train.main(train.parse_args([*FLAGS, *RUNS[request.param], "--output_dir", str(folder)]))
    print(f"\n{request.param}", *steps, sep="\n  ")  # noqa: T201 - the measured values: pytest -s
    assert len(steps) == len(syncs) == 3
    recorded = json.loads((folder / "run.json").read_text())["recipe"]["generation_kwargs"]
    assert "stop_token_ids" in recorded and "allowed_token_ids" not in recorded  # which are 65,537 of Llasa's
    return Run(BOUNDS[request.param], steps)


@pytest.fixture(scope="module")
def tokens() -> SpeechTokens:
    return load_tokenizer("tiny/llasa")[1]


def test_it_samples_with_the_weights_just_trained(run):
    for step in run.steps[:STALE]:
        assert 1 - run.bound < step.ratios.min() and step.ratios.max() < 1 + run.bound, str(step)


def test_weights_of_the_step_before_would_be_noticed(run):
    stale = run.steps[STALE]
    assert stale.ratios.min() < 1 - run.bound and 1 + run.bound < stale.ratios.max(), str(stale)


def test_no_token_but_speech_codes_and_end(run, tokens):
    given = {token for step in run.steps for rollout in step.rollouts() for token in rollout}
    assert given <= set(tokens.speech_ids)
    assert len(given) > 100


def test_end_stops_a_rollout(run, tokens):
    rollouts = [rollout for step in run.steps for rollout in step.rollouts()]
    ended = [rollout for rollout in rollouts if tokens.end_id in rollout]
    assert 0 < len(ended) < len(rollouts)
    for rollout in rollouts:
        if tokens.end_id in rollout:
            assert rollout.index(tokens.end_id) == len(rollout) - 1
        else:
            assert len(rollout) == LENGTH


def test_the_newer_model_runner_would_refuse_our_allowed_tokens(tokens):
    """Why prepare_vllm turns it off. It needs a GPU; a vLLM without this limit does not need the older one."""
    from vllm.v1.worker.gpu.sample.logit_bias import MAX_NUM_ALLOWED_TOKEN_IDS

    assert len(tokens.speech_ids) > MAX_NUM_ALLOWED_TOKEN_IDS


def test_flags_of_the_documented_server_exist():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    page = Path("docs/vllm.md").read_text(encoding="utf-8").replace("\\\n", " ")
    words = shlex.split(re.search(r"vllm serve (.*)", page).group(1))
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    assert args.weight_transfer_config.backend == "nccl"
    assert args.logprobs_mode == "processed_logprobs"
    assert args.max_logprobs == -1
