"""What vLLM needs to sample the policy's rollouts, and the settings with which nothing would be learnt."""

import os

from transformers import AutoConfig
from trl import GRPOConfig

from common.cli import InputError
from training.scoring import causal_lm

# With any of these vLLM samples from a cut distribution, and its log-probs are those of the cut one.
NEUTRAL_SAMPLING = {"top_p": (1.0,), "top_k": (0, -1, None), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}


def prepare_vllm(args: GRPOConfig, allowed_ids: list[int], end_id: int, max_length: int) -> None:
    """Fill in what vLLM needs with each request, and refuse what would silently stop the learning. In place.

    vLLM reads the tokenizer and the generation config from disk and never sees the confined head, so END and the
    allowed tokens are given with each request. Of its two model runners only the older takes them: the newer, which
    vLLM 0.30 has by default on a GPU, ends with "Too many allowed token IDs" above 1,024.

    Args:
        max_length: tokens of prompt and speech; vLLM would reserve memory for Llama-3.2's 131,072 otherwise.
    Raises:
        InputError: truncated sampling, or an importance ratio over whole sequences. TRL multiplies the loss by
            exp(Σ (train − sample)) of the log-probs; over 1,000 codes a mean difference of 0.05 makes that e^−50.
            Or a server without a GPU here.
    """
    if args.vllm_mode == "server" and args.device.type != "cuda":
        raise InputError(
            f"--vllm_mode server: the weights go to the server by NCCL, from GPU to GPU (got {args.device.type}). "
            "Use --vllm_mode colocate"
        )
    for name, neutral in NEUTRAL_SAMPLING.items():
        if getattr(args, name) not in neutral:
            raise InputError(
                f"--{name} {getattr(args, name)} with vLLM: the importance-sampling correction would weight every "
                f"rollout by about 0 and nothing would be learnt. Sample by temperature alone (--{name} {neutral[0]})"
            )
    mode = args.vllm_importance_sampling_mode
    if args.vllm_importance_sampling_correction and not mode.startswith("token"):
        raise InputError(
            f"--vllm_importance_sampling_mode {mode}: a ratio over a whole rollout of up to "
            f"{args.max_completion_length} codes is about 0 or out of bounds, and its rollout teaches nothing. "
            "Use token_truncate"
        )
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    ours = {"stop_token_ids": [end_id], "allowed_token_ids": allowed_ids, "detokenize": False}
    args.generation_kwargs = ours | (args.generation_kwargs or {})
    args.vllm_max_model_length = args.vllm_max_model_length or max_length


def check_vllm_head(model) -> None:
    """Raises InputError where vLLM, which reads the config on the disk, would sample with another head than ours."""
    config = causal_lm(model).config
    name, commit = config._name_or_path, getattr(config, "_commit_hash", None)
    on_disk = AutoConfig.from_pretrained(name, revision=commit or "main")
    if on_disk.tie_word_embeddings and not config.tie_word_embeddings:
        raise InputError(
            f"--use_vllm: the config of {name} ties head and embeddings and its weights differ, so vLLM would take the "
            "embeddings as head. Set tie_word_embeddings to false in the config.json of a local copy, or leave "
            "--use_vllm out"
        )
