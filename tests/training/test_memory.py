"""The memory estimate, against what PyTorch's tracker counts, and for the shipped recipe."""

from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, LlamaForCausalLM, Xcodec2Config, Xcodec2Model
from whisper.model import AudioEncoder, ModelDimensions, TextDecoder

from speech.confined_head import confine_head
from training import memory
from training.grpo_trainer import score_confined

LLASA_1B = {  # Llama-3.2-1B with Llasa's vocabulary
    "vocab_size": 193_800,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LARGE_V3 = ModelDimensions(128, 1500, 1280, 20, 32, 51_866, 448, 1280, 20, 32)


def arguments(**settings) -> SimpleNamespace:
    """What `shapes_of` reads of a GRPOConfig."""
    usual = {"bf16": False, "fp16": False, "steps_per_generation": 1, "device": torch.device("cpu")}
    return SimpleNamespace(**usual | settings)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_loss_takes_what_was_estimated(checkpointing):
    rows, length, first = 4, 200, 7_000
    sizes = {"vocab_size": 20_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLASA_1B | sizes | heads)).train()
    confine_head(model, list(range(first, 20_000)))
    score_confined(model, temperature=1.0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():  # so that the optimizer's state is there
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        ids = torch.randint(first, 20_000, (rows, length))
        model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum().backward()
        optimizer.step()
    measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    args = arguments(per_device_train_batch_size=rows, gradient_checkpointing=checkpointing)
    parts = memory.estimate(model, None, [], 0, memory.shapes_of(model, args, length), False)
    named = ("policy", "gradients", "optimizer", "loss")
    assert sum(parts[name] for name in named) == pytest.approx(measured, rel=0.15)


@pytest.fixture(scope="module")
def real_sizes():
    """Llasa-1B, a reference, and the reward models, without memory."""
    with torch.device("meta"):
        policy, reference = (LlamaForCausalLM(LlamaConfig(**LLASA_1B)) for _ in range(2))
        # Not whisper.model.Whisper: it makes a sparse tensor, which cannot be without memory
        parts = AudioEncoder(*astuple(LARGE_V3)[:5]), TextDecoder(*astuple(LARGE_V3)[5:])
        whisper = torch.nn.ModuleList(parts).half()
        whisper.dims = LARGE_V3
        codec = Xcodec2Model(Xcodec2Config())
    for model in (policy, reference):
        confine_head(model, [128_261, *range(128_264, 193_800)])
    return policy, reference, codec, SimpleNamespace(model=whisper, batch_size=17, dtype=torch.float16)


def test_the_recipe_fits_its_card(real_sizes):
    policy, reference, codec, scorer = real_sizes
    recipe = yaml.safe_load(open("configs/llasa_1b_a100_40gb.yaml"))
    args = arguments(
        bf16=True,  # train.py's default on a GPU
        per_device_train_batch_size=recipe["per_device_train_batch_size"],
        steps_per_generation=recipe["gradient_accumulation_steps"],
        gradient_checkpointing=recipe["gradient_checkpointing"],
        device=torch.device("cuda"),
    )
    shapes = memory.shapes_of(policy, args, 100 + recipe["max_completion_length"])
    scoring = memory.scoring_bytes(scorer)
    assert sum(p.numel() for p in policy.parameters()) == pytest.approx(1.37e9, rel=0.01)
    parts = memory.estimate(policy, reference, [codec, scorer.model], scoring, shapes, recipe["offload_rewards"])
    assert parts["peak"] < 39.4 * memory.GIB
    kept = memory.estimate(policy, reference, [codec, scorer.model], scoring, shapes, False)
    assert kept["peak"] > parts["peak"]
    # DDP averages gradients in buckets of its own, a second copy of them all.
    several = memory.estimate(policy, reference, [codec], scoring, shapes, False, ddp=True)
    one = memory.estimate(policy, reference, [codec], scoring, shapes, False)
    assert several["peak"] - one["peak"] == pytest.approx(memory.ALLOCATOR_SLACK * one["gradients"], rel=1e-6)


def test_adapters_train_little(real_sizes):
    policy, *_ = real_sizes
    policy.requires_grad_(False)
    policy.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    shapes = memory.shapes_of(policy, arguments(per_device_train_batch_size=1, gradient_checkpointing=True), 100)
    parts = memory.estimate(policy, None, [], 0, shapes, False)
    policy.requires_grad_(True)
    assert parts["gradients"] == 2048 * 2048 * 4 and parts["reference"] == 0
    first, second = memory.report(parts).splitlines()
    assert first.startswith("memory: about ") and first.endswith(" GiB at the peak")
    assert second.startswith("  policy 5.1") and len(second) <= 120
