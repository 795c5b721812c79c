"""Load the policy that train.py trains, and what scores its rollouts."""

import logging
from collections.abc import Collection

import torch
from peft import PeftConfig, PeftModel
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig

from common.cli import InputError, library_errors_are_input
from reward_models import RewardConfig, models_needed
from reward_models.preference import PreferenceModel
from reward_models.rollouts import SpeechRolloutScorer
from reward_models.token2text import Token2Text
from reward_models.transcripts import TranscriptScorer
from speech.checkpoint_files import UNREADABLE
from speech.codec import SpeechCodec
from speech.dnsmos import Dnsmos
from speech.speaker_encoder import SpeakerEncoder
from speech.tokens import SpeechTokens, prepare_model
from speech.weights import check_adapter, check_finite, load_causal_lm
from speech.whisper_scorer import WhisperScorer
from training.recipes import GRPORecipe, ScriptArguments

logger = logging.getLogger("train")


def load_model(model_args: ModelConfig, tokenizer, tokens: SpeechTokens, task: str):
    """The policy, confined to a task's answers; from a LoRA folder a PeftModel whose adapter is trained further."""
    name, adapter = model_args.model_name_or_path, None
    with library_errors_are_input(f"--model_name_or_path {name}: its LoRA config cannot be read", *UNREADABLE):
        if find_adapter_config_file(name, revision=model_args.model_revision):
            adapter = name
            name = PeftConfig.from_pretrained(adapter, revision=model_args.model_revision).base_model_name_or_path
    if adapter and model_args.use_peft:
        raise InputError(
            f"--use_peft: {adapter} is a LoRA adapter already, and is trained further as it is. Leave the flag out"
        )
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    options = {key: value for key, value in options.items() if value is not None}
    if adapter is None:
        model = load_causal_lm(name, revision=model_args.model_revision, **options)
    else:
        try:
            model = load_causal_lm(name, **options)
        except InputError as error:
            raise InputError(f"--model_name_or_path {adapter}: its base model {error}") from error
    if model.dtype in (torch.bfloat16, torch.float16) and not (adapter or model_args.use_peft):
        logger.warning(
            "--dtype %s without LoRA: AdamW's steps are smaller than %s resolves, so most weights stay as they are "
            "(DeepSpeed and FSDP keep float32 copies). Use --dtype float32, or --use_peft true",
            model_args.dtype,
            str(model.dtype).removeprefix("torch."),
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and head.weight is not embedding.weight:
        logger.warning("%s: its config ties head and embeddings, its weights differ; they are kept apart", name)
        model.config.tie_word_embeddings = False  # or what is saved would load with one of the two
    prepare_model(model, tokenizer, tokens, task)
    if adapter is None:
        return model
    with library_errors_are_input(f"--model_name_or_path {adapter}: its LoRA weights cannot be loaded", *UNREADABLE):
        model = PeftModel.from_pretrained(model, adapter, revision=model_args.model_revision, is_trainable=True)
    check_adapter(adapter, model)
    check_finite(adapter, model)
    return model


def load_rollout_scorer(
    script_args: ScriptArguments,
    training_args: GRPORecipe,
    rewards: RewardConfig,
    languages: Collection[str],
    tokenizer,
    tokens: SpeechTokens,
) -> SpeechRolloutScorer | TranscriptScorer:
    """What the task's rewards are computed from, with those models that they need; text needs none.

    Args:
        languages: of the rows that it is to score.
    """
    if script_args.task == "asr":
        return TranscriptScorer(tokenizer, tokens.text_end_id)
    needed, device = models_needed(rewards, script_args.task), training_args.device
    codec, whisper, token2text, speaker_encoder, preference_model = None, None, None, None, None
    if "diffro" in script_args.method or "token2text" in needed:
        if not script_args.token2text:
            raise InputError(f"{script_args.reward_config}: the reward token2text needs --token2text, its model")
        token2text = Token2Text.from_pretrained(script_args.token2text, device)
    if "preference_model" in needed:
        if not script_args.preference_model:
            raise InputError(f"{script_args.reward_config}: the reward preference needs --preference_model, its model")
        preference_model = PreferenceModel.from_pretrained(script_args.preference_model, device)
    if "codec" in needed:
        codec = SpeechCodec.from_pretrained(script_args.codec_id, device=device)
        codec.drop_encoder()
    if "whisper" in needed:
        whisper = WhisperScorer(script_args.whisper, device=device)
        whisper.check_languages(languages)
    if "speaker_encoder" in needed:
        speaker_encoder = SpeakerEncoder.from_pretrained(script_args.speaker_encoder, device)
    group_size, offload = training_args.num_generations, script_args.offload_rewards
    return SpeechRolloutScorer(
        tokens,
        codec,
        whisper,
        group_size,
        offload,
        token2text,
        word_times="word_times" in needed,
        speaker_encoder=speaker_encoder,
        dnsmos=Dnsmos() if "dnsmos" in needed else None,
        preference_model=preference_model,
    )
