"""Make preferences by rule: recordings, each against copies of it with a spoiled melody.

    python make_preferences.py --dataset tiny/heldout --output made/pairs.jsonl
    python train_preference_model.py --pairs made/pairs.jsonl --output_dir preference_model

A pair is two copies of one recording, of equal words, voice, timing and loudness, that differ in F0:

    flattened   the melody pressed towards its median, 0 to 30 % of its movement left
    swapped     the melody of another recording with another text, at this one's median
    mistimed    the melody from its end to its beginning, or late by a quarter to three quarters of it
    transposed  the same melody, 2 to 4 semitones higher or lower. No preference: a control. A model that has learnt
                melody, and not how far Praat had to move F0, is right in half of these. Not for training

F0 is edited by Praat's overlap-add, and *both* sides go through it, or a model would learn its sound: the better one is
given its own melody. Each side is also transposed by its own 1.5 semitones at most, by chance, so that the better one
is no more a plain copy than the other. With --neutral, a recording is also paired with another one of its text by its
speaker, spoken neutrally (kind: neutral); both are resynthesized too. Spoiled copies whose melody is within
--min_change semitones of the recording's (RMS) are in no pair.

--output has the rows of docs/dpo.md: id, text, chosen_audio, rejected_audio (paths from its folder), source (made),
kind, and language and speaker where the recordings have them. With --codec_id also chosen_codes and rejected_codes,
which `train.py --method dpo` needs. The clips are 16-bit WAV, in a folder beside it.

An interrupted run is resumed by the same command; recordings have random numbers of their own, so the files are the
same to the last byte. Exit codes: 0 pairs were written; 1 there are none; 2 the input was wrong.
"""

import argparse
import functools
import logging
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.cli import (
    NOT_NEGATIVE,
    HelpFormatter,
    InputError,
    add_device,
    bad_input_exits,
    check_at_least,
    check_pairs_file,
    check_ranges,
    check_seed,
    check_writable,
    parse_strictly,
    pick_device,
    run_script,
    set_up_logging,
    settings_of,
)
from common.dataset_io import (
    AUDIO_COLUMNS,
    TEXT_COLUMNS,
    Source,
    carried_value,
    drawn_rows,
    open_source,
    path_and_bytes,
)
from common.resumable_file import ResumableFile
from speech.audio import audio_failure, load_audio, save_audio
from speech.measures import MIN_SECONDS
from speech.melody_edits import MIN_VOICED, difference_st, flattened, melody_of, mistimed, swapped, with_melody
from speech.tokens import SAMPLE_RATE

KINDS = ("flattened", "swapped", "mistimed")
CONTROL = "transposed"
TRANSPOSED_ST = 1.5  # of each side, at most
CONTROL_ST = (2.0, 4.0)
MAX_DURATION_S = 30.0
DONORS = 20  # recordings tried for another melody; more than a few fail only where nearly all are without voice

# Arguments that do not change the pairs: a resumed run may have other values of them
FREE_ARGUMENTS = ("output", "overwrite", "device", "debug")

logger = logging.getLogger("make_preferences")


# --- Recordings -------------------------------------------------------------------------------------------


class Recordings:
    """The rows of a dataset that have a text.

    Args:
        source: from `open_source`.
    """

    def __init__(self, source: Source):
        self.source = source
        texts = source.rows[source.columns["text"]]
        self.texts = [(text or "").strip() for text in texts]
        self.melody = functools.lru_cache(maxsize=1_000)(self._melody)

    def carried(self, index: int) -> dict[str, str]:
        """The id (or else the row's number), and the speaker and the language where there is one."""
        row = self.source.rows[index]
        values = {
            name: carried_value(self.source, name, row[column])
            for name, column in self.source.columns.items()
            if name not in ("text", "audio")
        }
        return {"id": str(index)} | {name: value for name, value in values.items() if value is not None}

    def wav(self, index: int) -> np.ndarray | None:
        """float32 mono at 16 kHz; None for one that cannot be read, is silent, or is too short or too long."""
        path, data = path_and_bytes(self.source.rows[index][self.source.columns["audio"]])
        if not (data or path):
            return None
        try:
            wav = load_audio(data or self.source.folder / path, MAX_DURATION_S)
        except (InputError, OSError) as error:
            logger.warning("row %d: left out: %s", index, error)
            return None
        return None if audio_failure(wav) or len(wav) <= MIN_SECONDS * SAMPLE_RATE else wav

    def _melody(self, index: int) -> np.ndarray | None:
        """`melody_of` a recording; None for one without enough voice."""
        wav = self.wav(index)
        if wav is None:
            return None
        melody = melody_of(wav)
        return melody if len(melody) >= MIN_VOICED else None

    def other_melody(self, index: int, rng: np.random.Generator) -> np.ndarray | None:
        """The melody of a recording with another text, by chance; None where none was found."""
        for _ in range(DONORS):
            donor = int(rng.integers(len(self.texts)))
            if self.texts[donor] != self.texts[index] and self.melody(donor) is not None:
                return self.melody(donor)
        return None


def neutral_index(recordings: Recordings, neutral: Recordings) -> dict[int, int]:
    """Row of a recording → row of the neutral one with its text and speaker.

    Raises:
        InputError: none has.
    """
    by_text = {(text, neutral.carried(i).get("speaker")): i for i, text in enumerate(neutral.texts)}
    keys = [(text, recordings.carried(i).get("speaker")) for i, text in enumerate(recordings.texts)]
    found = {i: by_text[key] for i, key in enumerate(keys) if key in by_text}
    if not found:
        raise InputError("--neutral: none of its rows has text and speaker of one in --dataset. Use the same texts")
    return found


# --- Pairs ------------------------------------------------------------------------------------------------


def spoiled_melodies(
    recordings: Recordings, index: int, kinds: list[str], rng: np.random.Generator
) -> dict[str, np.ndarray | None]:
    """By kind, what becomes of a recording's melody; None where there is no other recording to swap with."""
    melody, spoiled = recordings.melody(index), {}
    for kind in kinds:
        if kind == "flattened":
            spoiled[kind] = flattened(melody, rng)
        elif kind == "swapped":
            other = recordings.other_melody(index, rng)
            spoiled[kind] = None if other is None else swapped(melody, other)
        elif kind == "mistimed":
            spoiled[kind] = mistimed(melody, rng)
        else:
            spoiled[kind] = melody + rng.choice([-1, 1]) * rng.uniform(*CONTROL_ST)
    return spoiled


def pairs_of(
    recordings: Recordings, index: int, neutral: Recordings | None, neutral_row: int | None, args: argparse.Namespace
) -> tuple[list[tuple[str, np.ndarray, np.ndarray]], Counter]:
    """Kind, better and worse clip of each pair of a recording, and how many pairs were not made, by reason."""
    outcomes = Counter()
    rng = np.random.default_rng([args.seed, index])
    wav = recordings.wav(index) if recordings.texts[index] else None
    melody = None if wav is None else recordings.melody(index)
    if melody is None:
        outcomes["unusable recording"] += 1
        return [], outcomes

    def transposed(one: np.ndarray) -> np.ndarray:
        return one + rng.uniform(-TRANSPOSED_ST, TRANSPOSED_ST)

    better = with_melody(wav, transposed(melody))
    pairs = []
    for kind, spoiled in spoiled_melodies(recordings, index, args.kinds, rng).items():
        if spoiled is None:
            outcomes["no other melody"] += 1
        elif kind != CONTROL and difference_st(melody, spoiled) < args.min_change:
            outcomes["too close"] += 1
        elif kind == CONTROL:
            pairs.append((kind, better, with_melody(wav, spoiled)))
        else:
            pairs.append((kind, better, with_melody(wav, transposed(spoiled))))
    if neutral_row is not None:
        plain_wav, plain = neutral.wav(neutral_row), neutral.melody(neutral_row)
        if plain is None:
            outcomes["unusable recording"] += 1
        elif np.array_equal(plain_wav, wav):
            outcomes["the same recording"] += 1
        else:
            pairs.append(("neutral", better, with_melody(plain_wav, transposed(plain))))
    outcomes["pairs"] += len(pairs)
    return pairs, outcomes


def write_pairs(
    pairs: list[tuple[str, np.ndarray, np.ndarray]], index: int, recordings: Recordings, folder: Path, codec
) -> list[dict]:
    """The rows of a recording's pairs, their clips written into `folder`."""
    rows = []
    carried = recordings.carried(index)
    for kind, better, worse in pairs:
        # The row's number, not its id, which may be no file name
        names = {"chosen_audio": f"{index:06d}.wav", "rejected_audio": f"{index:06d}_{kind}.wav"}
        for name, wav in zip(names.values(), (better, worse), strict=True):
            save_audio(folder / name, wav)
        row = {**carried, "id": f"{carried['id']}_{kind}", "text": recordings.texts[index]}
        row |= {name: f"{folder.name}/{file}" for name, file in names.items()}
        if codec is not None:
            row["chosen_codes"], row["rejected_codes"] = codec.encode([better, worse])
        rows.append(row | {"source": "made", "kind": kind})
    return rows


# --- The script -------------------------------------------------------------------------------------------


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, num_recordings=1)
    check_ranges(args, {"min_change": NOT_NEGATIVE})
    check_seed(args.seed)
    check_pairs_file(args.output)
    check_writable(Path(args.output).parent)


def main(args: argparse.Namespace) -> None:
    set_up_logging("make_preferences")
    with bad_input_exits():
        check_args(args)
        recordings = Recordings(open_source(args.dataset, args.split, None, args.text_column, args.audio_column))
        neutral, neutral_rows = None, {}
        if args.neutral:
            neutral = Recordings(open_source(args.neutral, args.split, None, args.text_column, args.audio_column))
            neutral_rows = neutral_index(recordings, neutral)
        indices = drawn_rows(len(recordings.texts), args.num_recordings, args.seed)
        run = settings_of(args, FREE_ARGUMENTS)
        run |= {"recordings": recordings.source.fingerprint()}
        run |= {"neutral_recordings": neutral.source.fingerprint() if neutral else None}
        output = ResumableFile(Path(args.output), run, "pairs", args.overwrite)
        if output.finished:
            logger.info("%s: complete already, nothing to do", output.path)
            return
        codec = None
        if args.codec_id:
            from speech.codec import SpeechCodec

            codec = SpeechCodec.from_pretrained(args.codec_id, pick_device(args.device))

    folder = output.path.parent / f"{output.path.stem}_audio"
    done = output.finished_batches()
    bar = tqdm(indices[len(done) :], "recordings", initial=len(done), total=len(indices), disable=None)
    for index in bar:
        pairs, outcomes = pairs_of(recordings, index, neutral, neutral_rows.get(index), args)
        done.append({"rows": write_pairs(pairs, index, recordings, folder, codec), "outcomes": outcomes})
        output.add_batch(done[-1])

    rows = [row for batch in done for row in batch["rows"]]
    outcomes = sum((Counter(batch["outcomes"]) for batch in done), Counter())
    made = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(row["kind"] for row in rows).items()))
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(outcomes.items()) if reason != "pairs")
    logger.info("%d recordings: %d pairs (%s); not made: %s", len(indices), len(rows), made, left_out or "none")
    if not rows:
        logger.error("nothing was written: no recording gives a pair. Use others, with a voice, or lower --min_change")
        sys.exit(1)
    output.finish(rows)
    logger.info("%s", output.path)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--dataset", required=True, help="recordings with texts, in any form of create_dataset.py's --dataset")
    add("--split", default="train", help="split of --dataset and of --neutral")
    add("--text_column", help=f"column of the text (default: the first available of {', '.join(TEXT_COLUMNS)})")
    add("--audio_column", help=f"column of the audio (default: the first available of {', '.join(AUDIO_COLUMNS)})")
    add("--neutral", help="recordings of the same texts by the same speakers, spoken neutrally: one more kind of pair")
    add("--num_recordings", type=int, help="so many of the recordings, drawn by --seed (default: all)")
    add("--output", required=True, help="the .jsonl file of pairs; the clips are written into a folder beside it")
    add("--overwrite", action="store_true", help="replace an --output of other settings or other recordings")
    add("--kinds", nargs="+", choices=[*KINDS, CONTROL], default=list(KINDS), help="what is done to the melody")
    add("--min_change", type=float, default=1.0, help="least RMS difference of a pair's melodies, in semitones")
    add("--codec_id", help="XCodec2, hub id or folder, that also encodes the clips (default: no codes)")
    add_device(parser, "device of the codec")
    add("--seed", type=int, default=0, help="seed of the recordings drawn and of what is done to their melodies")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    run_script(main, parse_args)
