"""benchmarks/vllm_rollout.py compares log-probs before it times anything, and says so where vLLM is missing."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import vllm_rollout
from benchmarks.rollout import Sampler


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler("tiny", torch.device("cpu"), seed=0, half=False)


@pytest.fixture(scope="module")
def sampled(sampler) -> tuple[torch.Tensor, torch.Tensor]:
    """Rollouts without END, and their log-probs one code at a time, from the distribution without END."""
    ids = sampler.sample(2, 100, confined=True, static=True, one_region=True, forced=True)
    assert ids.shape == (2, 100) and sampler.tokens.end_id not in ids  # unforced, most end before
    log_probs = []
    for i in range(0, 100, 25):
        whole = torch.cat([torch.tensor([sampler.prompt] * 2), ids[:, :i]], dim=1)
        logits = sampler.model(whole).logits[:, -1].detach()
        logits[:, sampler.tokens.end_id] = -torch.inf
        log_probs.append(logits.log_softmax(-1).gather(-1, ids[:, i : i + 1]))
    return ids, torch.cat(log_probs, dim=1)


def test_the_policys_scores_are_those_of_sampling_without_end(sampler, sampled):
    ids, log_probs = sampled
    torch.testing.assert_close(vllm_rollout.scored(sampler, ids)[:, ::25], log_probs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("off", [0.0, 0.01])
def test_other_log_probs_are_not_timed(sampler, sampled, off):
    ids, _ = sampled
    engine = SimpleNamespace(sample=lambda rollouts: (ids, vllm_rollout.scored(sampler, ids) + off))
    if off == 0:
        assert vllm_rollout.check_equal(sampler, engine, torch.float32) == 0
    else:
        with pytest.raises(SystemExit, match="do not give the same results"):
            vllm_rollout.check_equal(sampler, engine, torch.float32)


def test_vllm_is_needed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(vllm_rollout, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        vllm_rollout.main(vllm_rollout.parse_args(["--output_dir", str(tmp_path)]))
    assert stop.value.code == 2 and "vLLM is not installed here" in caplog.text
