"""benchmarks/rollout.py runs, and its variants draw the same codes before they are timed."""

import json

import pytest
import torch

from benchmarks import rollout


def run(output_dir):
    argv = ["--rollouts", "2", "--codes", "6", "--repeats", "1", "--threads", "1", "--device", "cpu", "--no-growth"]
    rollout.main(rollout.parse_args([*argv, "--output_dir", str(output_dir)]))


@pytest.fixture(autouse=True)
def no_gigabyte(monkeypatch):
    monkeypatch.setattr(rollout, "memory_bandwidth", lambda device: 1e10)


def test_results_and_table(tmp_path, capsys):
    run(tmp_path)
    results = json.loads((tmp_path / "rollout_tiny.json").read_text())
    names = ["baseline: TRL", "+ confined head", "+ static cache"]
    assert results["frac_differing"] == dict.fromkeys(names, 0.0)
    assert {name: len(seconds) for name, seconds in results["seconds"].items()} == dict.fromkeys(names, 1)
    assert 0 < results["bandwidth_limit_s"] < min(results["seconds"].values())[0]
    assert "| + static cache |" in capsys.readouterr().out


def test_variants_that_differ_are_not_timed(tmp_path, monkeypatch):
    sample = rollout.Sampler.sample

    def another_code(self, *args, static, **how):
        return sample(self, *args, static=static, **how) + int(static)

    monkeypatch.setattr(rollout.Sampler, "sample", another_code)
    with pytest.raises(SystemExit, match="do not give the same results"):
        run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_variants_of_the_real_size_sample_in_bfloat16():
    """As on a GPU: float32 weights under autocast, where keys and values differ in dtype before they are cached."""
    sampler = rollout.Sampler("tiny", torch.device("cpu"), seed=0, half=True)
    variants = rollout.build_variants(sampler, rollouts=2, codes=6)
    names = [rollout.BASELINE, "+ confined head", "+ static cache", "+ weights cast once (ours)"]
    assert list(variants) == names
    codes = {name: sample() for name, sample in variants.items()}
    assert all(drawn.shape == (2, 6) for drawn in codes.values())
    assert torch.equal(codes["+ static cache"], codes["+ weights cast once (ours)"])
