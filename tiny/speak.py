"""Speak the toy setup's sentences: recordings for training, and held-out ones; 34,520 clips, some 21 h.

    python -m tiny.build --stage speech

Writes `<id>.flac` (16 kHz) and `metadata.jsonl`, a row a clip; and `heldout_neutral/` with the held-out clips as they
were before they got their melody. An interrupted run resumes. Half of the questions and emphasised sentences for
training keep the neutral melody: a policy that is trained by likelihood alone speaks the average, as real ones do.
"""

import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

from speech.tokens import SAMPLE_RATE
from tiny.corpus import emphasised_word, form, sentences, spoken_words
from tiny.melody import Word, with_emphasis, with_question
from tiny.voices import SPEAKERS, speak_with_times
from tiny.work_dir import SEED

TRAIN_CLIPS = 34_000  # the first sentences
TRAIN_SPEAKERS = ["joe", "slt", "joe", "rms"]  # in turn
FRAC_NEUTRAL = 0.5  # of the questions and emphasised sentences for training
HELDOUT = {"statement": 48, "question": 36, "emphasis": 36}  # the last sentences of each form
ASR_HELDOUT = slice(45_000, 45_400)  # of the sentences; behind those of the RL texts
NEUTRAL_FOLDER = "heldout_neutral"


def train_rows() -> list[dict]:
    rng = random.Random(SEED)
    rows = []
    for i, text in enumerate(sentences(SEED)[:TRAIN_CLIPS]):
        neutral = rng.random() < FRAC_NEUTRAL and form(text) != "statement"
        rows.append(
            {
                "id": f"train_{i:05d}",
                "text": text,
                "speaker": TRAIN_SPEAKERS[i % len(TRAIN_SPEAKERS)],
                "form": form(text),
                "melody": "neutral" if neutral else "right",
                "split": "train",
            }
        )
    return rows


def heldout_texts() -> list[str]:
    """HELDOUT's numbers of sentences of each form, in the corpus's order reversed."""
    missing, texts = dict(HELDOUT), []
    for text in reversed(sentences(SEED)):
        if missing[form(text)]:
            missing[form(text)] -= 1
            texts.append(text)
        if not any(missing.values()):
            return texts
    raise ValueError(f"the corpus has too few sentences for {HELDOUT}")


def heldout_rows() -> list[dict]:
    """Round robin over the voices within each form, so that each has a third of each."""
    rows = []
    for i, text in enumerate(sorted(heldout_texts(), key=form)):
        speaker = SPEAKERS[i % len(SPEAKERS)]
        row = {"id": f"heldout_{i:03d}", "text": text, "speaker": speaker, "form": form(text), "melody": "right"}
        rows.append({**row, "split": "heldout"})
    return rows


def asr_heldout_rows() -> list[dict]:
    """Sentences held out for ASR; a clip of it joins one or more of them."""
    texts = sentences(SEED)[ASR_HELDOUT]
    shared = {"melody": "right", "split": "asr_heldout"}
    return [
        {"id": f"asr_{i:03d}", "text": text, "speaker": SPEAKERS[i % len(SPEAKERS)], "form": form(text)} | shared
        for i, text in enumerate(texts)
    ]


def with_marked_melody(wav: np.ndarray, text: str, words: list[Word]) -> tuple[np.ndarray, list[Word]]:
    """The neutral clip with the melody that the text's marks ask for, and the times of its words."""
    if form(text) == "question":
        return with_question(wav), words
    if form(text) == "statement":
        return wav, words
    index = emphasised_word(text)
    emphasised, end_s = with_emphasis(wav, words[index].start_s, words[index].end_s)
    later_s = end_s - words[index].end_s
    moved = [Word(word.text, word.start_s + later_s, word.end_s + later_s) for word in words[index + 1 :]]
    return emphasised, [*words[:index], Word(words[index].text, words[index].start_s, end_s), *moved]


def record(row: dict, folder: Path) -> list[tuple[Path, dict]]:
    """Write the clip of a row, and its neutral one if it is held out; returns (folder, completed row) of each."""
    wav, times = speak_with_times(row["text"], row["speaker"])
    words = [Word(text, *span) for text, span in zip(spoken_words(row["text"]).split(), times, strict=True)]
    takes = []
    if row["split"] == "heldout":
        takes.append((folder / NEUTRAL_FOLDER, {**row, "melody": "neutral"}, wav, words))
    if row["melody"] == "right":
        wav, words = with_marked_melody(wav, row["text"], words)
    takes.append((folder, row, wav, words))
    return [(place, write_clip(place, take, wav, words)) for place, take, wav, words in takes]


def write_clip(folder: Path, row: dict, wav: np.ndarray, words: list[Word]) -> dict:
    sf.write(folder / f"{row['id']}.flac", wav, SAMPLE_RATE)
    index = emphasised_word(row["text"])
    times = [(word.text, round(word.start_s, 3), round(word.end_s, 3)) for word in words]
    return {
        **row,
        "duration_s": round(len(wav) / SAMPLE_RATE, 3),
        "word_start_s": None if index is None else times[index][1],
        "word_end_s": None if index is None else times[index][2],
        "words": times,
    }


def record_all(rows: list[dict], folder: Path, processes: int) -> None:
    """Record the rows that `folder` doesn't have yet."""
    for place in (folder, folder / NEUTRAL_FOLDER):
        place.mkdir(parents=True, exist_ok=True)
    metadata = folder / "metadata.jsonl"
    done = {json.loads(line)["id"] for line in metadata.read_text().splitlines()} if metadata.exists() else set()
    missing = [row for row in rows if row["id"] not in done]
    with ProcessPoolExecutor(processes) as pool:
        recorded = pool.map(record, missing, [folder] * len(missing), chunksize=4)
        for takes in tqdm(recorded, total=len(missing), desc="speak", disable=None):
            for place, row in takes:  # the main clip last, as it is the one that says that a row is done
                with open(place / "metadata.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
