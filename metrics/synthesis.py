"""What `evaluation.py --task tts` does."""

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import set_seed

from common.cli import InputError, bad_input_exits
from common.run_record import provenance
from metrics.html_page import to_show
from metrics.judges import load_judges
from metrics.report import summarize, write_reports
from metrics.texts import Item, num_units, read_items, units_of
from reward_models.token2text import Token2Text
from reward_models.whisper import best_of_n
from speech.audio import audio_failure, load_audio
from speech.codec import SpeechCodec, check_codebook, decode_rollouts
from speech.error_rate import error_rate
from speech.measures import is_repetitive, log_f0_std
from speech.policy import (
    DEFAULT_CODEC,
    DEFAULT_WHISPER,
    MIN_ROOM,
    Policy,
    Sample,
    load_tokenizer,
    recorded,
    reward_parameters,
)
from speech.tokens import SAMPLE_RATE, asr_prompt, tts_prompt
from speech.whisper_scorer import WhisperScorer

logger = logging.getLogger("evaluation")


@dataclass
class Bench:
    """What every row is measured with."""

    args: argparse.Namespace
    codec: SpeechCodec
    judges: dict[str, object]  # by name, see judges.py
    reward_scorer: WhisperScorer | None  # picks in best-of-N, with the first model's reward parameters
    reward_parameters: dict[str, float]
    token2text: Token2Text | None = None


Produced = tuple[list[Sample | None], list[np.ndarray]]  # one per item; no sample where no codes were made
Row = tuple[dict, list[np.ndarray]]  # for results.json, and the waveforms of the first seed to listen to


def measure(
    bench: Bench,
    name: str,
    items: list[Item],
    produce: Callable[[], Produced],
    seeds: list[int] | None = None,
    reader: Policy | None = None,
    **about,
) -> Row:
    """One row of the results, its metrics apart. Without seeds nothing is random and one pass is enough.

    Args:
        reader: the policy that spoke, if it is to read its own codes back.
    """
    clips, first_wavs, compute_s = [], None, 0.0
    for seed in seeds or [None]:
        if seed is not None:
            set_seed(seed)
        start = time.perf_counter()
        samples, wavs = produce()
        compute_s += time.perf_counter() - start
        judged = judge_clips(bench.judges, items, samples, wavs, seed)
        if bench.token2text is not None:
            read_codes(bench.token2text, items, samples, judged)
        if reader is not None:
            read_back(reader, items, samples, judged, bench.args)
        clips += judged
        first_wavs = wavs if first_wavs is None else first_wavs
    return {"name": name, **about, "seeds": seeds or [None], "compute_s": compute_s, "clips": clips}, first_wavs


def judge_clips(
    judges: dict[str, object], items: list[Item], samples: list[Sample | None], wavs: list[np.ndarray], seed: int | None
) -> list[dict]:
    """Everything measured on one clip each, ready for JSON; the texts' order is kept."""
    clips = []
    for item, sample, wav in zip(items, samples, wavs, strict=True):
        failure = audio_failure(wav)
        clips.append(
            {
                "id": item.id,
                "text": item.text,
                "seed": seed,
                "num_codes": sample and len(sample.codes),
                "truncated": sample and sample.truncated,
                "repetitive": sample and is_repetitive(sample.codes),
                "failure": failure,
                "duration_s": len(wav) / SAMPLE_RATE,
                "num_units": num_units(item),
                "log_f0_std": None if failure else number_or_none(log_f0_std(wav)),
                "judges": {},
            }
        )
    texts, languages = [item.text for item in items], [item.language for item in items]
    for name, judge in judges.items():
        for clip, score in zip(clips, judge.score(wavs, texts, languages), strict=True):
            clip["judges"][name] = {
                "hyp_text": score.hyp_text,
                "error_rate": score.wer,
                "edits": score.edits,
                "ref_length": score.ref_length,
                "nll": number_or_none(score.nll),
            }
    return clips


def read_codes(token2text: Token2Text, items: list[Item], samples: list[Sample | None], clips: list[dict]) -> None:
    """The reward model of DiffRO beside the judges: where it rises and their error rate does not fall, it is hacked."""
    spoken = [i for i, sample in enumerate(samples) if sample is not None]
    texts, languages = [items[i].text for i in spoken], [items[i].language for i in spoken]
    scores = token2text.score([samples[i].codes for i in spoken], texts, languages)
    for i, score in zip(spoken, scores, strict=True):
        clips[i]["token2text"] = score


def read_back(
    policy: Policy, items: list[Item], samples: list[Sample], clips: list[dict], args: argparse.Namespace
) -> None:
    """Text -> speech -> text by one model: what it reads in its own codes, as the judge "itself" of each clip."""
    policy.turn_to("asr")
    frame = len(policy.encode([asr_prompt([0])], args.max_length)[0]) - 1
    longest = min(args.max_length, policy.model.config.max_position_embeddings) - frame - MIN_ROOM
    spoken = [sample.codes[:longest] for sample in samples if sample.codes]
    read = iter(
        policy.transcribe(
            [asr_prompt(codes) for codes in spoken],
            max_length=args.max_length,
            max_completion_length=args.max_completion_length,
            batch_size=args.batch_size,
        )
    )
    policy.turn_to("tts")
    for item, sample, clip in zip(items, samples, clips, strict=True):
        hyp_text = next(read).text if sample.codes else ""
        errors = error_rate(item.text, hyp_text, item.language)
        clip["judges"]["itself"] = {
            "hyp_text": hyp_text,
            "error_rate": errors.rate,
            "edits": errors.edits,
            "ref_length": errors.ref_length,
            "nll": None,
        }


def number_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None


def model_rows(bench: Bench, models: dict[str, str], items: list[Item], prompts: list) -> Iterator[Row]:
    """Checkpoints x temperatures, and best-of-N of the first checkpoint at the first temperature."""
    args = bench.args
    for model, (name, path) in enumerate(models.items()):
        with bad_input_exits():
            policy = Policy.from_pretrained(path, args.device)
            policy.encode(prompts, args.max_length)
        for temperature in args.temperature:
            label = f"{name} T={temperature:g}" if len(args.temperature) > 1 else name
            about = {"seeds": args.seeds, "model": path, "temperature": temperature}
            about["reader"] = policy if args.cycle else None
            produce = partial(speak, bench, policy, prompts, temperature, label)
            yield measure(bench, label, items, produce, best_of=1, **about)
            if model == 0 and temperature == args.temperature[0] and args.best_of > 1:
                label = f"{label}, best of {args.best_of}"
                produce = partial(speak_best, bench, policy, prompts, items, temperature, label)
                yield measure(bench, label, items, produce, best_of=args.best_of, **about)


def reference_rows(bench: Bench, items: list[Item], wavs: list[np.ndarray]) -> Iterator[Row]:
    """Natural readings as they are, and after the codec: the ceiling of everything above."""
    about = {"model": None, "temperature": None, "best_of": 1}
    yield measure(bench, "natural", items, lambda: ([None] * len(wavs), wavs), **about)

    def resynthesise() -> Produced:
        samples = [Sample(codes, truncated=False) for codes in bench.codec.encode(wavs)]
        return samples, decode_rollouts(bench.codec, [sample.codes for sample in samples])

    yield measure(bench, "codec resynthesis", items, resynthesise, **about)


def voice_prompts(codec: SpeechCodec, items: list[Item]) -> list[list[dict[str, str]]]:
    """The prompts, each voice encoded once."""
    paths = sorted({item.ref_audio for item in items if item.ref_audio})
    codes = {path: codec.encode([load_audio(path)])[0] for path in tqdm(paths, desc="voice prompts", disable=not paths)}
    return [tts_prompt(item.text, item.ref_text, codes.get(item.ref_audio)) for item in items]


def speak(bench: Bench, policy: Policy, prompts: list, temperature: float, label: str) -> Produced:
    samples = policy.sample(
        prompts,
        temperature=temperature,
        top_p=bench.args.top_p,
        max_length=bench.args.max_length,
        batch_size=bench.args.batch_size,
        progress=label,
    )
    return samples, decode_rollouts(bench.codec, [sample.codes for sample in samples])


def speak_best(
    bench: Bench, policy: Policy, prompts: list, items: list[Item], temperature: float, label: str
) -> Produced:
    """The best of N rollouts of each prompt, by the reward."""
    n = bench.args.best_of
    samples, wavs = speak(bench, policy, [prompt for prompt in prompts for _ in range(n)], temperature, label)
    repeated = [item for item in items for _ in range(n)]
    texts, languages = [item.text for item in repeated], [item.language for item in repeated]
    kept = best_of_n(bench.reward_scorer, samples, wavs, texts, languages, n, **bench.reward_parameters)
    return [samples[i] for i in kept], [wavs[i] for i in kept]


def evaluate_speech(args: argparse.Namespace, models: dict[str, str]) -> dict:
    with bad_input_exits():
        items = read_items(args.texts, args.language)
        references = read_items(args.references, args.language) if args.references else []
        without_audio = [item.id for item in references if item.audio is None]
        if without_audio:
            raise InputError(f"{args.references}: no audio for {without_audio[0]!r}; --references needs readings")
        everything = items + references
        units = units_of(everything)
        tokens = [load_tokenizer(path)[1] for path in models.values()]
        first = next(iter(models.values()))
        whisper = args.whisper or recorded(first, "whisper", DEFAULT_WHISPER)
        texts, languages = [item.text for item in everything], [item.language for item in everything]
        judges = load_judges(args.judge or [whisper], texts, languages, args.device)
        scorer = (judges.get(whisper) or WhisperScorer(whisper, args.device)) if args.best_of > 1 else None
        codec = SpeechCodec.from_pretrained(args.codec_id or recorded(first, "codec_id", DEFAULT_CODEC), args.device)
        token2text = Token2Text.from_pretrained(args.token2text, args.device) if args.token2text else None
        for model_tokens in tokens:
            check_codebook(codec, model_tokens)
            if token2text is not None:
                token2text.check_codebook(model_tokens.num_codes)
        natural = [load_audio(item.audio) for item in references]
        prompts = voice_prompts(codec, items)

    bench = Bench(args, codec, judges, scorer, reward_parameters(first), token2text)
    about = {"arguments": vars(args), "units": units, "models": models, "num_texts": len(items)}
    results = {**provenance(), **about, "rows": []}
    to_hear = {item.text for item in to_show(items, args.num_players)}
    players = {}
    of_models = model_rows(bench, models, items, prompts)
    of_references = reference_rows(bench, references, natural) if references else []
    for row, wavs in chain(of_models, of_references):
        results["rows"].append(row)
        row["metrics"] = summarize(row, results["rows"][0])
        for clip, wav in zip(row["clips"], wavs, strict=False):  # the first seed's clips come first
            if clip["text"] in to_hear:
                players.setdefault(clip["text"], []).append((row["name"], clip, wav))
        write_reports(Path(args.output_dir), results, players)
        for judge, metrics in row["metrics"]["judges"].items():
            logger.info("%s: %.2f %% %s wrong by %s", row["name"], 100 * metrics["error_rate"], units, judge)
    logger.info("listen: %s", Path(args.output_dir) / "report.html")
    return results
