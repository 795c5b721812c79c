r"""Pick the rows of a data set that reinforcement learning of speech recognition is to run on (arXiv 2509.18569).

    python select_rl_data.py --dataset tokenized_dataset --select hard long keywords --num 20000 \
      --transcripts whisper.jsonl policy.jsonl --keywords names.txt --output rl_data.parquet

The data set is one made by create_dataset.py. The kinds of rows, up to --num of each; a row may be of several:

    random    drawn at random: the paper's D0, the control
    hard      D1: recognisers disagree on it, or one of them repeats itself; those they disagree on most
    long      D2: longer than --min_long_s, or the --longest_share of the data set; drawn at random from these
    keywords  D3: has a word of --keywords, or one of the --rarest_words; drawn at random from these
    nothing   its text is empty: noise or silence, in which the policy is not to invent words (not the paper's)

--keywords is a file with a word or a few words (a name) a line. --transcripts are files with a line for each row that
was transcribed, by its number in the data set (from 0) or by its id:

    {"index": 0, "transcripts": ["the boat was gone", "a goat was gone"]}
    {"id": "slt_000", "transcripts": ["the boat was gone"]}

several samples of the policy (inference.py --task asr --num_samples 4 --output policy.jsonl) or one of each of several
recognisers; of several files, the transcripts of a row are put together. How much they disagree is the mean, over all
pairs, of the edits between two normalised transcripts over the longer one's words (or characters).

Writes the picked rows with the columns `selected_by` (list of kinds), `why` (a sentence) and, of --select keywords,
`keywords` (those in the row), which the reward `asr_rules` reads. Exit code 2: the input was wrong.

Differs from the paper: it says neither which recognisers it compares nor by what threshold, nor where its keywords
come from; all of that is chosen here.
"""

import argparse
import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
from tqdm.auto import tqdm

from common.cli import HelpFormatter, InputError, bad_input_exits, check_at_least, check_writable, parse_strictly
from common.dataset_io import load_any_dataset
from reward_models.asr_rules import find_keywords, keyword_index, repetition
from speech.error_rate import CER_LANGUAGES, error_rate, language_code, normalize_text
from speech.tokens import CODES_PER_SECOND

KINDS = ("random", "hard", "long", "keywords", "nothing")
MIN_LONG_S = 20.0  # the paper's: rare in the data of supervised training
RAREST_WORDS = 1000
MIN_WORD_LENGTH = 3  # letters of a rare word: shorter ones are mostly abbreviations and slips
SHOWN_CHARACTERS = 60  # of a transcript in `why`

logger = logging.getLogger("select_rl_data.py")

Reasons = dict[int, str]  # of the rows of one kind, by their number: a sentence each


# --- The input --------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """The data set, and what the kinds look at.

    Attributes:
        rows: all of them, with every column.
        texts: of the rows with words, by their number.
        nothing: the rows in which nothing is said.
        languages: Whisper's code of each row's.
        durations_s: of each row.
    """

    rows: datasets.Dataset
    texts: dict[int, str]
    nothing: list[int]
    languages: list[str]
    durations_s: list[float]


def open_corpus(args: argparse.Namespace) -> Corpus:
    """The data set of the arguments, without the texts of which no reward can be made.

    Raises:
        OSError, ValueError: no such set, no text or codes, a column that would be overwritten, an unknown language.
    """
    rows = load_any_dataset(args.dataset, args.split)
    check_columns(rows, args)
    texts, languages = list(rows["text"]), row_languages(rows, args.language)
    scorable = {i: text for i, text in enumerate(texts) if text and normalize_text(text, languages[i])}
    if not scorable:
        raise InputError(f"{args.dataset}: no row has a text with a word in it")
    nothing = [i for i, text in enumerate(texts) if text is not None and not text.strip()]
    left_out = len(texts) - len(scorable) - len(nothing)
    if left_out:
        logger.info("left out: %d of %d rows, whose text has no word", left_out, len(texts))
    return Corpus(rows, scorable, nothing, languages, row_durations(rows))


def check_columns(rows: datasets.Dataset, args: argparse.Namespace) -> None:
    there = ", ".join(rows.column_names)
    for column in ("text", "audio_codes"):
        if column not in rows.column_names:
            raise InputError(f"{args.dataset}: no column {column!r} (there: {there}); make it with create_dataset.py")
    if getattr(rows.features["text"], "dtype", None) not in ("string", "large_string"):
        raise InputError(f"{args.dataset}: column 'text' holds {rows.features['text']}, not text")
    for column in added_columns(args.select):
        if column in rows.column_names:
            raise InputError(f"{args.dataset} has a column {column!r} already, which would be overwritten; remove it")


def added_columns(kinds: list[str]) -> list[str]:
    return ["selected_by", "why"] + (["keywords"] if "keywords" in kinds else [])


def row_languages(rows: datasets.Dataset, default: str) -> list[str]:
    """Whisper's code of each row's language; ValueError for one that Whisper does not know."""
    if "language" not in rows.column_names:
        return [language_code(default)] * len(rows)
    named = [language or default for language in rows["language"]]
    codes = {name: language_code(name) for name in set(named)}
    return [codes[name] for name in named]


def row_durations(rows: datasets.Dataset) -> list[float]:
    """Seconds."""
    if "duration_s" in rows.column_names:
        return [float(duration_s) for duration_s in rows["duration_s"]]
    return [len(codes) / CODES_PER_SECOND for codes in rows["audio_codes"]]


def read_keywords(path: str) -> list[str]:
    """The words of a file, one or several a line; ValueError if there are none."""
    try:
        keywords = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--keywords {path}: cannot be read: {error}") from None
    if not keywords:
        raise InputError(f"--keywords {path}: the file is empty; give a word a line")
    return keywords


def read_transcripts(paths: list[str], ids: list[str], num_rows: int) -> dict[int, list[str]]:
    """The transcripts of rows, by their number, those of several files put together.

    Args:
        ids: the data set's; none if it has none.
    Raises:
        ValueError: names the file, the line, and what is wrong with it.
    """
    times = Counter(ids)
    numbers = {name: i for i, name in enumerate(ids) if times[name] == 1}
    transcripts = defaultdict(list)
    for path in paths:
        try:
            # Not splitlines, which cuts at U+2028 too, inside a string.
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--transcripts {path}: cannot be read: {error}") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row, texts = _parse_transcripts(line, numbers, num_rows)
                except ValueError as error:
                    raise InputError(f"--transcripts {path}, line {number}: {error}") from None
                transcripts[row] += texts
    if paths and not transcripts:
        raise InputError(f"--transcripts {' '.join(paths)}: no transcripts in it")
    return dict(transcripts)


def _parse_transcripts(line: str, numbers: dict[str, int], num_rows: int) -> tuple[int, list[str]]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from None
    expected = 'expected {"index": 0, "transcripts": ["…", …]}, or "id" in place of "index"'
    texts = fields.get("transcripts") if isinstance(fields, dict) else None
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise InputError(f"{expected}; got {line[:80]}")
    if "index" not in fields:
        if "id" not in fields:
            raise InputError(f"{expected}; got {line[:80]}")
        if str(fields["id"]) not in numbers:
            raise InputError(f"no row, or more than one, has the id {fields['id']!r}: is it another data set's?")
        return numbers[str(fields["id"])], texts
    index = fields["index"]
    if type(index) is not int or not 0 <= index < num_rows:
        raise InputError(f"index {index!r} is not in [0, {num_rows}): are these the transcripts of another data set?")
    return index, texts


# --- The kinds --------------------------------------------------------------------------------------------


def draw(candidates: Iterable[int], num: int, seed: int, kind: str) -> list[int]:
    """At most `num` rows; those of a kind do not depend on which other kinds are picked."""
    candidates = sorted(candidates)
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    return sorted(rng.choice(candidates, min(num, len(candidates)), replace=False).tolist())


def long_rows(corpus: Corpus, min_long_s: float, longest_share: float | None) -> Reasons:
    """The rows over `min_long_s`, or with a `longest_share` that share of them (at least one).

    Raises:
        ValueError: none is that long.
    """
    durations_s = {i: corpus.durations_s[i] for i in corpus.texts}
    if longest_share is not None:
        by_length = sorted(durations_s, key=lambda i: (-durations_s[i], i))
        longest = by_length[: max(1, round(longest_share * len(by_length)))]
        return {i: f"{durations_s[i]:.1f} s, among the longest {100 * longest_share:g} %" for i in longest}
    longer = {i: f"{length:.1f} s, over {min_long_s:g} s" for i, length in durations_s.items() if length > min_long_s}
    if not longer:
        raise InputError(
            f"--select long: no row is over {min_long_s:g} s, the longest has {max(durations_s.values()):.1f} s; "
            "lower --min_long_s, or give --longest_share 0.1"
        )
    return longer


def rarest_words(corpus: Corpus, num: int, seed: int) -> dict[str, list[str]]:
    """The words that the fewest rows have, by language; drawn at random where as many rows have them.

    Words of letters only, at least MIN_WORD_LENGTH of them: numbers are no names.

    Raises:
        ValueError: a language without spaces between words.
    """
    spaceless = sorted({corpus.languages[i] for i in corpus.texts} & CER_LANGUAGES)
    if spaceless:
        raise InputError(
            f"--select keywords: the data set has rows in {', '.join(spaceless)}, where the rarest words cannot be "
            "told from the text; give --keywords a file"
        )
    num_rows = Counter()
    for i, text in corpus.texts.items():
        language = corpus.languages[i]
        num_rows.update((language, word) for word in set(normalize_text(text, language).split()))
    words = sorted((language, word) for language, word in num_rows if word.isalpha() and len(word) >= MIN_WORD_LENGTH)
    np.random.default_rng([seed, KINDS.index("keywords")]).shuffle(words)
    rarest = defaultdict(list)
    for language, word in sorted(words, key=num_rows.__getitem__)[:num]:
        rarest[language].append(word)
    return rarest


def keyword_rows(corpus: Corpus, keywords: dict[str, list[str]]) -> dict[int, list[str]]:
    """The rows with keywords in their text, and which.

    Args:
        keywords: by language.
    Raises:
        ValueError: no row has one.
    """
    indices = {language: keyword_index(words, language) for language, words in keywords.items()}
    found = {}
    for i, text in corpus.texts.items():
        language = corpus.languages[i]
        if words := find_keywords(text, indices.get(language, {}), language):
            found[i] = sorted(words)
    if not found:
        raise InputError("--select keywords: no row has any of the keywords; give another --keywords file")
    return found


def disagreement(transcripts: list[str], language: str) -> float:
    """Mean over all pairs of the edits between two normalised transcripts over the longer one's length, in [0, 1].

    'a b c d', 'a b c d', 'a x c d': (0 + 1/4 + 1/4) / 3 = 0.1667. A single transcript agrees with itself: 0.
    """
    rates = [_pair_error_rate(*pair, language) for pair in combinations(transcripts, 2)]
    return sum(rates) / len(rates) if rates else 0.0


def _pair_error_rate(a: str, b: str, language: str) -> float:
    compared = _compared(a, language), _compared(b, language)
    if compared[0] == compared[1]:
        return 0.0
    if not all(compared):
        return 1.0
    # Of the two directions: the edits are the same, and the longer text gives the lower rate.
    return min(error_rate(a, b, language).rate, error_rate(b, a, language).rate)


def _compared(text: str, language: str) -> str:
    """The text as the error rate sees it."""
    normalized = normalize_text(text, language)
    return normalized.replace(" ", "") if language in CER_LANGUAGES else normalized


def hard_rows(corpus: Corpus, transcripts: dict[int, list[str]], num: int) -> Reasons:
    """The `num` rows whose transcripts disagree most, or of which most transcripts repeat themselves.

    Ranked by the larger of the disagreement and the share of looping transcripts: recognisers that all loop alike
    agree, and that row is as hard as any.

    Raises:
        ValueError: there is no such row.
    """
    hardness, why = {}, {}
    compared = sorted(corpus.texts.keys() & transcripts.keys())
    for i in tqdm(compared, desc="comparing", unit="row"):
        language, hyps = corpus.languages[i], transcripts[i]
        differ = disagreement(hyps, language)
        loops = [hyp for hyp in hyps if repetition(corpus.texts[i], hyp, language)]
        if differ or loops:
            hardness[i] = max(differ, len(loops) / len(hyps))
            why[i] = _why_hard(hyps, loops, language)
    logger.info("hard: %d of %d rows have transcripts, %d are hard", len(compared), len(corpus.texts), len(hardness))
    if not hardness:
        raise InputError(
            f"--select hard: in none of the {len(compared)} rows with transcripts do these differ or repeat "
            "themselves; give those of several recognisers, or several samples of each row"
        )
    hardest = sorted(hardness, key=lambda i: (-hardness[i], i))[:num]
    return {i: why[i] for i in hardest}


def _why_hard(transcripts: list[str], loops: list[str], language: str) -> str:
    reasons, total = [], len(transcripts)
    [(commonest, times), *others] = Counter(_compared(text, language) for text in transcripts).most_common()
    if others:
        examples = f"{_shown(commonest)}, {_shown(others[0][0])}"
        reasons.append(f"{total - times} of {total} transcripts differ: {examples}")
    if loops:
        reasons.append(f"{len(loops)} of {total} transcripts repeat themselves: {_shown(loops[0])}")
    return "; ".join(reasons)


def _shown(text: str) -> str:
    return f"'{text}'" if len(text) <= SHOWN_CHARACTERS else f"'{text[:SHOWN_CHARACTERS].rstrip()}…'"


# --- The script -------------------------------------------------------------------------------------------


@dataclass
class Selection:
    """Per kind, the rows that were picked and why; and the keywords of all rows that have some."""

    picked: dict[str, Reasons]
    keywords: dict[int, list[str]]

    @property
    def rows(self) -> list[int]:
        return sorted(set().union(*self.picked.values()))

    def columns(self) -> dict[str, list]:
        """What is added to the rows."""
        kinds = {i: [kind for kind in self.picked if i in self.picked[kind]] for i in self.rows}
        return {
            "selected_by": list(kinds.values()),
            "why": ["; ".join(self.picked[kind][i] for kind in kinds[i]) for i in kinds],
            # Whatever a row was picked for, the reward can use its keywords.
            "keywords": [self.keywords.get(i, []) for i in kinds],
        }


def select(
    corpus: Corpus, transcripts: dict[int, list[str]], keywords: list[str], args: argparse.Namespace
) -> Selection:
    """At most --num rows of each kind of --select.

    Args:
        transcripts: of rows, by their number.
        keywords: those given; none: the rarest words.
    """
    picked, found = {}, {}
    if "random" in args.select:
        picked["random"] = dict.fromkeys(draw(corpus.texts, args.num, args.seed, "random"), "drawn at random")
    if "hard" in args.select:
        picked["hard"] = hard_rows(corpus, transcripts, args.num)
    if "long" in args.select:
        longer = long_rows(corpus, MIN_LONG_S if args.min_long_s is None else args.min_long_s, args.longest_share)
        picked["long"] = {i: longer[i] for i in draw(longer, args.num, args.seed, "long")}
    if "keywords" in args.select:
        by_language = (
            dict.fromkeys(set(corpus.languages), keywords)
            if keywords
            else rarest_words(corpus, args.rarest_words or RAREST_WORDS, args.seed)
        )
        found = keyword_rows(corpus, by_language)
        drawn = draw(found, args.num, args.seed, "keywords")
        picked["keywords"] = {i: f"keyword {', '.join(map(repr, found[i]))}" for i in drawn}
    if "nothing" in args.select:
        if not corpus.nothing:
            raise InputError("--select nothing: no row has an empty text")
        picked["nothing"] = dict.fromkeys(draw(corpus.nothing, args.num, args.seed, "nothing"), "nothing is said")
    return Selection(picked, found)


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, num=1, seed=0)
    if args.rarest_words is not None:
        check_at_least(args, rarest_words=1)
    for flags, kind in (
        (("transcripts",), "hard"),
        (("min_long_s", "longest_share"), "long"),
        (("keywords", "rarest_words"), "keywords"),
    ):
        unused = [flag for flag in flags if getattr(args, flag) is not None]
        if unused and kind not in args.select:
            raise InputError(f"--{unused[0]} is for --select {kind}; add that, or leave it out")
    if "hard" in args.select and not args.transcripts:
        raise InputError("--select hard compares transcripts; give --transcripts a file (see --help for its format)")
    if args.longest_share is not None and not 0 < args.longest_share <= 1:
        raise InputError(f"--longest_share {args.longest_share:g}: give a share above 0, at most 1")
    if args.min_long_s is not None and not 0 <= args.min_long_s < math.inf:
        raise InputError(f"--min_long_s {args.min_long_s:g}: give seconds from 0 on")
    language_code(args.language)
    output = Path(args.output)
    if output.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"--output {output}: give a .jsonl or a .parquet file")
    if output.exists() and not args.overwrite:
        raise InputError(f"--output {output} is there already; --overwrite replaces it")
    check_writable(output.parent)


def write_rows(corpus: Corpus, selection: Selection, args: argparse.Namespace) -> None:
    """The picked rows with what is said of them; the file is there whole or not at all."""
    datasets.disable_progress_bars()
    text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
    rows, columns = corpus.rows.select(selection.rows), selection.columns()
    for column in added_columns(args.select):
        rows = rows.add_column(column, columns[column], feature=text if column == "why" else texts)
    path = Path(args.output)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    if path.suffix == ".parquet":
        rows.to_parquet(temporary)
    else:
        rows.to_json(temporary, force_ascii=False)
    os.replace(temporary, path)


def log_make_up(corpus: Corpus, selection: Selection, args: argparse.Namespace) -> None:
    """Rows and mean duration of each kind, how many rows two kinds share, and the whole."""

    def rows_of(rows: Collection[int]) -> str:
        return f"{len(rows)} rows, {np.mean([corpus.durations_s[i] for i in rows]):.1f} s on average"

    for kind, rows in selection.picked.items():
        logger.info("%s: %s%s", kind, rows_of(rows), "" if len(rows) == args.num else f" (--num {args.num})")
    for (first, rows), (second, others) in combinations(selection.picked.items(), 2):
        logger.info("%s and %s: %d rows are both", first, second, len(rows.keys() & others.keys()))
    hours = sum(corpus.durations_s[i] for i in selection.rows) / 3600
    logger.info("%s: %s, %.2f hours", args.output, rows_of(selection.rows), hours)


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(format="%(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    with bad_input_exits():
        check_args(args)
        keywords = read_keywords(args.keywords) if args.keywords else []
        corpus = open_corpus(args)
        ids = corpus.rows["id"] if "id" in corpus.rows.column_names else []
        transcripts = read_transcripts(args.transcripts or [], list(map(str, ids)), len(corpus.rows))
        selection = select(corpus, transcripts, keywords, args)
    write_rows(corpus, selection, args)
    log_make_up(corpus, selection, args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", required=True, help="saved folder, hub id, or .json/.jsonl/.csv/.parquet file, with audio_codes")
    add("--split", default="train", help="split to pick from")
    add("--select", nargs="+", choices=KINDS, required=True, help="kinds of rows, see above")
    add("--num", type=int, default=20_000, help="rows of each kind, if there are as many; the paper's number")
    add("--seed", type=int, default=0, help="of what is drawn at random")
    add("--output", required=True, help="a .jsonl or a .parquet file")
    add("--overwrite", action="store_true", help="replace the output if it is there")
    add("--language", default="en", help="Whisper's code or name of the language of rows that do not say")
    add("--transcripts", nargs="+", metavar="FILE", help="hard: .jsonl files with transcripts of the rows, see above")
    long = parser.add_mutually_exclusive_group()
    long.add_argument("--min_long_s", type=float, help=f"long: rows over so many seconds (default: {MIN_LONG_S:g})")
    long.add_argument("--longest_share", type=float, help="long: this share of the rows instead, 0.2 for a fifth")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--keywords", metavar="FILE", help="keywords: a text file, a word or a name a line")
    words.add_argument(
        "--rarest_words",
        type=int,
        metavar="N",
        help=f"keywords: without a file, the N words in the fewest rows (default: {RAREST_WORDS})",
    )
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    main(parse_args())
