"""`evaluation.py --task tts`: checkpoints synthesize texts, evaluation ASRs transcribe and score the clips."""

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import set_seed

from common.cli import InputError, bad_input_exits
from common.run_record import provenance
from metrics.clip_measures import (
    SynthesizedSpeech,
    add_round_trip_errors,
    add_token2text_scores,
    measure_clips,
)
from metrics.comparison import speech_comparison
from metrics.formatting import percent
from metrics.html_page import evenly_spaced
from metrics.judges import ROUND_TRIP, EvaluationASR, asr_roles, load_evaluation_asrs
from metrics.report import Player, error_unit, summarize, write_reports
from metrics.texts import Item, read_items, units_of
from reward_models.token2text import Token2Text
from reward_models.whisper import best_of_n
from speech.audio import load_audio
from speech.codec import SpeechCodec, check_codebook, decode_rollouts
from speech.policy import (
    DEFAULT_CODEC,
    DEFAULT_WHISPER,
    Policy,
    Sample,
    load_tokenizer,
    recorded,
    reward_parameters,
)
from speech.tokens import tts_prompt
from speech.whisper_scorer import WhisperScorer

logger = logging.getLogger(__name__)

# --- Texts and models -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationTexts:
    """The texts to synthesize, and natural readings to compare with.

    Attributes:
        references, natural_wavs: of --references; float32 mono at 16 kHz.
        units: "words" or "characters", see `texts.units_of`.
    """

    items: list[Item]
    references: list[Item]
    natural_wavs: list[np.ndarray]
    units: str


@dataclass(frozen=True)
class EvaluationModels:
    """What every row is measured with.

    Attributes:
        evaluation_asrs: by name, the held-out ones first.
        asr_roles: by name, see `judges.asr_roles`.
        reward_scorer, reward_parameters: of best-of-N: the first model's reward; no scorer without best-of-N.
    """

    args: argparse.Namespace
    codec: SpeechCodec
    evaluation_asrs: dict[str, EvaluationASR]
    asr_roles: dict[str, str]
    reward_scorer: WhisperScorer | None
    reward_parameters: dict[str, float]
    token2text: Token2Text | None


def load_texts(args: argparse.Namespace) -> EvaluationTexts:
    items = read_items(args.texts, args.language)
    references = read_items(args.references, args.language) if args.references else []
    for item in references:
        if item.audio is None:
            raise InputError(f"--references {args.references}: no audio for {item.id!r}. Add a natural reading of it")
    natural_wavs = [load_audio(item.audio) for item in references]
    return EvaluationTexts(items, references, natural_wavs, units_of(items + references))


def load_models(args: argparse.Namespace, models: dict[str, str], items: list[Item]) -> EvaluationModels:
    """Load all but the checkpoints, and check that the checkpoints' tokenizers fit the codec.

    Args:
        models: name -> path.
        items: all that is to be scored.
    """
    checkpoint_tokens = [load_tokenizer(path)[1] for path in models.values()]
    first = next(iter(models.values()))
    reward_whisper = args.whisper or recorded(first, "whisper", DEFAULT_WHISPER)
    roles = asr_roles(args.judge or [reward_whisper], reward_whisper, list(models.values()))
    texts, languages = [item.text for item in items], [item.language for item in items]
    evaluation_asrs = load_evaluation_asrs(list(roles), texts, languages, args.device)
    reward_scorer = None
    if args.best_of > 1:
        reward_scorer = evaluation_asrs.get(reward_whisper) or WhisperScorer(reward_whisper, args.device)
    codec = SpeechCodec.from_pretrained(args.codec_id or recorded(first, "codec_id", DEFAULT_CODEC), args.device)
    token2text = Token2Text.from_pretrained(args.token2text, args.device) if args.token2text else None
    for tokens in checkpoint_tokens:
        check_codebook(codec, tokens)
        if token2text is not None:
            token2text.check_codebook(tokens.num_codes)
    if args.cycle:
        roles[ROUND_TRIP] = ROUND_TRIP
    return EvaluationModels(args, codec, evaluation_asrs, roles, reward_scorer, reward_parameters(first), token2text)


def prompts_of(items: list[Item], codec: SpeechCodec) -> list[list[dict[str, str]]]:
    """The prompts; the audio of each voice prompt is encoded once."""
    paths = sorted({item.ref_audio for item in items if item.ref_audio})
    codes = {}
    for path in tqdm(paths, desc="voice prompts", disable=None if paths else True):
        [codes[path]] = codec.encode([load_audio(path)])
    return [tts_prompt(item.text, item.ref_text, codes.get(item.ref_audio)) for item in items]


# --- Speech -----------------------------------------------------------------------------------------------


def synthesize(
    models: EvaluationModels, policy: Policy, prompts: list, temperature: float, label: str
) -> SynthesizedSpeech:
    """One rollout of each prompt, decoded."""
    samples = policy.sample(
        prompts,
        temperature=temperature,
        top_p=models.args.top_p,
        max_length=models.args.max_length,
        batch_size=models.args.batch_size,
        progress=label,
    )
    return SynthesizedSpeech(samples, decode_rollouts(models.codec, [sample.codes for sample in samples]))


def synthesize_best_of_n(
    models: EvaluationModels, policy: Policy, prompts: list, items: list[Item], temperature: float, label: str
) -> SynthesizedSpeech:
    """Of --best_of rollouts of each prompt the one with the highest reward."""
    n = models.args.best_of
    repeated_prompts = [prompt for prompt in prompts for _ in range(n)]
    texts = [item.text for item in items for _ in range(n)]
    languages = [item.language for item in items for _ in range(n)]
    samples, wavs = synthesize(models, policy, repeated_prompts, temperature, label)
    best = best_of_n(models.reward_scorer, samples, wavs, texts, languages, n, **models.reward_parameters)
    return SynthesizedSpeech([samples[i] for i in best], [wavs[i] for i in best])


def resynthesize(codec: SpeechCodec, wavs: list[np.ndarray]) -> SynthesizedSpeech:
    """Recordings after the codec's encoder and decoder."""
    samples = [Sample(codes, truncated=False) for codes in codec.encode(wavs)]
    return SynthesizedSpeech(samples, decode_rollouts(codec, [sample.codes for sample in samples]))


# --- Rows -------------------------------------------------------------------------------------------------


class EvaluatedRow(NamedTuple):
    """A row of results.json without its metrics, and the waveforms of its first seed."""

    row: dict
    first_wavs: list[np.ndarray]


def evaluated_row(
    models: EvaluationModels,
    name: str,
    items: list[Item],
    synthesis: Callable[[], SynthesizedSpeech],
    seeds: list[int] | None = None,
    own_asr: Policy | None = None,
    **about,
) -> EvaluatedRow:
    """Synthesize the items once per seed (once if there are none: nothing is random then) and measure the clips.

    Args:
        synthesis: its time is `compute_s`.
        own_asr: the checkpoint that synthesizes, if it is to transcribe its own codes (--cycle).
        about: further keys of the row.
    """
    clips, first_wavs, compute_s = [], None, 0.0
    for seed in seeds or [None]:
        if seed is not None:
            set_seed(seed)
        start = time.perf_counter()
        speech = synthesis()
        compute_s += time.perf_counter() - start
        seed_clips = measure_clips(models.evaluation_asrs, items, speech, seed)
        if models.token2text is not None:
            add_token2text_scores(models.token2text, items, speech.samples, seed_clips)
        if own_asr is not None:
            add_round_trip_errors(own_asr, items, speech.samples, seed_clips, models.args)
        clips += seed_clips
        first_wavs = speech.wavs if first_wavs is None else first_wavs
    row = {"name": name, **about, "seeds": seeds or [None], "compute_s": compute_s, "clips": clips}
    return EvaluatedRow(row, first_wavs)


def checkpoint_rows(
    models: EvaluationModels, checkpoints: dict[str, str], items: list[Item], prompts: list
) -> Iterator[EvaluatedRow]:
    """Checkpoints x temperatures, and best-of-N of the first checkpoint at the first temperature."""
    args = models.args
    for number, (name, path) in enumerate(checkpoints.items()):
        with bad_input_exits():
            policy = Policy.from_pretrained(path, args.device)
            policy.encode(prompts, args.max_length)  # raises for a text too long
        for temperature in args.temperature:
            label = f"{name} T={temperature:g}" if len(args.temperature) > 1 else name
            about = {"seeds": args.seeds, "model": path, "temperature": temperature}
            about["own_asr"] = policy if args.cycle else None
            synthesis = partial(synthesize, models, policy, prompts, temperature, label)
            yield evaluated_row(models, label, items, synthesis, best_of=1, **about)
            if number == 0 and temperature == args.temperature[0] and args.best_of > 1:
                label = f"{label}, best of {args.best_of}"
                synthesis = partial(synthesize_best_of_n, models, policy, prompts, items, temperature, label)
                yield evaluated_row(models, label, items, synthesis, best_of=args.best_of, **about)


def reference_rows(models: EvaluationModels, items: list[Item], wavs: list[np.ndarray]) -> Iterator[EvaluatedRow]:
    """Natural readings as recorded, and after the codec: the best that a checkpoint could reach."""
    about = {"model": None, "temperature": None, "best_of": 1}
    recordings = SynthesizedSpeech([None] * len(wavs), wavs)
    yield evaluated_row(models, "natural", items, lambda: recordings, **about)
    yield evaluated_row(models, "codec resynthesis", items, partial(resynthesize, models.codec, wavs), **about)


def row_summary(row: dict, units: str) -> str:
    """One line for the terminal."""
    rates = [f"{asr} {percent(metrics['error_rate'])}" for asr, metrics in row["metrics"]["asr"].items()]
    return f"{row['name']}: {len(row['clips'])} clips, {error_unit(units)} {', '.join(rates)}"


def evaluate(args: argparse.Namespace, checkpoints: dict[str, str]) -> dict:
    """All rows, written anew after each; returns what results.json holds.

    Args:
        args: of evaluation.py, checked.
        checkpoints: name -> path.
    """
    with bad_input_exits():
        texts = load_texts(args)
        models = load_models(args, checkpoints, texts.items + texts.references)
        prompts = prompts_of(texts.items, models.codec)
    results = {
        **provenance(),
        "arguments": vars(args),
        "units": texts.units,
        "asr_roles": models.asr_roles,
        "models": checkpoints,
        "num_texts": len(texts.items),
        "rows": [],
    }
    listened = {item.text for item in evenly_spaced(texts.items, args.num_players)}
    players: dict[str, list[Player]] = {}
    rows = checkpoint_rows(models, checkpoints, texts.items, prompts)
    if texts.references:
        rows = chain(rows, reference_rows(models, texts.references, texts.natural_wavs))
    for row, first_wavs in rows:
        results["rows"].append(row)
        row["metrics"] = summarize(row, results["rows"][0])
        for clip, wav in zip(row["clips"], first_wavs, strict=False):  # the first seed's clips come first
            if clip["text"] in listened:
                players.setdefault(clip["text"], []).append((row["name"], clip, wav))
        write_reports(Path(args.output_dir), results, players)
        logger.info(row_summary(row, texts.units))
    for line in speech_comparison(results):
        logger.info(line)
    logger.info("Listen: %s", (Path(args.output_dir) / "report.html").resolve())
    return results
