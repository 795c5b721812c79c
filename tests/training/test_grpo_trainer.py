"""What SpeechGRPOTrainer does in another way than TRL's."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from reward_models.parts import Part
from speech.tokens import prepare_model
from training import grpo_trainer
from training.grpo_trainer import SpeechGRPOTrainer


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


def test_nan_from_a_reward_is_not_taken_for_none(monkeypatch):
    """TRL turns None into NaN, and then leaves both out of the sum."""

    def faulty(**_):
        return [0.5, math.nan]

    def rewards_of(trainer, inputs):
        return torch.tensor([reward(completion_ids=inputs) for reward in trainer.reward_funcs]).T

    monkeypatch.setattr(grpo_trainer.GRPOTrainer, "_calculate_rewards", rewards_of)
    trainer = SpeechGRPOTrainer.__new__(SpeechGRPOTrainer)
    trainer.reward_funcs = [faulty]
    with pytest.raises(ValueError, match="reward faulty: must give each of 2 rollouts a finite number"):
        trainer._calculate_rewards([[1], [2]])


def test_advantages_in_time_by_hand():
    """Two groups of two. With u = 1 / √2, which a pair is normalised to: the first reward, of weight 1, gives the first
    group ±u, half of it to the rollout and half to its first token; the second, of weight 0.5, gives it ±u / 2 behind
    the first token; the third, without parts, gives the second group ±u / 2. Squares over u²: 2 + 3 + 0.25 + 0.5. The
    other process has none, and 15 tokens beside these 8: the RMS is u √(5.75 / 23) = u / 2."""
    first = {0: Part(1.0, 0.0, 0.02)}, {0: Part(0.0, 0.0, 0.02)}, None, None
    end = {"end": Part(1.0, 0.02, math.inf)}, {"end": Part(0.0, 0.02, math.inf)}, None, None
    scorer = SimpleNamespace(rollouts="rollouts")
    trainer = SpeechGRPOTrainer.__new__(SpeechGRPOTrainer)
    trainer.reward_funcs = [
        SimpleNamespace(rollout_scorer=scorer, whole_frac=0.5, parts=lambda rollouts, i: first[i]),
        SimpleNamespace(rollout_scorer=scorer, parts=lambda rollouts, i: end[i]),
        SimpleNamespace(rollout_scorer=scorer),
    ]
    trainer._own_rewards = torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 0, 2], [1, 0, 0]])
    trainer.reward_weights, trainer.num_generations = torch.tensor([1.0, 0.5, 0.5]), 2
    reduced = []
    trainer.accelerator = SimpleNamespace(
        reduce=lambda own, how: reduced.append((own.tolist(), how)) or own + torch.tensor([0.0, 15.0])
    )
    mask = torch.arange(4) < torch.tensor([2, 3, 1, 2])[:, None]
    expected = torch.tensor([[2.0, 2, 0, 0], [-2, -2, -2, 0], [1, 0, 0, 0], [-1, -1, 0, 0]])
    torch.testing.assert_close(trainer._token_advantages(mask.long()), expected, rtol=0, atol=1e-3)
    assert reduced == [([pytest.approx(5.75 / 2, abs=2e-3), 8.0], "sum")]


@pytest.mark.parametrize(
    ("training", "credit", "frac"), [(True, "rollout", 0.75), (True, "time", 0.5), (False, "time", 0.0)]
)
def test_rewards_of_all_processes_and_of_this_one(training, credit, frac, monkeypatch):
    """Groups of two, whose sums differ in the first alone, and one by one in the second too; groups of four differ."""
    rewards = torch.tensor([[0.0, 0], [1, 0], [1, 0], [0, 1], [2, 0], [2, 0], [3, 1], [3, 1]])
    monkeypatch.setattr(grpo_trainer.GRPOTrainer, "_calculate_rewards", lambda *_: rewards)
    trainer = SpeechGRPOTrainer.__new__(SpeechGRPOTrainer)
    trainer.accelerator, trainer.model = SimpleNamespace(process_index=1), SimpleNamespace(training=training)
    trainer.num_generations, trainer.num_generations_eval = 2, 4
    trainer.reward_funcs, trainer.reward_weights, trainer.credit = [], torch.ones(2), credit
    trainer.multi_objective_aggregation = "sum_then_normalize"
    assert trainer._calculate_rewards([{}] * 4) is rewards
    assert trainer._own_rewards.equal(rewards[4:]) and trainer._frac_without_signal == frac


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
        ({"use_adaptive_entropy": True}, False),
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
    missing = torch.tensor([[0.5], [0.5], [math.nan]])
    for summed in (True, False):
        assert grpo_trainer.frac_without_signal(missing, weights[:1], 3, summed) == 1.0


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
