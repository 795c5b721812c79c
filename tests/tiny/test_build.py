"""tiny/build.py: its stages on a few fake clips, and what it says where one is missing."""

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile as sf
from fake_vowel import falling
from safetensors.numpy import load_file

from common.cli import InputError
from inference import main as infer
from inference import parse_args as inference_args
from reward_models.token2text import Token2Text
from speech.audio import load_audio
from tiny import build, build_policy, rollouts, work_dir
from tiny.corpus import form
from tiny.speak import asr_heldout_rows, heldout_texts, train_rows

SHORT = {
    build: {
        "DEVICE": "cpu",
        "CODEC_BATCH": 2,
        "DECODER_BATCH": 1,
        "CODEC_CLIPS": 3,
        "SPLICED_CLIPS": 3,
        "GARBLED_CLIPS": 3,
        "ROLLOUT_TEXTS": slice(3),
        "RECORDED": 1,
        "RESYNTHESIZED": 2,
    },
    build_policy: {
        "DEVICE": "cpu",
        "POLICY_BATCH": 2,
        "EVAL_STEPS": 1,
        "NON_SPEECH": {"sft": 1, "pool": 1, "heldout": 1},
    },
    rollouts: {"MAX_LENGTH": 140},
}
CODECS = ("codec_joint", "codec")


def fake_speech(folder: Path) -> None:
    """Two training clips and three held-out ones of each of two voices, 1.7 s of a vowel."""
    folder.mkdir(parents=True)
    rows = []
    for speaker, f0_hz in (("joe", 110), ("slt", 190)):
        for i, split in enumerate(("train", "train", "heldout", "heldout", "asr_heldout")):
            name = "Susan" if split == "heldout" else "Nancy"
            words = [[word, 0.4 * j, 0.4 * (j + 1)] for j, word in enumerate((name.lower(), "took", "the", "lamp"))]
            row = {"id": f"{speaker}_{i}", "text": f"{name} took the lamp.", "speaker": speaker, "split": split}
            rows.append({**row, "form": "statement", "melody": "right", "duration_s": 1.7, "words": words})
            sf.write(folder / f"{speaker}_{i}.flac", falling(1.7, f0_hz, f0_hz - 10 - i), 16_000)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_stages_after_the_speech(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="tiny.build")
    fake_speech(tmp_path / "speech")
    fake_speech(tmp_path / "random")
    for module, constants in SHORT.items():
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    flags = f"--work_dir {tmp_path} --codec_steps 2 --decoder_steps 2 --whisper_steps 2 --policy_steps 3"
    flags += " --reward_asr_steps 2 --asr_policy_steps 2 --token2text_steps 2 --teacher tiny/whisper.pt"
    args = build.parse_args(flags.split())
    for stage in list(build.STAGES)[1:-1]:
        build.STAGES[stage](args)
    codes = work_dir.load_codes(tmp_path)
    assert [len(ids) for ids in codes] == [86] * 10  # 1.7 s are 85 hops, and the codec pads with one more
    assert build.training_frames(tmp_path)[0].lengths == [86] * 6  # of 3 of the 4 recordings, and their copies
    encoder = [np.concatenate([w.flatten() for w in state(tmp_path / name, "acoustic_encoder")]) for name in CODECS]
    decoder = [np.concatenate([w.flatten() for w in state(tmp_path / name, "acoustic_decoder")]) for name in CODECS]
    assert np.array_equal(*encoder) and not np.array_equal(*decoder)
    curve = [json.loads(line) for line in (tmp_path / "llasa_sft" / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [1, 2, 3]
    assert curve[0]["heldout_prompted"] > curve[1]["heldout_prompted"]  # the first step has a learning rate of 0
    shipped = json.loads((tmp_path / "llasa" / "run.json").read_text())
    assert shipped["steps"] == 3 and shipped["codec_id"] == str(tmp_path / "codec")
    assert shipped["whisper"] == str(tmp_path / "whisper.pt")
    heard = [message for message in caplog.messages if "held-out clips" in message]
    assert [message.split(": WER")[0] for message in heard] == [
        f"{stage}: held-out clips, {name}"
        for stage in ("whisper", "reward_asr")
        for name in ("natural", "resynthesized")
    ]
    wav = tmp_path / "sample.wav"
    flags = f"--model_name_or_path {tmp_path}/llasa --output {wav} --max_length 110 --text"
    infer(inference_args([*flags.split(), "Nancy took the lamp."]))
    assert wav.exists()

    sets = {name: read(tmp_path / f"asr_{name}.parquet") for name in ("sft", "pool", "heldout")}
    assert [len(rows) for rows in sets.values()] == [3, 3, 3] and "keywords" in sets["heldout"].column_names
    curve = [json.loads(line) for line in (tmp_path / "llasa_asr_sft" / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [1, 2] and "heldout_asr" in curve[0]
    infer(inference_args(transcribe(tmp_path)))
    assert len((tmp_path / "transcripts.jsonl").read_text().splitlines()) == 3

    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(build, "SHIPPED", shipped)
    build.STAGES["ship"](args)
    record = json.loads((shipped / "llasa" / "run.json").read_text())
    assert (record["codec_id"], record["whisper"]) == ("tiny/codec", "tiny/whisper.pt")
    assert json.loads((shipped / "llasa_asr" / "run.json").read_text())["codec_id"] == "tiny/codec"
    assert len(read(shipped / "asr" / "pool.parquet")) == 3 and "Rebecca" in (shipped / "asr/keywords.txt").read_text()
    assert (shipped / "codec" / "model.safetensors").exists()
    assert (shipped / "whisper.pt").read_bytes() == (tmp_path / "reward_asr.pt").read_bytes()
    assert (tmp_path / "whisper.pt").read_bytes() != (tmp_path / "reward_asr.pt").read_bytes()
    recordings = [json.loads(line) for line in (shipped / "heldout" / "metadata.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in recordings) == ["joe_2", "joe_3", "slt_2", "slt_3"]
    assert all(len(load_audio(shipped / "heldout" / row["file_name"])) == 27_200 for row in recordings)
    assert (shipped / "texts" / "heldout.txt").read_text() == "Susan took the lamp.\n" * 4
    rows = read(shipped / "speech.parquet")
    assert rows["text"][:] == ["Nancy took the lamp."] * 4 and rows["audio_codes"][:] == codes[:2] + codes[5:7]
    assert Token2Text.from_pretrained(shipped / "token2text").config["labels"] == {"speaker": ["joe", "slt"]}
    texts = [json.loads(line)["text"] for line in (shipped / "texts" / "train.jsonl").read_text().splitlines()]
    assert Counter(map(form, texts)) == build.RL_TEXTS and len(set(texts)) == len(texts)
    others = {row["text"] for row in [*train_rows(), *asr_heldout_rows()]} | set(heldout_texts())
    assert not others & set(texts)

    monkeypatch.setattr(build, "train_codec", None)  # would raise: what is there is kept
    monkeypatch.setattr(build, "train_decoder", None)
    monkeypatch.setattr(build_policy, "train_policy", None)
    for stage in ("codec", "decoder", "policy", "asr_policy"):
        build.STAGES[stage](args)


def read(path: Path) -> datasets.Dataset:
    return datasets.Dataset.from_parquet(str(path))


def transcribe(folder: Path) -> list[str]:
    flags = f"--task asr --model_name_or_path {folder}/llasa_asr --dataset {folder}/asr_heldout.parquet"
    return [*flags.split(), "--max_completion_length", "8", "--output", f"{folder}/transcripts.jsonl"]


def state(folder: Path, part: str) -> list[np.ndarray]:
    return [weight for name, weight in sorted(load_file(folder / "model.safetensors").items()) if name.startswith(part)]


@pytest.mark.parametrize(
    "stage, missing",
    [
        ("codec", "speech"),
        ("rows", "speech"),
        ("policy", "decoder"),
        ("whisper", "decoder"),
        ("rollouts", "policy"),
        ("reward_asr", "whisper"),
        ("asr_rows", "decoder"),
        ("asr_policy", "policy"),
        ("token2text", "rows"),
        ("ship", "decoder"),
    ],
)
def test_a_stage_names_the_one_it_needs(stage, missing, tmp_path):
    args = build.parse_args(["--work_dir", str(tmp_path)])
    with pytest.raises(InputError, match=f"is missing. Run --stage {missing} first"):
        build.STAGES[stage](args)


def test_bad_flags_are_named(caplog, tmp_path):
    for flag, value, named in (("threads", "0", "must be >= 1"), ("asr_policy_steps", "0", "must be >= 1")):
        with pytest.raises(SystemExit):
            build.main(build.parse_args(["--work_dir", str(tmp_path), f"--{flag}", value]))
        assert f"--{flag}: {named}" in caplog.text


def test_a_teacher_that_is_missing_is_named_before_the_first_stage(caplog, tmp_path):
    with pytest.raises(SystemExit):
        build.main(build.parse_args(["--work_dir", str(tmp_path / "new"), "--teacher", "no.pt"]))
    assert "--teacher no.pt: is not there. Run python -m tiny.whisper_weights tiny.en" in caplog.text
    assert not list(tmp_path.rglob("*.flac"))


def test_help_names_every_stage(capsys):
    with pytest.raises(SystemExit):
        build.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert all(f"    {stage}  " in printed for stage in build.STAGES)


def test_voice_prompts_of_sft_rows_are_other_clips_of_the_same_voice():
    speakers = ["joe"] * 40 + ["slt", "rms"] * 10
    clip = {"form": "statement", "melody": "neutral", "duration_s": 1.0}
    rows = [{"id": str(i), "text": f"{name} {i}", "speaker": name} | clip for i, name in enumerate(speakers)]
    made = build_policy.speech_rows(rows, [[i, i] for i in range(len(rows))])
    assert made["text"] == [row["text"] for row in rows] and made["audio_codes"][7] == [7, 7]
    for i, row in enumerate(made):
        if row["ref_text"] is None:
            assert row["speaker"] == "joe" and row["ref_codes"] is None
            continue
        voice, number = row["ref_text"].split()
        assert voice == row["speaker"] and int(number) != i and row["ref_codes"] == [int(number)] * 2
    alone = sum(ref is None for ref in made["ref_text"])
    assert 10 <= alone <= 30  # half of joe's 40


def test_usage_counts_codes_and_their_perplexity():
    assert build.usage([[5, 5], [9, 9, 1, 3]]) == "4 of 4096 codes in use, perplexity 4"  # 1/3, 1/3, 1/6, 1/6: 3.8
