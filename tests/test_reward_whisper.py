"""The formulas of the WER + NLL reward by hand, the reward of one clip, and the script."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from fake_whisper import babble, save_random_whisper

import reward_whisper
from common.cli import InputError
from reward_whisper import check_parameters, harmonic_mean, nll_reward, reward, wer_reward
from speech.audio import load_audio, save_audio
from speech.whisper_scorer import MAX_NLL, Score, WhisperScorer

# --- Formulas ---


def test_wer_reward_by_hand():
    assert wer_reward(0.0) == 1.0
    # tanh(0.3) = (e^0.6 - 1) / (e^0.6 + 1) = 0.8221188 / 2.8221188 = 0.2913126
    assert wer_reward(0.1) == pytest.approx(1 - 0.2913126, abs=1e-7)
    # alpha 1, WER 1: tanh(1) = (e^2 - 1) / (e^2 + 1) = 6.3890561 / 8.3890561 = 0.7615942
    assert wer_reward(1.0, alpha_wer=1.0) == pytest.approx(0.2384058, abs=1e-7)


def test_nll_reward_by_hand():
    assert nll_reward(0.0) == 1.0
    assert nll_reward(0.6) == pytest.approx(0.8187308, abs=1e-7)  # e^-0.2
    assert nll_reward(3.0) == pytest.approx(0.3678794, abs=1e-7)  # e^-1
    assert nll_reward(1.0, alpha_nll=0.5) == pytest.approx(0.1353353, abs=1e-7)  # e^-2
    assert 0.001 < nll_reward(MAX_NLL) < 0.0013  # e^-6.67: the worst, and still above 0


def test_harmonic_mean_by_hand():
    # 1 / (0.6 / 0.5 + 0.4 / 0.8) = 1 / (1.2 + 0.5) = 0.5882353
    assert harmonic_mean(0.5, 0.8) == pytest.approx(0.5882353, abs=1e-7)
    # weights need not add up to 1: 3 / (1 / 0.5 + 2 / 0.25) = 3 / 10
    assert harmonic_mean(0.5, 0.25, lambda_wer=1, lambda_nll=2) == pytest.approx(0.3)
    assert harmonic_mean(0.7, 0.7) == pytest.approx(0.7)
    assert harmonic_mean(0.0, 1.0) == harmonic_mean(1.0, 0.0) == harmonic_mean(0.0, 0.0) == 0.0
    # A weight of 0 leaves its term out, even when that term is 0.
    assert harmonic_mean(0.5, 0.0, lambda_wer=1, lambda_nll=0) == 0.5
    assert harmonic_mean(0.0, 0.5, lambda_wer=0, lambda_nll=1) == 0.5


def test_rewards_are_bounded_and_monotone():
    grid = np.linspace(0, 5, 51)
    for formula in (wer_reward, nll_reward):
        values = [formula(x) for x in grid]
        assert all(0 <= v <= 1 for v in values)
        assert all(a > b for a, b in itertools.pairwise(values))
    unit = np.linspace(0.05, 1, 20)
    for fixed in unit:
        for values in ([harmonic_mean(r, fixed) for r in unit], [harmonic_mean(fixed, r) for r in unit]):
            assert all(a < b for a, b in itertools.pairwise(values))
            assert all(min(r, fixed) - 1e-12 <= v <= max(r, fixed) + 1e-12 for r, v in zip(unit, values, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1])
def test_numbers_out_of_range_are_refused(bad):
    for call in (
        lambda: wer_reward(bad),
        lambda: nll_reward(bad),
        lambda: harmonic_mean(bad, 0.5),
        lambda: harmonic_mean(0.5, bad),
        lambda: harmonic_mean(0.5, 0.5, lambda_wer=bad),
        lambda: wer_reward(0.5, alpha_wer=bad),
        lambda: nll_reward(0.5, alpha_nll=bad),
    ):
        with pytest.raises(ValueError, match="must be finite.*got"):
            call()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha_wer": 0.0}, r"alpha_wer: must be finite and > 0 \(got 0.0\)"),
        ({"alpha_nll": math.nan}, "alpha_nll: must be finite and > 0"),
        ({"lambda_wer": -0.1}, r"lambda_wer: must be finite and >= 0 \(got -0.1\)"),
        ({"lambda_nll": math.inf}, "lambda_nll: must be finite and >= 0"),
        ({"lambda_wer": 0.0, "lambda_nll": 0.0}, "must not both be 0"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(InputError, match=message):
        check_parameters(**parameters)
    with pytest.raises(InputError, match=message):
        reward(Score("a", 0.5, 0.5, 1, 2), **parameters)


def test_reward_of_a_clip_by_hand():
    score = Score("the hat", wer=0.1, nll=0.6, edits=1, ref_length=10)
    # R_wer = 0.7086874, R_nll = 0.8187308; 1 / (0.6 / 0.7086874 + 0.4 / 0.8187308) = 1 / (0.8466356 + 0.4885611)
    assert reward(score) == pytest.approx(0.7489533, abs=1e-7)
    assert reward(score, lambda_wer=1.0, lambda_nll=0.0) == wer_reward(0.1)
    assert reward(score, lambda_wer=0.0, lambda_nll=1.0, alpha_nll=6.0) == nll_reward(0.6, 6.0)


def test_reward_of_truncated_and_failed_clips_is_0():
    assert reward(Score("the hat", 0.0, 0.0, 0, 2), truncated=True) == 0.0
    for failure in ("empty", "silent", "non_finite"):
        score = Score("", 1.0, MAX_NLL, 2, 2, failure)
        assert reward(score) == reward(score, truncated=True) == 0.0
    # By its numbers alone a failure would be low, and not 0: 1 / (0.6 / 0.00494 + 0.4 / 0.00127) = 0.0023
    assert harmonic_mean(wer_reward(1.0), nll_reward(MAX_NLL)) == pytest.approx(0.0023, abs=1e-4)
    assert reward(Score("", 1.0, MAX_NLL, 2, 2)) == pytest.approx(0.0023, abs=1e-4)


# --- The script ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random_whisper(tmp_path_factory.mktemp("whisper") / "random.pt")


def run_script(**flags) -> None:
    argv = [f"--{name}={value}" for name, value in flags.items()]
    reward_whisper.main(reward_whisper.parse_args(argv))


def test_script_prints_the_components(checkpoint, tmp_path, capsys):
    path = tmp_path / "a.wav"
    save_audio(path, babble(1, 9))
    run_script(audio=path, text="Hello there.", whisper=checkpoint, device="cpu", alpha_nll=6)
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    score = WhisperScorer(checkpoint, device="cpu").score([load_audio(path)], ["Hello there."])[0]
    r_wer, r_nll = wer_reward(score.wer), nll_reward(score.nll, 6)
    assert list(printed) == ["audio", "transcript", "WER", "NLL", "R_wer", "R_nll", "R"]
    assert printed["NLL"] == f"{score.nll:.4f} nats per token"
    assert printed["R_nll"] == f"{r_nll:.4f}"
    assert printed["R"] == f"{harmonic_mean(r_wer, r_nll):.4f}"


def test_script_on_a_silent_clip(checkpoint, tmp_path, capsys):
    path = tmp_path / "silent.wav"
    save_audio(path, np.zeros(8_000, np.float32))
    run_script(audio=path, text="你好", whisper=checkpoint, device="cpu", language="zh")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "audio      0.50 s (silent: not transcribed, R is 0)"
    assert lines[2].split()[:2] == ["CER", "1.0000"] and lines[-1].split() == ["R", "0.0000"]


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("audio", "missing.wav", "missing.wav: no such audio file"),
        ("text", "...", "is empty after"),
        ("language", "klingon", "unknown language 'klingon'"),
        ("whisper", "missing.pt", "missing.pt: no such Whisper model"),
        ("lambda_wer", "-1", "lambda_wer: must be"),
        ("alpha_nll", "0", "alpha_nll: must be"),
        ("device", "quantum", "--device quantum"),
    ],
)
def test_bad_input_of_the_script_is_one_line_of_error(checkpoint, tmp_path, caplog, flag, value, message):
    save_audio(tmp_path / "a.wav", babble(1, 9))
    flags = {"audio": tmp_path / "a.wav", "text": "Hello", "whisper": checkpoint, "device": "cpu"}
    with pytest.raises(SystemExit) as stop:
        run_script(**flags | {flag: value})
    assert stop.value.code == 2
    [record] = caplog.records
    assert record.getMessage().startswith("error: ") and message in record.getMessage()
    assert "\n" not in record.getMessage()


def test_script_without_a_traceback(tmp_path):
    """As a process: exit code 2 and one line on stderr."""
    argv = [sys.executable, "reward_whisper.py", f"--audio={tmp_path / 'missing.wav'}", "--text=Hello"]
    process = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
