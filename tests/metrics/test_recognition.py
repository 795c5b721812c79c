"""ASR evaluation: hand-worked numbers, keywords, recordings as clips, and what the shipped model reaches."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Audio, Dataset

from metrics.recognition import RecognitionClip, read_clips, summarize, transcript_entry, with_all_keywords
from speech.codec import SpeechCodec
from speech.policy import Policy, Transcript
from speech.tokens import asr_prompt, tts_prompt

MULTITASK_MODEL = "tiny/llasa_asr"
NUM_CODES = 4096  # of tiny/codec


def clip(text: str, seconds: float = 1.0, keywords: tuple[str, ...] = ("Zagreb", "Split")) -> RecognitionClip:
    return RecognitionClip("x", [0] * int(50 * seconds), text, "en", list(keywords))


def row_of(transcripts: list[tuple[RecognitionClip, Transcript]]) -> dict:
    return {"seeds": [0], "clips": [transcript_entry(*one, 0) for one in transcripts]}


ROW = row_of(
    [
        (clip("from Zagreb to Split"), Transcript("from Zagreb to spit", False)),  # 1 S of 4
        (clip("Anna found green boxes", 4.0), Transcript("Anna found", False)),  # 2 D of 4
        (clip("red"), Transcript("red Zagreb hat", False)),  # 2 I of 1
        (clip("the boat was gone"), Transcript("the boat was gone", True)),  # no edits, but truncated
        (clip(""), Transcript("thank you", False)),
        (clip(""), Transcript("", False)),
    ]
)


def test_metrics_by_hand():
    metrics = summarize(ROW, ROW, long_s=3.0)
    assert metrics["all"]["wer"] == pytest.approx(5 / 13)
    assert metrics["all"]["substitutions"] == pytest.approx(1 / 13)
    assert metrics["all"]["deletions"] == pytest.approx(2 / 13)
    assert metrics["all"]["insertions"] == pytest.approx(2 / 13)
    assert metrics["short"]["wer"] == pytest.approx(3 / 9) and metrics["long"]["wer"] == pytest.approx(2 / 4)
    # In the texts: Zagreb, Split; in the transcripts: Zagreb, and Zagreb where the text does not have it.
    assert metrics["keyword_recall"] == 1 / 2 and metrics["keyword_precision"] == 1 / 2
    assert metrics["all"]["hallucinations"] == 1 / 4 and metrics["all"]["truncated"] == 1 / 4
    assert metrics["nonspeech_hallucinations"] == 1 / 2 and metrics["nonspeech_words_per_clip"] == 1.0
    assert metrics["all"]["change"] is None  # from itself


def test_change_from_the_first_row():
    """The first clip right, the rest as before: 4 edits after 5, of the same 13 words; long clips unchanged."""
    better = row_of([(clip("from Zagreb to Split"), Transcript("from Zagreb to Split", False))])
    better["clips"] += ROW["clips"][1:]
    better, first = (row | {"clips": 20 * row["clips"]} for row in (better, ROW))  # so that each draw has errors
    metrics = summarize(better, first, long_s=3.0)
    assert metrics["all"]["change"]["relative"] == pytest.approx(4 / 5 - 1)
    assert metrics["short"]["change"]["relative"] == pytest.approx(2 / 3 - 1)
    assert metrics["long"]["change"] == {"relative": 0.0, "interval": [0.0, 0.0]}


def test_a_clip_of_the_limit_is_a_short_one():
    row = row_of([(clip("red hats", 3.0), Transcript("red hats", False))])
    assert summarize(row, row, long_s=3.0)["short"] is not None and summarize(row, row, long_s=2.99)["short"] is None


def test_a_row_without_long_clips_or_non_speech_has_no_such_metrics():
    row = row_of([(clip("red hats"), Transcript("red hats", False))])
    metrics = summarize(row, row, long_s=3.0)
    assert metrics["long"] is None and metrics["nonspeech_hallucinations"] is None
    assert metrics["keyword_recall"] is None and metrics["all"]["wer"] == 0


def test_a_keyword_of_another_clip_counts_against_precision():
    clips = with_all_keywords([clip("from Zagreb", keywords=("Zagreb",)), clip("red hats", keywords=())])
    keywords = transcript_entry(clips[1], Transcript("red Zagreb", False), None)["keywords"]
    assert keywords == {"in_text": 0, "in_transcript": 1, "in_both": 0}
    row = row_of([(clips[0], Transcript("from Zagreb", False)), (clips[1], Transcript("red Zagreb", False))])
    metrics = summarize(row, row, long_s=3.0)
    assert (metrics["keyword_recall"], metrics["keyword_precision"]) == (1, 1 / 2)


def test_clips_may_be_recordings(recordings, tmp_path):
    codec = SpeechCodec.from_pretrained("tiny/codec")
    clips = read_clips(recordings, "train", "en", NUM_CODES, lambda: codec, 2048)
    assert len(clips) == 24 and clips[0].codes and clips[0].id == "heldout_057"
    (tmp_path / "m.jsonl").write_text('{"text": "a b"}\n')
    with pytest.raises(ValueError, match="neither audio_codes nor audio"):
        read_clips(str(tmp_path / "m.jsonl"), "train", "en", NUM_CODES, lambda: codec, 2048)


def test_recordings_may_lie_in_a_parquet_file(tmp_path):
    """As datasets saves them: {"bytes", "path"}; with or without its note that this is audio."""
    codec, clips = SpeechCodec.from_pretrained("tiny/codec"), tmp_path / "clips.parquet"
    names = ["heldout_057.ogg", "heldout_103.ogg"]
    audio = [{"bytes": (Path("tiny/heldout") / name).read_bytes(), "path": "gone.ogg"} for name in names]
    shutil.copy(Path("tiny/heldout") / names[0], tmp_path)

    def codes(rows: Dataset) -> list[list[int]]:
        rows.to_parquet(clips)
        return [clip.codes for clip in read_clips(str(clips), "train", "en", NUM_CODES, lambda: codec, 2048)]

    first, second = codes(Dataset.from_dict({"text": ["a"] * 2, "audio": audio}).cast_column("audio", Audio()))
    assert first != second
    audio += [{"bytes": None, "path": names[0]}]
    assert codes(Dataset.from_dict({"text": ["a"] * 3, "audio": audio})) == [first, second, first]
    audio += [{"bytes": None, "path": None}]
    with pytest.raises(ValueError, match="clips.parquet, row 3: neither a path nor bytes of audio"):
        codes(Dataset.from_dict({"text": ["a"] * 4, "audio": audio}))


def test_a_recording_that_is_not_there_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"text": "a", "audio": "no.wav"}\n')
    with pytest.raises(ValueError, match=r"m.jsonl, row 0: .*no.wav: no such audio file"):
        read_clips(str(tmp_path / "m.jsonl"), "train", "en", NUM_CODES, lambda: SimpleNamespace(encode=list), 2048)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"audio_codes": [1]}', "no column 'text' .got audio_codes."),
        ('{"text": "a", "audio_codes": []}', r"row 0: audio_codes must be .* from 0 to 4095 .got \[\]."),
        ('{"text": "?!", "audio_codes": [1]}', r"row 0: the text has no word in it .got '\?!'."),
        ('{"text": "", "audio_codes": [1]}', "all clips are without speech"),
        ('{"text": "a", "audio_codes": [1], "language": "xx"}', "--clips .*m.jsonl, row 0: unknown language 'xx'"),
        ('{"text": "", "audio_codes": [1], "language": "xx"}', "row 0: unknown language 'xx'"),
        ('{"text": "a", "audio_codes": [1], "language": 5}', "row 0: language must be text .got 5."),
        ('{"text": 7, "audio_codes": [1]}', "--clips .*m.jsonl, row 0: text must be text .got 7."),
        ('{"text": "a", "audio_codes": [1]}\n{"text": null, "audio_codes": [1]}', "row 1: text .* .got None."),
        ('{"text": "a", "audio_codes": "596 293 346"}', "row 0: audio_codes must be .* .got '596 293 346'."),
        ('{"text": "a", "audio_codes": null}', "row 0: audio_codes must be .* .got None."),
        ('{"text": "a", "audio_codes": [596.5]}', "row 0: audio_codes must be .* .got 596.5 among them."),
        ('{"text": "a", "audio_codes": [1]}\n{"text": "b", "audio_codes": [-1]}', "row 1: .* .got -1 among"),
        ('{"text": "a", "audio_codes": [4096]}', "row 0: audio_codes must be .* .got 4096 among them."),
        ('{"text": "a", "audio_codes": [1], "keywords": "hammer"}', "row 0: keywords must be a list of .* 'hammer'."),
    ],
)
def test_bad_clips_are_named(row, message, tmp_path):
    (tmp_path / "m.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=message):
        read_clips(str(tmp_path / "m.jsonl"), "train", "en", NUM_CODES, lambda: pytest.fail("encoded"), 2048)


def test_words_and_characters_are_not_mixed(tmp_path):
    rows = [("今天天气很好", "zh"), ("red hats", "en"), ("", "en")]
    rows = [{"text": text, "language": language, "audio_codes": [1]} for text, language in rows]

    def languages(*chosen: dict) -> list[str]:
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        path = str(tmp_path / "m.jsonl")
        return [clip.language for clip in read_clips(path, "train", "en", NUM_CODES, lambda: pytest.fail("encoded"), 9)]

    with pytest.raises(ValueError, match=r"--clips .*m.jsonl: languages .* mixed .got en, zh.. Evaluate them in sep"):
        languages(*rows)
    assert languages(rows[0], rows[2]) == ["zh", "en"]  # a clip without speech has no error rate


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> str:
    """The first 24 held-out ones, as a folder of audio."""
    folder = tmp_path_factory.mktemp("recordings")
    lines = Path("tiny/heldout/metadata.jsonl").read_text().splitlines(keepends=True)[:24]
    (folder / "metadata.jsonl").write_text("".join(lines))
    for line in lines:
        shutil.copy(Path("tiny/heldout") / json.loads(line)["file_name"], folder)
    return str(folder)


def test_one_model_transcribes_and_then_synthesizes(recordings):
    """tiny/llasa_asr is a multitask model: ASR, and TTS again after that."""
    policy = Policy.from_pretrained(MULTITASK_MODEL, task="asr")
    codec = SpeechCodec.from_pretrained("tiny/codec")
    clips = read_clips(recordings, "train", "en", NUM_CODES, lambda: codec, 2048)
    transcripts = policy.transcribe([asr_prompt(one.codes) for one in clips], batch_size=48, max_completion_length=40)
    row = row_of(list(zip(clips, transcripts, strict=True)))
    assert summarize(row, row, long_s=3.0)["all"]["wer"] <= 0.10  # clean recordings
    policy.turn_to("tts")
    torch.manual_seed(0)
    samples = policy.sample([tts_prompt("Nancy took the lamp.")] * 4, temperature=0.7, max_length=240)
    assert all(len(sample.codes) > 20 for sample in samples) and not all(sample.truncated for sample in samples)
