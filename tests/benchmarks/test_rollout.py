"""benchmarks/rollout.py runs, and its variants draw the same codes before they are timed."""

import json

import pytest

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
