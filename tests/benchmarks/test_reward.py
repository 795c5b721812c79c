"""benchmarks/reward.py runs, its sides agree before they are timed, and its JSON holds what it printed."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import reward  # noqa: E402
from harness import REFERENCE  # noqa: E402


def run(output_dir, *flags):
    argv = ["--size", "tiny", "--rollouts", "6", "--repeats", "1", "--threads", "1", "--device", "cpu"]
    reward.main(reward.parse_args([*argv, "--output_dir", str(output_dir), *flags]))


def test_reward_benchmark(tmp_path, capsys):
    run(tmp_path)
    results = json.loads((tmp_path / "reward_tiny.json").read_text())
    assert results["rollouts"] == len(results["codes"]) == 6
    assert results["differences"]["this project"]["transcripts_differing"] == 0
    assert results["differences"]["this project"]["max_nll_difference"] < 1e-3
    assert 0 < results["mean"]["reward"] < 1 and 0 < results["mean"]["nll"] < 20
    assert {name: len(seconds) for name, seconds in results["seconds"].items()} == {REFERENCE: 1, "this project": 1}
    median, low, high = results["ratio"]["this project"]
    assert 0 < low <= median <= high
    stages = results["stage_seconds"]["this project"]
    assert tuple(stages) == reward.STAGES and all(seconds > 0 for seconds in stages.values())
    assert 0 < results["encoder_limit_s"]["this project"] < 1
    printed = capsys.readouterr().out
    assert "| one at a time |" in printed and "| this project |" in printed and "teacher forcing" in printed


def test_sides_that_differ_are_not_timed(tmp_path, monkeypatch):
    heard = reward.one_at_a_time

    def deaf(*args):
        return [reward.Heard("", item.wer, item.nll, item.reward) for item in heard(*args)]

    monkeypatch.setattr(reward, "one_at_a_time", deaf)
    with pytest.raises(SystemExit, match="do not give the same results"):
        run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_rollout_without_codes_earns_nothing():
    codec, scorers = reward.load_models("tiny", reward.torch.device("cpu"), seed=0, half=False)
    scorer = scorers["this project"]
    sides = (reward.one_at_a_time, reward.in_batches)
    [a], [b] = (side(codec, scorer, [[]], ["Anna found two boxes."]) for side in sides)
    assert a == b == reward.Heard("", 1.0, reward.MAX_NLL, 0.0)


def test_encoder_flops():
    # 1 layer, 2 positions, width 4, 3 mels: convolutions 2 * 3 * (4 * 3 * 4 + 2 * 16) = 480;
    # projections and MLP 2 * 12 * 2 * 16 = 768; attention 2 * 2 * 4 * 4 = 64
    sizes = {"n_mels": 3, "n_audio_ctx": 2, "n_audio_state": 4, "n_audio_layer": 1}
    dims = reward.whisper.ModelDimensions(**(reward.LARGE_V3 | sizes))
    assert reward.encoder_flops(dims) == 480 + 768 + 64
