"""DiffRO: gradients by finite differences, GRPO untouched, and each method with all that training comes with."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from fake_token2text import small
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from speech.tokens import prepare_model, prepare_tokenizer, tts_prompt
from tiny.llasa import new_model, new_tokenizer
from training import diffro, grpo_trainer
from training.diffro import METHODS, DiffROTrainer, draw_codes, sample_filter, straight_through
from training.grpo_trainer import SpeechGRPOTrainer

TEXTS = ["Anna found two boxes.", "Peter bought hats.", "Laura saw birds.", "Oliver sold six."]
HIDDEN, ROWS, CODES, WIDTH = 24, 67, 64, 32


def directional_slope(function, point: torch.Tensor, direction: torch.Tensor, step: float) -> float:
    """Central difference."""
    return float(function(point + step * direction) - function(point - step * direction)) / (2 * step)


# --- Drawing codes ----------------------------------------------------------------------------------------


def test_the_hard_forward_is_one_code_and_drawn_as_often_as_likely():
    embedding = torch.randn(5, 3)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    torch.manual_seed(0)
    drawn = straight_through(logits.expand(20_000, 5), embedding, temperature=0.7)
    matches = (drawn[:, None] == embedding).all(-1)
    assert (matches.sum(1) == 1).all()  # exactly, not nearly
    torch.testing.assert_close(matches.float().mean(0), logits.softmax(0), atol=0.015, rtol=0)


def test_the_backward_is_the_mixtures():
    """∂R/∂logits = J of the mixture, times ∂R/∂embedding taken at the code drawn."""
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(9, 4, dtype=torch.float64)
    torch.manual_seed(3)
    hard = straight_through(logits, embedding, 0.8)
    reward = hard.tanh().sum()
    [got] = torch.autograd.grad(reward, logits)
    upstream = 1 - hard.detach().tanh() ** 2
    torch.manual_seed(3)
    mixed = straight_through(logits, embedding, 0.8, hard=False)
    [wanted] = torch.autograd.grad((mixed * upstream).sum(), logits)
    torch.testing.assert_close(got, wanted)


def test_the_mixture_by_hand(monkeypatch):
    """All noise equal: softmax(logits / temperature) @ embedding."""
    monkeypatch.setattr(torch, "rand_like", lambda logits: torch.full_like(logits, 0.5))
    logits, embedding = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]])
    # e^(1 / 0.5) / (e^(1 / 0.5) + 1) = 0.8808
    assert straight_through(logits, embedding, 0.5, hard=False).item() == pytest.approx(0.8808, abs=1e-4)
    assert straight_through(logits, embedding, 0.5).item() == 1.0


def test_the_mixture_is_not_rounded_under_autocast():
    logits, embedding = torch.randn(7, CODES), torch.randn(CODES, WIDTH)
    torch.manual_seed(0)
    wanted = straight_through(logits, embedding, 0.7, hard=False)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = straight_through(logits, embedding, 0.7, hard=False)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, wanted)


def settings(measured: bool = True, hard: bool = True, dtype=torch.float32) -> tuple:
    """Bias to measured, as `draw_codes` takes them; END and two markers stand before the codes."""
    generator = torch.Generator().manual_seed(5)
    bias = torch.zeros(ROWS, dtype=dtype)
    bias[1:3] = -1e4
    embedding = torch.randn(CODES, WIDTH, generator=generator, dtype=dtype)
    reference = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype)
    return bias, reference, embedding, 3, 0.9, 0.7, hard, measured


def test_the_soft_rewards_gradient_is_the_finite_difference():
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, HIDDEN, dtype=torch.float64), torch.randn(ROWS, HIDDEN, dtype=torch.float64)

    def reward(parameters):
        torch.manual_seed(1)
        states, rows = parameters[:7], parameters[7:]
        drawn, kls, _ = draw_codes(states, hidden, rows, *settings(hard=False, dtype=torch.float64))
        return drawn.tanh().mean() - 0.1 * kls.mean()

    point = torch.cat([hidden + 0.1, weight]).requires_grad_()
    [slope] = torch.autograd.grad(reward(point), point)
    for seed in range(3):
        direction = torch.randn(point.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        measured = directional_slope(reward, point.detach(), direction, 1e-6)
        assert float((slope * direction).sum()) == pytest.approx(measured, rel=1e-6, abs=1e-9)


def test_chunks_change_nothing_and_bound_what_exists_at_once(monkeypatch):
    torch.manual_seed(0)
    states, reference = torch.randn(50, HIDDEN), torch.randn(50, HIDDEN)
    sizes, results = [], []
    original = straight_through
    monkeypatch.setattr(
        diffro, "straight_through", lambda logits, *a: sizes.append(len(logits)) or original(logits, *a)
    )
    for limit in (2**25, 8 * ROWS):
        monkeypatch.setattr(diffro, "CHUNK_LOGITS", limit)
        hidden = states.clone().requires_grad_()
        weight = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()
        torch.manual_seed(1)
        drawn, kls, entropies = draw_codes(hidden, reference, weight, *settings())
        after = torch.rand(1)
        (drawn.tanh().sum() + kls.sum()).backward()
        results.append((drawn, kls, entropies, hidden.grad, weight.grad, after))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked)
    # Whole: once. In chunks of 8 positions: 6 and a rest of 2, forward and again for the backward pass.
    assert sizes[0] == 50
    assert sorted(sizes[1:]) == [2, 2] + [8] * 12


def test_kl_and_entropy_are_those_of_the_whole_distribution():
    torch.manual_seed(0)
    hidden, reference, weight = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN), torch.randn(ROWS, HIDDEN)
    bias, reference_weight, *rest = settings()
    _, kls, entropies = draw_codes(hidden, reference, weight, bias, reference_weight, *rest)
    policy = torch.distributions.Categorical(logits=(hidden @ weight.T + bias) / 0.9)
    other = torch.distributions.Categorical(logits=(reference @ reference_weight.T + bias) / 0.9)
    torch.testing.assert_close(kls, torch.distributions.kl_divergence(policy, other))
    torch.testing.assert_close(entropies, policy.entropy())
    same = draw_codes(hidden, hidden, weight, bias, weight, *rest)[1]
    torch.testing.assert_close(same, torch.zeros(5))


# --- The filter -------------------------------------------------------------------------------------------


def test_what_each_filter_keeps():
    advantages = [1.0, -1.0, 0.0, 0.5, 0.5, 0.5]
    codes = [[1, 2], [1, 2], [1, 2], [], [7] * 25, [1, 2]]
    truncated = [False, False, False, False, False, True]
    assert sample_filter("none", advantages, codes, truncated) == [True, True, True, False, True, True]
    assert sample_filter("positive", advantages, codes, truncated) == [True, False, False, False, True, True]
    assert sample_filter("clean", advantages, codes, truncated) == [True, False, False, False, False, False]


# --- Training ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy on disk, because TRL loads the reference from there."""
    tokenizer = new_tokenizer(TEXTS, num_codes=64)
    path = tmp_path_factory.mktemp("policy")
    new_model(tokenizer, seed=0, hidden=48, layers=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def low_codes(completion_ids, **_) -> list[float]:
    """Of token ids alone; differs within every group."""
    return [-sum(ids) / len(ids) / 100 + len(ids) / 50 for ids in completion_ids]


OURS = inspect.signature(DiffROTrainer).parameters.keys() - {"args", "kwargs"}


def make(folder: Path, output_dir: Path, cls=DiffROTrainer, peft=None, **options) -> SpeechGRPOTrainer:
    ours = {name: options.pop(name) for name in OURS & options.keys()}
    args = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 10,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "loss_type": "grpo",
        "beta": 0.0,
        "seed": 0,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "shuffle_dataset": False,
    } | options
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = prepare_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prepare_model(model, tokenizer, tokens)
    if cls is DiffROTrainer:
        ours = {"tokens": tokens, "token2text": small({"speaker": ["rms", "slt"]}), "filter": "none"} | ours
    else:
        ours = {"allowed_ids": tokens.speech_ids}
    rows = [{"prompt": tts_prompt(text), "text": text, "speaker": "slt"} for text in TEXTS] * 8
    return cls(
        model=model,
        reward_funcs=[low_codes],
        args=GRPOConfig(output_dir=str(output_dir), **args),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft,
        **ours,
    )


def trained(trainer: SpeechGRPOTrainer, **options) -> dict[str, torch.Tensor]:
    trainer.train(**options)
    return {name: weights.detach().clone() for name, weights in trainer.model.named_parameters()}


def logged(trainer: SpeechGRPOTrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerance) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def first_batch(trainer: DiffROTrainer, seed: int = 0) -> dict:
    """A batch of rollouts, as the loss gets it."""
    torch.manual_seed(seed)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in trainer.train_dataset.select([0, 1]) for _ in range(4)]
    return trainer._generate_and_score_completions(rows)


def gradients(trainer: DiffROTrainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    loss.backward()
    return {name: weights.grad.clone() for name, weights in trainer.model.named_parameters()}


def test_combined_is_grpo_and_lambda_times_diffro_from_one_pass(folder, tmp_path):
    trainer = make(folder, tmp_path, diffro_weight=0.3)
    batch = first_batch(trainer)
    calls = []
    forward = trainer.model.base_model.forward
    trainer.model.base_model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    results = {}
    for method in ("grpo", "diffro", "grpo+diffro"):
        trainer.method = method
        compute_loss = trainer._compute_loss if method in METHODS else super(DiffROTrainer, trainer)._compute_loss
        torch.manual_seed(1)
        loss = compute_loss(trainer.model, batch)
        results[method] = loss.item(), gradients(trainer, loss)
    assert len(calls) == 3
    assert results["grpo+diffro"][0] == pytest.approx(results["grpo"][0] + 0.3 * results["diffro"][0], rel=1e-5)
    for name, combined in results["grpo+diffro"][1].items():
        apart = results["grpo"][1][name] + 0.3 * results["diffro"][1][name]
        torch.testing.assert_close(combined, apart, rtol=1e-4, atol=1e-6)


def test_only_kept_rollouts_count_in_a_mean_over_all(folder, tmp_path):
    trainer = make(folder, tmp_path, method="diffro", filter="positive")
    batch = first_batch(trainer)
    kept = batch["diffro_kept"]
    assert torch.equal(kept, batch["advantages"] > 0) and 0 < kept.sum() < 8
    torch.manual_seed(1)
    loss = trainer._compute_loss(trainer.model, batch)
    rows = kept.nonzero()[:, 0].tolist()
    part = {
        name: (value[kept] if isinstance(value, torch.Tensor) else [value[i] for i in rows])
        for name, value in batch.items()
        if name != "num_items_in_batch"
    }
    torch.manual_seed(1)
    alone = trainer._compute_loss(trainer.model, part)
    assert loss.item() == pytest.approx(alone.item() * len(rows) / 8, rel=1e-5)
    shares = trainer._metrics["train"]["diffro_frac_kept"]
    assert shares == pytest.approx([len(rows) / 8, 1.0])


@pytest.mark.parametrize("method", ["diffro", "grpo+diffro"])
def test_a_batch_of_which_nothing_is_kept(folder, tmp_path, method):
    """Its loss is connected to every weight, as other processes expect, and asks for nothing."""
    trainer = make(folder, tmp_path, method=method, filter="positive", beta=0.1)
    batch = first_batch(trainer)
    batch["diffro_kept"][:] = False
    batch["completion_mask"][0] = 0  # --mask_truncated_completions
    loss = trainer._compute_loss(trainer.model, batch)
    found = gradients(trainer, loss)
    assert trainer._metrics["train"]["diffro_frac_kept"] == [0.0]
    if method == "diffro":
        assert loss == 0 and all((slope == 0).all() for slope in found.values())


def test_reward_is_log_prob_of_the_codes_drawn(folder, tmp_path, monkeypatch):
    """With no noise and the mixture's forward, R is the model's log P given the policy's own distributions."""
    monkeypatch.setattr(torch, "rand_like", lambda logits: torch.full_like(logits, 0.5))
    trainer = make(folder, tmp_path, method="diffro", gumbel_hard=False, label_columns=("speaker",))
    batch = first_batch(trainer)
    lengths = torch.tensor([10, 4, 7, 9, 3, 8, 5, 6])
    batch["completion_ids"][torch.arange(8), lengths - 1] = trainer.tokens.end_id  # which is no code to be read
    trainer.token2text.embedding.weight.data *= 100  # R of random weights hardly depends on the codes
    batch["completion_mask"] = (torch.arange(10) < lengths[:, None]).long()
    loss = trainer._compute_loss(trainer.model, batch)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -batch["completion_ids"].shape[1] - 1 : -1]
    first = trainer.tokens.first_code_id
    soft = logits[..., first : first + 64].softmax(-1)
    spoken = (batch["completion_ids"] >= first) & batch["completion_mask"].bool()
    states = trainer.token2text.encode(trainer.token2text.embed(soft), spoken)
    text_ids = trainer.token2text.text_ids(batch["diffro_text"], ["en"] * len(spoken))
    rewards = trainer.token2text.text_log_probs(*states, text_ids)
    rewards = rewards + trainer.token2text.label_log_probs(*states)["speaker"][:, 1]
    assert -loss.item() == pytest.approx(rewards.mean().item(), rel=1e-4)


def test_kl_and_entropy_are_means_over_each_rollouts_tokens(folder, tmp_path):
    """And the loss is the sum over the rollouts kept of β · KL − R, by the number of all."""
    trainer = make(folder, tmp_path, method="diffro", filter="positive", beta=0.5, temperature=0.8)
    torch.manual_seed(2)
    with torch.no_grad():
        for weights in trainer.model.parameters():
            weights += 0.05 * torch.randn_like(weights)
    batch = first_batch(trainer)
    lengths = torch.tensor([10, 4, 7, 9, 3, 8, 5, 6])  # all eight have 10 tokens: END is rare
    batch["completion_mask"] = (torch.arange(10) < lengths[:, None]).long()
    loss = trainer._compute_loss(trainer.model, batch)
    inputs = {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
    }
    there, kept = batch["completion_mask"].bool(), batch["diffro_kept"]
    assert 1 < kept.sum() < 8
    with torch.no_grad():
        log_probs, others = (
            (model(**inputs).logits[:, -there.shape[1] - 1 : -1] / 0.8).log_softmax(-1)
            for model in (trainer.model, trainer.ref_model)
        )
    kls, entropies = (log_probs.exp() * (log_probs - others)).sum(-1), -(log_probs.exp() * log_probs).sum(-1)
    kl, entropy = (
        torch.stack([row[mask].mean() for row, mask in zip(values, there, strict=True)])[kept].mean().item()
        for values in (kls, entropies)
    )
    logged_means = {name: trainer._metrics["train"][name][-1] for name in ("kl", "entropy", "diffro_reward")}
    assert kl > 0.01 and logged_means["kl"] == pytest.approx(kl, rel=1e-4)
    assert logged_means["entropy"] == pytest.approx(entropy, rel=1e-4)
    expected = (0.5 * kl - logged_means["diffro_reward"]) * int(kept.sum()) / len(kept)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_row_without_a_language_is_english(folder, tmp_path):
    trainer = make(folder, tmp_path, method="diffro")
    trainer.model.train()
    rows = [{**trainer.train_dataset[0], "language": language} for language in ("de", None, "de", None)]
    assert trainer._generate_and_score_completions(rows)["diffro_language"] == ["de", "en", "de", "en"]


def test_several_draws_are_the_mean_of_single_ones(folder, tmp_path):
    """Each from noise of its own, in one pass of the policy: less noise in the gradient."""
    trainer = make(folder, tmp_path, method="diffro")
    batch = first_batch(trainer)

    def slope(seed: int, draws: int) -> tuple[float, torch.Tensor]:
        trainer.gumbel_draws = draws
        torch.manual_seed(seed)
        loss = trainer._compute_loss(trainer.model, batch)
        return loss.item(), gradients(trainer, loss)["model.embed_tokens.weight"].flatten()

    torch.manual_seed(5)
    noise = [torch.rand_like(torch.empty(n, 64)) for n in [int(batch["completion_mask"].sum())] * 3]
    with pytest.MonkeyPatch.context() as patch:
        given = iter([*noise, *noise])
        patch.setattr(torch, "rand_like", lambda logits: next(given).clone())
        together, singles = slope(0, draws=3), [slope(0, draws=1) for _ in range(3)]
    assert together[0] == pytest.approx(sum(loss for loss, _ in singles) / 3, rel=1e-5)
    torch.testing.assert_close(together[1], sum(g for _, g in singles) / 3, rtol=1e-4, atol=1e-7)

    def spread(draws: int) -> float:
        found = torch.stack([slope(seed, draws)[1] for seed in range(8)])
        return float(found.var(dim=0).sum())

    assert spread(8) < spread(1) / 4  # an eighth, as measured from eight


def test_the_whole_gradient_is_the_finite_difference(folder, tmp_path):
    """From the policy's weights through the token-to-text model, in double precision (inside, norms are single)."""
    trainer = make(folder, tmp_path, method="diffro", gumbel_hard=False, beta=30.0)
    batch = first_batch(trainer)
    for model in (trainer.model, trainer.ref_model, trainer.token2text):
        model.double()
    weight = trainer.model.base_model.layers[0].mlp.down_proj.weight
    weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))  # at 0 the KL is flat

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return trainer._compute_loss(trainer.model, batch)

    slope = gradients(trainer, loss())["model.layers.0.mlp.down_proj.weight"]
    direction = slope / slope.norm()
    values = []
    for step in (1e-2, -1e-2):
        weight.data += step * direction
        values.append(loss().item())
        weight.data -= step * direction
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(slope.norm().item(), rel=1e-2)


@pytest.mark.parametrize("method", ["diffro", "grpo+diffro"])
def test_two_half_batches_are_one(folder, tmp_path, method, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "groups_together", lambda batches: batches)  # Gumbel noise is drawn row by row
    options = {"method": method, "filter": "positive", "max_steps": 1, "beta": 0.1, "optim": "sgd"}
    whole = make(folder, tmp_path, **options)
    weights = trained(whole)
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    halves = make(folder, tmp_path, **parts, **options)
    assert_same(trained(halves), weights, rtol=1e-4, atol=1e-6)
    for name in ("diffro_frac_kept", "loss"):
        assert logged(whole)[0][name] == pytest.approx(logged(halves)[0][name], abs=1e-4)


def test_texts_stay_with_their_rollouts(folder, tmp_path):
    """TRL shuffles and divides the batch; each row must keep the text of its own prompt."""
    trainer = make(folder, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1)
    seen = []
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(inputs) or compute(model, inputs)
    trainer.train()
    assert len(seen) == 2
    for inputs in seen:
        prompts = trainer.processing_class.batch_decode(inputs["prompt_ids"])
        assert all(text in prompt for text, prompt in zip(inputs["diffro_text"], prompts, strict=True))


@pytest.mark.parametrize("method", ["grpo", "diffro", "grpo+diffro"])
@pytest.mark.parametrize("lora", [False, True])
def test_lora_and_gradient_checkpointing(folder, tmp_path, method, lora):
    peft = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None
    cls, method = (SpeechGRPOTrainer, {}) if method == "grpo" else (DiffROTrainer, {"method": method})
    trainer = make(folder, tmp_path, cls, peft, gradient_checkpointing=True, beta=0.1, **method)
    before = {name: weights.detach().clone() for name, weights in trainer.model.named_parameters()}
    after = trained(trainer)
    unmoved = [n for n, w in trainer.model.named_parameters() if w.requires_grad and torch.equal(before[n], after[n])]
    assert unmoved == []
    entries = logged(trainer)
    assert len(entries) == 2
    assert abs(entries[0]["kl"]) < 1e-5 and entries[1]["kl"] > 1e-6
    if method:
        assert all({"diffro_reward", "diffro_frac_kept", "gumbel_temperature"} <= entry.keys() for entry in entries)
    assert all(entry["entropy"] > 1 for entry in entries)


def test_evaluation(folder, tmp_path):
    trainer = make(folder, tmp_path, method="diffro", per_device_eval_batch_size=8)
    found = trainer.evaluate(trainer.train_dataset.select(range(2)))
    assert found["eval_loss"] == pytest.approx(-found["eval_diffro_reward"], rel=1e-4)


@pytest.mark.parametrize("method", ["diffro", "grpo+diffro"])
def test_resumed_is_uninterrupted(folder, tmp_path, method):
    options = {"method": method, "max_steps": 4, "gumbel_temperature": 2.0, "gumbel_temperature_end": 0.5}
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = make(folder, tmp_path / "a", **saved, **options)
    weights = trained(whole)
    assert [entry["gumbel_temperature"] for entry in logged(whole)] == pytest.approx([2.0, 1.5, 1.0, 0.5])
    resumed = make(folder, tmp_path / "b", **saved, **options)
    assert_same(trained(resumed, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2")), weights, rtol=0, atol=0)


def test_diffro_alone_raises_its_reward(folder, tmp_path):
    trainer = make(folder, tmp_path, method="diffro", max_steps=12, per_device_train_batch_size=16)
    trainer.train()
    rewards = [entry["diffro_reward"] for entry in logged(trainer)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ppo"}, "method 'ppo' is none of diffro"),
        ({"filter": "best"}, "filter 'best' is none of"),
        ({"diffro_weight": 0.0}, "diffro_weight must be above 0"),
        ({"gumbel_temperature": 0.0}, "gumbel_temperature must be above 0"),
        ({"gumbel_draws": 0}, "gumbel_draws must be at least 1"),
        ({"gumbel_temperature_end": float("nan")}, "gumbel_temperature_end must be above 0"),
        ({"label_columns": ("emotion",)}, "no head for 'emotion'"),
        ({"cast_lm_head_to_fp32": True}, "leave cast_lm_head_to_fp32 off"),
    ],
)
def test_bad_settings(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(folder, tmp_path, **options)


TWO_PROCESSES = """
import faulthandler
faulthandler.dump_traceback_later(90, exit=True)  # one that waits for the other must not outlive the test
import json, sys, torch
sys.path[:0] = ["tests", "tests/training"]
import conftest
from pathlib import Path
from test_diffro import logged, make, trained
folder, out = map(Path, sys.argv[1:])
found = {}
for method in ("diffro", "grpo+diffro"):
    trainer = make(folder, out, method=method, filter="positive", per_device_train_batch_size=4, beta=0.1)
    compute = trainer._compute_loss
    def nothing_kept_by_one(model, inputs):
        if trainer.accelerator.process_index and trainer.state.global_step:
            inputs["diffro_kept"][:] = False
        return compute(model, inputs)
    trainer._compute_loss = nothing_kept_by_one
    weights = torch.cat([w.flatten() for w in trained(trainer).values()])
    every = trainer.accelerator.gather(weights[None])
    assert torch.equal(every[0], every[1])
    found[method] = logged(trainer)
if trainer.is_world_process_zero():
    (out / "log.json").write_text(json.dumps(found))
trainer.accelerator.wait_for_everyone()  # as train.py does
trainer.end()
"""


def test_two_processes(folder, tmp_path):
    """The weights stay the same in both, also where the filter leaves one of them with nothing."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd()}
    subprocess.run([*command, str(script), str(folder), str(tmp_path)], env=environment, check=True, timeout=120)
    for entries in json.loads((tmp_path / "log.json").read_text()).values():
        assert len(entries) == 2 and all("diffro_reward" in entry for entry in entries)
        assert entries[1]["diffro_frac_kept"] <= 0.5
