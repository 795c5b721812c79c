"""tiny/judge_voice.py: its figures on clips of known voices, its encoder, and what it says of another evaluation."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.texts import read_items
from speech.audio import load_audio
from tiny import judge_melody, judge_voice
from tiny.build import with_voice_prompts
from tiny.judge_voice import HELDOUT, LEVEL_DBFS, TEXTS, Ge2e

ROWS = [json.loads(line) for line in (HELDOUT / "metadata.jsonl").read_text().splitlines()]
SPEAKERS = {row["file_name"]: row["speaker"] for row in ROWS}
WEIGHTS = Path("build/ge2e")


class ByFirstSample:
    """An encoder of three voices: a clip's first sample is the voice's number."""

    @staticmethod
    def embed(wav):
        return np.eye(3)[int(wav[0])]


def write_results(folder: Path, clips_of: dict[str, list[dict]], seed: int = 0) -> None:
    rows = [
        {"name": name, "model": name, "temperature": 1.0, "seeds": [seed], "clips": clips}
        for name, clips in clips_of.items()
    ]
    (folder / "results.json").write_text(json.dumps({"rows": rows}))


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Judges an evaluation: `before` has joe's voice in all clips, `after` the prompts'; one clip failed."""
    numbers = {"joe": 0, "rms": 1, "slt": 2}
    recordings = {HELDOUT / name: np.full(800, numbers[speaker]) for name, speaker in SPEAKERS.items()}
    monkeypatch.setattr(judge_voice, "load_audio", recordings.get)
    monkeypatch.setattr(judge_voice, "audio_failure", lambda wav: None)
    monkeypatch.setattr(Ge2e, "from_pretrained", lambda folder: ByFirstSample())
    items = read_items(str(TEXTS), "en")
    clips = [{"id": item.id, "text": item.text, "failure": None} for item in items]
    failed = [{**clips[0], "failure": "empty"}, *clips[1:]]
    write_results(tmp_path, {"before": clips, "after": failed})
    sounds = {f"0_{i}": np.zeros(800) for i in range(len(items))}
    for i, item in enumerate(items):
        sounds[f"1_{i}"] = np.full(800, numbers[SPEAKERS[Path(item.ref_audio).name]])
    monkeypatch.setattr(judge_melody, "read_sounds", lambda folder: sounds)
    return tmp_path, sounds


def judge(folder, *flags: str) -> None:
    judge_voice.main(judge_voice.parse_args([str(folder), *flags]))


def test_voices_of_a_policy(judged, caplog):
    caplog.set_level("INFO")
    judge(judged[0])
    lines = [line[2:-2].split(" | ") for line in caplog.messages[-1].splitlines()[2:]]
    assert lines[0][1:] == ["before", "0.333", "", "33.3"]
    name, similarity, change, right = lines[1][1:]
    assert (name, similarity, right) == ("after", "0.992", "99.2")  # 119 of 120
    assert change.startswith("+0.658 ± 0.0")
    assert lines[2][1:3] == ["recordings of the same voice", "1.000"]
    assert lines[3][1:3] == ["recordings of two voices", "0.000"]


def test_samplings_are_averaged_by_text(judged, tmp_path, caplog):
    """In the second one the clips that had failed have not, and all of `before` have."""
    caplog.set_level("INFO")
    folder = judged[0]
    [before, after] = [row["clips"] for row in json.loads((folder / "results.json").read_text())["rows"]]
    (tmp_path / "again").mkdir()
    silent = [{**clip, "failure": "silent"} for clip in before]
    write_results(tmp_path / "again", {"before": silent, "after": before}, seed=1)
    judge(folder, str(tmp_path / "again"))
    lines = [line[2:-2].split(" | ") for line in caplog.messages[-1].splitlines()[2:]]
    assert lines[0][1:] == ["before", "0.167", "", "16.7"]
    assert lines[1][1:3] == ["after", "0.996"] and lines[1][4] == "99.6"  # 239 of 240
    assert lines[1][3].startswith("+0.829 ± 0.0") and len(lines) == 4


def test_one_voice_for_all_clips(judged, caplog):
    """joe's in all clips of `before`, in a third of `after`; one voice has the same texts, without their prompts."""
    caplog.set_level("INFO")
    folder = judged[0]
    results = json.loads((folder / "results.json").read_text())
    for row in results["rows"]:
        row["clips"] = [{**clip, "id": f"line {i}"} for i, clip in enumerate(row["clips"])]
    (folder / "results.json").write_text(json.dumps(results))
    judge(folder, "--voice", "joe")
    header, _, *lines = [line[2:-2].split(" | ") for line in caplog.messages[-1].splitlines()]
    assert header[-1] == "voice is joe's, %"
    assert [lines[0][i] for i in (1, 2, 4)] == ["before", "1.000", "100.0"]
    name, similarity, right = (lines[1][i] for i in (1, 2, 4))
    expected = sum(SPEAKERS[Path(item.ref_audio).name] == "joe" for item in read_items(str(TEXTS), "en")[1:]) / 120
    assert (name, similarity, right) == ("after", f"{expected:.3f}", f"{100 * expected:.1f}")


def test_clips_that_are_missing(judged, caplog):
    folder, sounds = judged
    sounds.pop("1_7")
    with pytest.raises(SystemExit):
        judge(folder)
    assert "Evaluate with --num_players 120 --overwrite" in caplog.text


def test_another_evaluation(judged, tmp_path, caplog):
    write_results(tmp_path, {"x": [{"id": "1", "text": "Go."}]})
    with pytest.raises(SystemExit):
        judge(tmp_path)
    assert "Use --texts tiny/texts/heldout_voices.jsonl" in caplog.text
    with pytest.raises(SystemExit):
        judge(tmp_path / "nowhere")
    assert "has no results.json" in caplog.text


def test_the_texts_are_those_of_the_recordings():
    assert [json.loads(line) for line in TEXTS.read_text().splitlines()] == with_voice_prompts(ROWS)
    prompts = [SPEAKERS[Path(item.ref_audio).name] for item in read_items(str(TEXTS), "en")]
    assert {speaker: prompts.count(speaker) for speaker in set(prompts)} == {"joe": 40, "rms": 40, "slt": 40}


def test_windows():
    result = doctest.testmod(judge_voice)
    assert result.attempted == 1 and result.failed == 0


def test_an_embedding_does_not_hear_the_level_of_a_quiet_clip():
    torch.manual_seed(0)
    state = torch.nn.ModuleDict({"lstm": torch.nn.LSTM(40, 256, 3), "linear": torch.nn.Linear(256, 256)}).state_dict()
    encoder = Ge2e(state).eval()
    wav = load_audio(HELDOUT / ROWS[0]["file_name"])
    wav *= 10 ** (LEVEL_DBFS / 20) / np.sqrt(np.mean(np.square(wav)))
    embedding = encoder.embed(0.01 * wav)
    assert embedding.shape == (256,) and np.linalg.norm(embedding) == pytest.approx(1)
    assert np.abs(embedding - encoder.embed(wav)).max() < 1e-5
    assert np.abs(embedding - encoder.embed(10 * wav)).max() > 1e-3  # a loud clip stays as it is
    assert np.isfinite(encoder.embed(wav[:1_000])).all()  # shorter than a window


def test_it_tells_the_three_voices():
    """With the published weights; the figures of all 120 are in docs/experiments/voice.md."""
    if not (WEIGHTS / "pretrained.pt").is_file():
        pytest.skip(f"the encoder's weights are not there: python -m tiny.judge_voice --weights {WEIGHTS}")
    encoder = Ge2e.from_pretrained(WEIGHTS)
    names = [name for speaker in ("joe", "rms", "slt") for name in SPEAKERS if SPEAKERS[name] == speaker][::8]
    recordings = {name: encoder.embed(load_audio(HELDOUT / name)) for name in names}
    for name in names:
        others = {other: embedding for other, embedding in recordings.items() if other != name}
        voices = judge_voice.mean_voices(others, SPEAKERS)
        assert judge_voice.nearest_voice(recordings[name], voices) == SPEAKERS[name]
    same = judge_voice.of_recordings(recordings, SPEAKERS, same=True)
    assert np.mean(same) > 0.8 > 0.6 > np.mean(judge_voice.of_recordings(recordings, SPEAKERS, same=False))
