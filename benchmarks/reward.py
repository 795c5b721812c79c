"""How fast rollouts are rewarded, from codes to R: one at a time, as is obvious, against the project's batches.

    python benchmarks/reward.py --size tiny           # 64 rollouts sampled from tiny/llasa
    python benchmarks/reward.py --size tiny --growth  # 8 to 256 of them, and a plot
    python benchmarks/reward.py --size real           # XCodec2 and Whisper large-v3 in shape, random weights

The obvious way takes each rollout alone: decodes its codes, makes its mel spectrogram, transcribes it with
`whisper.decode`, and makes another pass, encoder included, for the NLL; all in float32. Transcripts must be identical
and NLLs within 1e-3 before anything is timed; in half precision the differences are printed instead.

Each side is timed 5 times, or once for the real size on a CPU, where that takes minutes.

Random weights are the worst case for the project's side: they neither end a transcript nor agree with a text, so
every transcript is decoded token by token to its bound.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
import whisper
from harness import (
    REFERENCE,
    TIMING_HEADER,
    benchmark_parser,
    growth_slope,
    host_peak_bytes,
    interleave,
    matmul_rate,
    plot_growth,
    ratios,
    synchronize,
    table,
    timing_rows,
    write_results,
)
from transformers import Xcodec2Config, Xcodec2Model, set_seed
from whisper.normalizers import EnglishTextNormalizer

import reward_whisper
from common.cli import pick_device
from reward_whisper import harmonic_mean, nll_reward, wer_reward
from speech import whisper_decoding
from speech.audio import audio_failure
from speech.codec import SpeechCodec, decode_rollouts
from speech.policy import Policy
from speech.tokens import CODES_PER_SECOND, tts_prompt
from speech.whisper_scorer import MAX_NLL, WhisperScorer

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
STAGES = ("codec", "mel", "encoder", "teacher forcing", "decoding", "text")


@dataclass(frozen=True)
class Heard:
    """What became of one rollout."""

    hyp_text: str
    wer: float
    nll: float
    reward: float


# --- The two sides ---


def one_at_a_time(codec: SpeechCodec, scorer: WhisperScorer, codes: list[list[int]], texts: list[str]) -> list[Heard]:
    """The obvious way, with the same models: nothing is shared between rollouts, or between transcript and NLL."""
    return [_hear(codec.model, scorer, ids, text) for ids, text in zip(codes, texts, strict=True)]


@torch.inference_mode()
def _hear(codec: Xcodec2Model, scorer: WhisperScorer, ids: list[int], text: str) -> Heard:
    wav = np.zeros(0, np.float32)
    if ids:
        audio = codec.decode(audio_codes=torch.tensor([[ids]], device=codec.device)).audio_values
        wav = audio[0, 0].float().cpu().numpy()
    if audio_failure(wav):
        return Heard("", 1.0, MAX_NLL, 0.0)
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
        sample_len=2 * len(text_ids) + 8,  # the bound of `WhisperScorer.score`
        fp16=scorer.dtype == torch.float16,
    )
    hyp_ids = whisper.decode(model, mel, options).tokens
    hyp_text = tokenizer.decode([token for token in hyp_ids if token < tokenizer.eot]).strip()

    prompt = tokenizer.sot_sequence_including_notimestamps
    logits = model(mel[None], torch.tensor([[*prompt, *text_ids]], device=scorer.device))[0, len(prompt) - 1 :]
    targets = torch.tensor([*text_ids, tokenizer.eot], device=scorer.device)
    nll = min(F.cross_entropy(logits.float(), targets).item(), MAX_NLL)

    normalize = EnglishTextNormalizer()
    wer = jiwer.wer(normalize(text), normalize(hyp_text))
    return Heard(hyp_text, wer, nll, harmonic_mean(wer_reward(wer), nll_reward(nll)))


def in_batches(codec: SpeechCodec, scorer: WhisperScorer, codes: list[list[int]], texts: list[str]) -> list[Heard]:
    """The project's way, as `reward_models` does it."""
    reward_whisper.normalize_text.cache_clear()  # the same transcripts come back only in a benchmark
    wavs = decode_rollouts(codec, codes)
    scores = scorer.score(wavs, texts)
    rewards = [0.0 if s.failure else harmonic_mean(wer_reward(s.wer), nll_reward(s.nll)) for s in scores]
    return [Heard(s.hyp_text, s.wer, s.nll, reward) for s, reward in zip(scores, rewards, strict=True)]


def differences(reference: list[Heard], side: list[Heard]) -> dict[str, float]:
    """How many transcripts differ, and by how much the numbers do at most."""
    pairs = list(zip(reference, side, strict=True))
    return {
        "transcripts_differing": sum(a.hyp_text != b.hyp_text for a, b in pairs),
        "max_nll_difference": max(abs(a.nll - b.nll) for a, b in pairs),
        "max_reward_difference": max(abs(a.reward - b.reward) for a, b in pairs),
    }


# --- Where the project's time goes ---


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
            (reward_whisper, "log_mel_spectrograms", "mel"),
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


# --- The inputs ---


def sampled_rollouts(count: int, device: torch.device, seed: int) -> tuple[list[list[int]], list[str]]:
    """Codes of tiny/llasa at temperature 1, ragged and partly bad, and the texts they were to say."""
    lines = Path("tiny/texts/heldout.txt").read_text().splitlines()
    texts = [lines[i // GROUP_SIZE % len(lines)] for i in range(count)]
    set_seed(seed)
    policy = Policy.from_pretrained("tiny/llasa", str(device))
    samples = policy.sample([tts_prompt(text) for text in texts], temperature=1.0, max_length=160, batch_size=64)
    return [sample.codes for sample in samples], texts


def random_rollouts(count: int, num_codes: int, longest: int, seed: int) -> tuple[list[list[int]], list[str]]:
    """From 200 random codes (4 s) to `longest`, and texts of two words a second."""
    rng = np.random.default_rng(seed)
    words = Path("tiny/texts/heldout.txt").read_text().split()
    codes = [rng.integers(num_codes, size=length).tolist() for length in rng.integers(200, longest + 1, size=count)]
    return codes, [" ".join(rng.choice(words, 2 * len(ids) // CODES_PER_SECOND)) for ids in codes]


def random_models(device: torch.device, seed: int, whisper_path: Path) -> SpeechCodec:
    """An XCodec2 of the published sizes that makes sound, and the checkpoint of a Whisper of large-v3's sizes."""
    torch.manual_seed(seed)
    codec = Xcodec2Model(Xcodec2Config())
    for module in codec.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.LayerNorm):
            module.reset_parameters()  # transformers' own is too small: the output would be exactly 0
    head = codec.acoustic_decoder.head
    head.linear.bias.data[: head.n_fft // 2 + 1] = -3  # log magnitudes: sound, and not too loud
    model = whisper.model.Whisper(whisper.ModelDimensions(**LARGE_V3))
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.02)
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.05)  # an NLL of 12, below MAX_NLL
    torch.save({"dims": LARGE_V3, "model_state_dict": model.half().state_dict()}, whisper_path)
    return SpeechCodec(codec.to(device))


def load_models(size: str, device: torch.device, seed: int, half: bool) -> tuple[SpeechCodec, dict[str, WhisperScorer]]:
    """The codec, and the project's sides by name: each precision's Whisper, float32 first."""
    precisions = {"this project": torch.float32} | ({"this project, float16": torch.float16} if half else {})
    with tempfile.TemporaryDirectory() as folder:
        if size == "tiny":
            codec, path = SpeechCodec.from_pretrained("tiny/codec", device), Path("tiny/whisper.pt")
        else:
            path = Path(folder) / "whisper.pt"
            codec = random_models(device, seed, path)
        return codec, {name: WhisperScorer(path, device, dtype) for name, dtype in precisions.items()}


# --- The script ---


def growth(sides: dict[str, Callable], codes: list, texts: list[str], device: torch.device, limit_s: float) -> dict:
    """Seconds over the number of rollouts; one at a time only to 64, being linear."""
    curves = {}
    for name, side in sides.items():
        sizes = [n for n in GROWTH_SIZES if n <= 64 or name != REFERENCE]
        seconds = []
        for n in sizes:
            call = {name: lambda side=side, n=n: side(codes[:n], texts[:n])}
            seconds.append(interleave(call, 1, device)[name].median)
        curves[name] = (sizes, seconds)
        print(f"{name}: seconds grow as rollouts^{growth_slope(sizes, seconds):.2f} from {sizes[0]} to {sizes[-1]}")
    name = "limit of arithmetic, Whisper's encoder alone"
    return {"rollouts": curves | {name: (GROWTH_SIZES, [limit_s * n for n in GROWTH_SIZES])}}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    device = torch.device(pick_device(args.device))
    on_gpu = device.type == "cuda"
    small = args.size == "real" and not on_gpu  # large-v3 on a CPU: enough to compare, no more
    if small and args.growth:
        sys.exit("error: --growth at the real size needs a GPU; on a CPU use --size tiny")
    count = args.rollouts or (2 if small else 64)
    repeats = args.repeats or (1 if small else 5)

    codec, scorers = load_models(args.size, device, args.seed, half=on_gpu)
    needed = max(count, GROWTH_SIZES[-1]) if args.growth else count
    if args.size == "tiny":
        all_codes, all_texts = sampled_rollouts(needed, device, args.seed)
    else:
        # 30 s, Whisper's window; on a CPU 6 s, because of all the steps of decoding to a bound
        all_codes, all_texts = random_rollouts(needed, codec.codebook_size, 300 if small else 1_500, args.seed)
    codes, texts = all_codes[:count], all_texts[:count]
    exact = scorers["this project"]
    sides = {REFERENCE: lambda codes, texts: one_at_a_time(codec, exact, codes, texts)}
    for name, scorer in scorers.items():
        sides[name] = lambda codes, texts, scorer=scorer: in_batches(codec, scorer, codes, texts)

    reference = sides[REFERENCE](codes, texts)
    found = {name: differences(reference, sides[name](codes, texts)) for name in scorers}
    for name, values in found.items():
        print(f"{name}, against {REFERENCE}: " + ", ".join(f"{key} {value:.2g}" for key, value in values.items()))
    if found["this project"]["transcripts_differing"] or found["this project"]["max_nll_difference"] > 1e-3:
        sys.exit("error: the sides do not give the same results; their times would not be comparable")

    timings = interleave({name: lambda side=side: side(codes, texts) for name, side in sides.items()}, repeats, device)
    stages = {
        name: stage_seconds(codec, scorer, lambda name=name: sides[name](codes, texts), repeats)
        for name, scorer in scorers.items()
    }
    lengths = [len(ids) for ids in codes]
    print(f"\n{count} rollouts of {min(lengths)} to {max(lengths)} codes, {device}, {args.threads} threads\n")
    print(table(TIMING_HEADER, timing_rows(timings, count)))
    print("\nSeconds of the project's side by stage\n")
    print(table(["side", *STAGES], [[name, *(f"{s:.3f}" for s in split.values())] for name, split in stages.items()]))
    rates = {name: matmul_rate(device, scorer.dtype) for name, scorer in scorers.items()}
    limits = {name: encoder_flops(exact.model.dims) / rate for name, rate in rates.items()}  # seconds a window
    for name, limit in limits.items():
        print(
            f"\n{name}: {rates[name] / 1e9:.0f} GFLOP/s allow an encoder of {count * limit:.3f} s: "
            f"{count * limit / stages[name]['encoder']:.0%} of it reached"
        )
    print(f"\npeak memory of the process: {host_peak_bytes() / 2**30:.2f} GiB")
    results = {
        "rollouts": count,
        "codes": lengths,
        "threads": args.threads,
        "differences": found,
        "mean": {key: float(np.mean([getattr(item, key) for item in reference])) for key in ("wer", "nll", "reward")},
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "ratio": {name: ratios(timings[REFERENCE], timings[name]) for name in scorers},
        "stage_seconds": stages,
        "matmul_rate": rates,
        "encoder_limit_s": {name: count * limit for name, limit in limits.items()},
        "peak_bytes": {name: timing.peak_bytes for name, timing in timings.items()},
        "host_peak_bytes": host_peak_bytes(),
    }
    if args.growth:
        results["growth"] = growth(sides, all_codes, all_texts, device, limits[list(limits)[-1]])
        plot_growth(args.output_dir / f"reward_{args.size}.png", results["growth"])
    write_results(args.output_dir, f"reward_{args.size}", results)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    parser.set_defaults(repeats=None)  # 5, or 1 for the real size on a CPU
    add = parser.add_argument
    add("--rollouts", type=int, help="rewarded at once; default 64, or 2 for the real size on a CPU")
    add("--growth", action="store_true", help="plot how the cost grows from 8 to 256 rollouts")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
