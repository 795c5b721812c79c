r"""Select rows of a dataset for reinforcement learning of speech recognition (arXiv 2509.18569).

    python select_rl_data.py --dataset tokenized_dataset --select hard long keywords --num 20000 \
      --transcripts whisper.jsonl policy.jsonl --keywords names.txt --output rl_data.parquet

The dataset is one from create_dataset.py. The kinds of rows, up to --num of each (a row may be of several kinds):

    random      drawn at random: the paper's D0, the control
    hard        D1: the rows on which transcripts disagree most, or where they repeat themselves
    long        D2: longer than --min_long_s, or among the --longest_frac of the dataset; drawn at random from these
    keywords    D3: with a word of --keywords, or one of the --rarest_words; drawn at random from these
    non_speech  with an empty text: clips without speech, on which the policy must not hallucinate (not in the paper)

--keywords is a text file with one keyword per line, of one or several words. --transcripts are .jsonl files with one
line per transcribed row, which names the row by its number in the dataset (from 0) or by its id:

    {"index": 0, "transcripts": ["the boat was gone", "a goat was gone"]}
    {"id": "clip_17", "transcripts": ["the boat was gone"]}

They hold several samples of the policy (inference.py --task asr --num_samples 4 --output policy.jsonl), or the
transcripts of several ASR models; those of several files are put together. The disagreement of a row is the mean, over
all pairs of transcripts, of the edits between the two normalised texts over the words (or characters) of the longer.

Writes the selected rows with the columns `selected_by` (list of kinds), `why` (a sentence) and, for --select keywords,
`keywords` (those in the row), which the reward `asr_rules` uses. Exit code 2: the input was wrong.

Differs from the paper: it does not state which ASR models it compares, by what threshold, nor where its keywords come
from; all of that is chosen here.
"""

import argparse
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
from tqdm.auto import tqdm

from common.cli import (
    NOT_NEGATIVE,
    HelpFormatter,
    InputError,
    bad_input_exits,
    check_at_least,
    check_ranges,
    check_seed,
    check_writable,
    parse_strictly,
    read_lines,
    run_script,
    set_up_logging,
    write_whole,
)
from common.dataset_io import check_codes, check_texts, load_any_dataset
from reward_models.asr_rules import find_keywords, keyword_index, repetition
from speech.error_rate import CER_LANGUAGES, error_rate, language_code, normalize_text
from speech.tokens import CODES_PER_SECOND, XCODEC2_CODES

KINDS = ("random", "hard", "long", "keywords", "non_speech")
MIN_LONG_S = 20.0  # the paper's: such clips are rare in the data of supervised training
RAREST_WORDS = 1000
MIN_WORD_LENGTH = 3  # letters of a rare word: shorter ones are mostly abbreviations and slips
SHOWN_CHARACTERS = 60  # length of a transcript in `why` at most

logger = logging.getLogger("select_rl_data")

Reasons = dict[int, str]  # row number → why the row is of a kind, a sentence


# --- The input --------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """The dataset, and the values by which rows are selected.

    Attributes:
        rows: all of them, with every column.
        texts: row number → text, of the rows with words.
        non_speech: numbers of the rows without speech, whose text is empty.
        languages: Whisper's language code of each row.
        durations_s: of each row, in seconds.
    """

    rows: datasets.Dataset
    texts: dict[int, str]
    non_speech: list[int]
    languages: list[str]
    durations_s: list[float]


def open_corpus(args: argparse.Namespace) -> Corpus:
    """The dataset of --dataset, without the texts that no reward can score.

    Raises:
        InputError: no such dataset, no text or codes, values of a wrong type, a column that would be overwritten, an
            unknown language.
    """
    rows = load_any_dataset(args.dataset, args.split)
    check_columns(rows, args)
    texts, languages = list(rows["text"]), row_languages(rows, args.language, args.dataset)
    scorable = {i: text for i, text in enumerate(texts) if text and normalize_text(text, languages[i])}
    if not scorable:
        raise InputError(f"{args.dataset}: no row has a text with a word in it. Use a dataset with transcribed speech")
    non_speech = [i for i, text in enumerate(texts) if text is not None and not text.strip()]
    num_ignored = len(texts) - len(scorable) - len(non_speech)
    if num_ignored:
        logger.info("ignored: %d of %d rows, whose text has no word", num_ignored, len(texts))
    return Corpus(rows, scorable, non_speech, languages, row_durations(rows, args.dataset))


def check_columns(rows: datasets.Dataset, args: argparse.Namespace) -> None:
    """Raises InputError where a column is missing, is of a wrong type, or would be overwritten."""
    for column in ("text", "audio_codes"):
        if column not in rows.column_names:
            raise InputError(
                f"{args.dataset}: no column {column!r} (got {', '.join(rows.column_names)}). Use a dataset from "
                "create_dataset.py"
            )
    for column in added_columns(args.select):
        if column in rows.column_names:
            raise InputError(f"{args.dataset}: has a column {column!r} already, which would be overwritten. Remove it")
    check_texts(rows, "text", args.dataset, optional=True)  # a null is ignored
    check_texts(rows, "language", args.dataset, optional=True)
    check_codes(rows, "audio_codes", XCODEC2_CODES, args.dataset)  # the codec of the rows is not known here


def added_columns(kinds: list[str]) -> list[str]:
    """The columns that the output has beside those of the dataset."""
    return ["selected_by", "why"] + (["keywords"] if "keywords" in kinds else [])


def row_languages(rows: datasets.Dataset, default: str, name: str) -> list[str]:
    """Whisper's code of each row's language; InputError, with the dataset's name, for one that Whisper lacks."""
    if "language" not in rows.column_names:
        return [language_code(default)] * len(rows)
    languages = [language or default for language in rows["language"]]
    codes = {}
    for i, language in enumerate(languages):
        if language not in codes:
            try:
                codes[language] = language_code(language)
            except InputError as error:
                raise InputError(f"{name}, row {i}: {error}") from None
    return [codes[language] for language in languages]


def row_durations(rows: datasets.Dataset, name: str) -> list[float]:
    """Duration of each row in seconds, from its codes where the dataset has none, as after a join with another.

    Raises:
        InputError: a duration that is no number.
    """
    durations_s = list(rows["duration_s"]) if "duration_s" in rows.column_names else [None] * len(rows)
    for i, duration_s in enumerate(durations_s):
        if type(duration_s) not in (int, float, type(None)):
            raise InputError(
                f"{name}, row {i}: duration_s must be a number of seconds (got {duration_s!r:.60}). Correct the row, "
                "or remove the column: the codes tell the durations too"
            )
    unknown = [i for i, duration_s in enumerate(durations_s) if duration_s is None or not 0 < duration_s < math.inf]
    for i, codes in zip(unknown, rows.select(unknown)["audio_codes"], strict=True):
        durations_s[i] = len(codes) / CODES_PER_SECOND
    return durations_s


def read_keywords(path: str) -> list[str]:
    """The keywords of a file, one per line; InputError if there are none."""
    keywords = [line.strip() for line in read_lines(path) if line.strip()]
    if not keywords:
        raise InputError(f"--keywords: {path} is empty. Write one keyword per line")
    return keywords


def read_transcripts(paths: list[str], ids: list[str], num_rows: int) -> dict[int, list[str]]:
    """Row number → transcripts, those of several files put together.

    Args:
        paths: .jsonl files.
        ids: of the dataset's rows; empty if it has none.
        num_rows: size of the dataset.
    Raises:
        InputError: names the file, the line, and what is wrong with it.
    """
    occurrences = Counter(ids)
    row_of_id = {row_id: row for row, row_id in enumerate(ids) if occurrences[row_id] == 1}
    transcripts = defaultdict(list)
    for path in paths:
        for number, line in enumerate(read_lines(path), start=1):
            if line.strip():
                try:
                    row, texts = _parse_transcripts(line, row_of_id, num_rows)
                except InputError as error:
                    raise InputError(f"--transcripts: {path}, line {number}: {error}") from None
                transcripts[row] += texts
    if paths and not transcripts:
        raise InputError(f"--transcripts: no transcripts in {' '.join(paths)}. See --help for the format")
    return dict(transcripts)


def _parse_transcripts(line: str, row_of_id: dict[str, int], num_rows: int) -> tuple[int, list[str]]:
    """Row number and transcripts of a line; InputError if it has another format, or another dataset's row."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from None
    wrong_format = f'expected {{"index": 0, "transcripts": ["…", …]}}, or "id" in place of "index" (got {line[:80]})'
    if not isinstance(fields, dict):
        raise InputError(wrong_format)
    texts = fields.get("transcripts")
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise InputError(wrong_format)
    if "index" in fields:
        index = fields["index"]
        if type(index) is not int or not 0 <= index < num_rows:
            raise InputError(f"index must be in [0, {num_rows}) (got {index!r}). Is this of another dataset?")
        return index, texts
    if "id" not in fields:
        raise InputError(wrong_format)
    if str(fields["id"]) not in row_of_id:
        raise InputError(f"no row, or more than one, has the id {fields['id']!r}. Is this of another dataset?")
    return row_of_id[str(fields["id"])], texts


# --- The kinds --------------------------------------------------------------------------------------------


def draw(candidates: Iterable[int], num: int, seed: int, kind: str) -> list[int]:
    """At most `num` of the candidates, drawn at random; the rows of a kind do not depend on the other kinds."""
    candidates = sorted(candidates)
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    return sorted(rng.choice(candidates, min(num, len(candidates)), replace=False).tolist())


def long_rows(corpus: Corpus, min_long_s: float, longest_frac: float | None) -> Reasons:
    """The rows over `min_long_s`, or with a `longest_frac` that fraction of them (at least one).

    Raises:
        InputError: no row is that long.
    """
    durations_s = {i: corpus.durations_s[i] for i in corpus.texts}
    if longest_frac is not None:
        by_length = sorted(durations_s, key=lambda i: (-durations_s[i], i))
        longest = by_length[: max(1, round(longest_frac * len(by_length)))]
        return {i: f"{durations_s[i]:.1f} s, among the longest {100 * longest_frac:g} %" for i in longest}
    longer = {i: f"{length:.1f} s, over {min_long_s:g} s" for i, length in durations_s.items() if length > min_long_s}
    if not longer:
        raise InputError(
            f"--select long: no row is over {min_long_s:g} s (the longest has {max(durations_s.values()):.1f} s). "
            "Lower --min_long_s, or use --longest_frac 0.1"
        )
    return longer


def rarest_words(corpus: Corpus, num: int, seed: int) -> dict[str, list[str]]:
    """The words that occur in the fewest rows, by language; ties are broken at random.

    Only words of at least MIN_WORD_LENGTH letters, and of nothing else: numbers are not names.

    Raises:
        InputError: a language without spaces between words.
    """
    spaceless = sorted({corpus.languages[i] for i in corpus.texts} & CER_LANGUAGES)
    if spaceless:
        raise InputError(
            f"--select keywords: the dataset has rows in {', '.join(spaceless)}, whose text cannot be split into "
            "words. Use a file of --keywords"
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
    """The rows with keywords: row number → the keywords in its text.

    Args:
        keywords: by language.
    Raises:
        InputError: no row has a keyword.
    """
    indices = {language: keyword_index(words, language) for language, words in keywords.items()}
    keywords_of = {}
    for i, text in corpus.texts.items():
        language = corpus.languages[i]
        occurrences = find_keywords(text, indices.get(language, {}), language)
        if occurrences:
            keywords_of[i] = sorted(occurrences)
    if not keywords_of:
        raise InputError("--select keywords: no row has any of the keywords. Use another file of --keywords")
    return keywords_of


def disagreement(transcripts: list[str], language: str) -> float:
    """Mean over all pairs of the edits between two normalised transcripts over the longer one's length, in [0, 1].

    'a b c d', 'a b c d', 'a x c d': (0 + 1/4 + 1/4) / 3 = 0.1667. A single transcript has no disagreement: 0.
    """
    rates = [_pair_error_rate(*pair, language) for pair in combinations(transcripts, 2)]
    return sum(rates) / len(rates) if rates else 0.0


def _pair_error_rate(a: str, b: str, language: str) -> float:
    normalized_a, normalized_b = _normalized(a, language), _normalized(b, language)
    if normalized_a == normalized_b:
        return 0.0
    if not normalized_a or not normalized_b:
        return 1.0
    # Both directions have the same number of edits; the longer text as reference has the lower rate.
    return min(error_rate(a, b, language).rate, error_rate(b, a, language).rate)


def _normalized(text: str, language: str) -> str:
    """The text as the error rate compares it: without spaces where it counts characters."""
    normalized = normalize_text(text, language)
    return normalized.replace(" ", "") if language in CER_LANGUAGES else normalized


def hard_rows(corpus: Corpus, transcripts: dict[int, list[str]], num: int) -> Reasons:
    """The `num` rows whose transcripts disagree most, or of which most transcripts repeat themselves.

    Ranked by the larger of the disagreement and the fraction of transcripts that repeat themselves: transcripts with
    the same loop agree, and their row is as hard as any.

    Raises:
        InputError: there is no such row.
    """
    hardness: dict[int, float] = {}
    why: Reasons = {}
    compared = sorted(corpus.texts.keys() & transcripts.keys())
    for i in tqdm(compared, desc="comparing", unit="row", disable=None):
        language, hyps = corpus.languages[i], transcripts[i]
        disagrees = disagreement(hyps, language)
        loops = [hyp for hyp in hyps if repetition(corpus.texts[i], hyp, language)]
        if disagrees or loops:
            hardness[i] = max(disagrees, len(loops) / len(hyps))
            why[i] = _why_hard(hyps, loops, language)
    logger.info("hard: %d of %d rows have transcripts, %d are hard", len(compared), len(corpus.texts), len(hardness))
    if not hardness:
        raise InputError(
            f"--select hard: in none of the {len(compared)} rows with transcripts do they differ or repeat themselves. "
            "Use --transcripts of several ASR models, or several samples of each row"
        )
    hardest = sorted(hardness, key=lambda i: (-hardness[i], i))[:num]
    return {i: why[i] for i in hardest}


def _why_hard(transcripts: list[str], loops: list[str], language: str) -> str:
    reasons = []
    total = len(transcripts)
    ranked = Counter(_normalized(text, language) for text in transcripts).most_common()
    if len(ranked) > 1:
        (commonest, count), (second, _) = ranked[:2]
        reasons.append(f"{total - count} of {total} transcripts differ: {_shown(commonest)}, {_shown(second)}")
    if loops:
        reasons.append(f"{len(loops)} of {total} transcripts repeat themselves: {_shown(loops[0])}")
    return "; ".join(reasons)


def _shown(text: str) -> str:
    return f"'{text}'" if len(text) <= SHOWN_CHARACTERS else f"'{text[:SHOWN_CHARACTERS].rstrip()}…'"


# --- The script -------------------------------------------------------------------------------------------


@dataclass
class Selection:
    """The selected rows.

    Attributes:
        reasons: by kind.
        keywords: row number → the keywords in its text, of all rows that have some.
    """

    reasons: dict[str, Reasons]
    keywords: dict[int, list[str]]

    @property
    def rows(self) -> list[int]:
        return sorted(set().union(*self.reasons.values()))

    def columns(self) -> dict[str, list]:
        """The columns that are added to the rows."""
        kinds = {i: [kind for kind in self.reasons if i in self.reasons[kind]] for i in self.rows}
        return {
            "selected_by": list(kinds.values()),
            "why": ["; ".join(self.reasons[kind][i] for kind in kinds[i]) for i in kinds],
            # Whatever a row was selected for, the reward can use its keywords.
            "keywords": [self.keywords.get(i, []) for i in kinds],
        }


def select(
    corpus: Corpus, transcripts: dict[int, list[str]], keywords: list[str], args: argparse.Namespace
) -> Selection:
    """At most --num rows of each kind of --select.

    Args:
        transcripts: by row number.
        keywords: of --keywords; where there are none, the rarest words are taken.
    Raises:
        InputError: there is no row of a kind.
    """
    reasons: dict[str, Reasons] = {}
    keywords_of: dict[int, list[str]] = {}
    if "random" in args.select:
        reasons["random"] = dict.fromkeys(draw(corpus.texts, args.num, args.seed, "random"), "drawn at random")
    if "hard" in args.select:
        reasons["hard"] = hard_rows(corpus, transcripts, args.num)
    if "long" in args.select:
        longer = long_rows(corpus, MIN_LONG_S if args.min_long_s is None else args.min_long_s, args.longest_frac)
        reasons["long"] = {i: longer[i] for i in draw(longer, args.num, args.seed, "long")}
    if "keywords" in args.select:
        if keywords:
            by_language = dict.fromkeys(set(corpus.languages), keywords)
        else:
            by_language = rarest_words(corpus, args.rarest_words or RAREST_WORDS, args.seed)
        keywords_of = keyword_rows(corpus, by_language)
        drawn = draw(keywords_of, args.num, args.seed, "keywords")
        reasons["keywords"] = {i: f"keyword {', '.join(map(repr, keywords_of[i]))}" for i in drawn}
    if "non_speech" in args.select:
        if not corpus.non_speech:
            raise InputError("--select non_speech: no row has an empty text. Add clips without speech, or leave it out")
        drawn = draw(corpus.non_speech, args.num, args.seed, "non_speech")
        reasons["non_speech"] = dict.fromkeys(drawn, "a clip without speech")
    return Selection(reasons, keywords_of)


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, num=1, rarest_words=1)
    check_seed(args.seed)
    for flags, kind in (
        (("transcripts",), "hard"),
        (("min_long_s", "longest_frac"), "long"),
        (("keywords", "rarest_words"), "keywords"),
    ):
        for flag in flags:
            if getattr(args, flag) is not None and kind not in args.select:
                raise InputError(
                    f"--{flag}: is for --select {kind} (got --select {' '.join(args.select)}). Leave it out"
                )
    if "hard" in args.select and not args.transcripts:
        raise InputError("--select hard: needs --transcripts to compare. See --help for the format of the files")
    check_ranges(args, {"longest_frac": (0, False, 1, True), "min_long_s": NOT_NEGATIVE})
    language_code(args.language)  # raises for an unknown one
    output = Path(args.output)
    if output.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"--output: must be a .jsonl or a .parquet file (got {output})")
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder. Use another name, or remove the folder")
    if output.exists() and not args.overwrite:
        raise InputError(f"--output: {output} exists. --overwrite replaces it")
    check_writable(output.parent)


def write_rows(corpus: Corpus, selection: Selection, args: argparse.Namespace) -> None:
    """Write the selected rows with the added columns, atomically."""
    datasets.disable_progress_bars()
    rows = corpus.rows.select(selection.rows)
    columns = selection.columns()
    for column in added_columns(args.select):
        text = datasets.Value("string")
        feature = text if column == "why" else datasets.List(text)
        rows = rows.add_column(column, columns[column], feature=feature)
    if Path(args.output).suffix == ".parquet":
        write_whole(Path(args.output), rows.to_parquet)
    else:
        write_whole(Path(args.output), lambda temporary: rows.to_json(temporary, force_ascii=False))


def log_summary(corpus: Corpus, selection: Selection, args: argparse.Namespace) -> None:
    """Log the number and mean duration of the rows of each kind, of those of two kinds, and of all."""

    def summary(rows: Collection[int]) -> str:
        return f"{len(rows)} rows, {np.mean([corpus.durations_s[i] for i in rows]):.1f} s on average"

    for kind, rows in selection.reasons.items():
        logger.info("%s: %s%s", kind, summary(rows), "" if len(rows) == args.num else f" (--num {args.num})")
    for (first, rows), (second, others) in combinations(selection.reasons.items(), 2):
        logger.info("%s and %s: %d rows are both", first, second, len(rows.keys() & others.keys()))
    hours = sum(corpus.durations_s[i] for i in selection.rows) / 3600
    logger.info("%s: %s, %.2f hours", args.output, summary(selection.rows), hours)


def main(args: argparse.Namespace) -> None:
    set_up_logging("select_rl_data")
    with bad_input_exits():
        check_args(args)
        keywords = read_keywords(args.keywords) if args.keywords else []
        corpus = open_corpus(args)
        ids = [str(row_id) for row_id in corpus.rows["id"]] if "id" in corpus.rows.column_names else []
        transcripts = read_transcripts(args.transcripts or [], ids, len(corpus.rows))
        selection = select(corpus, transcripts, keywords, args)
    write_rows(corpus, selection, args)
    log_summary(corpus, selection, args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add(
        "--dataset",
        required=True,
        help="saved folder, hub id, or .json/.jsonl/.csv/.tsv/.parquet file, with audio_codes",
    )
    add("--split", default="train", help="split to select from")
    add("--select", nargs="+", choices=KINDS, required=True, help="kinds of rows, see above")
    add("--num", type=int, default=20_000, help="largest number of rows of each kind, by default the paper's")
    add("--seed", type=int, default=0, help="random seed of the draws")
    add("--output", required=True, help="file to write, .jsonl or .parquet")
    add("--overwrite", action="store_true", help="replace an existing output file")
    add("--language", default="en", help="Whisper's code or name of the language of rows without one")
    add("--transcripts", nargs="+", metavar="FILE", help="hard: .jsonl files with transcripts of the rows, see above")
    long = parser.add_mutually_exclusive_group()
    long.add_argument(
        "--min_long_s", type=float, help=f"long: rows of more seconds than this (default: {MIN_LONG_S:g})"
    )
    long.add_argument("--longest_frac", type=float, help="long: this fraction of the rows instead, 0.2 for a fifth")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--keywords", metavar="FILE", help="keywords: text file with one keyword per line")
    words.add_argument(
        "--rarest_words",
        type=int,
        metavar="N",
        help=f"keywords: instead of a file, the N words that occur in the fewest rows (default: {RAREST_WORDS})",
    )
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    run_script(main, parse_args)
