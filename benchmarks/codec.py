"""Speed of codec decoding: speech codes to waveforms, one rollout at a time and in batches.

    python benchmarks/codec.py --size tiny  # tiny/codec: 64 rollouts of 50 to 96 codes
    python benchmarks/codec.py --size real  # published sizes, random weights: 64 rollouts of 200 to 1,500 codes

The variants:

    baseline: one at a time  `Xcodec2Model.decode` on each rollout alone
    batched, padded          as many rollouts in a forward pass as a GPU has memory for, whatever the padding costs
    ours                     `SpeechCodec.decode`, which weighs batch size against padding

Before anything is timed, the batched variants must be within 1e-4 of the baseline (waveforms in [-1, 1], float32). In
half precision, which rounds more coarsely than that, the differences are printed and not checked.

The real size takes seconds a rollout on a CPU: there it decodes 4 rollouts of 100 to 300 codes, twice.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import Wav2Vec2BertConfig, Xcodec2Config, Xcodec2Model

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/X.py` finds the project's files

from benchmarks.harness import (
    BASELINE,
    NOT_COMPARABLE,
    Timing,
    benchmark_parser,
    growth_slope,
    host_peak_bytes,
    interleave,
    matmul_rate,
    plot_growth,
    ratios,
    set_up,
    timing_table,
    write_results,
)
from common.cli import InputError, bad_input_exits, parse_strictly
from speech.codec import BATCH_CODES, SpeechCodec

Decode = Callable[[list[list[int]]], list[np.ndarray]]

SLOW_REPEATS = 2  # of the real size on a CPU
TOLERANCE = 1e-4  # of samples nominally in [-1, 1], in float32
GROWTH_ROLLOUTS = [8, 16, 32, 64, 128, 256]
GROWTH_CODES = [50, 100, 200, 400, 800, 1_500]  # of the longest of 4 rollouts; 1 to 30 s
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> Xcodec2Model:
    """tiny/codec, or a decoder of the published sizes with an audible output; its encoders, not needed, are small."""
    if size == "tiny":
        return SpeechCodec.from_pretrained("tiny/codec", device, dtype).model
    torch.manual_seed(seed)
    semantic = Wav2Vec2BertConfig(num_hidden_layers=1, hidden_size=1024, intermediate_size=64)
    model = Xcodec2Model(Xcodec2Config(encoder_hidden_size=2, semantic_model_config=semantic))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.LayerNorm):
            module.reset_parameters()  # transformers' own init is too small: the output would be exactly 0
    return model.to(device, dtype)


def random_codes(lengths: np.ndarray, codebook_size: int, rng: np.random.Generator) -> list[list[int]]:
    return [rng.integers(codebook_size, size=length).tolist() for length in lengths]


# --- The variants -----------------------------------------------------------------------------------------


@torch.inference_mode()
def one_at_a_time(model: Xcodec2Model, codes: list[list[int]]) -> list[np.ndarray]:
    """The baseline."""
    inputs = (torch.tensor([[ids]], device=model.device) for ids in codes)
    return [model.decode(audio_codes=ids).audio_values[0, 0].float().cpu().numpy() for ids in inputs]


def build_variants(model: Xcodec2Model) -> dict[str, Decode]:
    ours, padded = SpeechCodec(model), SpeechCodec(model)
    padded.batch_codes, padded.padding_codes = BATCH_CODES["gpu"], math.inf
    return {
        BASELINE: lambda codes: one_at_a_time(model, codes),
        "batched, padded": padded.decode,
        "ours": ours.decode,
    }


def max_differences(variants: dict[str, Decode], codes: list[list[int]]) -> dict[str, float]:
    """The largest difference of any sample from the baseline's, by variant."""
    reference = variants[BASELINE](codes)
    return {
        name: max(float(np.abs(a - b).max()) for a, b in zip(reference, decode(codes), strict=True))
        for name, decode in variants.items()
        if name != BASELINE
    }


def decoder_flops(model: Xcodec2Model, lengths: list[int]) -> float:
    """Floating-point operations: every weight once per code, attention's two products; without the inverse FFT."""
    config = model.config
    weights = sum(weight.numel() for weight in model.acoustic_decoder.parameters())
    width = config.num_attention_heads * config.head_dim
    attention = 4 * config.num_hidden_layers * width  # for each pair of codes
    return float(sum(2 * weights * n + attention * n**2 for n in lengths))


# --- The script -------------------------------------------------------------------------------------------


def time_variants(
    variants: dict[str, Decode], codes: list[list[int]], repeats: int, device: torch.device
) -> dict[str, Timing]:
    calls = {name: lambda decode=decode: decode(codes) for name, decode in variants.items()}
    return interleave(calls, repeats, device)


def growth(variants: dict[str, Decode], inputs: dict[str, dict[int, list]], limit_s: Callable, device) -> dict:
    """Seconds of each variant, and the limit of arithmetic, over each x-axis.

    Args:
        inputs: {x-axis label: {size: codes}}.
        limit_s: codes → the least seconds that their arithmetic takes.
    """
    curves = {}
    for label, points in inputs.items():
        sizes = list(points)
        timings = [time_variants(variants, codes, 1, device) for codes in points.values()]
        lines = {name: (sizes, [timing[name].median for timing in timings]) for name in variants}
        lines["limit of arithmetic"] = (sizes, [limit_s(codes) for codes in points.values()])
        curves[label] = lines
        for name, (_, seconds) in lines.items():
            slope = growth_slope(sizes, seconds)
            print(f"{name}: seconds grow as ({label})^{slope:.2f} from {sizes[0]} to {sizes[-1]}")
    return curves


def fill_in(args: argparse.Namespace, device: torch.device) -> None:
    """The defaults that depend on --size and the device. In place.

    Raises:
        InputError: what only a GPU can do.
    """
    on_cpu = device.type == "cpu"
    slow = args.size == "real" and on_cpu  # 0.4 GFLOP per code: few rollouts are enough for a ratio
    if on_cpu and args.dtype != "float32":
        raise InputError(f"--dtype {args.dtype}: needs a GPU, many CPUs emulate it, hundreds of times slower")
    if slow and args.growth:
        raise InputError("--growth: needs a GPU with --size real. On a CPU use --size tiny")
    shortest, longest = (50, 96) if args.size == "tiny" else (100, 300) if slow else (200, 1_500)
    args.min_codes = args.min_codes or shortest
    args.max_codes = args.max_codes or longest
    args.rollouts = args.rollouts or (4 if slow else 64)
    args.repeats = args.repeats or (SLOW_REPEATS if slow else 5)
    if args.growth is None:
        args.growth = not slow


def main(args: argparse.Namespace) -> None:
    with bad_input_exits():
        device = set_up(args)
        fill_in(args, device)
    torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions, and no float32
    dtype = DTYPES[args.dtype]
    model = load_model(args.size, device, dtype, args.seed)
    variants, codebook_size = build_variants(model), SpeechCodec(model).codebook_size
    rng = np.random.default_rng(args.seed)

    def rollouts(n: int, low: int, high: int) -> list[list[int]]:
        return random_codes(rng.integers(low, high + 1, size=n), codebook_size, rng)

    codes = rollouts(args.rollouts, args.min_codes, args.max_codes)
    lengths = [len(ids) for ids in codes]
    differences = max_differences(variants, codes)
    for name, difference in differences.items():
        print(f"{name}: largest difference of a sample from the baseline {difference:.1e}")
    if dtype == torch.float32 and not max(differences.values()) <= TOLERANCE:  # NaN fails too
        sys.exit(NOT_COMPARABLE)

    timings = time_variants(variants, codes, args.repeats, device)
    print(f"\n{args.rollouts} rollouts of {min(lengths)} to {max(lengths)} codes")
    print(f"{device}, {args.dtype}, {args.threads} threads\n")
    print(timing_table(timings, args.rollouts, "rollouts"))
    rate = matmul_rate(device, dtype)
    limit = decoder_flops(model, lengths) / rate
    reached = limit / timings["ours"].median
    print(f"\nlimit of arithmetic at {rate / 1e9:.0f} GFLOP/s: {limit:.3f} s, of which ours reaches {reached:.0%}")
    print(f"peak memory of the process: {host_peak_bytes() / 2**30:.2f} GiB")
    results = {
        "rollouts": args.rollouts,
        "codes": lengths,
        "device": str(device),
        "dtype": args.dtype,
        "threads": args.threads,
        "max_difference": differences,
        "equal": max(differences.values()) <= TOLERANCE,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "ratio": {name: ratios(timings[BASELINE], timings[name]) for name in differences},
        "matmul_rate": rate,
        "limit_s": limit,
        "peak_bytes": {name: timing.peak_bytes for name, timing in timings.items()},
        "host_peak_bytes": host_peak_bytes(),
    }
    if args.growth:
        inputs = {
            "rollouts": {n: rollouts(n, args.min_codes, args.max_codes) for n in GROWTH_ROLLOUTS},
            "codes of the longest of 4": {n: rollouts(4, n * 9 // 10, n) for n in GROWTH_CODES},
        }
        print()
        results["growth"] = growth(
            variants, inputs, lambda codes: decoder_flops(model, [len(ids) for ids in codes]) / rate, device
        )
    write_results(args.output_dir, f"codec_{args.size}", results)
    if args.growth:
        plot_growth(args.output_dir / f"codec_{args.size}.png", results["growth"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, slow_repeats=SLOW_REPEATS)
    add = parser.add_argument
    add("--rollouts", type=int, help="number of rollouts decoded at once (default: 64; 4 for the real size on a CPU)")
    min_help = "codes of the shortest rollout (default: 50; for the real size 200, on a CPU 100)"
    add("--min_codes", type=int, help=min_help)
    max_help = "codes of the longest rollout (default: 96; for the real size 1,500, on a CPU 300)"
    add("--max_codes", type=int, help=max_help)
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the codec's weights")
    growth_help = "plot seconds over rollouts and over codes (default: yes, except for the real size on a CPU)"
    add("--growth", action=argparse.BooleanOptionalAction, help=growth_help)
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    main(parse_args())
