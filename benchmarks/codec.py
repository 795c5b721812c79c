"""How fast rollouts become sound: one at a time, as is obvious, against exact padded batches and what `decode` chooses.

    python benchmarks/codec.py --size tiny  # tiny/codec: 64 rollouts of 50 to 96 codes, as tiny/llasa speaks
    python benchmarks/codec.py --size real  # published sizes, random weights: 64 of 200 to 1,500 (a CPU: see --help)

"batched, padded" puts as many rollouts into a forward pass as a GPU's memory is meant for, whatever the padding;
"chosen" is `SpeechCodec.decode` as it is. Both must be within 1e-4 of one at a time before anything is timed; in half
precision, which rounds coarser than that, the differences are printed instead.
"""

import argparse
import math
import sys
from collections.abc import Callable

import numpy as np
import torch
from harness import (
    REFERENCE,
    TIMING_HEADER,
    Timing,
    benchmark_parser,
    growth_slope,
    host_peak_bytes,
    interleave,
    matmul_rate,
    plot_growth,
    ratios,
    table,
    timing_rows,
    write_results,
)
from transformers import Wav2Vec2BertConfig, Xcodec2Config, Xcodec2Model

from common.cli import pick_device
from speech.codec import BATCH_CODES, SpeechCodec

Side = Callable[[list[list[int]]], list[np.ndarray]]

TOLERANCE = 1e-4  # of samples nominally in [-1, 1], in float32
GROWTH_ROLLOUTS = [8, 16, 32, 64, 128, 256]
GROWTH_CODES = [50, 100, 200, 400, 800, 1_500]  # of the longest of 4 rollouts; 1 to 30 s
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> Xcodec2Model:
    """tiny/codec, or a decoder of the published sizes that makes sound; its encoders, not needed, are small."""
    if size == "tiny":
        return SpeechCodec.from_pretrained("tiny/codec", device, dtype).model
    torch.manual_seed(seed)
    semantic = Wav2Vec2BertConfig(num_hidden_layers=1, hidden_size=1024, intermediate_size=64)
    model = Xcodec2Model(Xcodec2Config(encoder_hidden_size=2, semantic_model_config=semantic))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.LayerNorm):
            module.reset_parameters()  # transformers' own is too small: the output would be exactly 0
    return model.to(device, dtype)


def random_codes(lengths: np.ndarray, codebook_size: int, rng: np.random.Generator) -> list[list[int]]:
    return [rng.integers(codebook_size, size=length).tolist() for length in lengths]


# --- The sides ---


@torch.inference_mode()
def one_at_a_time(model: Xcodec2Model, codes: list[list[int]]) -> list[np.ndarray]:
    """The obvious way."""
    inputs = (torch.tensor([[ids]], device=model.device) for ids in codes)
    return [model.decode(audio_codes=ids).audio_values[0, 0].float().cpu().numpy() for ids in inputs]


def build_sides(model: Xcodec2Model) -> dict[str, Side]:
    chosen, padded = SpeechCodec(model), SpeechCodec(model)
    padded.batch_codes, padded.padding_codes = BATCH_CODES["gpu"], math.inf
    return {
        REFERENCE: lambda codes: one_at_a_time(model, codes),
        "batched, padded": padded.decode,
        "chosen": chosen.decode,
    }


def max_differences(sides: dict[str, Side], codes: list[list[int]]) -> dict[str, float]:
    """The largest difference of any sample from one at a time, by side."""
    reference = sides[REFERENCE](codes)
    return {
        name: max(float(np.abs(a - b).max()) for a, b in zip(reference, side(codes), strict=True))
        for name, side in sides.items()
        if name != REFERENCE
    }


def decoder_flops(model: Xcodec2Model, lengths: list[int]) -> float:
    """Floating-point operations: every weight once a code, attention's two products; without the inverse FFT."""
    config = model.config
    weights = sum(weight.numel() for weight in model.acoustic_decoder.parameters())
    width = config.num_attention_heads * config.head_dim
    attention = 4 * config.num_hidden_layers * width  # for each pair of codes
    return float(sum(2 * weights * n + attention * n**2 for n in lengths))


# --- The script ---


def time_sides(sides: dict[str, Side], codes: list[list[int]], repeats: int, device: torch.device) -> dict[str, Timing]:
    return interleave({name: lambda side=side: side(codes) for name, side in sides.items()}, repeats, device)


def growth(sides: dict[str, Side], inputs: dict[str, dict[int, list]], limit_s: Callable, device: torch.device) -> dict:
    """Seconds of each side, and those that arithmetic takes, over each x-axis.

    Args:
        inputs: {x-axis label: {size: codes}}.
        limit_s: codes → the least seconds that their arithmetic takes.
    """
    curves = {}
    for label, points in inputs.items():
        sizes = list(points)
        timings = [time_sides(sides, codes, 1, device) for codes in points.values()]
        lines = {name: (sizes, [timing[name].median for timing in timings]) for name in sides}
        lines["limit of arithmetic"] = (sizes, [limit_s(codes) for codes in points.values()])
        curves[label] = lines
        for name, (_, seconds) in lines.items():
            slope = growth_slope(sizes, seconds)
            print(f"{name}: seconds grow as ({label})^{slope:.2f} from {sizes[0]} to {sizes[-1]}")
    return curves


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default for convolutions would be no float32
    device, dtype = torch.device(pick_device(args.device)), DTYPES[args.dtype]
    if device.type == "cpu" and dtype != torch.float32:
        sys.exit(f"error: --dtype {args.dtype} needs a GPU; many CPUs emulate it, hundreds of times slower")
    slow = args.size == "real" and device.type == "cpu"  # 0.4 GFLOP a code: enough to compare, no more
    if slow and args.growth:
        sys.exit("error: --growth at the real size needs a GPU; on a CPU use --size tiny")
    shortest, longest = (50, 96) if args.size == "tiny" else (100, 300) if slow else (200, 1_500)
    shortest, longest = args.min_codes or shortest, args.max_codes or longest
    count, repeats = args.rollouts or (4 if slow else 64), args.repeats or (2 if slow else 5)

    model = load_model(args.size, device, dtype, args.seed)
    sides = build_sides(model)
    rng = np.random.default_rng(args.seed)

    def rollouts(n: int, low: int, high: int) -> list[list[int]]:
        return random_codes(rng.integers(low, high + 1, size=n), SpeechCodec(model).codebook_size, rng)

    codes = rollouts(count, shortest, longest)
    lengths = [len(ids) for ids in codes]
    differences = max_differences(sides, codes)
    print(f"largest difference of a sample from {REFERENCE}: {differences}")
    if dtype == torch.float32 and not max(differences.values()) <= TOLERANCE:  # NaN fails too
        sys.exit("error: the sides do not give the same results; their times would not be comparable")

    timings = time_sides(sides, codes, repeats, device)
    print(f"\n{count} rollouts of {min(lengths)} to {max(lengths)} codes")
    print(f"{device}, {args.dtype}, {args.threads} threads\n")
    print(table(TIMING_HEADER, timing_rows(timings, count)))
    rate = matmul_rate(device, dtype)
    limit = decoder_flops(model, lengths) / rate
    reached = limit / timings["chosen"].median
    print(f"\n{rate / 1e9:.0f} GFLOP/s of a large product allow {limit:.3f} s: {reached:.0%} of it reached as chosen")
    print(f"peak memory of the process: {host_peak_bytes() / 2**30:.2f} GiB")
    results = {
        "rollouts": count,
        "codes": lengths,
        "device": str(device),
        "dtype": args.dtype,
        "threads": args.threads,
        "max_difference": differences,
        "equal": max(differences.values()) <= TOLERANCE,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "ratio": {name: ratios(timings[REFERENCE], timings[name]) for name in differences},
        "matmul_rate": rate,
        "limit_s": limit,
        "peak_bytes": {name: timing.peak_bytes for name, timing in timings.items()},
        "host_peak_bytes": host_peak_bytes(),
    }
    if args.growth or (args.growth is None and not slow):
        inputs = {
            "rollouts": {n: rollouts(n, shortest, longest) for n in GROWTH_ROLLOUTS},
            "codes of the longest of 4": {n: rollouts(4, n * 9 // 10, n) for n in GROWTH_CODES},
        }
        print()
        results["growth"] = growth(
            sides, inputs, lambda codes: decoder_flops(model, [len(ids) for ids in codes]) / rate, device
        )
    write_results(args.output_dir, f"codec_{args.size}", results)
    if "growth" in results:
        plot_growth(args.output_dir / f"codec_{args.size}.png", results["growth"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.set_defaults(repeats=None)  # 5, or 2 for the real size on a CPU
    add = parser.add_argument
    add("--rollouts", type=int, help="default 64, or 4 for the real size on a CPU")
    add("--min_codes", type=int, help="of the shortest rollout; default 50 for tiny, 200 for real (100 on a CPU)")
    add("--max_codes", type=int, help="of the longest; default 96 for tiny, 1,500 for real (300 on a CPU)")
    add("--dtype", choices=DTYPES, default="float32", help="of the codec's weights")
    growth_help = "plot how the cost grows with rollouts and with codes; default: except for the real size on a CPU"
    add("--growth", action=argparse.BooleanOptionalAction, help=growth_help)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
