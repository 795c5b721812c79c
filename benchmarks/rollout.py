"""How fast codes are sampled: the obvious way, and what each change to it brings.

    python benchmarks/rollout.py --size tiny          # 64 rollouts of tiny/llasa
    python benchmarks/rollout.py --size real          # Llasa-1B's shapes, random weights; on a GPU 64 × 1,000 codes

The obvious way is what TRL does with a policy loaded as it comes: float32 weights (cast to half precision at each
forward, on a GPU), the whole head with the text tokens forbidden by a bias, a cache that grows by copying. Every side
must draw the very same codes from the same seed before it is timed; the two marked (other rounding) need not.
"""

import argparse
import contextlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import (
    TIMING_HEADER,
    Timing,
    benchmark_parser,
    interleave,
    memory_bandwidth,
    plot_growth,
    table,
    timing_rows,
    write_results,
)
from transformers import LlamaConfig, LlamaForCausalLM

from common.cli import pick_device
from speech.confined_head import confine_head
from speech.policy import Policy
from speech.tokens import SpeechTokens, tts_prompt

# Llama-3.2-1B with Llasa's vocabulary: 1.37 B parameters, the embeddings (397 M) tied to the head
LLASA_1B = {
    "vocab_size": 193_800,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
LLASA_1B_TOKENS = SpeechTokens(
    start_id=128_260,
    end_id=128_261,
    first_code_id=128_264,
    num_codes=65_536,
    num_text_ids=128_000,
    text_end_id=128_257,
)
LLASA_1B_PROMPT = 80  # tokens: Llama's turns and a sentence
PAD_ID = 128_004


def load_policy(size: str, device: torch.device, seed: int) -> tuple[LlamaForCausalLM, SpeechTokens, list[int], int]:
    """A float32 policy that is not confined, its tokens, one prompt's ids, and its padding token."""
    if size == "tiny":
        policy = Policy.from_pretrained("tiny/llasa", str(device))
        text = Path("tiny/texts/heldout.txt").read_text().splitlines()[0]
        return policy.model.float(), policy.tokens, policy.encode([tts_prompt(text)])[0], policy.tokenizer.pad_token_id
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**LLASA_1B)).eval()
    prompt = torch.randint(128_000, (LLASA_1B_PROMPT,)).tolist()
    return model, LLASA_1B_TOKENS, prompt, PAD_ID


def forbid_by_bias(model, tokens: SpeechTokens) -> None:
    """The whole head, and a bias that leaves only speech: what a ConfinedHead gives the same logits as."""
    confine_head(model, tokens.speech_ids)
    model.get_output_embeddings().__class__ = torch.nn.Linear


class Sampler:
    """One policy, sampled in several ways.

    Args:
        half: whether forwards run in bfloat16, as training does on a GPU.
    """

    def __init__(self, size: str, device: torch.device, seed: int, half: bool):
        self.model, self.tokens, self.prompt, self.pad_id = load_policy(size, device, seed)
        self.device, self.seed, self.half = device, seed, half

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half)

    def sample(
        self, rollouts: int, codes: int, *, confined: bool, static: bool, one_region: bool, compiled: bool = False
    ) -> torch.Tensor:
        """Codes of so many rollouts, shape (rollouts, codes or fewer)."""
        model = self.model
        confine = confine_head if confined else lambda m, _: forbid_by_bias(m, self.tokens)
        confine(model, self.tokens.speech_ids)
        forward = type(model).forward.__get__(model)

        def casting(*args, **kwargs):  # as accelerate wraps it: a region of its own for every forward
            with self.autocast():
                return forward(*args, **kwargs)

        casting.__signature__ = inspect.signature(forward)  # `generate` checks its arguments against it
        model.forward = casting
        ids = torch.tensor([self.prompt] * rollouts, device=self.device)
        torch.manual_seed(self.seed)
        with torch.no_grad(), contextlib.ExitStack() as regions:
            if one_region:
                regions.enter_context(self.autocast())
                if confined and self.half:
                    regions.enter_context(model.get_output_embeddings().kept_rows(torch.bfloat16))
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=codes,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=self.tokens.end_id,
                pad_token_id=self.pad_id,
                cache_implementation="static" if static else None,
                disable_compile=not compiled,
            )
        del model.forward
        return out[:, len(self.prompt) :]

    def bytes_a_step(self, rollouts: int, codes: int, confined: bool) -> float:
        """What must at least be read to draw one code for each rollout: the weights, and half of the full cache."""
        config, size = self.model.config, 2 if self.half else 4
        layers = sum(p.numel() for name, p in self.model.named_parameters() if "embed_tokens" not in name)
        rows = self.tokens.num_codes if confined else config.vocab_size
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return size * (layers + rows * config.hidden_size + rollouts * cache * (len(self.prompt) + codes / 2))


def sides(sampler: Sampler, rollouts: int, codes: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The obvious way, then one change after another."""

    def side(**how) -> Callable[[], torch.Tensor]:
        return lambda: sampler.sample(rollouts, codes, **how)

    found = {
        "obvious": side(confined=False, static=False, one_region=False),
        "+ confined head": side(confined=True, static=False, one_region=False),
        "+ static cache": side(confined=True, static=True, one_region=False),
    }
    if sampler.half:
        found["+ weights cast once (ours)"] = side(confined=True, static=True, one_region=True)
    if sampler.device.type == "cuda":
        found["+ compiled (other rounding)"] = side(confined=True, static=True, one_region=True, compiled=True)
    return found


def check_equal(found: dict[str, Callable[[], torch.Tensor]]) -> dict[str, float]:
    """The share of codes that differ from the obvious way's; SystemExit where it should be 0 and is above 1 %.

    The head's rows are summed in another order when they are fewer, so a draw at a boundary may fall the other way,
    and every code after it in that rollout.
    """
    reference = next(iter(found.values()))()
    differing = {}
    for name, call in found.items():
        codes = call()
        width = min(codes.shape[1], reference.shape[1])
        differing[name] = (codes[:, :width] != reference[:, :width]).float().mean().item()
        print(f"{name}: {differing[name]:.2%} of the codes differ from the obvious way's")
    return differing


def growth(sampler: Sampler, rollouts: list[int], codes: list[int], fixed: tuple[int, int], repeats: int) -> dict:
    """Seconds over the number of rollouts and over their length, the last side of `sides` that is exact."""
    how = {"confined": True, "static": True, "one_region": True}
    bandwidth = memory_bandwidth(sampler.device)

    def seconds(n: int, length: int) -> float:
        timing = interleave({"ours": lambda: sampler.sample(n, length, **how)}, repeats, sampler.device)
        return timing["ours"].median

    def limit(n: int, length: int) -> float:
        return length * sampler.bytes_a_step(n, length, confined=True) / bandwidth

    at_codes, at_rollouts = fixed[1], fixed[0]
    return {
        f"rollouts of up to {at_codes} codes": {
            "ours": (rollouts, [seconds(n, at_codes) for n in rollouts]),
            "limit by memory bandwidth": (rollouts, [limit(n, at_codes) for n in rollouts]),
        },
        f"codes of {at_rollouts} rollouts": {
            "ours": (codes, [seconds(at_rollouts, n) for n in codes]),
            "limit by memory bandwidth": (codes, [limit(at_rollouts, n) for n in codes]),
        },
    }


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    device = torch.device(pick_device(args.device))
    on_gpu = device.type == "cuda"
    small = args.size == "real" and not on_gpu  # a 1.4 B model on a CPU: enough to compare, no more
    rollouts = args.rollouts or (4 if small else 64)
    codes = args.codes or (8 if small else 1_000 if args.size == "real" else 96)
    sampler = Sampler(args.size, device, args.seed, half=args.size == "real")
    found = sides(sampler, rollouts, codes)
    differing = check_equal(found)
    if max(share for name, share in differing.items() if "other rounding" not in name) > 0.01 and not sampler.half:
        sys.exit("error: the sides do not draw the same codes; their times would not be comparable")

    timings: dict[str, Timing] = interleave(found, args.repeats, device)
    print(f"\n{rollouts} rollouts of up to {codes} codes, {device}, {'bfloat16' if sampler.half else 'float32'}\n")
    print(table(TIMING_HEADER, timing_rows(timings, rollouts * codes)))
    bandwidth = memory_bandwidth(device)
    limit = codes * sampler.bytes_a_step(rollouts, codes, confined=True) / bandwidth
    best = min(timing.median for timing in timings.values())
    print(f"\nmemory bandwidth {bandwidth / 1e9:.0f} GB/s would allow {limit:.2f} s: {limit / best:.0%} of it reached")
    results = {
        "rollouts": rollouts,
        "codes": codes,
        "half": sampler.half,
        "share_differing": differing,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "peak_bytes": {name: timing.peak_bytes for name, timing in timings.items()},
        "bandwidth_limit_s": limit,
    }
    if args.growth and not small:
        lengths = [50, 200, 800, 1_500] if args.size == "real" else [50, 100, 200, 400]
        curves = growth(sampler, [8, 32, 128, 256], lengths, (64 if on_gpu else 16, 100), repeats=1)
        results["growth"] = curves
        plot_growth(args.output_dir / f"rollout_{args.size}.png", curves)
    write_results(args.output_dir, f"rollout_{args.size}", results)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    add = parser.add_argument
    add("--rollouts", type=int, help="sampled at once; default 64, or 4 for the real size on a CPU")
    add("--codes", type=int, help="most codes of each; default 96 (tiny), 1,000 (real), 8 (real, on a CPU)")
    add("--growth", action=argparse.BooleanOptionalAction, default=True, help="plot how the cost grows")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
