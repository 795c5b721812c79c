"""Speed of the reward: speech codes to R, one rollout at a time and in batches.

    python benchmarks/reward.py --size tiny           # 64 rollouts sampled from tiny/llasa
    python benchmarks/reward.py --size tiny --growth  # 8 to 256 of them, and a plot
    python benchmarks/reward.py --size real           # published sizes (XCodec2, Whisper large-v3), random weights

The variants:

    baseline: one at a time  each rollout alone: decode its codes, its mel spectrogram, `whisper.decode` for the
                             transcript, another pass, encoder included, for the NLL; all in float32
    ours                     the batches of reward_models/, in float32
    ours, float16            the same with Whisper in float16; on a GPU only

Before anything is timed, the transcripts of ours must be the baseline's and the NLLs within 1e-3; in half precision
the differences are printed and not checked.

With random weights a transcript neither ends nor agrees with its text, the worst case for ours: each is decoded token
by token up to its limit. The real size takes minutes on a CPU: there it scores 2 rollouts of up to 6 s, once.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
import whisper
from transformers import Xcodec2Config, Xcodec2Model, set_seed
from whisper.normalizers import EnglishTextNormalizer

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/X.py` finds the project's files

import reward_whisper
from benchmarks.harness import (
    BASELINE,
    NOT_COMPARABLE,
    benchmark_parser,
    growth_slope,
    host_peak_bytes,
    interleave,
    matmul_rate,
    plot_growth,
    ratios,
    set_up,
    synchronize,
    timing_table,
    write_results,
)
from common.cli import InputError, bad_input_exits, parse_strictly
from common.tables import markdown_table
from speech import error_rate, whisper_decoding, whisper_scorer
from speech.audio import audio_failure
from speech.codec import SpeechCodec, decode_rollouts
from speech.policy import Policy
from speech.text_marks import plain_text
from speech.tokens import CODES_PER_SECOND, tts_prompt
from speech.whisper_scorer import MAX_NLL, Score, WhisperScorer, transcript_limit

LARGE_V3 = {
    "n_mels": 128,
    "n_audio_ctx": 1500,
    "n_audio_state": 1280,
    "n_audio_head": 20,
    "n_audio_layer": 32,
    "n_vocab": 51_866,
    "n_text_ctx": 448,
    "n_text_state": 1280,
    "n_text_head": 20,
    "n_text_layer": 32,
}
GROUP_SIZE = 8  # rollouts of one text, as in GRPO
GROWTH_SIZES = [8, 16, 32, 64, 128, 256]  # rollouts
SLOW_REPEATS = 1  # of the real size on a CPU
STAGES = ("codec", "mel", "encoder", "teacher forcing", "decoding", "text")


class ScoredRollout(NamedTuple):
    """Whisper's score of a rollout and its reward R."""

    score: Score
    reward: float


Variant = Callable[[list[list[int]], list[str]], list[ScoredRollout]]  # of codes and texts


# --- The variants -----------------------------------------------------------------------------------------


def one_at_a_time(
    codec: SpeechCodec, scorer: WhisperScorer, codes: list[list[int]], texts: list[str]
) -> list[ScoredRollout]:
    """The baseline, with the same models: nothing is shared between rollouts, or between transcript and NLL."""
    scores = [_score_alone(codec.model, scorer, ids, text) for ids, text in zip(codes, texts, strict=True)]
    return [ScoredRollout(score, reward_whisper.reward(score)) for score in scores]


@torch.inference_mode()
def _score_alone(codec: Xcodec2Model, scorer: WhisperScorer, ids: list[int], text: str) -> Score:
    wav, text = np.zeros(0, np.float32), plain_text(text)
    if ids:
        audio = codec.decode(audio_codes=torch.tensor([[ids]], device=codec.device)).audio_values
        wav = audio[0, 0].float().cpu().numpy()
    failure = audio_failure(wav)
    hyp_text, nll = ("", MAX_NLL) if failure else _whisper_alone(scorer, wav, text)
    normalize = EnglishTextNormalizer()
    words = jiwer.process_words(normalize(text), normalize(hyp_text))
    edits = words.substitutions + words.deletions + words.insertions
    ref_length = words.hits + words.substitutions + words.deletions
    return Score(hyp_text, words.wer, nll, edits, ref_length, failure)


def _whisper_alone(scorer: WhisperScorer, wav: np.ndarray, text: str) -> tuple[str, float]:
    """A waveform's transcript, and the NLL of `text`."""
    model = scorer.model
    padded = whisper.pad_or_trim(wav.clip(-1.0, 1.0), scorer.window)
    mel = whisper.log_mel_spectrogram(padded, model.dims.n_mels, device=scorer.device).to(scorer.dtype)
    tokenizer = whisper.tokenizer.get_tokenizer(
        model.is_multilingual, num_languages=model.num_languages, language="en", task="transcribe"
    )
    text_ids = tokenizer.encode(" " + text.strip())

    options = whisper.DecodingOptions(
        language="en",
        without_timestamps=True,
        sample_len=transcript_limit(len(text_ids)),
        fp16=scorer.dtype == torch.float16,
    )
    hyp_ids = whisper.decode(model, mel, options).tokens
    hyp_text = tokenizer.decode([token for token in hyp_ids if token < tokenizer.eot]).strip()

    prompt = tokenizer.sot_sequence_including_notimestamps
    logits = model(mel[None], torch.tensor([[*prompt, *text_ids]], device=scorer.device))[0, len(prompt) - 1 :]
    targets = torch.tensor([*text_ids, tokenizer.eot], device=scorer.device)
    return hyp_text, min(F.cross_entropy(logits.float(), targets).item(), MAX_NLL)


def in_batches(
    codec: SpeechCodec, scorer: WhisperScorer, codes: list[list[int]], texts: list[str]
) -> list[ScoredRollout]:
    """Ours, as reward_models/whisper.py does it."""
    error_rate.normalize_text.cache_clear()  # only in a benchmark are the same transcripts scored again
    scores = scorer.score(decode_rollouts(codec, codes), texts)
    return [ScoredRollout(score, reward_whisper.reward(score)) for score in scores]


def differences(reference: list[ScoredRollout], rollouts: list[ScoredRollout]) -> dict[str, float]:
    """How many transcripts differ, and by how much the numbers do at most."""
    pairs = list(zip(reference, rollouts, strict=True))
    return {
        "transcripts_differing": sum(a.score.hyp_text != b.score.hyp_text for a, b in pairs),
        "max_nll_difference": max(abs(a.score.nll - b.score.nll) for a, b in pairs),
        "max_reward_difference": max(abs(a.reward - b.reward) for a, b in pairs),
    }


# --- Seconds by stage -------------------------------------------------------------------------------------


@contextlib.contextmanager
def clocked(owner: object, name: str, seconds: Counter, stage: str, device: torch.device) -> Iterator[None]:
    """Within it, calls of `owner.name` add their seconds to `seconds[stage]`."""
    call = getattr(owner, name)

    def timed(*args, **kwargs):
        synchronize(device)
        start = time.perf_counter()
        result = call(*args, **kwargs)
        synchronize(device)
        seconds[stage] += time.perf_counter() - start
        return result

    with mock.patch.object(owner, name, timed):
        yield


def stage_seconds(
    codec: SpeechCodec, scorer: WhisperScorer, run: Callable[[], object], repeats: int
) -> dict[str, float]:
    """Median seconds that a `run` spends in each of STAGES; "teacher forcing" is the one pass over all the texts."""
    runs = [_stage_seconds(codec, scorer, run) for _ in range(repeats)]
    return {stage: float(np.median([seconds[stage] for seconds in runs])) for stage in STAGES}


def _stage_seconds(codec: SpeechCodec, scorer: WhisperScorer, run: Callable[[], object]) -> dict[str, float]:
    seconds, device = Counter(), scorer.device
    reader = whisper_decoding.WindowReader
    with contextlib.ExitStack() as clocks:
        for owner, name, stage in (
            (codec, "decode", "codec"),
            (scorer, "score", "score"),
            (whisper_scorer, "log_mel_spectrograms", "mel"),
            (scorer.model.encoder, "forward", "encoder"),
            (reader, "read", "read"),
            (reader, "_read_drafts", "teacher forcing"),
        ):
            clocks.enter_context(clocked(owner, name, seconds, stage, device))
        run()
    seconds["decoding"] = seconds["read"] - seconds["teacher forcing"]
    seconds["text"] = seconds["score"] - seconds["mel"] - seconds["encoder"] - seconds["read"]
    return seconds


def encoder_flops(dims: whisper.ModelDimensions) -> float:
    """Floating-point operations of Whisper's encoder for one window, its matrix products alone."""
    positions, width = dims.n_audio_ctx, dims.n_audio_state
    convolutions = 2 * 3 * (2 * positions * dims.n_mels * width + positions * width**2)
    layer = 2 * 12 * positions * width**2 + 2 * 2 * positions**2 * width  # 4 projections and the MLP; attention
    return convolutions + dims.n_audio_layer * layer


# --- The inputs -------------------------------------------------------------------------------------------


def sampled_rollouts(count: int, device: torch.device, seed: int) -> tuple[list[list[int]], list[str]]:
    """Codes of tiny/llasa at temperature 1, of many lengths and partly bad, and their reference texts."""
    lines = Path("tiny/texts/heldout.txt").read_text().splitlines()
    texts = [lines[i // GROUP_SIZE % len(lines)] for i in range(count)]
    set_seed(seed)
    policy = Policy.from_pretrained("tiny/llasa", str(device))
    samples = policy.sample([tts_prompt(text) for text in texts], temperature=1.0, max_length=240, batch_size=64)
    return [sample.codes for sample in samples], texts


def random_rollouts(count: int, num_codes: int, longest: int, seed: int) -> tuple[list[list[int]], list[str]]:
    """From 200 random codes (4 s) to `longest`, and texts of two words a second."""
    rng = np.random.default_rng(seed)
    words = Path("tiny/texts/heldout.txt").read_text().split()
    codes = [rng.integers(num_codes, size=length).tolist() for length in rng.integers(200, longest + 1, size=count)]
    return codes, [" ".join(rng.choice(words, 2 * len(ids) // CODES_PER_SECOND)) for ids in codes]


def random_models(device: torch.device, seed: int, whisper_path: Path) -> SpeechCodec:
    """An XCodec2 of the published sizes with an audible output, and a Whisper of large-v3's, saved to a file."""
    torch.manual_seed(seed)
    codec = Xcodec2Model(Xcodec2Config())
    for module in codec.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.LayerNorm):
            module.reset_parameters()  # transformers' own init is too small: the output would be exactly 0
    head = codec.acoustic_decoder.head
    head.linear.bias.data[: head.n_fft // 2 + 1] = -3  # log magnitudes: audible, and not too loud
    model = whisper.model.Whisper(whisper.ModelDimensions(**LARGE_V3))
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.02)
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.05)  # an NLL of 12, below MAX_NLL
    torch.save({"dims": LARGE_V3, "model_state_dict": model.half().state_dict()}, whisper_path)
    return SpeechCodec(codec.to(device))


def load_models(size: str, device: torch.device, seed: int, half: bool) -> tuple[SpeechCodec, dict[str, WhisperScorer]]:
    """The codec, and Whisper for each variant of ours by name, float32 first."""
    precisions = {"ours": torch.float32} | ({"ours, float16": torch.float16} if half else {})
    with tempfile.TemporaryDirectory() as folder:
        if size == "tiny":
            codec, path = SpeechCodec.from_pretrained("tiny/codec", device), Path("tiny/whisper.pt")
        else:
            path = Path(folder) / "whisper.pt"
            codec = random_models(device, seed, path)
        return codec, {name: WhisperScorer(path, device, dtype) for name, dtype in precisions.items()}


# --- The script -------------------------------------------------------------------------------------------


def growth(
    variants: dict[str, Variant], codes: list, texts: list[str], device: torch.device, limit_s: float
) -> dict[str, dict]:
    """Seconds over the number of rollouts; the baseline, which is linear, only up to 64."""
    curves = {}
    for name, variant in variants.items():
        sizes = [n for n in GROWTH_SIZES if n <= 64 or name != BASELINE]
        seconds = []
        for n in sizes:
            call = {name: lambda variant=variant, n=n: variant(codes[:n], texts[:n])}
            seconds.append(interleave(call, 1, device)[name].median)
        curves[name] = (sizes, seconds)
        print(f"{name}: seconds grow as rollouts^{growth_slope(sizes, seconds):.2f} from {sizes[0]} to {sizes[-1]}")
    name = "limit of arithmetic, Whisper's encoder alone"
    return {"rollouts": curves | {name: (GROWTH_SIZES, [limit_s * n for n in GROWTH_SIZES])}}


def main(args: argparse.Namespace) -> None:
    with bad_input_exits():
        device = set_up(args)
        slow = args.size == "real" and device.type == "cpu"  # large-v3: two rollouts are enough for a ratio
        if slow and args.growth:
            raise InputError("--growth: needs a GPU with --size real. On a CPU use --size tiny")
    count = args.rollouts or (2 if slow else 64)
    repeats = args.repeats or (SLOW_REPEATS if slow else 5)

    codec, scorers = load_models(args.size, device, args.seed, half=device.type == "cuda")
    needed = max(count, GROWTH_SIZES[-1]) if args.growth else count
    if args.size == "tiny":
        all_codes, all_texts = sampled_rollouts(needed, device, args.seed)
    else:
        # 30 s, Whisper's window; on a CPU 6 s, because every transcript is decoded up to its limit
        all_codes, all_texts = random_rollouts(needed, codec.codebook_size, 300 if slow else 1_500, args.seed)
    codes, texts = all_codes[:count], all_texts[:count]
    exact = scorers["ours"]
    variants: dict[str, Variant] = {BASELINE: lambda codes, texts: one_at_a_time(codec, exact, codes, texts)}
    for name, scorer in scorers.items():
        variants[name] = lambda codes, texts, scorer=scorer: in_batches(codec, scorer, codes, texts)

    reference = variants[BASELINE](codes, texts)
    compared = {name: differences(reference, variants[name](codes, texts)) for name in scorers}
    for name, values in compared.items():
        print(f"{name}, against the baseline: " + ", ".join(f"{key} {value:.2g}" for key, value in values.items()))
    if compared["ours"]["transcripts_differing"] or compared["ours"]["max_nll_difference"] > 1e-3:
        sys.exit(NOT_COMPARABLE)

    calls = {name: lambda variant=variant: variant(codes, texts) for name, variant in variants.items()}
    timings = interleave(calls, repeats, device)
    stages = {name: stage_seconds(codec, scorer, calls[name], repeats) for name, scorer in scorers.items()}
    lengths = [len(ids) for ids in codes]
    print(f"\n{count} rollouts of {min(lengths)} to {max(lengths)} codes, {device}, {args.threads} threads\n")
    print(timing_table(timings, count, "rollouts"))
    print("\nSeconds by stage\n")
    by_stage = [[name, *(f"{seconds:.3f}" for seconds in split.values())] for name, split in stages.items()]
    print(markdown_table(["variant", *STAGES], by_stage))
    rates = {name: matmul_rate(device, scorer.dtype) for name, scorer in scorers.items()}
    limits = {name: encoder_flops(exact.model.dims) / rate for name, rate in rates.items()}  # seconds per window
    for name, limit in limits.items():
        reached = count * limit / stages[name]["encoder"]
        print(
            f"\n{name}: limit of arithmetic of the encoder at {rates[name] / 1e9:.0f} GFLOP/s: {count * limit:.3f} s, "
            f"of which it reaches {reached:.0%}"
        )
    print(f"\npeak memory of the process: {host_peak_bytes() / 2**30:.2f} GiB")
    results = {
        "rollouts": count,
        "codes": lengths,
        "threads": args.threads,
        "differences": compared,
        "mean": {
            "wer": float(np.mean([rollout.score.wer for rollout in reference])),
            "nll": float(np.mean([rollout.score.nll for rollout in reference])),
            "reward": float(np.mean([rollout.reward for rollout in reference])),
        },
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "ratio": {name: ratios(timings[BASELINE], timings[name]) for name in scorers},
        "stage_seconds": stages,
        "matmul_rate": rates,
        "encoder_limit_s": {name: count * limit for name, limit in limits.items()},
        "peak_bytes": {name: timing.peak_bytes for name, timing in timings.items()},
        "host_peak_bytes": host_peak_bytes(),
    }
    if args.growth:
        results["growth"] = growth(variants, all_codes, all_texts, device, limits[list(limits)[-1]])
        plot_growth(args.output_dir / f"reward_{args.size}.png", results["growth"])
    write_results(args.output_dir, f"reward_{args.size}", results)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, slow_repeats=SLOW_REPEATS)
    add = parser.add_argument
    add("--rollouts", type=int, help="number of rollouts scored at once (default: 64; 2 for the real size on a CPU)")
    growth_help = "plot seconds over 8 to 256 rollouts"
    add("--growth", action=argparse.BooleanOptionalAction, default=False, help=growth_help)
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    main(parse_args())
