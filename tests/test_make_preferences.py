"""make_preferences.py on vowels: pairs that differ in melody and nothing else, a resumed run, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from clips import tone, write_rows
from fake_vowel import falling, vowel

import make_preferences
from speech.audio import save_audio
from speech.melody_edits import PEAK, melody_of, with_melody

RATE = 16_000
SHAPES = {"ana": (180, 120), "ben": (110, 160), "eva": (240, 170), "tom": (100, 140)}


@pytest.fixture
def recordings(tmp_path) -> Path:
    """Four sung sentences, one of them by no known speaker."""
    rows = []
    for name, (first, last) in SHAPES.items():
        save_audio(tmp_path / f"{name}.wav", falling(1.0, first, last))
        rows.append({"id": name, "text": f"{name} sings?", "audio": f"{name}.wav", "speaker": name})
    rows[3]["speaker"] = None
    return Path(write_rows(tmp_path / "recordings.jsonl", rows))


def run(recordings: Path, output: Path, *flags: str) -> list[dict]:
    argv = ["--dataset", str(recordings), "--output", str(output), *flags]
    make_preferences.main(make_preferences.parse_args(argv))
    return [json.loads(line) for line in output.read_text().splitlines()]


def clips(pair: dict, folder: Path) -> list[np.ndarray]:
    return [soundfile.read(folder / pair[f"{side}_audio"], dtype="float32")[0] for side in ("chosen", "rejected")]


def test_pairs_are_of_one_recording_in_the_shared_format(recordings, tmp_path):
    pairs = run(recordings, tmp_path / "pairs.jsonl", "--min_change", "0")
    assert len(pairs) == 12
    assert {pair["kind"] for pair in pairs} == {"flattened", "swapped", "mistimed"}
    for pair in pairs:
        name = pair["id"].split("_")[0]
        assert pair["text"] == f"{name} sings?" and pair["source"] == "made"
        assert pair.get("speaker") == (None if name == "tom" else name) and "chosen_codes" not in pair
        chosen, rejected = clips(pair, tmp_path)
        # Equal length and peak tell nothing
        assert len(chosen) == len(rejected)
        assert np.abs(chosen).max() == pytest.approx(PEAK, abs=1e-3) == np.abs(rejected).max()


def test_the_better_side_has_the_recordings_melody_and_the_flattened_one_has_none(recordings, tmp_path):
    [pair] = run(recordings, tmp_path / "pairs.jsonl", "--kinds", "flattened", "--num_recordings", "1")
    first, last = SHAPES[pair["id"].split("_")[0]]
    movement = 12 * np.log2(last / first)
    chosen, rejected = (melody_of(wav) for wav in clips(pair, tmp_path))
    assert chosen[-3:].mean() - chosen[:3].mean() == pytest.approx(movement, abs=1)
    assert abs(rejected[-3:].mean() - rejected[:3].mean()) < 0.5 * abs(movement)


def test_both_sides_have_been_through_praat(recordings, tmp_path, monkeypatch):
    """With a spoiled melody that is the recording's, the sides are one waveform: Praat's sound is on both."""
    monkeypatch.setattr(make_preferences, "flattened", lambda melody, rng: melody)
    monkeypatch.setattr(make_preferences, "TRANSPOSED_ST", 0.0)
    for pair in run(recordings, tmp_path / "pairs.jsonl", "--kinds", "flattened", "--min_change", "0"):
        chosen, rejected = clips(pair, tmp_path)
        assert np.array_equal(chosen, rejected)
        wav = soundfile.read(tmp_path / f"{pair['id'].split('_')[0]}.wav", dtype="float32")[0]
        assert not np.array_equal(chosen[: len(wav)], wav)
        assert np.abs(chosen - with_melody(wav, melody_of(wav))).max() < 1e-3


def test_a_neutral_recording_is_resynthesized_too(recordings, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(make_preferences, "TRANSPOSED_ST", 0.0)
    flat = falling(1.0, 150, 149)
    save_audio(tmp_path / "flat.wav", flat)
    rows = [{"text": "ana sings?", "audio": "flat.wav", "speaker": "ana"}]
    rows.append({"text": "ben sings?", "audio": "flat.wav", "speaker": "another"})
    rows.append({"text": "eva sings?", "audio": "eva.wav", "speaker": "eva"})  # the recording itself
    neutral = write_rows(tmp_path / "neutral.jsonl", rows)
    pairs = run(recordings, tmp_path / "pairs.jsonl", "--neutral", neutral, "--kinds", "mistimed")
    [pair] = [pair for pair in pairs if pair["kind"] == "neutral"]
    assert pair["id"] == "ana_neutral"
    stored = soundfile.read(tmp_path / "flat.wav", dtype="float32")[0]
    assert np.abs(clips(pair, tmp_path)[1] - with_melody(stored, melody_of(stored))).max() < 1e-3
    write_rows(tmp_path / "neutral.jsonl", rows[:1])
    with pytest.raises(SystemExit):
        run(recordings, tmp_path / "pairs.jsonl", "--neutral", neutral, "--kinds", "mistimed")
    assert "neutral_recordings" in caplog.text


def test_the_control_has_the_same_melody_elsewhere(recordings, tmp_path):
    for pair in run(recordings, tmp_path / "pairs.jsonl", "--kinds", "transposed"):
        chosen, rejected = (melody_of(wav) for wav in clips(pair, tmp_path))
        length = min(len(chosen), len(rejected))
        moved = np.median(chosen[:length] - rejected[:length])
        assert 0.3 < abs(moved) < 6
        assert np.median(np.abs(chosen[:length] - rejected[:length] - moved)) < 0.5


def test_recordings_without_a_melody_give_no_pair(tmp_path, caplog):
    save_audio(tmp_path / "flat.wav", falling(1.0, 150, 150))
    save_audio(tmp_path / "silent.wav", np.zeros(RATE, np.float32))
    save_audio(tmp_path / "click.wav", vowel(np.full(320, 150.0)))
    tone(tmp_path / "none.wav", 0.01)
    names = ("flat.wav", "silent.wav", "click.wav", "none.wav", "gone.wav")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "la", "audio": name} for name in names])
    with pytest.raises(SystemExit) as stop:
        run(Path(rows), tmp_path / "pairs.jsonl")
    assert stop.value.code == 1
    # The flat one is too close to itself, flattened or late, and there is no recording with another text
    assert "1 no other melody, 2 too close, 4 unusable recording" in caplog.text
    assert "no such audio file" in caplog.text and not (tmp_path / "pairs.jsonl").exists()


def test_codes_are_the_codec_s(recordings, tmp_path):
    pairs = run(recordings, tmp_path / "pairs.jsonl", "--codec_id", "tiny/codec", "--num_recordings", "1")
    for pair in pairs:
        assert len(pair["chosen_codes"]) == len(pair["rejected_codes"]) == pytest.approx(50, abs=3)
        assert pair["chosen_codes"] != pair["rejected_codes"]


def test_a_resumed_run_writes_the_same_file(recordings, tmp_path, monkeypatch):
    run(recordings, tmp_path / "whole/pairs.jsonl", "--min_change", "0")
    made, calls = make_preferences.pairs_of, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_preferences, "pairs_of", interrupted)
        run(recordings, tmp_path / "killed/pairs.jsonl", "--min_change", "0")
    assert not (tmp_path / "killed/pairs.jsonl").exists()
    run(recordings, tmp_path / "killed/pairs.jsonl", "--min_change", "0")
    whole, killed = (
        sorted(path for path in (tmp_path / name).rglob("*") if path.suffix != ".json" and path.is_file())
        for name in ("whole", "killed")
    )
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in killed]
    assert [path.name for path in whole] == [path.name for path in killed] and len(whole) == 17


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--output {folder}/pairs.txt", "not a .jsonl file"),
        ("--min_change nan", "--min_change: must be in [0, inf) (got nan)"),
        ("--num_recordings 0", "--num_recordings: must be >= 1 (got 0)"),
        ("--seed -1", "--seed: must be in [0"),
        ("--dataset {folder}/gone.jsonl", "gone.jsonl"),
        ("--text_column words", "no column 'words'"),
        ("--neutral {folder}/other.jsonl", "--neutral: none of its rows has text and speaker"),
    ],
)
def test_bad_flags_exit_2(recordings, tmp_path, caplog, flags, message):
    write_rows(tmp_path / "other.jsonl", [{"text": "else", "audio": "ana.wav"}])
    argv = ["--dataset", str(recordings), "--output", str(tmp_path / "pairs.jsonl")]
    argv += flags.format(folder=tmp_path).split()
    with pytest.raises(SystemExit) as stop:
        make_preferences.main(make_preferences.parse_args(argv))
    assert stop.value.code == 2 and message in caplog.text
