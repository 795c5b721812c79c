"""The pairs of a listening page: of clips that inference.py wrote, or given one by one; and the planted ones."""

import argparse
import logging
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import InputError, check_at_least, check_seed, read_lines
from metrics.degraded_copies import DEGRADATIONS, MIN_DURATION_S
from metrics.texts import parse_json
from speech.audio import audio_failure, load_audio
from speech.tokens import SAMPLE_RATE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """One side of a pair.

    Attributes:
        audio: absolute path.
        codes: the speech codes that it was decoded from, where they are known.
        source: what it is counted under when the answers are read, such as the file that it is from.
        degraded: which of `DEGRADATIONS` the listener hears instead of it, if one.
    """

    audio: str
    codes: list[int] | None = None
    source: str | None = None
    degraded: str | None = None


@dataclass(frozen=True)
class ClipPair:
    """Two clips of a text.

    Attributes:
        better: 0 or 1, the side that is known to be better, of a planted pair; None of a pair to ask about.
        ref_text, ref_codes: the voice prompt of both, if they had one.
        speaker: of both, if known.
    """

    id: str
    text: str
    clips: tuple[Clip, Clip]
    better: int | None = None
    ref_text: str | None = None
    ref_codes: list[int] | None = None
    speaker: str | None = None


# --- Flags ------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, num_pairs: int | None) -> argparse._MutuallyExclusiveGroup:
    """What `draw_pairs` takes, and the question.

    Args:
        num_pairs: default of --num_pairs; None is all.
    Returns:
        The group of --clips and --pairs, of which one is needed.
    """
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--clips", nargs="+", metavar="FILE", help="one or two lists of clips, from inference.py")
    source.add_argument("--pairs", metavar="FILE", help="list of pairs of clips")
    add = parser.add_argument_group("what is asked").add_argument
    add("--question", default="Which reading sounds better?", help="what is asked of each pair")
    most = "largest number of pairs, drawn at random"
    add("--num_pairs", type=int, default=num_pairs, help=most if num_pairs else f"{most} (default: all)")
    add("--num_planted", type=int, default=8, help="number of planted pairs on top of them, to check who answers")
    add("--planted", metavar="FILE", help="what to plant; default: clips of the list against degraded copies of them")
    add("--seed", type=int, default=0, help="random seed of the drawing, the order, the sides and the degraded copies")
    return source


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags of `add_flags` that make no pairs."""
    check_at_least(args, num_pairs=1, num_planted=0)
    check_seed(args.seed)
    if args.clips is not None and len(args.clips) > 2:
        raise InputError(f"--clips: one or two files (got {len(args.clips)}). Compare two at a time")
    if not args.question.strip():
        raise InputError("--question: is empty. Ask what is to be compared, or leave it out")


# --- Files ------------------------------------------------------------------------------------------------


def read_rows(path: str) -> Iterator[tuple[int, dict]]:
    """Number and content of each row of a .jsonl file; InputError names a line that is none."""
    if Path(path).suffix.lower() != ".jsonl":
        raise InputError(f"{path}: not a .jsonl file (got {Path(path).suffix or 'no suffix'}). Use JSON Lines")
    empty = True
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        empty = False
        try:
            yield number, parse_json(line)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    if empty:
        raise InputError(f"{path}: no row in the file. Add at least one line")


def text_of(row: dict, where: str, name: str = "text") -> str:
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: {name} must be text (got {text!r:.60}). Correct the row")
    return text.strip()


def codes_of(row: dict, name: str, where: str) -> list[int] | None:
    codes = row.get(name)
    if codes is None:
        return None
    if not isinstance(codes, list) or not codes or not all(type(code) is int and code >= 0 for code in codes):
        raise InputError(f"{where}: {name} must be a list of speech codes, whole numbers >= 0 (got {codes!r:.60})")
    return codes


def clip_of(row: dict, audio: str, codes: str, where: str, folder: Path, source: str | None) -> Clip:
    """The clip of two columns of a row; its path starts beside the file."""
    path = folder / text_of(row, where, audio)
    if not path.is_file():
        raise InputError(f"{where}: {audio} {path}: no such file. Paths start beside the .jsonl file")
    return Clip(str(path.resolve()), codes_of(row, codes, where), source)


def voice_prompt_of(row: dict, where: str) -> tuple[str | None, list[int] | None]:
    ref_codes = codes_of(row, "ref_codes", where)
    if (row.get("ref_text") is None) != (ref_codes is None):
        raise InputError(f"{where}: a voice prompt needs both ref_text and ref_codes. Add the other, or leave both out")
    return (None, None) if ref_codes is None else (text_of(row, where, "ref_text"), ref_codes)


# --- Pairs to ask about -----------------------------------------------------------------------------------


def read_pairs(path: str) -> list[ClipPair]:
    """The pairs of a file with a row {"text", "audio_a", "audio_b"} each, and optionally more: docs/preferences.md."""
    pairs, num_equal = [], 0
    for number, row in read_rows(path):
        where, folder = f"{path}, line {number}", Path(path).parent
        clips = tuple(clip_of(row, f"audio_{side}", f"codes_{side}", where, folder, side) for side in "ab")
        ref_text, ref_codes = voice_prompt_of(row, where)
        if are_equal(*clips):
            num_equal += 1
            continue
        pair_id = str(row.get("id") or number)
        speaker = None if row.get("speaker") in (None, "") else str(row["speaker"])  # VCTK's are numbers
        pairs.append(ClipPair(pair_id, text_of(row, where), clips, None, ref_text, ref_codes, speaker))
    if not pairs:
        raise InputError(f"{path}: the two clips of each pair are equal. Give pairs that differ")
    if num_equal:
        logger.warning("%s: %d pairs of equal clips are left out", path, num_equal)
    check_ids(path, pairs)
    return pairs


def are_equal(first: Clip, second: Clip) -> bool:
    """Whether one would hear the same twice: the same file, or the same codes."""
    return first.audio == second.audio or (first.codes is not None and first.codes == second.codes)


def check_ids(path: str, pairs: list[ClipPair]) -> None:
    seen = set()
    for pair in pairs:
        if pair.id in seen:
            raise InputError(f"{path}: two rows have the id {pair.id!r}. Use each once")
        seen.add(pair.id)


Prompt = tuple[str, str | None, tuple[int, ...] | None]  # text, ref_text, ref_codes


def read_clips(path: str, source: str) -> dict[Prompt, list[Clip]]:
    """The clips of each prompt, of a file with a row {"text", "audio"} each, and optionally "codes".

    Truncated rollouts are left out: trained on, a clip of a pair gets an END, which they never had.
    """
    clips = defaultdict(list)
    num_truncated = 0
    for number, row in read_rows(path):
        if row.get("truncated"):
            num_truncated += 1
            continue
        where = f"{path}, line {number}"
        ref_text, ref_codes = voice_prompt_of(row, where)
        prompt = (text_of(row, where), ref_text, None if ref_codes is None else tuple(ref_codes))
        clips[prompt].append(clip_of(row, "audio", "codes", where, Path(path).parent, source))
    if num_truncated:
        logger.info("%s: %d truncated clips are left out", path, num_truncated)
    return dict(clips)


def pair_clips(paths: list[str], rng: random.Random) -> list[ClipPair]:
    """Pairs of the clips of one or two files; each clip is in one pair at most.

    Of one file: two clips of the same text, drawn at random. Of two files, such as two checkpoints' samples of the same
    texts: the first clip of a text in one and the first in the other, and so on.
    """
    by_file = [read_clips(path, path) for path in paths]
    pairs = []
    for prompt, clips in by_file[0].items():
        if len(by_file) == 2:
            both = zip(clips, by_file[1].get(prompt, []), strict=False)
        else:
            drawn = rng.sample(clips, len(clips))
            both = zip(drawn[::2], drawn[1::2], strict=False)
        text, ref_text, ref_codes = prompt
        for first, second in both:
            if not are_equal(first, second):
                codes = None if ref_codes is None else list(ref_codes)
                pairs.append(ClipPair(str(len(pairs)), text, (first, second), None, ref_text, codes))
    if not pairs:
        what = (
            "no text has two different clips"
            if len(paths) == 1
            else "the files have no text in common, or the same clips of it"
        )
        raise InputError(f"--clips {' '.join(paths)}: {what}. Sample with inference.py --num_samples 2, or two models")
    return pairs


# --- Planted pairs ----------------------------------------------------------------------------------------


def read_planted(path: str) -> list[ClipPair]:
    """Pairs whose better side is known, of rows {"text", "audio"} or {"text", "chosen_audio", "rejected_audio"}.

    Of a row with "audio" (or "file_name", as in an audiofolder), such as a recording, the other side is a degraded
    copy; which kind goes by the row's number.
    """
    pairs = []
    for number, row in read_rows(path):
        where, folder = f"{path}, line {number}", Path(path).parent
        if "chosen_audio" in row:
            names = ("chosen_audio", "rejected_audio")
            clips = tuple(clip_of(row, name, "no codes", where, folder, None) for name in names)
            pairs.append(ClipPair(f"planted-{number}", text_of(row, where), clips, better=0))
        else:
            name = "file_name" if "audio" not in row and "file_name" in row else "audio"
            clip = clip_of(row, name, "no codes", where, folder, None)
            pairs.append(degraded_pair(f"planted-{number}", text_of(row, where), clip, number))
    return pairs


def planted_copies(pairs: list[ClipPair], rng: random.Random) -> list[ClipPair]:
    """A planted pair of each pair: one of its clips against a degraded copy."""
    return [
        degraded_pair(f"planted-{number}", pair.text, rng.choice(pair.clips), number)
        for number, pair in enumerate(pairs)
    ]


def degraded_pair(pair_id: str, text: str, clip: Clip, number: int) -> ClipPair:
    """A clip against a copy of it, degraded in the number's way."""
    kind = list(DEGRADATIONS)[number % len(DEGRADATIONS)]
    original = replace(clip, source=None)
    return ClipPair(pair_id, text, (original, replace(original, degraded=kind)), better=0)


def draw_pairs(
    clips: list[str] | None,
    pairs_file: str | None,
    num_pairs: int | None,
    planted_file: str | None,
    num_planted: int,
    rng: random.Random,
) -> list[ClipPair]:
    """At most `num_pairs` pairs to ask about (None: all), and after them `num_planted` planted ones.

    Args:
        clips: one or two lists of clips, to be paired; or None, and `pairs_file` is a list of pairs.
        planted_file: what to plant; None: clips of pairs that are left over, against degraded copies of them.
    """
    pairs = read_pairs(pairs_file) if pairs_file else pair_clips(clips, rng)
    rng.shuffle(pairs)
    pairs, left = pairs[:num_pairs], pairs[len(pairs) if num_pairs is None else num_pairs :]
    if planted_file:
        candidates = read_planted(planted_file)
        rng.shuffle(candidates)
    else:
        candidates = planted_copies([*left, *pairs], rng)
    planted = first_usable(candidates, num_planted)
    if planted_file and num_planted and not planted:
        raise InputError(f"--planted {planted_file}: all clips are silent or shorter than {MIN_DURATION_S:g} s")
    if len(planted) < num_planted:
        logger.warning("%d planted pairs only: there are not %d clips to make them of", len(planted), num_planted)
    return pairs + planted


def first_usable(planted: list[ClipPair], count: int) -> list[ClipPair]:
    """The first `count` of the planted pairs, without those of a clip too short or too silent to be degraded."""
    usable = []
    for pair in planted:
        if len(usable) == count:
            break
        if pair.clips[1].degraded is None or can_be_degraded(pair.clips[1].audio):
            usable.append(pair)
    return usable


def can_be_degraded(path: str) -> bool:
    wav = load_audio(path)
    return len(wav) >= MIN_DURATION_S * SAMPLE_RATE and audio_failure(wav) is None
