"""benchmarks/dataset.py runs, its variants' codes are equal before times are printed, and its JSON holds them."""

import json
import sys
import time

import pytest
import soundfile

import create_dataset
from benchmarks import dataset
from benchmarks.harness import BASELINE


@pytest.fixture
def in_this_process(monkeypatch):
    """Starting a process takes longer than encoding a few clips."""

    def run_command(command: list[str]) -> tuple[float, int]:
        start = time.perf_counter()
        create_dataset.main(create_dataset.parse_args(command[2:]))
        return time.perf_counter() - start, 1_000_000

    monkeypatch.setattr(dataset, "run_command", run_command)
    monkeypatch.setattr(dataset, "SHORTEST_S", 0.5)
    monkeypatch.setattr(dataset, "LONGEST_S", 1.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the benchmark sets it


def run(output_dir, *flags):
    argv = ["--hours", "0.001", "--repeats", "1", "--threads", "1", "--device", "cpu", "--num_workers", "1"]
    dataset.main(dataset.parse_args([*argv, "--output_dir", str(output_dir), *flags]))
    return json.loads((output_dir / "dataset_tiny.json").read_text())


def test_results_and_table(tmp_path, capsys, in_this_process):
    results = run(tmp_path)
    assert results["equal"] is True and results["num_workers"] == 1
    assert results["seconds"].keys() == results["peak_bytes"].keys() == {BASELINE, "ours"}
    assert results["ratio"][0] == results["seconds"][BASELINE][0] / results["seconds"]["ours"][0]
    assert all(seconds > 0 for seconds in results["seconds_of_stages"].values())
    printed = capsys.readouterr().out
    assert f"| {BASELINE} |" in printed and "| ours |" in printed and "of a clip of 10 s: read and resample" in printed


def test_variants_that_differ_are_not_timed(tmp_path, capsys, monkeypatch, in_this_process):
    monkeypatch.setattr(dataset, "codes_of", lambda folder: [[int(folder.name[0])]])
    with pytest.raises(SystemExit, match="do not give the same results"):
        run(tmp_path)
    assert not list(tmp_path.iterdir()) and "|" not in capsys.readouterr().out


def test_clips_have_the_hours_asked_for(tmp_path):
    clips = dataset.write_clips(tmp_path, 0.02, seed=0)
    rows = [json.loads(line) for line in clips.read_text().splitlines()]
    durations = [soundfile.info(tmp_path / row["audio"]).duration for row in rows]
    assert 72 <= sum(durations) <= 92 and 2 <= min(durations) < max(durations) <= 20.001


def test_time_and_memory_of_a_command():
    code = "import subprocess, sys, time; x = bytearray(60_000_000); time.sleep(float(sys.argv[1]));"
    child = f"subprocess.run([sys.executable, '-c', '{code}', '0.7'])"
    seconds, peak_bytes = dataset.run_command([sys.executable, "-c", code + child, "0.1"])
    assert 0.8 <= seconds < 20 and 120_000_000 < peak_bytes < 400_000_000
    with pytest.raises(SystemExit, match="NameError"):
        dataset.run_command([sys.executable, "-c", "nothing"])


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--hours", "0"], "--hours: must be in (0, inf) (got 0.0)"),
        (["--hours", "nan"], "--hours: must be in (0, inf) (got nan)"),
        (["--num_workers", "0"], "--num_workers: must be >= 1 (got 0)"),
        (["--size", "real"], "--size real: needs a GPU"),
    ],
)
def test_bad_input_is_one_line(tmp_path, caplog, flags, error):
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, *flags)
    assert exit.value.code == 2 and error in caplog.text
