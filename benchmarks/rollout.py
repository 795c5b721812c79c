"""Speed of sampling: speech codes of a batch of rollouts, with the baseline and with one change to it after another.

    python benchmarks/rollout.py --size tiny  # 64 rollouts of up to 96 codes, tiny/llasa
    python benchmarks/rollout.py --size real  # Llasa-1B's shapes, random weights: 64 rollouts of 1,000 codes

The variants, each with the changes before it:

    baseline: TRL                TRL's sampling of a policy as loaded: float32 weights (on a GPU cast to half precision
                                 at each forward), the whole head with a bias that forbids text tokens, a growing cache
    + confined head              only the head's rows of speech codes and END
    + static cache               keys and values allocated once
    + weights cast once (ours)   the real size only, whose forwards run in bfloat16; for tiny, + static cache is ours
    + compiled (other rounding)  on a GPU only; not what train.py does

Before anything is timed, all must draw the baseline's codes from the same seed (in float32; up to 1 % may differ, see
`check_equal`), except what is marked (other rounding).

The real size on a CPU takes seconds a code: there it samples 4 rollouts of 8 codes.
"""

import argparse
import contextlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/X.py` finds the project's files

from benchmarks.harness import (
    NOT_COMPARABLE,
    Timing,
    benchmark_parser,
    interleave,
    memory_bandwidth,
    plot_growth,
    set_up,
    timing_table,
    write_results,
)
from common.cli import bad_input_exits, parse_strictly
from speech.confined_head import confine_head
from speech.policy import Policy
from speech.tokens import XCODEC2_CODES, SpeechTokens, tts_prompt
from training.grpo_trainer import keys_like_values

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
    num_codes=XCODEC2_CODES,
    num_text_ids=128_000,
    text_end_id=128_257,
)
LLASA_1B_PROMPT = 80  # tokens: Llama's turns and a sentence
PAD_ID = 128_004
BASELINE = "baseline: TRL"
OTHER_ROUNDING = "(other rounding)"
MAX_FRAC_DIFFERING = 0.01


def load_policy(size: str, device: torch.device, seed: int) -> tuple[LlamaForCausalLM, SpeechTokens, list[int], int]:
    """A float32 policy that is not confined, its tokens, one prompt's ids, and its padding token."""
    if size == "tiny":
        policy = Policy.from_pretrained("tiny/llasa", str(device))
        text = Path("tiny/texts/heldout.txt").read_text().splitlines()[0]
        return policy.model.float(), policy.tokens, policy.encode([tts_prompt(text)])[0], policy.tokenizer.pad_token_id
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**LLASA_1B)).eval()
    prompt = torch.randint(LLASA_1B_TOKENS.num_text_ids, (LLASA_1B_PROMPT,)).tolist()
    return model, LLASA_1B_TOKENS, prompt, PAD_ID


def forbid_by_bias(model, tokens: SpeechTokens) -> None:
    """The whole head, with a bias of -inf for all but speech: the logits of a ConfinedHead, for more work."""
    confine_head(model, tokens.speech_ids)
    model.get_output_embeddings().__class__ = torch.nn.Linear


class Sampler:
    """One policy, sampled by several variants.

    Args:
        half: whether forwards run in bfloat16, as training does on a GPU.
    """

    def __init__(self, size: str, device: torch.device, seed: int, half: bool):
        self.model, self.tokens, self.prompt, self.pad_id = load_policy(size, device, seed)
        self.device, self.seed, self.half = device, seed, half

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half)

    def sample(
        self,
        rollouts: int,
        codes: int,
        *,
        confined: bool,
        static: bool,
        one_region: bool,
        compiled: bool = False,
        forced: bool = False,
    ) -> torch.Tensor:
        """Token ids of `rollouts` completions of at most `codes`: shape (rollouts, the longest's length).

        Args:
            confined: whether the head has only the rows of speech; else they are forbidden by a bias.
            static: whether the cache is static.
            one_region: whether one autocast region is around all steps, so that weights are cast once.
            compiled: whether the forward is compiled.
            forced: whether END is never sampled, so that every completion has `codes`.
        """
        model = self.model
        confine = confine_head if confined else lambda m, _: forbid_by_bias(m, self.tokens)
        confine(model, self.tokens.speech_ids)
        forward = type(model).forward.__get__(model)

        def casting(*args, **kwargs):  # as accelerate wraps it: an autocast region of its own for every forward
            with self.autocast():
                return forward(*args, **kwargs)

        casting.__signature__ = inspect.signature(forward)  # `generate` checks its arguments against it
        model.forward = casting
        ids = torch.tensor([self.prompt] * rollouts, device=self.device)
        torch.manual_seed(self.seed)
        with torch.no_grad(), keys_like_values(), contextlib.ExitStack() as regions:
            if one_region:
                regions.enter_context(self.autocast())
                if confined and self.half:
                    regions.enter_context(model.get_output_embeddings().kept_rows(torch.bfloat16))
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=codes,
                min_new_tokens=codes if forced else None,
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
        """Bytes that one step of sampling must at least read: the weights, and half of the full cache."""
        config, size = self.model.config, 2 if self.half else 4
        layers = sum(p.numel() for name, p in self.model.named_parameters() if "embed_tokens" not in name)
        rows = self.tokens.num_codes if confined else config.vocab_size
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return size * (layers + rows * config.hidden_size + rollouts * cache * (len(self.prompt) + codes / 2))


def build_variants(sampler: Sampler, rollouts: int, codes: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The baseline, then one change after another."""

    def variant(**how) -> Callable[[], torch.Tensor]:
        return lambda: sampler.sample(rollouts, codes, **how)

    variants = {
        BASELINE: variant(confined=False, static=False, one_region=False),
        "+ confined head": variant(confined=True, static=False, one_region=False),
        "+ static cache": variant(confined=True, static=True, one_region=False),
    }
    if sampler.half:
        variants["+ weights cast once (ours)"] = variant(confined=True, static=True, one_region=True)
    if sampler.device.type == "cuda":
        name = f"+ compiled {OTHER_ROUNDING}"
        variants[name] = variant(confined=True, static=True, one_region=True, compiled=True)
    return variants


def check_equal(variants: dict[str, Callable[[], torch.Tensor]], half: bool) -> dict[str, float]:
    """The fraction of each variant's codes that differ from the baseline's.

    The head's rows are summed in another order when they are fewer, so a draw at a boundary may differ, and every code
    after it in that rollout.

    Raises:
        SystemExit: in float32 more than 1 % differ, in a variant that is not marked OTHER_ROUNDING.
    """
    reference = variants[BASELINE]()
    differing = {}
    for name, sample in variants.items():
        codes = sample()
        width = min(codes.shape[1], reference.shape[1])
        differing[name] = (codes[:, :width] != reference[:, :width]).float().mean().item()
        print(f"{name}: {differing[name]:.2%} of the codes differ from the baseline's")
    if not half and max(frac for name, frac in differing.items() if OTHER_ROUNDING not in name) > MAX_FRAC_DIFFERING:
        sys.exit(NOT_COMPARABLE)
    return differing


def growth(sampler: Sampler, rollouts: list[int], codes: list[int], fixed: tuple[int, int], repeats: int) -> dict:
    """Seconds of ours over the number of rollouts and over their length.

    Args:
        rollouts, codes: the points of the two x-axes.
        fixed: (rollouts, codes) of the axis that does not vary.
    """
    ours = {"confined": True, "static": True, "one_region": True}
    bandwidth = memory_bandwidth(sampler.device)

    def seconds(n: int, length: int) -> float:
        timing = interleave({"ours": lambda: sampler.sample(n, length, **ours)}, repeats, sampler.device)
        return timing["ours"].median

    def limit(n: int, length: int) -> float:
        return length * sampler.bytes_a_step(n, length, confined=True) / bandwidth

    fixed_rollouts, fixed_codes = fixed
    return {
        f"rollouts of up to {fixed_codes} codes": {
            "ours": (rollouts, [seconds(n, fixed_codes) for n in rollouts]),
            "limit of memory bandwidth": (rollouts, [limit(n, fixed_codes) for n in rollouts]),
        },
        f"codes of {fixed_rollouts} rollouts": {
            "ours": (codes, [seconds(fixed_rollouts, n) for n in codes]),
            "limit of memory bandwidth": (codes, [limit(fixed_rollouts, n) for n in codes]),
        },
    }


def main(args: argparse.Namespace) -> None:
    with bad_input_exits():
        device = set_up(args)
    on_gpu = device.type == "cuda"
    slow = args.size == "real" and not on_gpu  # 1.4 B parameters: few rollouts are enough for a ratio
    rollouts = args.rollouts or (4 if slow else 64)
    codes = args.codes or (8 if slow else 1_000 if args.size == "real" else 96)
    sampler = Sampler(args.size, device, args.seed, half=args.size == "real")
    variants = build_variants(sampler, rollouts, codes)
    differing = check_equal(variants, sampler.half)

    timings: dict[str, Timing] = interleave(variants, args.repeats, device)
    print(f"\n{rollouts} rollouts of up to {codes} codes, {device}, {'bfloat16' if sampler.half else 'float32'}\n")
    print(timing_table(timings, rollouts * codes, "codes"))
    bandwidth = memory_bandwidth(device)
    limit = codes * sampler.bytes_a_step(rollouts, codes, confined=True) / bandwidth
    fastest = min(timing.median for timing in timings.values())
    print(
        f"\nlimit of memory bandwidth at {bandwidth / 1e9:.0f} GB/s: {limit:.2f} s, of which the fastest variant "
        f"reaches {limit / fastest:.0%}"
    )
    results = {
        "rollouts": rollouts,
        "codes": codes,
        "half": sampler.half,
        "frac_differing": differing,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "peak_bytes": {name: timing.peak_bytes for name, timing in timings.items()},
        "bandwidth_limit_s": limit,
    }
    if args.growth and not slow:
        lengths = [50, 200, 800, 1_500] if args.size == "real" else [50, 100, 200, 400]
        curves = growth(sampler, [8, 32, 128, 256], lengths, (64 if on_gpu else 16, 100), repeats=1)
        results["growth"] = curves
        plot_growth(args.output_dir / f"rollout_{args.size}.png", curves)
    write_results(args.output_dir, f"rollout_{args.size}", results)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    add = parser.add_argument
    add("--rollouts", type=int, help="number of rollouts sampled at once (default: 64; 4 for the real size on a CPU)")
    codes_help = "most codes of a rollout (default: 96; for the real size 1,000, on a CPU 8)"
    add("--codes", type=int, help=codes_help)
    growth_help = "plot seconds over rollouts and over codes; never for the real size on a CPU"
    add("--growth", action=argparse.BooleanOptionalAction, default=True, help=growth_help)
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    main(parse_args())
