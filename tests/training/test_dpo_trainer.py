"""DPO on a confined policy: its log-probs are GRPO's, its loss is the paper's formula."""

import json

import pytest
import torch
from fake_policy import save_policy

import train
from training.grpo_trainer import SpeechGRPOTrainer
from training.recipes import GRPORecipe

PAIRS = [
    {"text": "Anna found two boxes.", "chosen_codes": [1, 2, 3, 4], "rejected_codes": [9, 9]},
    {"text": "Go.", "chosen_codes": [5], "rejected_codes": [6, 7, 8], "ref_text": "Hm.", "ref_codes": [1] * 60},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    save_policy(folder / "policy", initializer_range=0.1)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return folder


def dpo_trainer(folder, *flags: str):
    """The trainer that train.py would run."""
    given = [
        "--method",
        "dpo",
        "--model_name_or_path",
        str(folder / "policy"),
        "--dataset",
        str(folder / "pairs.jsonl"),
    ]
    given += ["--output_dir", str(folder / "run"), "--use_cpu", "true", "--gradient_checkpointing", "false"]
    script_args, training_args, model_args = train.parse_args([*given, *flags])
    tokenizer, tokens = train.load_tokenizer(str(folder / "policy"))
    return train.dpo_trainer(script_args, training_args, model_args, tokenizer, tokens)


def scored(trainer, batch: dict) -> torch.Tensor:
    """Log-probs that the loss is made of, shape (rows, time − 1): those of both pairs' chosen, then rejected."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return trainer.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs


def test_log_probs_are_those_of_grpo_on_the_same_rows(folder):
    """GRPO pads prompts on the left and reads a shared one once; DPO pads on the right: the same numbers."""
    dpo = dpo_trainer(folder)
    rows = dpo.train_dataset
    log_probs = scored(dpo, dpo.data_collator(list(rows)))
    args = GRPORecipe(output_dir=str(folder / "grpo"), use_cpu=True, num_generations=2, per_device_train_batch_size=2)
    grpo = SpeechGRPOTrainer(
        model=dpo.model,
        reward_funcs=[lambda completion_ids, **_: [0.0] * len(completion_ids)],
        args=args,
        train_dataset=rows.add_column("prompt", ["a"] * len(rows)),
        processing_class=dpo.processing_class,
        allowed_ids=train.load_tokenizer(str(folder / "policy"))[1].speech_ids,
    )
    completions = [row[name] for name in ("chosen_ids", "rejected_ids") for row in rows]
    prompts = [row["prompt_ids"] for _ in range(2) for row in rows]
    width, room, pad = max(map(len, prompts)), max(map(len, completions)), dpo.processing_class.pad_token_id
    ids = [
        [pad] * (width - len(prompt)) + prompt + completion + [pad] * (room - len(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    mask = [
        [0] * (width - len(prompt)) + [1] * (len(prompt) + len(completion)) + [0] * (room - len(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    with torch.no_grad():
        theirs, *_ = grpo._get_per_token_logps_and_entropies(grpo.model, torch.tensor(ids), torch.tensor(mask), room)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ours = log_probs[row, len(prompt) - 1 : len(prompt) - 1 + len(completion)]
        torch.testing.assert_close(ours, theirs[row, : len(completion)], rtol=0, atol=1e-5)
        assert ours.std() > 0.1, "not all alike, or a wrong position would not show"
        assert log_probs[row].count_nonzero() == len(completion), "the loss is of the answer only"


@pytest.mark.parametrize("weighting", ["false", "true"])
def test_the_loss_is_that_of_the_paper(folder, weighting):
    """−log σ(β ((log π(c) − log ref(c)) − (log π(r) − log ref(r)))), the mean over pairs (arXiv 2305.18290, eq. 7)."""
    trainer = dpo_trainer(folder, "--beta", "0.3", "--use_weighting", weighting)
    batch = trainer.data_collator(list(trainer.train_dataset))
    reference = scored(trainer, batch).sum(1)
    assert trainer.compute_loss(trainer.model, batch).item() > 0
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in trainer.model.parameters():
            weights.add_(0.02 * torch.randn_like(weights))
    log_probs = scored(trainer, batch)
    ratios = log_probs.sum(1) - reference
    expected = -torch.nn.functional.logsigmoid(0.3 * (ratios[:2] - ratios[2:]))
    assert expected.min() < 0.68 or expected.max() > 0.7, "the update is to change something"
    if weighting == "true":  # WPO (arXiv 2406.11827, eq. 2): weighted by both answers' alignment, which is above 0
        assert 0 < trainer.compute_loss(trainer.model, batch).item() < 0.9 * expected.mean().item()
    else:
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.mean().item(), abs=1e-5)


def test_the_reference_may_say_what_the_policy_may(folder):
    trainer = dpo_trainer(folder)
    heads = [model.get_output_embeddings() for model in (trainer.model, trainer.ref_model)]
    assert heads[0] is not heads[1] and torch.equal(heads[0].bias, heads[1].bias)


def test_the_reference_is_scored_in_the_policys_precision(folder):
    trainer = dpo_trainer(folder, "--bf16", "true")
    batch = trainer.data_collator(list(trainer.train_dataset))
    exact = scored(trainer, batch)
    with trainer.accelerator.autocast():  # as the training prepares the policy
        rounded = scored(trainer, batch)
    trainer.model = trainer.ref_model
    assert torch.equal(scored(trainer, batch), rounded) and not torch.equal(rounded, exact)


@pytest.mark.parametrize("adapter", [[], ["--use_peft", "true", "--lora_r", "2"]], ids=["all weights", "lora"])
def test_reference_log_probs_computed_beforehand(folder, adapter):
    """--precompute_ref_log_probs true keeps no reference in memory; its numbers are those of the start."""
    trainer = dpo_trainer(folder, "--precompute_ref_log_probs", "true", *adapter)
    assert trainer.ref_model is None
    batch = trainer.data_collator(list(trainer.train_dataset))
    log_probs = scored(trainer, batch).sum(1)
    torch.testing.assert_close(batch["ref_chosen_logps"], log_probs[:2], rtol=0, atol=1e-4)
    torch.testing.assert_close(batch["ref_rejected_logps"], log_probs[2:], rtol=0, atol=1e-4)
