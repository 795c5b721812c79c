"""`evaluation.py --task tts`: checkpoints synthesize texts, evaluation ASRs transcribe and score the clips."""

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import set_seed

from common.cli import InputError, bad_input_exits
from common.run_record import content_digest, short_digest
from metrics.clip_measures import (
    MEASUREMENTS,
    SynthesizedSpeech,
    add_code_distances,
    add_dnsmos_scores,
    add_round_trip_errors,
    add_speaker_similarities,
    add_token2text_scores,
    measure_clips,
)
from metrics.comparison import speech_comparison
from metrics.formatting import percent
from metrics.html_page import evenly_spaced
from metrics.judges import ROUND_TRIP, EvaluationASR, asr_roles, load_evaluation_asrs, model_path, word_timer
from metrics.report import Player, error_unit, summarize, write_reports
from metrics.result_files import open_results, read_sounds, write_sounds
from metrics.texts import Item, read_items, units_of
from reward_models.token2text import Token2Text
from reward_models.whisper import best_of_n
from speech.adapters import Adapter, check_base, parse_adapters
from speech.audio import load_audio, load_short_audio
from speech.codec import SpeechCodec, check_codebook, decode_rollouts
from speech.dnsmos import Dnsmos
from speech.policy import (
    DEFAULT_CODEC,
    Policy,
    Sample,
    load_tokenizer,
    recorded_with_adapters,
    reward_parameters,
)
from speech.speaker_encoder import MIN_SECONDS, SpeakerEncoder
from speech.text_marks import marked_words
from speech.tokens import tts_prompt
from speech.whisper_checkpoint import DEFAULT_WHISPER
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
        voices: speaker embedding of each voice prompt's recording, by its path; none without a speaker encoder.
        reward_scorer, reward_parameters: of best-of-N: the first model's reward; no scorer without best-of-N.
    """

    args: argparse.Namespace
    codec: SpeechCodec
    evaluation_asrs: dict[str, EvaluationASR]
    asr_roles: dict[str, str]
    reward_scorer: WhisperScorer | None
    reward_parameters: dict[str, float]
    token2text: Token2Text | None
    speaker_encoder: SpeakerEncoder | None
    voices: dict[str, np.ndarray]
    dnsmos: Dnsmos | None


def load_texts(args: argparse.Namespace) -> EvaluationTexts:
    items = read_items(args.texts, args.language)
    references = read_items(args.references, args.language) if args.references else []
    for item in references:
        if item.audio is None:
            raise InputError(f"--references {args.references}: no audio for {item.id!r}. Add a natural reading of it")
    natural_wavs = [load_audio(item.audio) for item in references]
    return EvaluationTexts(items, references, natural_wavs, units_of(item.language for item in items + references))


def adapter_rows(args: argparse.Namespace, models: dict[str, str]) -> dict[str, list[Adapter]]:
    """--adapters: name of the row -> LoRAs added to the first model; InputError where they cannot be."""
    first_name, first_path = next(iter(models.items()))
    rows = {}
    for words in args.adapters or []:
        adapters = parse_adapters(words)
        check_base(first_path, adapters)
        name = " + ".join([first_name, *map(str, adapters)])
        if name in {*models, *rows}:
            raise InputError(f"--adapters {' '.join(words)}: there is a row {name!r} already. Give each once")
        rows[name] = adapters
    return rows


def adapters_of(args: argparse.Namespace) -> list[Adapter]:
    return [adapter for words in args.adapters or [] for adapter in parse_adapters(words)]


def adapter_folders(args: argparse.Namespace) -> list[str]:
    return sorted({adapter.folder for adapter in adapters_of(args)})


def reward_whisper_of(args: argparse.Namespace, models: dict[str, str]) -> str:
    first = next(iter(models.values()))
    return args.whisper or recorded_with_adapters(first, adapters_of(args), "whisper", DEFAULT_WHISPER)


def codec_of(args: argparse.Namespace, models: dict[str, str]) -> str:
    first = next(iter(models.values()))
    return args.codec_id or recorded_with_adapters(first, adapters_of(args), "codec_id", DEFAULT_CODEC)


def digests_of(args: argparse.Namespace, models: dict[str, str], texts: EvaluationTexts) -> dict:
    """What tells the models and texts from others of the same names; see `result_files.open_results`."""
    items = [*texts.items, *texts.references]
    recordings = {path for item in items for path in (item.ref_audio, item.audio) if path}
    names = {*models.values(), *(args.judge or []), reward_whisper_of(args, models), codec_of(args, models)}
    names |= {name for name in (args.token2text, args.speaker_encoder, *adapter_folders(args)) if name}
    return {
        "texts": short_digest(vars(item) for item in items),
        "measurements": MEASUREMENTS,
        "reward parameters": reward_parameters(next(iter(models.values()))),
        **{f"content of {name}": content_digest(model_path(name)) for name in sorted({*names, *recordings})},
    }


def load_models(args: argparse.Namespace, models: dict[str, str], items: list[Item]) -> EvaluationModels:
    """Load all but the checkpoints, and check that the checkpoints' tokenizers fit the codec.

    Args:
        models: name -> path.
        items: all that is to be scored.
    """
    checkpoint_tokens = [load_tokenizer(path)[1] for path in models.values()]
    reward_whisper = reward_whisper_of(args, models)
    roles = asr_roles(args.judge or [reward_whisper], reward_whisper, [*models.values(), *adapter_folders(args)])
    texts, languages = [item.text for item in items], [item.language for item in items]
    evaluation_asrs = load_evaluation_asrs(list(roles), texts, languages, args.device)
    reward_scorer = None
    if args.best_of > 1:
        reward_scorer = evaluation_asrs.get(reward_whisper) or WhisperScorer(reward_whisper, args.device)
        reward_scorer.check_languages(languages)
    codec = SpeechCodec.from_pretrained(codec_of(args, models), args.device)
    token2text = Token2Text.from_pretrained(args.token2text, args.device) if args.token2text else None
    speaker_encoder, voices = None, {}
    if args.speaker_encoder:
        speaker_encoder = SpeakerEncoder.from_pretrained(args.speaker_encoder, args.device)
        voices = voices_of(speaker_encoder, items, args.max_length)
    for tokens in checkpoint_tokens:
        check_codebook(codec, tokens)
        if token2text is not None:
            token2text.check_codebook(tokens.num_codes)
    if args.cycle:
        roles[ROUND_TRIP] = ROUND_TRIP
    parameters = reward_parameters(next(iter(models.values())))
    return EvaluationModels(
        args,
        codec,
        evaluation_asrs,
        roles,
        reward_scorer,
        parameters,
        token2text,
        speaker_encoder,
        voices,
        dnsmos=Dnsmos() if args.dnsmos else None,
    )


def voices_of(encoder: SpeakerEncoder, items: list[Item], max_length: int) -> dict[str, np.ndarray]:
    """Speaker embedding of each voice prompt's recording, by its path; InputError if there is none, or none in it."""
    paths = sorted({item.ref_audio for item in items if item.ref_audio})
    if not paths:
        raise InputError(
            "--speaker_encoder: no text has a voice prompt to compare with. Add ref_audio and ref_text to --texts "
            "(.jsonl or .lst), or leave the flag out"
        )
    voices = dict(zip(paths, encoder.embed([load_short_audio(path, max_length) for path in paths]), strict=True))
    for path, embedding in voices.items():
        if np.isnan(embedding).any():
            raise InputError(f"{path}: silent, or shorter than the {MIN_SECONDS} s that --speaker_encoder needs")
    return voices


def prompts_of(items: list[Item], codec: SpeechCodec, max_length: int) -> list[list[dict[str, str]]]:
    """The prompts; the audio of each voice prompt is encoded once."""
    paths = sorted({item.ref_audio for item in items if item.ref_audio})
    codes = {}
    for path in tqdm(paths, desc="voice prompts", disable=None if paths else True):
        [codes[path]] = codec.encode([load_short_audio(path, max_length)])
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
    clips, samples, first_wavs, compute_s = [], [], None, 0.0
    for seed in seeds or [None]:
        if seed is not None:
            set_seed(seed)
        start = time.perf_counter()
        speech = synthesis()
        compute_s += time.perf_counter() - start
        seed_clips = measure_clips(models.evaluation_asrs, items, speech, seed)
        if models.speaker_encoder is not None:
            add_speaker_similarities(models.speaker_encoder, models.voices, items, speech.wavs, seed_clips)
        if models.dnsmos is not None:
            add_dnsmos_scores(models.dnsmos, speech.wavs, seed_clips)
        if models.token2text is not None:
            add_token2text_scores(models.token2text, items, speech.samples, seed_clips)
        if own_asr is not None:
            add_round_trip_errors(own_asr, items, speech.samples, seed_clips, models.args)
        clips += seed_clips
        samples.append(speech.samples)
        first_wavs = speech.wavs if first_wavs is None else first_wavs
    if len(samples) > 1:
        add_code_distances(samples, clips)
    row = {"name": name, **about, "seeds": seeds or [None], "compute_s": compute_s, "clips": clips}
    return EvaluatedRow(row, first_wavs)


def planned_rows(
    models: EvaluationModels, checkpoints: dict[str, str], texts: EvaluationTexts, prompts: list
) -> list[Callable[[], EvaluatedRow]]:
    """What computes each row.

    Checkpoints x temperatures; best-of-N of the first checkpoint at the first temperature; the first checkpoint with
    adapters x temperatures; natural readings as recorded and after the codec, the best that a checkpoint could reach.
    """
    args = models.args

    @lru_cache(maxsize=1)
    def load_policy(path: str, adapters: tuple[Adapter, ...] = ()) -> Policy:
        with bad_input_exits():
            policy = Policy.from_pretrained(path, args.device, adapters=adapters)
            policy.encode(prompts, args.max_length)  # raises for a text too long
        return policy

    rows = []
    for name, path in checkpoints.items():
        for temperature in args.temperature:
            label = f"{name} T={temperature:g}" if len(args.temperature) > 1 else name
            about = {"model": path, "temperature": temperature}
            rows.append(partial(checkpoint_row, models, load_policy, label, texts.items, prompts, best_of=1, **about))
            if len(rows) == 1 and args.best_of > 1:
                label, about["best_of"] = f"{label}, best of {args.best_of}", args.best_of
                rows.append(partial(checkpoint_row, models, load_policy, label, texts.items, prompts, **about))
    path = next(iter(checkpoints.values()))
    for name, adapters in adapter_rows(args, checkpoints).items():
        load_adapted = partial(load_policy, adapters=tuple(adapters))
        for temperature in args.temperature:
            label = f"{name} T={temperature:g}" if len(args.temperature) > 1 else name
            about = {"model": path, "temperature": temperature, "adapters": [str(adapter) for adapter in adapters]}
            row = partial(checkpoint_row, models, load_adapted, label, texts.items, prompts, best_of=1, **about)
            rows.append(row)
    if texts.references:
        about = {"model": None, "temperature": None, "best_of": 1}
        recordings = SynthesizedSpeech([None] * len(texts.references), texts.natural_wavs)
        resynthesis = partial(resynthesize, models.codec, texts.natural_wavs)
        rows.append(partial(evaluated_row, models, "natural", texts.references, lambda: recordings, **about))
        rows.append(partial(evaluated_row, models, "codec resynthesis", texts.references, resynthesis, **about))
    return rows


def checkpoint_row(
    models: EvaluationModels,
    load_policy: Callable[[str], Policy],
    label: str,
    items: list[Item],
    prompts: list,
    model: str,
    temperature: float,
    best_of: int,
    **about,
) -> EvaluatedRow:
    """A checkpoint at one temperature, as it samples or the best of several rollouts; `about`: further keys."""
    policy = load_policy(model)
    if best_of > 1:
        synthesis = partial(synthesize_best_of_n, models, policy, prompts, items, temperature, label)
    else:
        synthesis = partial(synthesize, models, policy, prompts, temperature, label)
    about |= {"model": model, "temperature": temperature, "best_of": best_of}
    own_asr = policy if models.args.cycle else None
    return evaluated_row(models, label, items, synthesis, models.args.seeds, own_asr, **about)


def row_summary(row: dict, units: str) -> str:
    """One line for the terminal."""
    rates = [f"{asr} {percent(metrics['error_rate'])}" for asr, metrics in row["metrics"]["asr"].items()]
    return f"{row['name']}: {len(row['clips'])} clips, {error_unit(units)} {', '.join(rates)}"


def players_of(rows: list[dict], sounds: dict[str, np.ndarray], listened: set[str]) -> dict[str, list[Player]]:
    """Text -> the clips of it to listen to, one per row."""
    players = {}
    for number, row in enumerate(rows):
        for i, clip in first_clips(row, listened):
            players.setdefault(clip["text"], []).append((row["name"], clip, sounds[f"{number}_{i}"]))
    return players


def first_clips(row: dict, listened: set[str]) -> list[tuple[int, dict]]:
    """The first seed's clips of the texts to listen to, each with its number."""
    clips = row["clips"][: len(row["clips"]) // len(row["seeds"])]
    return [(i, clip) for i, clip in enumerate(clips) if clip["text"] in listened]


def evaluate(args: argparse.Namespace, checkpoints: dict[str, str]) -> dict:
    """All rows, written anew after each; returns what results.json holds.

    Rows that an earlier run of the same settings has left are kept.

    Args:
        args: of evaluation.py, checked.
        checkpoints: name -> path.
    """
    folder = Path(args.output_dir)
    with bad_input_exits():
        adapter_rows(args, checkpoints)  # raises for adapters that cannot be added, before anything is loaded
        texts = load_texts(args)
        results = open_results(folder, vars(args), digests_of(args, checkpoints, texts), args.overwrite)
        sounds = read_sounds(folder) if results["rows"] else {}
        models = load_models(args, checkpoints, texts.items + texts.references)
        prompts = prompts_of(texts.items, models.codec, args.max_length)
    rows = results.pop("rows")
    results |= {"units": texts.units, "asr_roles": models.asr_roles, "models": checkpoints}
    results["word_timer"] = word_timer(models.evaluation_asrs)
    if results["word_timer"] is None and any(marked_words(item.text) for item in texts.items):
        logger.info("No emphasis is measured: only a --judge by openai-whisper (large-v3, a .pt file) has word times")
    results |= {"num_texts": len(texts.items), "rows": rows}
    listened = {item.text for item in evenly_spaced(texts.items, args.num_players)}
    for row in rows:
        logger.info("%s (done before)", row_summary(row, texts.units))
    for compute in planned_rows(models, checkpoints, texts, prompts)[len(rows) :]:
        row, first_wavs = compute()
        sounds |= {f"{len(rows)}_{i}": first_wavs[i] for i, _ in first_clips(row, listened)}
        rows.append(row)
        row["metrics"] = summarize(row, rows[0])
        write_sounds(folder, sounds)
        sounds = read_sounds(folder)  # as a resumed evaluation has them, so that it draws the same contours
        write_reports(folder, results, players_of(rows, sounds, listened))
        logger.info(row_summary(row, texts.units))
    for line in speech_comparison(results):
        logger.info(line)
    logger.info("Listen: %s", (folder / "report.html").resolve())
    return results
