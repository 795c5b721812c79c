"""Speed of sampling with vLLM: codes of a batch of rollouts by train.py's own sampling and by --use_vllm's.

    python benchmarks/vllm_rollout.py --size tiny  # 64 rollouts of 96 codes, tiny/llasa, float32
    python benchmarks/vllm_rollout.py --size real  # Llasa-1B's shapes, random weights, 64 of 1,000 codes, bfloat16

Both sample from the same weights and prompt at temperature 1, without END, so that both give the same number of codes.
The engine is started as TRL starts it beside the policy, but in the dtype of the policy's forwards (TRL leaves that to
the checkpoint).

Before anything is timed, vLLM's log-probs of what it sampled must be those of the policy for the same codes, and so the
distribution it samples from: within 0.001 nats in float32, 0.05 on average in bfloat16.

The real size wants a GPU. vLLM must be installed (docs/vllm.md).
"""

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/X.py` finds the project's files

from benchmarks.harness import NOT_COMPARABLE, benchmark_parser, interleave, set_up, timing_table, write_results
from benchmarks.rollout import Sampler
from common.cli import InputError, bad_input_exits, parse_strictly
from speech.confined_head import confine_head

OURS = "generate (ours)"
VLLM = "vLLM"
MOST_DIFFERENCE = {torch.float32: ("max", 1e-3), torch.bfloat16: ("mean", 0.05)}  # nats, of the log-probs
CHECKED = 4  # rollouts whose log-probs are compared; all logits of 64 rollouts of 1,000 codes would take 17 GB


class Engine:
    """vLLM with the weights of a sampler's policy, confined as `prepare_vllm` confines it.

    Args:
        codes: of each rollout.
    """

    def __init__(self, sampler: Sampler, rollouts: int, codes: int, dtype: torch.dtype):
        from trl.trainer.utils import ensure_master_addr_port
        from vllm import LLM

        self.prompt, self.tokens, self.codes = sampler.prompt, sampler.tokens, codes
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", VLLM_USE_V2_MODEL_RUNNER="0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        ensure_master_addr_port()
        with tempfile.TemporaryDirectory() as folder:
            sampler.model.save_pretrained(folder)
            self.llm = LLM(
                model=folder,
                skip_tokenizer_init=True,
                dtype=dtype,
                max_model_len=len(self.prompt) + codes,
                max_num_seqs=rollouts,
                distributed_executor_backend="external_launcher",
                gpu_memory_utilization=0.3,
                max_num_batched_tokens=4096,
                logprobs_mode="processed_logprobs",
            )

    def sample(self, rollouts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and their log-probs, both (rollouts, codes)."""
        from vllm import SamplingParams

        how = SamplingParams(
            temperature=1.0,
            max_tokens=self.codes,
            min_tokens=self.codes,
            logprobs=0,
            stop_token_ids=[self.tokens.end_id],
            allowed_token_ids=self.tokens.speech_ids,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": self.prompt}] * rollouts
        answers = [out.outputs[0] for out in self.llm.generate(prompts, sampling_params=how, use_tqdm=False)]
        ids = [list(answer.token_ids) for answer in answers]
        log_probs = [
            [step[token].logprob for step, token in zip(a.logprobs, a.token_ids, strict=True)] for a in answers
        ]
        return torch.tensor(ids), torch.tensor(log_probs)


def scored(sampler: Sampler, ids: torch.Tensor) -> torch.Tensor:
    """The policy's log-probs of sampled codes, by one forward without a cache. Both (rollouts, codes)."""
    first = len(sampler.prompt)
    whole = torch.cat([torch.tensor([sampler.prompt] * len(ids)), ids], dim=1).to(sampler.device)
    with torch.no_grad(), sampler.autocast():
        logits = sampler.model(whole, use_cache=False).logits[:, first - 1 : -1].float()
    logits[..., sampler.tokens.end_id] = -torch.inf
    return logits.log_softmax(-1).gather(-1, whole[:, first:, None])[..., 0].cpu()


def check_equal(sampler: Sampler, engine: Engine, dtype: torch.dtype) -> float:
    """How far vLLM's log-probs of the codes it samples are from the policy's, in nats.

    Raises:
        SystemExit: too far.
    """
    ids, sampled = engine.sample(CHECKED)
    difference = (sampled - scored(sampler, ids)).abs()
    statistic, most = MOST_DIFFERENCE[dtype]
    value = getattr(difference, statistic)().item()
    print(f"log-probs of {ids.numel()} codes, vLLM's and the policy's: {statistic} difference {value:.2g} nats")
    if not value <= most:
        sys.exit(NOT_COMPARABLE)
    return value


def main(args: argparse.Namespace) -> None:
    with bad_input_exits():
        device = set_up(args)
        if find_spec("vllm") is None:
            raise InputError("benchmarks/vllm_rollout.py: vLLM is not installed here. See docs/vllm.md")
    real = args.size == "real"
    rollouts, codes = args.rollouts, args.codes or (1_000 if real else 96)
    dtype = torch.bfloat16 if real else torch.float32
    sampler = Sampler(args.size, device, args.seed, half=real)
    confine_head(sampler.model, sampler.tokens.speech_ids)
    engine = Engine(sampler, rollouts, codes, dtype)
    difference = check_equal(sampler, engine, dtype)

    ours = {"confined": True, "static": True, "one_region": True, "forced": True}
    variants = {
        OURS: lambda: sampler.sample(rollouts, codes, **ours),
        VLLM: lambda: engine.sample(rollouts),
    }
    timings = interleave(variants, args.repeats, device)
    print(f"\n{rollouts} rollouts of {codes} codes, {device}, {str(dtype).removeprefix('torch.')}\n")
    print(timing_table(timings, rollouts * codes, "codes"))
    results = {
        "rollouts": rollouts,
        "codes": codes,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "log_prob_difference": difference,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "peak_bytes": {name: timing.peak_bytes for name, timing in timings.items()},
    }
    write_results(args.output_dir, f"vllm_rollout_{args.size}", results)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rollouts", type=int, default=64, help="number of rollouts sampled at once")
    parser.add_argument("--codes", type=int, help="codes of each rollout (default: 96; for the real size 1,000)")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    main(parse_args())
