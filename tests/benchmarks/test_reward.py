"""benchmarks/reward.py runs, its variants agree before they are timed, and its JSON holds what it printed."""

import dataclasses
import json

import pytest

from benchmarks import reward
from benchmarks.harness import BASELINE


def run(output_dir, *flags):
    argv = ["--size", "tiny", "--rollouts", "6", "--repeats", "1", "--threads", "1", "--device", "cpu"]
    reward.main(reward.parse_args([*argv, "--output_dir", str(output_dir), *flags]))


def test_results_and_tables(tmp_path, capsys):
    run(tmp_path)
    results = json.loads((tmp_path / "reward_tiny.json").read_text())
    assert results["rollouts"] == len(results["codes"]) == 6
    assert results["differences"]["ours"]["transcripts_differing"] == 0
    assert results["differences"]["ours"]["max_nll_difference"] < 1e-3
    assert 0 < results["mean"]["reward"] < 1 and 0 < results["mean"]["nll"] < 20
    assert {name: len(seconds) for name, seconds in results["seconds"].items()} == {BASELINE: 1, "ours": 1}
    median, low, high = results["ratio"]["ours"]
    assert 0 < low <= median <= high
    stages = results["stage_seconds"]["ours"]
    assert tuple(stages) == reward.STAGES and all(seconds > 0 for seconds in stages.values())
    assert 0 < results["encoder_limit_s"]["ours"] < 1
    printed = capsys.readouterr().out
    assert "| baseline: one at a time |" in printed and "| ours |" in printed and "teacher forcing" in printed


def test_variants_that_differ_are_not_timed(tmp_path, monkeypatch):
    alone = reward.one_at_a_time

    def without_transcripts(*args):
        return [item._replace(score=dataclasses.replace(item.score, hyp_text="")) for item in alone(*args)]

    monkeypatch.setattr(reward, "one_at_a_time", without_transcripts)
    with pytest.raises(SystemExit, match="do not give the same results"):
        run(tmp_path, "--rollouts", "2")
    assert not list(tmp_path.iterdir())


def test_a_rollout_without_codes_earns_nothing():
    codec, scorers = reward.load_models("tiny", reward.torch.device("cpu"), seed=0, half=False)
    variants = (reward.one_at_a_time, reward.in_batches)
    [a], [b] = (variant(codec, scorers["ours"], [[]], ["Anna found two boxes."]) for variant in variants)
    assert a == b == reward.ScoredRollout(reward.Score("", 1.0, reward.MAX_NLL, 4, 4, "empty"), 0.0)


def test_encoder_flops():
    # 1 layer, 2 positions, width 4, 3 mels: convolutions 2 * 3 * (4 * 3 * 4 + 2 * 16) = 480;
    # projections and MLP 2 * 12 * 2 * 16 = 768; attention 2 * 2 * 4 * 4 = 64
    sizes = {"n_mels": 3, "n_audio_ctx": 2, "n_audio_state": 4, "n_audio_layer": 1}
    dims = reward.whisper.ModelDimensions(**(reward.LARGE_V3 | sizes))
    assert reward.encoder_flops(dims) == 480 + 768 + 64
