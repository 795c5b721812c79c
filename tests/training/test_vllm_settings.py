"""What vLLM is given, and what is refused before it starts."""

import pytest
from trl import GRPOConfig

from training import vllm_settings
from training.vllm_settings import prepare_vllm


def vllm_config(tmp_path, **settings) -> GRPOConfig:
    return GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)


def test_vllm_is_told_where_to_stop(tmp_path):
    args = vllm_config(tmp_path, vllm_importance_sampling_mode="token_truncate", generation_kwargs={"seed": 3})
    prepare_vllm(args, allowed_ids=[5, 8, 9], end_id=5, max_length=2048)
    assert args.generation_kwargs == {
        "stop_token_ids": [5],
        "allowed_token_ids": [5, 8, 9],
        "detokenize": False,
        "seed": 3,
    }
    assert args.vllm_max_model_length == 2048


@pytest.mark.parametrize(("before", "after"), [({}, "0"), ({"VLLM_USE_V2_MODEL_RUNNER": "1"}, "1")])
def test_vllm_uses_the_model_runner_that_takes_65_537_allowed_tokens(tmp_path, monkeypatch, before, after):
    args = vllm_config(tmp_path, vllm_importance_sampling_mode="token_truncate")
    monkeypatch.setattr(vllm_settings.os, "environ", before)
    prepare_vllm(args, [5, 8, 9], 5, 2048)
    assert before == {"VLLM_USE_V2_MODEL_RUNNER": after}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.95}, "--top_p 0.95 with vLLM"),
        ({"top_k": 50}, "--top_k 50 with vLLM"),
        ({"min_p": 0.1}, "--min_p 0.1 with vLLM"),
        ({"repetition_penalty": 1.1}, "--repetition_penalty 1.1 with vLLM"),
        ({"vllm_importance_sampling_mode": "sequence_mask"}, "Use token_truncate"),
        ({"vllm_mode": "server"}, "--vllm_mode server: the weights go to the server by NCCL"),
    ],
)
def test_vllm_settings_that_teach_nothing_are_refused(tmp_path, settings, message):
    settings = {"vllm_importance_sampling_mode": "token_truncate"} | settings
    with pytest.raises(ValueError, match=message):
        prepare_vllm(vllm_config(tmp_path, **settings), [5], 5, 2048)
