"""Scoring over the confined head: TRL's numbers for less work; what vLLM is given."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from fake_llasa import TEXT, batch
from trl import GRPOConfig
from trl.trainer.utils import add_fused_lm_head, shuffle_sequence_dict, split_tensor_dict

from speech.tokens import asr_prompt, prepare_model, prepare_tokenizer, prompt_ids
from tiny.llasa import new_model, new_tokenizer
from training import grpo_trainer
from training.grpo_trainer import SpeechGRPOTrainer, prepare_vllm, score_confined


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = new_tokenizer([TEXT], num_codes=64)
    prepare_tokenizer(tokenizer)
    return tokenizer


@pytest.fixture
def model(tokenizer):
    return new_model(tokenizer, seed=0, hidden=48, layers=1)


@pytest.fixture
def tokens(tokenizer):
    return prepare_tokenizer(tokenizer)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_gradients_are_those_of_trls_full_head(tokenizer, tokens, temperature):
    ids, mask, labels = batch(tokenizer, tokens)
    results = []
    for narrow in (False, True):
        model = new_model(tokenizer, seed=0, hidden=48, layers=1)
        prepare_model(model, tokenizer, tokens)
        add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
        if narrow:
            score_confined(model, temperature)
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        (out.log_probs.sum() + 0.1 * out.entropy.sum()).backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (full, full_grads), (narrow, narrow_grads) = results
    torch.testing.assert_close(narrow.log_probs, full.log_probs)
    torch.testing.assert_close(narrow.entropy, full.entropy)
    assert full_grads.keys() == narrow_grads.keys()
    for name in full_grads:
        torch.testing.assert_close(narrow_grads[name], full_grads[name], msg=name)
    # By hand: the log-softmax over what is allowed, at the positions before the labels
    logits = model(ids, attention_mask=mask).logits[:, :-1] / temperature
    by_hand = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(narrow.log_probs, by_hand.masked_fill(labels[:, 1:] == -100, 0))


def test_a_metric_that_nobody_could_measure_is_no_value():
    trainer = SpeechGRPOTrainer.__new__(SpeechGRPOTrainer)
    trainer._pending_metrics = defaultdict(list)
    trainer._log_metric("dnsmos_ovrl", float("nan"))
    trainer._log_metric("wer", 0.25)
    assert trainer._pending_metrics == {"wer": [0.25]}


def test_where_all_rollouts_are_masked_their_advantages_are_0():
    """--mask_truncated_completions true, and none of a batch has ended."""
    trainer = SpeechGRPOTrainer.__new__(SpeechGRPOTrainer)
    trainer.reward_funcs = [SimpleNamespace(rollout_scorer=SimpleNamespace(rollouts=None))]
    trainer._own_rewards, trainer.reward_weights, trainer.num_generations = torch.zeros(4, 1), torch.ones(1), 4
    trainer.accelerator = SimpleNamespace(reduce=lambda values, how: values)
    assert trainer._token_advantages(torch.zeros(4, 6, dtype=torch.long)).equal(torch.zeros(4, 6))


def long_prompts(tokenizer, tokens):
    """Six rollouts of two clips, mixed, the prompts padded on the left and the texts on the right."""
    texts = ["Anna", "Anna found", TEXT, "two", "boxes.", "found two"]
    pad, width = tokenizer.pad_token_id, 8
    prompts = [prompt_ids(tokenizer, asr_prompt(codes)) for codes in ([5, 6, 7] * 20, [9] * 40)]
    longest, rows = max(map(len, prompts)), []
    for i, text in enumerate(texts):
        prompt = prompts[i % 2]
        answer = tokenizer(text, add_special_tokens=False)["input_ids"][: width - 1] + [tokens.text_end_id]
        left, right = longest - len(prompt), width - len(answer)
        rows.append(
            (
                [pad] * left + prompt + answer + [pad] * right,
                [0] * left + [1] * (len(prompt) + len(answer)) + [0] * right,
                [-100] * longest + answer + [-100] * right,
            )
        )
    return [torch.tensor(part) for part in zip(*rows, strict=True)]


def test_a_long_prompt_read_once_gives_the_same_scores_and_gradients(tokenizer, monkeypatch):
    tokens = prepare_tokenizer(tokenizer, "asr")
    ids, mask, labels = long_prompts(tokenizer, tokens)
    results, lengths = [], []
    for packed in (False, True):
        monkeypatch.setattr(grpo_trainer, "PACKED_FRAC", 0.5 if packed else 0.0)
        model = new_model(tokenizer, seed=0, hidden=48, layers=3)
        prepare_model(model, tokenizer, tokens, "asr")
        score_confined(model, temperature=0.7)
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        (out.log_probs * torch.arange(1.0, 7)[:, None]).sum().backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters()}))
    prompt_length = ids.shape[1] - 8
    assert lengths == [ids.shape, (2, prompt_length + 3 * 8)]
    (each, each_grads), (once, once_grads) = results
    assert each.log_probs.abs().sum() > 1
    torch.testing.assert_close(once.log_probs, each.log_probs)
    torch.testing.assert_close(once.entropy, each.entropy)
    for name in each_grads:
        torch.testing.assert_close(once_grads[name], each_grads[name], msg=name)


def test_a_batch_with_nothing_to_score(tokenizer):
    """--mask_truncated_completions leaves truncated rollouts out: here all of a micro-batch."""
    tokens = prepare_tokenizer(tokenizer, "asr")
    ids, mask, labels = long_prompts(tokenizer, tokens)
    model = new_model(tokenizer, seed=0, hidden=48, layers=1)
    prepare_model(model, tokenizer, tokens, "asr")
    score_confined(model, temperature=1.0)
    out = model(input_ids=ids, attention_mask=mask, labels=torch.full_like(labels, -100), fused_lm_head=True)
    assert not out.label_mask.any() and not out.log_probs.any()
    out.log_probs.sum().backward()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_arguments_that_are_none_do_not_stop_the_packing(tokenizer, tokens):
    """PEFT passes on all arguments of a forward, most of them None."""
    model = new_model(tokenizer, seed=0, hidden=48, layers=1)
    ids, mask, labels = long_prompts(tokenizer, tokens)
    prompt_length = int((labels != -100).any(dim=0).int().argmax())
    inputs = {"input_ids": ids, "attention_mask": mask, "inputs_embeds": None, "output_attentions": None}
    assert grpo_trainer.shared_prompts(model, inputs, prompt_length) is not None
    assert grpo_trainer.shared_prompts(model, inputs | {"inputs_embeds": ids}, prompt_length) is None


def update_settings(steps_per_generation: int, **settings) -> SimpleNamespace:
    defaults = {"steps_per_generation": steps_per_generation, "gradient_accumulation_steps": 4, "num_iterations": 1}
    defaults |= {"loss_type": "grpo", "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False}
    return SimpleNamespace(**(defaults | settings))


@pytest.mark.parametrize(
    ("settings", "free"),
    [
        ({}, True),
        ({"gradient_accumulation_steps": 8}, True),  # two generations, one update
        ({"gradient_accumulation_steps": 6}, False),  # the second generation is divided by an update
        ({"num_iterations": 2}, False),  # an update is half of a pass
        ({"loss_type": "bnpo"}, False),
        ({"top_entropy_quantile": 0.2}, False),
        ({"entropy_coef": 0.01}, False),
    ],
)
def test_the_order_of_rows_is_free_where_an_update_is_their_sum(settings, free):
    trainer = object.__new__(grpo_trainer.SpeechGRPOTrainer)
    trainer.args = update_settings(4, **settings)
    assert trainer._order_is_free() is free


def test_groups_without_signal():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, math.nan], [0.5, math.nan]])
    # Two groups of two. Their sums are equal in both; one by one only those of the second are
    weights = torch.tensor([1.0, 1.0])
    assert grpo_trainer.frac_without_signal(rewards, weights, 2, summed=True) == 1.0
    assert grpo_trainer.frac_without_signal(rewards, weights, 2, summed=False) == 0.5
    assert grpo_trainer.frac_without_signal(rewards, torch.tensor([2.0, 1.0]), 2, summed=True) == 0.5


def test_a_token_that_the_head_cannot_say_has_no_score(tokenizer, tokens):
    """TRL's kernel would take 0 for its logit: a loss without a bound."""
    model = new_model(tokenizer, seed=0, hidden=48, layers=1)
    prepare_model(model, tokenizer, tokens)
    score_confined(model, 1.0)
    ids, mask, _ = batch(tokenizer, tokens)
    with pytest.raises(ValueError, match="a token is to be scored that the confined head cannot say"):
        model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)


@pytest.mark.parametrize("prompt_length", [10, 3])
def test_rollouts_of_one_long_prompt_share_a_micro_batch(prompt_length, monkeypatch):
    """TRL shuffles them before it divides them; what belongs to a row stays with it."""
    prompts, group, length = 4, 3, 5
    rows = torch.arange(prompts * group)
    batch = {
        "prompt_ids": (rows // group)[:, None].expand(-1, prompt_length),
        "completion_ids": rows[:, None].expand(-1, length),
        "advantages": rows.float(),
        "diffro_text": [f"text of {row}" for row in rows.tolist()],
        "num_items_in_batch": torch.tensor(60),
        "old_per_token_logps": None,
    }

    def generate_and_divide(trainer, generation_batch):
        if generation_batch is not None:
            trainer._buffered_inputs = split_tensor_dict(shuffle_sequence_dict(generation_batch), prompts)
        return trainer._buffered_inputs[trainer._step]

    monkeypatch.setattr(grpo_trainer.GRPOTrainer, "_prepare_inputs", generate_and_divide)
    trainer = object.__new__(grpo_trainer.SpeechGRPOTrainer)
    trainer.model, trainer._buffered_inputs = SimpleNamespace(training=True), None
    trainer.args = update_settings(prompts)
    torch.manual_seed(0)
    seen, clips = [], []
    for trainer._step in range(prompts):
        inputs = trainer._prepare_inputs(batch if trainer._step == 0 else None)
        numbers = inputs["completion_ids"][:, 0].tolist()
        assert inputs["advantages"].tolist() == numbers and inputs["num_items_in_batch"] == 60
        assert inputs["diffro_text"] == [f"text of {row}" for row in numbers]
        assert inputs["prompt_ids"][:, 0].tolist() == [row // group for row in numbers]
        assert inputs["old_per_token_logps"] is None
        clips.append(len(inputs["prompt_ids"].unique(dim=0)))
        seen += numbers
    assert sorted(seen) == rows.tolist()
    assert (clips == [1] * prompts) == (prompt_length > length)


def trainer_with(head, use_vllm: bool = False):
    """As much of a SpeechGRPOTrainer as sampling asks for."""
    trainer = object.__new__(grpo_trainer.SpeechGRPOTrainer)
    trainer.use_vllm, trainer.model = use_vllm, SimpleNamespace(get_output_embeddings=lambda: head)
    trainer.accelerator = SimpleNamespace(
        unwrap_model=lambda model: model,
        device=torch.device("cpu"),
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    return trainer


def test_a_sharded_head_keeps_no_rows(model, tokenizer, tokens):
    """FSDP2: outside of a forward the weight is a DTensor, whose slices no plain tensor can be multiplied with."""
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    prepare_model(model, tokenizer, tokens)
    head = model.lm_head
    with torch.autocast("cpu", dtype=torch.bfloat16), trainer_with(head)._kept_head():
        assert head._kept is not None
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        head.weight = torch.nn.Parameter(distribute_tensor(head.weight.data, mesh))
        with torch.autocast("cpu", dtype=torch.bfloat16), trainer_with(head)._kept_head():
            assert head._kept is None
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use_vllm", [False, True])
def test_vllm_samples_outside_of_autocast(model, tokenizer, tokens, use_vllm, monkeypatch):
    """Inside, LoRA's merge into vLLM's weights would be rounded, and a compiled engine run in another format."""
    prepare_model(model, tokenizer, tokens)
    autocast = []
    monkeypatch.setattr(
        grpo_trainer.GRPOTrainer,
        "_generate_single_turn",
        lambda self: autocast.append(torch.is_autocast_enabled("cpu")),
    )
    trainer_with(model.lm_head, use_vllm)._generate_single_turn()
    assert autocast == [not use_vllm]


def test_short_prompts_are_not_packed(model, tokenizer, tokens):
    ids, mask, labels = batch(tokenizer, tokens)
    length = int((labels != -100).any(dim=0).int().argmax())
    assert grpo_trainer.shared_prompts(model, {"input_ids": ids, "attention_mask": mask}, length) is None


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
    monkeypatch.setattr(grpo_trainer.os, "environ", before)
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
