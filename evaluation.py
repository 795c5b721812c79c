r"""Measure checkpoints on held-out texts: error rates by outside judges, prosody, failures, speed, a page to hear.

    python evaluation.py --models SFT=tiny/llasa GRPO=llasa-grpo-exp1 --texts tiny/texts/heldout.txt \
      --seeds 0 1 2 --judge tiny/whisper.pt pocketsphinx --best_of 4 --output_dir report

    python evaluation.py --task asr --models SFT=tiny/llasa_asr RL=llasa-asr --clips tiny/asr/heldout.parquet \
      --temperature 0 --long_s 3 --output_dir report

With --task asr the checkpoints transcribe --clips instead: evaluation_asr.py says what is measured.
Writes results.json (every clip), results.md (the table) and report.html (one page with players, no other file
needed), anew after each row. The texts, one row of numbers per checkpoint and temperature:

    .txt    one text a line
    .jsonl  {"text": …} and, if there are any, "id", "language", "ref_audio" and "ref_text" (voice prompt), "audio"
            (a natural reading; an audiofolder's metadata.jsonl, with "file_name", will do)
    .lst    seed-tts-eval's meta.lst: id|ref_text|ref_audio|text, and |audio where there is a natural reading
"""

import argparse
import json
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

import evaluation_asr
from audio import audio_failure, load_audio
from cli import HelpFormatter, bad_input_exits, check_at_least, check_writable, parse_strictly, pick_device
from evaluation_report import summarize, write_reports
from html_page import to_show
from inference import MAX_NEW_TOKENS, best_of, check_sampling, read_text, whisper_rewards
from judges import load_judges
from policy import DEFAULT_CODEC, DEFAULT_WHISPER, MIN_ROOM, Policy, Sample, load_tokenizer, recorded
from reward_models.prosody import log_f0_std
from reward_models.rollouts import is_repetitive
from reward_models.token2text import Token2Text
from reward_whisper import CER_LANGUAGES, WhisperScorer, error_rate, language_code
from run_record import provenance
from speech_codec import SpeechCodec, check_codebook, decode_rollouts
from speech_tokens import SAMPLE_RATE, TASKS, asr_prompt, tts_prompt

logger = logging.getLogger(__name__)


# --- The texts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A text to say; `ref_audio` and `ref_text` are its voice prompt, `audio` a natural reading of it."""

    id: str
    text: str
    language: str
    ref_audio: str | None = None
    ref_text: str | None = None
    audio: str | None = None


def read_items(path: str, language: str) -> list[Item]:
    """The items of a .txt, .jsonl or .lst file, checked; audio paths start beside the file.

    Args:
        language: of the items that do not say.
    Raises:
        ValueError: names the file, the line, and what is wrong with it.
    """
    parsers = {".txt": lambda line: {"text": line}, ".jsonl": _parse_json, ".lst": _parse_meta}
    parse = parsers.get(Path(path).suffix.lower())
    if parse is None:
        raise ValueError(f"{path}: give texts as {', '.join(parsers)}; see evaluation.py --help")
    items = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            try:
                items.append(_item(parse(line), str(number), language, Path(path).parent))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not items:
        raise ValueError(f"{path}: no text in it")
    return items


def _parse_json(line: str) -> dict[str, str]:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError(f'expected an object such as {{"text": "…"}}, got {line[:60]}')
    return fields


def _parse_meta(line: str) -> dict[str, str]:
    fields = line.rstrip("\n").split("|")
    if len(fields) not in (4, 5):
        raise ValueError(f"expected id|ref_text|ref_audio|text, with |audio or without, got {line[:60]!r}")
    return dict(zip(("id", "ref_text", "ref_audio", "text", "audio"), fields, strict=False))


def _item(fields: dict[str, str], default_id: str, language: str, folder: Path) -> Item:
    if not isinstance(fields.get("text"), str):
        raise ValueError(f"a row without text; it has: {', '.join(fields) or 'nothing'}")
    values = {key: fields.get(key) or None for key in ("ref_audio", "ref_text", "audio")}
    values["audio"] = values["audio"] or fields.get("file_name")  # an audiofolder's metadata.jsonl calls it so
    for key in ("ref_audio", "audio"):
        if values[key]:
            values[key] = str(folder / values[key])
            if not Path(values[key]).is_file():
                raise ValueError(f"{key} {values[key]}: no such file")
    item = Item(
        str(fields.get("id") or default_id), fields["text"].strip(), fields.get("language") or language, **values
    )
    tts_prompt(item.text, item.ref_text, None if item.ref_audio is None else [])  # half a voice prompt, …
    error_rate(item.text, "", item.language)  # an unknown language, nothing left to score
    return item


def units_of(items: list[Item]) -> str:
    """ "words" or "characters": what the error rate of these texts counts."""
    kinds = {language_code(item.language) in CER_LANGUAGES for item in items}
    if len(kinds) > 1:
        raise ValueError("the texts mix languages scored by words and by characters; evaluate them apart")
    return "characters" if kinds.pop() else "words"


def num_units(item: Item) -> int:
    """Words as written (the normaliser would make one of "twenty five"), or characters."""
    by_characters = language_code(item.language) in CER_LANGUAGES
    return error_rate(item.text, "", item.language).ref_length if by_characters else len(item.text.split())


# --- Rows -------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What every row is measured with."""

    args: argparse.Namespace
    codec: SpeechCodec
    judges: dict[str, object]  # by name, see judges.py
    reward_scorer: WhisperScorer | None  # picks in best-of-N
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
                "ended": sample and sample.ended,
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
            max_new_tokens=args.max_new_tokens,
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
        samples = [Sample(codes, ended=True) for codes in bench.codec.encode(wavs)]
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
    rewards = whisper_rewards(bench.reward_scorer, samples, wavs, texts, languages)
    kept = best_of(rewards, n)
    return [samples[i] for i in kept], [wavs[i] for i in kept]


# --- The script -------------------------------------------------------------------------------------------


def named_models(models: list[str]) -> dict[str, str]:
    """NAME=path, or a path that is its own name."""
    named = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals or "/" in name:  # a path may hold a =
            name = path = model
        if not name or not path or name in named:
            raise ValueError(f"--models {model}: give NAME=path, each name once")
        named[name] = path
    return named


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, best_of=1, batch_size=1, max_length=1, max_new_tokens=1, num_players=0)
    check_sampling(args.temperature, args.top_p)
    if (args.clips is None) == (args.task == "asr") or (args.texts is None) == (args.task == "tts"):
        raise ValueError("--task tts takes --texts, --task asr takes --clips")
    for name in ("seeds", "temperature", "judge"):
        given = getattr(args, name) or []
        if len(set(given)) < len(given):
            raise ValueError(f"--{name}: one is given twice")


def main(args: argparse.Namespace) -> dict:
    """Returns what results.json holds."""
    with bad_input_exits():
        check_args(args)
        models = named_models(args.models)
        check_writable(Path(args.output_dir))
        args.device = pick_device(args.device)
    return (evaluation_asr.evaluate if args.task == "asr" else evaluate_speech)(args, models)


def evaluate_speech(args: argparse.Namespace, models: dict[str, str]) -> dict:
    with bad_input_exits():
        items = read_items(args.texts, args.language)
        references = read_items(args.references, args.language) if args.references else []
        without_audio = [item.id for item in references if item.audio is None]
        if without_audio:
            raise ValueError(f"{args.references}: no audio for {without_audio[0]!r}; --references needs readings")
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

    bench = Bench(args, codec, judges, scorer, token2text)
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="[NAME=]PATH", help="checkpoints; the first is the baseline")
    add("--task", choices=TASKS, default="tts", help="tts: text to speech; asr: speech to text")
    add("--texts", help="tts: a .txt, .jsonl or .lst file, see above")
    add("--clips", help="asr: a data set of create_dataset.py, or of audio and text; text '' where nothing is said")
    add("--split", default="train", help="of --clips")
    add("--long_s", type=float, default=20.0, help="asr: clips above so many seconds are reported apart")
    add("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="asr: tokens of a transcript")
    add(
        "--references", help="a .jsonl or .lst file with natural readings: rows for them, as they are and resynthesised"
    )
    add("--output_dir", default="evaluation", help="folder of results.json, results.md and report.html")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each text is said once for each seed")
    add(
        "--judge",
        nargs="+",
        action="extend",
        help="Whisper names or paths, and pocketsphinx; default: the reward's Whisper",
    )
    add(
        "--temperature",
        type=float,
        nargs="+",
        help="several give a row each; 0 is greedy. Default: 1 for tts, 0 for asr",
    )
    add(
        "--cycle",
        action="store_true",
        help='tts: each checkpoint reads its own speech back, as the judge "itself"; for models of --task both',
    )
    add("--token2text", help="tts: a folder of train_token2text.py; adds its score of the codes, DiffRO's reward")
    add("--best_of", type=int, default=1, help="from 2 on: a row for the baseline's best of so many, by the reward")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest codes that make up this share")
    add("--max_length", type=int, default=2048, help="tokens of prompt and answer together")
    add("--batch_size", type=int, default=16, help="clips sampled at a time")
    add("--num_players", type=int, default=8, help="texts, or clips, to listen to on the page")
    add("--language", default="en", help="of texts that do not say")
    add("--device", default="auto", help="auto is a GPU where there is one")
    add("--codec_id", help=f"default: what the first model's run.json says, else {DEFAULT_CODEC}")
    add("--whisper", help=f"the reward's; default: what the first model's run.json says, else {DEFAULT_WHISPER}")
    args = parse_strictly(parser, argv)
    args.temperature = args.temperature or [0.0 if args.task == "asr" else 1.0]
    return args


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    main(parse_args())
