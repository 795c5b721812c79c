"""create_dataset.py: every kind of source, every kind of bad clip, kill and resume."""

import functools
import gc
import io
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import soundfile
import torch
from fake_codec import build_native
from transformers import Xcodec2Model

import create_dataset
from common import dataset_io
from speech.codec import SpeechCodec
from speech.tokens import SAMPLE_RATE

ROOT = Path(__file__).parent.parent
load_codec = functools.cache(SpeechCodec.from_pretrained)
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No hub, a fresh cache, and the codec loaded once."""
    monkeypatch.setattr(SpeechCodec, "from_pretrained", load_codec)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


@pytest.fixture(scope="session")
def codec_dir(tmp_path_factory) -> str:
    """A random XCodec2 whose codes depend on the audio."""
    folder = tmp_path_factory.mktemp("codec")
    build_native(seed=0).save_pretrained(folder)
    return str(folder)


def tone(duration_s: float, seed: int = 0, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """A tone in noise, float32, shape (n_samples,)."""
    times = np.arange(round(duration_s * sample_rate)) / sample_rate
    noise = np.random.default_rng(seed).normal(size=len(times))
    return (0.3 * np.sin(2 * np.pi * (200 + 20 * seed) * times) + 0.03 * noise).astype(np.float32)


@pytest.fixture
def clips(tmp_path) -> Path:
    """Three clips in wavs/, and metadata.csv beside the folder."""
    (tmp_path / "data" / "wavs").mkdir(parents=True)
    lines = ["audio,text,speaker,language,id,other"]
    for i in range(3):
        soundfile.write(tmp_path / "data" / "wavs" / f"{i}.wav", tone(0.5 + 0.1 * i, i), SAMPLE_RATE)
        lines.append(f"wavs/{i}.wav,text {i},slt,en,00{i},x")
    (tmp_path / "data" / "clips.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


def arguments(codec_dir: str, dataset: Path | str, output_dir: Path, *more: str) -> list[str]:
    return [f"--dataset={dataset}", f"--output_dir={output_dir}", f"--codec_id={codec_dir}", "--device=cpu", *more]


def create(codec_dir: str, dataset: Path | str, output_dir: Path, *more: str) -> datasets.Dataset:
    create_dataset.main(create_dataset.parse_args(arguments(codec_dir, dataset, output_dir, *more)))
    assert not (output_dir / ".partial").exists()
    return dataset_io.load_any_dataset(str(output_dir))


def test_convolutions_are_computed_in_float32_on_a_gpu_too(codec_dir, clips, tmp_path, monkeypatch):
    """TF32, PyTorch's default there, has the mantissa of float16: codes would differ from GPU to GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    encode, seen = Xcodec2Model.encode, []

    def recorded(model, *inputs):
        seen.append(torch.backends.cudnn.allow_tf32)
        return encode(model, *inputs)

    monkeypatch.setattr(Xcodec2Model, "encode", recorded)
    create(codec_dir, clips / "clips.csv", tmp_path / "out")
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32


def refusal(caplog, *args: str) -> str:
    """The one line of a run that must end with exit code 2."""
    caplog.clear()
    with pytest.raises(SystemExit) as end:
        create(*args)
    assert end.value.code == 2
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    return record.getMessage()


def skips(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "skipped.jsonl").read_text().splitlines()]


def with_row(clips: Path, line: str) -> Path:
    """clips.csv with one more row."""
    (clips / "more.csv").write_text((clips / "clips.csv").read_text() + line + "\n")
    return clips / "more.csv"


def test_columns_and_codes(codec_dir, clips, tmp_path):
    dataset = create(codec_dir, clips / "clips.csv", tmp_path / "out", "--batch_size=2")
    assert dataset.column_names == [
        "text", "audio_codes", "duration_s", "sampling_rate", "speaker", "language", "id",
    ]  # fmt: skip
    assert dataset["text"][:] == ["text 0", "text 1", "text 2"]
    assert dataset["id"][:] == ["000", "001", "002"]  # CSV is not guessed to be numbers
    assert dataset["duration_s"][:] == [0.5, 0.6, 0.7]
    assert set(dataset["sampling_rate"]) == {16_000}
    codec = load_codec(codec_dir)
    for row, i in zip(dataset, range(3), strict=True):
        wav, _ = soundfile.read(clips / "wavs" / f"{i}.wav", dtype="float32")
        assert row["audio_codes"] == codec.encode([wav])[0]  # batch equals loop
    assert len({code for row in dataset for code in row["audio_codes"]}) > 10
    assert skips(tmp_path / "out") == []


def as_file(clips: Path, suffix: str) -> Path:
    rows = datasets.Dataset.from_csv(str(clips / "clips.csv"))
    path = clips / f"again{suffix}"
    if suffix == ".parquet":
        rows.to_parquet(path)
    elif suffix == ".json":  # an array, the other layout of JSON
        path.write_text(json.dumps(list(rows)))
    else:
        rows.to_json(path)
    return path


def as_folder(clips: Path, kind: str) -> Path:
    """The clips saved by datasets (bytes embedded or paths), or as an audiofolder."""
    folder = clips / kind
    paths = [str(clips / "wavs" / f"{i}.wav") for i in range(3)]
    content = [Path(path).read_bytes() for path in paths]
    texts = [f"text {i}" for i in range(3)]
    if kind in ("metadata.csv", "metadata.jsonl"):
        (clips / "wavs" / kind).write_text(
            "file_name,text\n" + "".join(f"{i}.wav,text {i}\n" for i in range(3))
            if kind == "metadata.csv"
            else "".join(json.dumps({"file_name": f"{i}.wav", "text": f"text {i}"}) + "\n" for i in range(3))
        )
        return clips / "wavs"
    audio = {"paths": paths, "bytes": content}.get(kind) or [
        {"path": f"{i}.wav", "bytes": content[i]} for i in range(3)
    ]
    rows = datasets.Dataset.from_dict({"text": texts, "audio": audio})
    if kind == "feature":
        rows = rows.cast_column("audio", datasets.Audio())
    if kind == "parquet":
        folder.mkdir()
        rows.cast_column("audio", datasets.Audio()).to_parquet(folder / "train-00000-of-00001.parquet")
    elif kind == "splits":
        datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(folder)
    else:
        rows.save_to_disk(folder)
    return folder


def test_all_sources_give_the_same(codec_dir, clips, tmp_path):
    expected = create(codec_dir, clips / "clips.csv", tmp_path / "csv").select_columns(["text", "audio_codes"])
    sources = {suffix: as_file(clips, suffix) for suffix in (".jsonl", ".json", ".parquet")}
    for kind in ("metadata.csv", "paths", "bytes", "struct", "feature", "parquet", "splits"):
        sources[kind] = as_folder(clips, kind)
    for name, source in sources.items():
        dataset = create(codec_dir, source, tmp_path / f"out{name}")
        assert dataset.select_columns(expected.column_names)[:] == expected[:], name


def test_audiofolder_with_jsonl_and_splits(codec_dir, clips, tmp_path, caplog):
    folder = as_folder(clips, "metadata.jsonl")
    assert len(create(codec_dir, folder, tmp_path / "flat")) == 3
    folder.rename(clips / "test")
    create_dataset.main(
        create_dataset.parse_args(arguments(codec_dir, clips, tmp_path / "out", "--split=test", "--format=json"))
    )
    assert len(dataset_io.load_any_dataset(str(tmp_path / "out" / "test.jsonl"), "test")) == 3
    (clips / "clips.csv").unlink()
    message = refusal(caplog, codec_dir, clips, tmp_path / "out2")
    assert "no split 'train'. Available: test" in message


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats_rates_and_channels(codec_dir, clips, tmp_path, suffix):
    stereo = np.stack([tone(1.0, 1, 8_000), tone(1.0, 2, 8_000)], axis=1)
    soundfile.write(clips / f"stereo.{suffix}", stereo, 8_000)
    row = create(codec_dir, with_row(clips, f"stereo.{suffix},hello,,,,"), tmp_path / "out")[3]
    assert row["duration_s"] == pytest.approx(1.0, abs=0.15)  # mp3 pads its ends
    assert len(row["audio_codes"]) == int(row["duration_s"] * 50 + 1e-6) + 1  # and one for the rest
    assert row["speaker"] == "" and row["sampling_rate"] == 16_000


def with_bad_clips(clips: Path) -> tuple[Path, list[tuple[str, str, str]]]:
    """clips.csv with a bad clip of each kind, and their (path, text, reason)."""
    (clips / "renamed.wav").write_text("this is not audio")
    soundfile.write(clips / "empty.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    soundfile.write(clips / "nan.wav", np.full(8_000, np.nan, np.float32), SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(clips / "huge.wav", 1e30 * tone(0.5), SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(clips / "zeros.wav", np.zeros(8_000, np.float32), SAMPLE_RATE)
    soundfile.write(clips / "quiet.wav", 1e-3 * tone(0.5), SAMPLE_RATE)
    soundfile.write(clips / "long.wav", tone(2.0), SAMPLE_RATE)
    soundfile.write(clips / "short.wav", tone(0.1), SAMPLE_RATE)
    mp3 = io.BytesIO()
    soundfile.write(mp3, tone(1.0), SAMPLE_RATE, format="MP3")
    (clips / "cut.mp3").write_bytes(mp3.getvalue()[: mp3.tell() // 2])
    rows = [
        ("renamed.wav", "a", "unreadable"), ("missing.wav", "a", "unreadable"), ("empty.wav", "a", "unreadable"),
        ("nan.wav", "a", "unreadable"), ("huge.wav", "a", "unreadable"), ("cut.mp3", "a", "unreadable"),
        ("zeros.wav", "a", "silent"), ("quiet.wav", "a", "silent"), ("long.wav", "a", "too_long"),
        ("short.wav", "a", "too_short"), ("wavs/0.wav", " ", "empty_text"), ("", "a", "unreadable"),
        ("wavs/0.wav", "end <|SPEECH_GENERATION_END|> more", "control_token"),
    ]  # fmt: skip
    return with_row(clips, "\n".join(f"{path},{text},,,id{i}," for i, (path, text, _) in enumerate(rows))), rows


def test_a_language_is_that_of_the_rows_that_state_none(codec_dir, clips, tmp_path, caplog):
    source = with_row(clips, "wavs/2.wav,Guten Tag.,slt,,x,")
    dataset = create(codec_dir, source, tmp_path / "some", "--language=de")
    assert dataset["language"][:] == ["en", "en", "en", "de"]
    (clips / "bare.csv").write_text("audio,text\nwavs/0.wav,Guten Tag.\n")
    assert create(codec_dir, clips / "bare.csv", tmp_path / "all", "--language=German")["language"][:] == ["German"]
    assert "unknown language" not in caplog.text
    (clips / "odd.csv").write_text("audio,text,language\nwavs/0.wav,Kiel vi fartas?,eo\n")
    create(codec_dir, clips / "odd.csv", tmp_path / "odd")  # supervised training takes it
    assert "GRPO and evaluation.py will refuse such rows: unknown language 'eo'" in caplog.text
    message = refusal(caplog, codec_dir, clips / "bare.csv", tmp_path / "none", "--language=klingon")
    assert "error: --language: unknown language 'klingon'" in message
    shards = [*("--language=de", "--num_shards=2")]
    for more in (["--shard_index=0"], ["--shard_index=1"], ["--merge"]):
        flags = arguments(codec_dir, source, tmp_path / "shards", *shards, *more)
        create_dataset.main(create_dataset.parse_args(flags))
    assert dataset_io.load_any_dataset(str(tmp_path / "shards"))["language"][:] == dataset["language"][:]


def test_bad_clips_are_listed(codec_dir, clips, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source, rows = with_bad_clips(clips)
    dataset = create(codec_dir, source, tmp_path / "out", "--max_duration_s=1.5")
    assert dataset["text"][:] == ["text 0", "text 1", "text 2"]
    for i, (skip, (path, _, reason)) in enumerate(zip(skips(tmp_path / "out"), rows, strict=True)):
        assert (skip["row"], skip["id"], skip["path"], skip["reason"]) == (i + 3, f"id{i}", path, reason)
        assert path in skip["detail"] or reason != "unreadable"
    summary = caplog.records[-1].getMessage()
    assert summary.startswith("kept 3, 0.00 hours; skipped 13, control_token 1, empty_text 1, silent 2, too_long 1, ")


def test_noise_and_silence_are_kept_where_they_are_asked_for(codec_dir, clips, tmp_path, caplog):
    """For ASR, whose rows without speech have an empty text; a clip that has a text is not kept if it is silent."""
    caplog.set_level(logging.INFO)
    source, rows = with_bad_clips(clips)
    soundfile.write(clips / "still.wav", np.zeros(8_000, np.float32), SAMPLE_RATE)
    with source.open("a") as file:
        file.write("\nstill.wav,,,,idx,")
    dataset = create(codec_dir, source, tmp_path / "out", "--max_duration_s=1.5", "--keep_non_speech")
    assert dataset["text"][:] == ["text 0", "text 1", "text 2", "", ""] and all(dataset["audio_codes"][:])
    assert caplog.records[-1].getMessage().startswith("kept 5 (2 without speech), 0.00 hours; skipped 12")
    reasons = [reason for *_, reason in rows if reason != "empty_text"]
    assert [skip["reason"] for skip in skips(tmp_path / "out")] == reasons


# --- Worker processes -------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    """Of a saved dataset, all but what names the folder it was written from."""
    return {name: (folder / name).read_bytes() for name in ("data-00000-of-00001.arrow", "skipped.jsonl")}


def test_codes_do_not_depend_on_the_number_of_workers(codec_dir, clips, tmp_path, caplog):
    source, _ = with_bad_clips(clips)
    options = "--max_duration_s=1.5", "--chunk_size=5", "--batch_size=2"
    expected = create(codec_dir, source, tmp_path / "0", *options, "--num_workers=0")
    assert len(expected) == 3
    for workers in ("1", "2"):
        create(codec_dir, source, tmp_path / workers, *options, f"--num_workers={workers}")
        assert files_of(tmp_path / workers) == files_of(tmp_path / "0")
    message = refusal(caplog, codec_dir, source, tmp_path / "strict", "--strict", "--num_workers=2")
    assert message == refusal(caplog, codec_dir, source, tmp_path / "strict", "--strict", "--num_workers=0")
    assert "renamed.wav" in message and '"row": 3' in message


def test_a_cpu_has_enough_to_do_without_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12))
    assert create_dataset.default_workers("cpu") == 0
    assert create_dataset.default_workers("cuda:1") == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    assert create_dataset.default_workers("cuda") == 4


def test_what_fails_in_a_worker_is_no_bad_clip(codec_dir, clips, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(create_dataset, "load_audio", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        create(codec_dir, clips / "clips.csv", tmp_path / "out", "--num_workers=2")
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    gc.collect()  # the workers now, and not in another test, where torch would wait 5 s for each


def test_workers_are_at_most_a_chunk_ahead(clips, monkeypatch):
    """Memory stays flat while the codec is busy."""
    read = multiprocessing.Value("i")

    def read_clip(source, index, args):
        with read.get_lock():
            read.value += 1
        return index, None

    monkeypatch.setattr(create_dataset, "read_clip", read_clip)
    source = dataset_io.open_source(str(clips / "clips.csv"))
    flags = ["--dataset=a", "--output_dir=b", "--num_workers=2", "--chunk_size=6"]
    ahead = create_dataset.read_ahead(source, range(1_000), create_dataset.parse_args(flags))
    for consumed in (1, 5, 30):
        while next(ahead)[0] < consumed - 1:
            pass
        time.sleep(0.2)
        assert consumed < read.value <= consumed + 6


def test_workers_leave_ctrl_c_to_the_main_process(clips, monkeypatch):
    monkeypatch.setattr(create_dataset, "read_clip", lambda *args: (signal.getsignal(signal.SIGINT), None))
    source = dataset_io.open_source(str(clips / "clips.csv"))
    args = create_dataset.parse_args(["--dataset=a", "--output_dir=b", "--num_workers=1"])
    assert list(create_dataset.read_ahead(source, range(3), args)) == [(signal.SIG_IGN, None)] * 3


def test_interrupted_by_ctrl_c(codec_dir, clips, tmp_path):
    """Ctrl-C goes to all processes of the terminal: one line, exit code 130, no process left, and it resumes."""
    source = with_row(clips, "\n".join(f"wavs/{i % 3}.wav,sentence {i},,,{i}," for i in range(200)))
    out, options = tmp_path / "out", ["--chunk_size=4", "--num_workers=2"]
    script = [sys.executable, "create_dataset.py", *arguments(codec_dir, source, out, *options)]
    flags = {"cwd": ROOT, "env": OFFLINE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # What a shell starts in the background ignores Ctrl-C, and so would this process
    process = subprocess.Popen(script, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **flags)
    while not list(out.glob(".partial/chunk-*.jsonl")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    *before, last = stderr.splitlines()
    assert last.startswith("interrupted.") and "by the same command" in last
    assert not before or "This DataLoader will create" in before[0], stderr  # torch's, on a machine of one core
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    done = len(list(out.glob(".partial/chunk-*.jsonl")))
    assert 1 <= done < 50
    assert len(create(codec_dir, source, out, *options)) == 203


# --- Shards -----------------------------------------------------------------------------------------------


def encode_shard(codec_dir: str, source: Path, out: Path, index: int, *more: str) -> None:
    flags = arguments(codec_dir, source, out, "--num_shards=3", f"--shard_index={index}", *more)
    create_dataset.main(create_dataset.parse_args(flags))


def test_shards_are_merged_to_what_one_process_writes(codec_dir, clips, tmp_path, caplog, monkeypatch):
    source, _ = with_bad_clips(clips)
    lines = "\n".join(f"wavs/{i % 3}.wav,sentence {i},,,{i}," for i in range(5))
    source.write_text(source.read_text() + lines + "\n")
    out, options = tmp_path / "out", ("--chunk_size=3", "--max_duration_s=1.5")  # 7 chunks of 21 rows
    create(codec_dir, source, tmp_path / "whole", *options)
    merge = "--num_shards=3", "--merge", *options

    assert "--merge: " in refusal(caplog, codec_dir, source, out, *merge)
    encode_shard(codec_dir, source, out, 2, *options)
    with monkeypatch.context() as patch:  # interrupted in its second chunk of three
        encode_chunk, calls = create_dataset.encode_chunk, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return encode_chunk(*args)

        patch.setattr(create_dataset, "encode_chunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode_shard(codec_dir, source, out, 0, *options)
    message = refusal(caplog, codec_dir, source, out, *merge)
    assert message.startswith("error: --merge: unfinished shards (got 3 of 7 chunks). Run --shard_index 0, 1 again")
    encode_shard(codec_dir, source, out, 1, *options)
    message = refusal(caplog, codec_dir, source, out, *merge)
    assert message.startswith("error: --merge: unfinished shards (got 5 of 7 chunks). Run --shard_index 0 again")
    with monkeypatch.context() as patch:
        patch.setattr(create_dataset, "encode_chunk", lambda *args: calls.append(args) or encode_chunk(*args))
        calls.clear()
        encode_shard(codec_dir, source, out, 0, *options)
        assert len(calls) == 2  # the first is there
    with monkeypatch.context() as patch:  # merging needs neither the codec nor a GPU
        patch.setattr(SpeechCodec, "from_pretrained", lambda *args, **kwargs: pytest.fail("not needed"))
        create(codec_dir, source, out, *merge, "--device=cuda", "--num_workers=2")
    assert files_of(out) == files_of(tmp_path / "whole")
    with pytest.raises(SystemExit):
        encode_shard(codec_dir, source, out, 0, *options)
    assert "holds a finished dataset" in caplog.text


def test_arguments_of_shards_agree(codec_dir, clips, tmp_path, caplog):
    source, out = clips / "clips.csv", tmp_path / "out"
    encode_shard(codec_dir, source, out, 2)  # of one chunk: nothing to do, but its arguments count
    message = refusal(caplog, codec_dir, source, out, "--num_shards=3", "--shard_index=0", "--batch_size=3")
    assert "unfinished run with other batch_size 16 (now 3)" in message and "or remove" in message
    message = refusal(caplog, codec_dir, source, out, "--num_shards=2", "--merge")
    assert "num_shards 3 (now 2)" in message
    encode_shard(codec_dir, source, out, 0, "--num_workers=1", "--format=json")  # these change no code
    assert len(create(codec_dir, source, out, "--num_shards=3", "--merge")) == 3


def test_a_shard_knows_its_place(codec_dir, clips, tmp_path, caplog):
    for flags, message in (
        (["--num_shards=3"], "--num_shards 3: must come with --shard_index 0 to 2"),
        (["--num_shards=3", "--shard_index=3"], r"--shard_index: must be in 0 to 2 (got 3)"),
        (["--shard_index=-1"], "--shard_index: must be in 0 to 0 (got -1)"),
        (["--num_shards=0"], "--num_shards: must be >= 1 (got 0)"),
        (["--num_shards=3", "--shard_index=1", "--merge"], "--merge: has no --shard_index"),
        (["--num_shards=3", "--shard_index=1", "--overwrite"], "--overwrite: one shard must not discard"),
        (["--num_workers=-1"], "--num_workers: must be >= 0 (got -1)"),
    ):
        assert message in refusal(caplog, codec_dir, clips / "clips.csv", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_the_first_of_processes_that_start_at_once_wins(tmp_path):
    barrier = threading.Barrier(8)

    def start(number: int) -> dict:
        barrier.wait()
        create_dataset.write_first(tmp_path / "run.json", {"number": number})
        return json.loads((tmp_path / "run.json").read_text())

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(start, range(8)))
    assert len(seen) == 8 and all(run == seen[0] for run in seen)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


# --- The run ----------------------------------------------------------------------------------------------


def test_strict_stops_at_the_first(codec_dir, clips, tmp_path, caplog):
    source = with_row(clips, "missing.wav,a,,,lost,")
    message = refusal(caplog, codec_dir, source, tmp_path / "out", "--strict", "--chunk_size=2")
    assert "missing.wav" in message and '"row": 3' in message and '"id": "lost"' in message
    # Repaired, it resumes from there.
    soundfile.write(clips / "missing.wav", tone(0.5), SAMPLE_RATE)
    assert len(create(codec_dir, source, tmp_path / "out", "--strict", "--chunk_size=2")) == 4


def test_no_usable_clip(codec_dir, clips, tmp_path, caplog):
    message = refusal(caplog, codec_dir, clips / "clips.csv", tmp_path / "out", "--max_duration_s=0.4")
    assert "no clip can be used" in message and "too_long 3" in message
    assert len(skips(tmp_path / "out")) == 3


@pytest.mark.parametrize("kind", ["arrow", "json", "parquet"])
def test_output_formats(codec_dir, clips, tmp_path, kind):
    out = tmp_path / "out"
    (clips / "clips.csv").write_text("audio,text\nwavs/0.wav,\"日本, 'quoted'\"\n")
    dataset = create(codec_dir, clips / "clips.csv", out, f"--format={kind}")
    assert dataset["text"][:] == ["日本, 'quoted'"] and len(dataset[0]["audio_codes"]) == 26
    file = {"arrow": "state.json", "json": "train.jsonl", "parquet": "train.parquet"}[kind]
    assert (out / file).is_file()


def test_overwrite(codec_dir, clips, tmp_path, caplog):
    out = tmp_path / "out"
    create(codec_dir, clips / "clips.csv", out)
    assert "--overwrite replaces it" in refusal(caplog, codec_dir, clips / "clips.csv", out)
    # An attempt that encodes nothing does not unlock it.
    assert "no such dataset" in refusal(caplog, codec_dir, "no/set", out, "--overwrite")
    assert "--overwrite replaces it" in refusal(caplog, codec_dir, clips / "clips.csv", out)
    dataset = create(codec_dir, clips / "clips.csv", out, "--overwrite", "--max_duration_s=0.55")
    assert len(dataset) == 1 and len(skips(out)) == 2
    create(codec_dir, clips / "clips.csv", out, "--overwrite", "--format=json")
    assert not (out / "state.json").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    assert "holds other files" in refusal(caplog, codec_dir, clips / "clips.csv", foreign, "--overwrite")


@pytest.mark.parametrize("moment", ["writing", "removing"])
def test_interrupted_at_the_end(codec_dir, clips, tmp_path, caplog, monkeypatch, moment):
    """Killed while the result is written, it is written again; killed while .partial is removed, it is finished."""
    source, out = clips / "clips.csv", tmp_path / "out"
    expected = create(codec_dir, source, tmp_path / "whole")[:]

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(datasets.Dataset, "save_to_disk", die)
        else:
            patch.setattr(create_dataset.shutil, "rmtree", lambda path, ignore_errors: path.exists() and die())
        create(codec_dir, source, out)
    if moment == "writing":
        assert list(out.glob(".partial/chunk-*"))
        monkeypatch.setattr(create_dataset, "encode_chunk", lambda *args: pytest.fail("done already"))
        assert create(codec_dir, source, out)[:] == expected
    else:
        assert list(out.glob(".discarded/chunk-*"))
        assert "holds a finished dataset" in refusal(caplog, codec_dir, source, out)
        assert dataset_io.load_any_dataset(str(out))[:] == expected


def test_killed_and_resumed(codec_dir, clips, tmp_path, caplog):
    lines = [f"wavs/{i % 3}.wav,sentence {i},,,{i}," for i in range(30)] + ["missing.wav,a,,,,"]
    source = with_row(clips, "\n".join(lines))
    out, options = tmp_path / "out", ["--chunk_size=2", "--batch_size=2"]
    script = [sys.executable, "create_dataset.py", *arguments(codec_dir, source, out, *options)]
    process = subprocess.Popen(script, cwd=ROOT, env=OFFLINE, stderr=subprocess.DEVNULL)
    while not list(out.glob(".partial/chunk-*.jsonl")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {file: file.stat().st_mtime_ns for file in out.glob(".partial/chunk-*.jsonl")}
    assert 1 <= len(done) < 17

    message = refusal(caplog, codec_dir, source, out, "--chunk_size=2", "--batch_size=3")
    assert "unfinished run" in message and "batch_size 2 (now 3)" in message
    edited = clips / "edited.csv"
    edited.write_text(source.read_text().replace("sentence 29", "other"))
    source_text = source.read_text()
    source.write_text(edited.read_text())
    assert "rows" in refusal(caplog, codec_dir, source, out, *options)
    source.write_text(source_text)

    encoded = []
    encode_chunk = create_dataset.encode_chunk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(create_dataset, "encode_chunk", lambda *args: encoded.append(args) or encode_chunk(*args))
        resumed = create(codec_dir, source, out, *options)
    assert len(encoded) == 17 - len(done)  # 34 rows, none of them done twice
    whole = create(codec_dir, source, tmp_path / "whole", *options)
    assert resumed[:] == whole[:] and len(resumed) == 33
    for name in ("skipped.jsonl", "data-00000-of-00001.arrow"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_strict_run_resumes_over_a_chunk_that_has_lost_its_end(codec_dir, clips, tmp_path, monkeypatch):
    source, out = clips / "clips.csv", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(create_dataset, "assemble", Mock(side_effect=KeyboardInterrupt))
        create(codec_dir, source, out, "--strict", "--chunk_size=2")
    chunk = min(out.glob(".partial/chunk-*"))
    os.truncate(chunk, chunk.stat().st_size - 5)
    assert create(codec_dir, source, out, "--strict", "--chunk_size=2")["id"] == ["000", "001", "002"]


@pytest.mark.parametrize("kept", [0, 0.5, 0.9])
def test_a_chunk_that_has_lost_its_end_is_not_written(kept, tmp_path):
    """Left out, its rows would be missing from the dataset without a word."""
    (chunk,) = create_dataset.all_chunks(3, tmp_path, 128)
    assert not create_dataset.is_written(chunk)
    create_dataset.write_lines(chunk.file, [{"audio_codes": [1, 2, 3]}] * 3)
    assert create_dataset.is_written(chunk)
    os.truncate(chunk.file, int(kept * chunk.file.stat().st_size))
    assert not create_dataset.is_written(chunk)


def test_bad_input_is_refused_at_once(codec_dir, clips, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(create_dataset, "encode_all", lambda *args: pytest.fail("too late"))
    csv, out = clips / "clips.csv", tmp_path / "out"
    assert "no such folder" in refusal(caplog, str(tmp_path / "no_codec"), csv, out)
    # Nothing was encoded, so another try in the same folder is no other run.
    assert "16000 Hz only" in refusal(caplog, codec_dir, csv, out, "--sampling_rate=24000")
    assert "must have 0 <= min < max" in refusal(caplog, codec_dir, csv, out, "--max_duration_s=0.1")
    assert "--batch_size: must be >= 1 (got 0)" in refusal(caplog, codec_dir, csv, out, "--batch_size=0")
    assert "cannot write into" in refusal(caplog, codec_dir, csv, csv / "out")
    message = refusal(caplog, codec_dir, csv, out, "--text_column=txet")
    assert "'txet'" in message and "audio, text, speaker" in message and "--text_column" in message
    assert "no column audio or file_name" in refusal(caplog, codec_dir, written(clips, "text\na\n"), out)
    assert "no column text or sentence" in refusal(caplog, codec_dir, written(clips, "audio\na\n"), out)
    codes = clips / "codes.jsonl"
    codes.write_text('{"text": "a", "audio_codes": [1]}\n')
    assert "train.py takes it as it is" in refusal(caplog, codec_dir, codes, out)
    codes.write_text('{"text": 7, "audio": [1]}\n')
    assert "is not text" in refusal(caplog, codec_dir, codes, out)
    codes.write_text('{"text": "7", "audio": [1]}\n')
    assert "Accepted: paths" in refusal(caplog, codec_dir, codes, out)


def written(clips: Path, text: str) -> Path:
    (clips / "written.csv").write_text(text)
    return clips / "written.csv"


def test_push_to_hub(codec_dir, clips, tmp_path, caplog, monkeypatch):
    assert "hf auth login" in refusal(caplog, codec_dir, clips / "clips.csv", tmp_path / "out", "--push_to_hub=me/set")
    pushed = []
    monkeypatch.setattr(create_dataset.HfApi, "create_repo", lambda self, name, **kwargs: pushed.append((name, kwargs)))
    monkeypatch.setattr(datasets.Dataset, "push_to_hub", lambda self, name, private: pushed.append((name, len(self))))
    create(codec_dir, clips / "clips.csv", tmp_path / "out", "--push_to_hub=me/set")
    assert pushed == [("me/set", {"repo_type": "dataset", "private": True, "exist_ok": True}), ("me/set", 3)]


def test_command_line(codec_dir, tmp_path, capsys):
    """One line on stderr, exit code 2, no traceback; a misspelt flag names the nearest."""
    script = [sys.executable, "create_dataset.py", *arguments(codec_dir, "no/set", tmp_path / "out")]
    process = subprocess.run(script, cwd=ROOT, env=OFFLINE, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: no/set: no such dataset")
    assert process.stderr.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        create_dataset.parse_args(["--dataset=a", "--output_dir=b", "--codec=c"])
    assert end.value.code == 2 and "Did you mean '--codec_id'" in capsys.readouterr().err
    documented = "--dataset a --output_dir b --codec_id HKUSTAudio/xcodec2 --sampling_rate 16000"
    assert vars(create_dataset.parse_args(documented.split()))["format"] == "arrow"
