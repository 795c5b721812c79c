"""benchmarks/codec.py runs, its variants agree before they are timed, and its JSON holds what it printed."""

import json

import numpy as np
import pytest
import torch

from benchmarks import codec
from benchmarks.harness import BASELINE


def run(output_dir, *flags):
    argv = ["--size", "tiny", "--repeats", "1", "--threads", "1", "--device", "cpu", "--output_dir", str(output_dir)]
    codec.main(codec.parse_args([*argv, *flags]))
    return json.loads((output_dir / "codec_tiny.json").read_text())


def test_results_and_table(tmp_path, capsys):
    results = run(tmp_path, "--rollouts", "6", "--no-growth")
    assert results["rollouts"] == len(results["codes"]) == 6
    assert 50 <= min(results["codes"]) < max(results["codes"]) <= 96
    assert results["equal"] is True and max(results["max_difference"].values()) < 1e-4
    assert results["seconds"].keys() == {BASELINE, "batched, padded", "ours"}
    for median, low, high in results["ratio"].values():
        assert 0 < low <= median <= high
    assert 0 < results["limit_s"] < results["seconds"]["ours"][0]
    assert "growth" not in results and [file.name for file in tmp_path.iterdir()] == ["codec_tiny.json"]
    printed = capsys.readouterr().out
    assert "| baseline: one at a time |" in printed and "| ours |" in printed


def test_growth(tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "GROWTH_ROLLOUTS", [2, 4])
    monkeypatch.setattr(codec, "GROWTH_CODES", [10, 20])
    results = run(tmp_path, "--rollouts", "2", "--min_codes", "5", "--max_codes", "9")
    for label, sizes in (("rollouts", [2, 4]), ("codes of the longest of 4", [10, 20])):
        lines = results["growth"][label]
        assert len(lines) == 4 and all(line[0] == sizes and min(line[1]) > 0 for line in lines.values())
    assert (tmp_path / "codec_tiny.png").stat().st_size > 10_000


def test_variants_that_differ_are_not_timed(tmp_path, monkeypatch):
    alone = codec.one_at_a_time
    monkeypatch.setattr(codec, "one_at_a_time", lambda *args: [wav + np.float32(0.001) for wav in alone(*args)])
    with pytest.raises(SystemExit, match="do not give the same results"):
        run(tmp_path, "--rollouts", "2", "--no-growth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--size", "real", "--growth"], "--growth: needs a GPU"),
        (["--dtype", "bfloat16"], "--dtype bfloat16: needs a GPU"),
        (["--repeats", "0"], "--repeats: must be >= 1 (got 0)"),
    ],
)
def test_bad_input_is_one_line(tmp_path, caplog, flags, error):
    args = codec.parse_args([*flags, "--threads", "1", "--device", "cpu", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        codec.main(args)
    assert exit.value.code == 2
    assert error in caplog.text


def test_decoder_flops():
    model = codec.load_model("tiny", torch.device("cpu"), torch.float32, seed=0)
    weights = sum(weight.numel() for weight in model.acoustic_decoder.parameters())
    # attention: 3 layers, 7 heads of 32; two products of 2 operations for each of 10 * 10 pairs
    assert codec.decoder_flops(model, [10, 1]) == 2 * weights * 11 + 4 * 3 * 224 * (100 + 1)
