"""The memory estimate, against what PyTorch's tracker and profiler count, and for the shipped recipe."""

import contextlib
from collections.abc import Callable
from dataclasses import astuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import DistributedType
from fake_token2text import small
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMForXVector,
    Xcodec2Config,
    Xcodec2Model,
)
from trl.kernels import chunked_logprob
from whisper.model import AudioEncoder, ModelDimensions, TextDecoder

import train
from reward_models.token2text import Token2Text
from speech.confined_head import confine_head
from speech.speaker_encoder import SpeakerEncoder
from training import diffro, memory
from training.grpo_trainer import SpeechGRPOTrainer, keys_like_values
from training.scoring import score_confined

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
    usual |= {
        "max_completion_length": 0,
        "gradient_checkpointing": True,
        "eval_strategy": "no",
        "eval_on_start": False,
        "optim": "adamw_torch",
    }
    usual |= {"gradient_accumulation_steps": 1, "num_iterations": 1}
    usual |= {"distributed_state": SimpleNamespace(distributed_type=DistributedType.NO)}
    return SimpleNamespace(**usual | settings)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that is allocated at once while `run` works, inside of operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(allocated.cumsum(0).max())


def small_llama(first: int) -> LlamaForCausalLM:
    """25 M parameters, confined to the tokens from `first` on."""
    sizes = {"vocab_size": 20_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLASA_1B | sizes | heads))
    confine_head(model, list(range(first, 20_000)))
    return model


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_loss_takes_what_was_estimated(checkpointing):
    rows, length, first = 4, 200, 7_000
    model = small_llama(first).train()
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
    parts = memory.estimate(model, None, [], 0, memory.shapes_of(model, args, length))
    held = sum(parts[name] for name in ("policy", "gradients", "optimizer"))
    assert parts["loss"] == pytest.approx(measured - held, rel=0.25)  # the CPU's tile is the rough part of it


def test_a_layer_keeps_what_was_estimated():
    """To 1 %: beside it are two numbers a token of the norms, and one a head of the attention."""
    rows, length = 4, 200
    model = small_llama(19_999)
    hidden = torch.randn(rows, length, 512, requires_grad=True)
    rotary = model.model.rotary_emb(hidden, torch.arange(length)[None])
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *rotary)}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model.layers[0](hidden, attention_mask=None, position_embeddings=rotary)
    assert output.requires_grad  # and what it keeps is there until here
    measured = sum(size for storage, size in kept.items() if storage not in known)
    shapes = memory.shapes_of(model, arguments(per_device_train_batch_size=rows), length)
    assert rows * length * memory.layer_bytes(shapes) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16 autocast"])
def test_sampling_takes_what_was_estimated(half):
    """Long prompts, as in ASR: most of it is their one pass."""
    rows, prompt, new = 4, 300, 3
    model = small_llama(first=19_000).eval()
    ids = torch.randint(19_000, 20_000, (rows, prompt))

    def sample():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half), keys_like_values():
            kept = model.get_output_embeddings().kept_rows(torch.bfloat16) if half else contextlib.nullcontext()
            with kept:
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    do_sample=True,
                    top_k=0,
                    pad_token_id=0,
                    cache_implementation="static",
                    disable_compile=True,
                )

    measured = peak_bytes(sample)
    args = arguments(bf16=half, per_device_train_batch_size=rows, max_completion_length=new)
    shapes = memory.shapes_of(model, args, prompt + new)
    copies = memory.linear_bytes(model) if half else 0
    assert copies + memory.sampling_bytes(shapes) == pytest.approx(measured, rel=0.15)


@pytest.fixture(params=[(128, 2, 2), (256, 4, 4)], ids=str)
def token2text(request) -> Token2Text:
    width, times, layers = request.param
    shape = {"d_model": width, "d_kv": width // 4, "d_ff": times * width, "num_heads": 4}
    layers = {"num_layers": layers, "num_decoder_layers": 2}
    model = small()
    return Token2Text({"num_codes": 64, "labels": {}, "t5": shape | layers}, model.tokenizer).eval()


def test_token2text_takes_what_was_estimated(token2text):
    rows, codes, text = 8, 400, "anna found 2 boxes"
    token2text.requires_grad_(False)
    clips = ([[3] * codes] * memory.BATCH_SIZE, [text] * memory.BATCH_SIZE, ["en"] * memory.BATCH_SIZE)
    measured = peak_bytes(lambda: token2text.score(*clips))
    assert memory.token2text_scoring_bytes(token2text, codes) == pytest.approx(measured, rel=0.15)

    embeddings = torch.randn(rows, codes, token2text.t5.config.d_model, requires_grad=True)
    mask = torch.ones(rows, codes, dtype=torch.bool)

    def reward_and_gradient():
        states = token2text.encode(embeddings, mask)
        token2text.text_log_probs(*states, token2text.text_ids([text] * rows, ["en"] * rows)).sum().backward()

    shapes = memory.shapes_of(
        small_llama(19_999), arguments(per_device_train_batch_size=rows, max_completion_length=codes), 50 + codes
    )
    assert memory.diffro_bytes(shapes, token2text, 1, False) == pytest.approx(peak_bytes(reward_and_gradient), rel=0.15)


@pytest.mark.parametrize("exact_kl", [False, True])
@pytest.mark.parametrize("draws", [1, 3])
def test_a_chunk_of_logits_takes_what_was_estimated(draws, exact_kl, monkeypatch):
    positions, rows, width = 128, 4_096, 16
    for module in (diffro, memory):
        monkeypatch.setattr(module, "CHUNK_LOGITS", 32 * rows)
    hidden, weight = torch.randn(positions, width, requires_grad=True), torch.randn(rows, width)
    reference = (torch.randn(positions, width), weight) if exact_kl else (None, None)
    settings = torch.zeros(rows), reference[1], torch.randn(rows - 1, width), 1, 1.0, 1.0, True, exact_kl, draws

    def draw():
        sum(part.sum() for part in diffro.draw_codes(hidden, reference[0], weight, *settings)).backward()

    model = small_llama(first=20_000 - rows)
    shapes = memory.shapes_of(
        model, arguments(per_device_train_batch_size=2, max_completion_length=positions // 2), positions
    )
    estimated = memory.diffro_bytes(shapes, small(), draws, exact_kl)
    assert estimated == pytest.approx(peak_bytes(draw), rel=0.15)


@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_gradients_while_sampling(steps_per_generation, tmp_path, monkeypatch):
    """There are none after an update, and some where rollouts are sampled between its two micro-batches."""
    sample, seen = SpeechGRPOTrainer._generate_single_turn, []

    def watched(trainer, *args):
        seen.append(any(p.grad is not None for p in trainer.model.parameters()))
        return sample(trainer, *args)

    monkeypatch.setattr(SpeechGRPOTrainer, "_generate_single_turn", watched)
    flags = (
        "--config configs/tiny.yaml --max_steps 2 --per_device_train_batch_size 4 --num_generations 4 --sample_steps 0"
    )
    flags += " --gradient_accumulation_steps 2 --max_completion_length 20 --save_strategy no"
    flags += f" --steps_per_generation {steps_per_generation} --output_dir {tmp_path}"
    arguments = train.parse_args(flags.split())
    train.main(arguments)
    assert seen == ([False, True, False, True] if steps_per_generation == 1 else [False, False])
    assert memory.gradients_while_sampling(arguments[1]) == any(seen)


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
        max_completion_length=recipe["max_completion_length"],
        device=torch.device("cuda"),
    )
    length = 100 + recipe["max_completion_length"]
    shapes, scoring = memory.shapes_of(policy, args, length), memory.scoring_bytes(scorer)
    assert sum(p.numel() for p in policy.parameters()) == pytest.approx(1.37e9, rel=0.01)

    def estimated(offload: bool) -> dict[str, int]:
        scorers = SimpleNamespace(codec=SimpleNamespace(model=codec), whisper=scorer, offload=offload)
        return memory.estimate_run(policy, reference, scorers, args, length)

    parts, kept = estimated(recipe["offload_rewards"]), estimated(False)
    assert parts["peak"] < 39.4 * memory.GIB
    assert kept["peak"] > parts["peak"]
    assert kept["reward models"] == parts["scoring"] - scoring == memory.module_bytes(codec, scorer.model)
    # DDP averages gradients in buckets of its own, a second copy of them all.
    several = memory.estimate(policy, reference, [codec], scoring, shapes, ddp=True)
    one = memory.estimate(policy, reference, [codec], scoring, shapes)
    accumulating = memory.estimate(policy, reference, [codec], scoring, shapes, sampling_with_gradients=True)
    assert accumulating["peak"] >= one["peak"]
    assert several["peak"] - one["peak"] == pytest.approx(memory.ALLOCATOR_SLACK * one["gradients"], rel=1e-6)


def test_what_asr_and_diffro_add(real_sizes):
    """64 clips of 30 s and their prompts go through the policy at once; DiffRO reads 8 × 1,500 codes once more."""
    policy, reference, *_ = real_sizes
    args = {"bf16": True, "per_device_train_batch_size": 8, "steps_per_generation": 8, "device": torch.device("cuda")}
    speech = memory.shapes_of(policy, arguments(**args, max_completion_length=256), 1_560 + 256)
    text = memory.shapes_of(policy, arguments(**args, max_completion_length=256), 80 + 256)
    caches = [2 * 16 * 512 * 2 * 64 * length for length in (1_816, 336)]
    passes = [memory.sampling_bytes(shapes) - cache for shapes, cache in zip((speech, text), caches, strict=True)]
    # 64 × 1,560 tokens; 4 streams of 2,048 float32 and 3 activations of 8,192 bfloat16 each
    assert passes[0] == 64 * 1_560 * (4 * 2_048 * 4 + 3 * 8_192 * 2)
    assert passes[1] < passes[0] / 10
    shapes = memory.shapes_of(policy, arguments(**args, max_completion_length=1_500), 1_580)
    token2text = small()
    plain = memory.estimate(policy, reference, [], 0, shapes)
    both = memory.estimate(policy, reference, [], 0, shapes, token2text=token2text, diffro=8 * memory.GIB)
    assert both["token2text"] == memory.module_bytes(token2text) > 0
    assert 7 * memory.GIB < both["loss"] - plain["loss"] < 8 * memory.GIB, "the tile of GRPO's logits is gone by then"


def test_adapters_train_little(real_sizes):
    policy, *_ = real_sizes
    policy.requires_grad_(False)
    policy.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    shapes = memory.shapes_of(policy, arguments(per_device_train_batch_size=1, gradient_checkpointing=True), 100)
    parts = memory.estimate(policy, None, [], 0, shapes)
    policy.requires_grad_(True)
    assert parts["gradients"] == 2048 * 2048 * 4 and parts["reference"] == 0
    first, second = memory.report(parts).splitlines()
    assert first.startswith("memory: about ") and first.endswith(" GiB at the peak")
    assert second.startswith("  policy 5.1") and len(second) <= 120


def test_vllm_beside_the_policy_takes_its_share_of_the_gpu():
    parts = {"policy": 5, "peak": 30}
    args = SimpleNamespace(use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3)
    assert memory.with_vllm(parts, args, 40) == {"policy": 5, "peak": 42, "vLLM": 12}
    args.vllm_mode = "server"
    assert memory.with_vllm(parts, args, 40) == parts


def test_a_speaker_encoder_takes_what_was_estimated():
    """Of the published width, with fewer layers: the first convolution decides."""
    encoder = SpeakerEncoder(WavLMForXVector(WavLMConfig(num_hidden_layers=1)), Wav2Vec2FeatureExtractor())
    encoder.batch_seconds = 4
    wavs = list(0.1 * np.random.default_rng(0).standard_normal((2, 32_000), dtype=np.float32))
    measured = peak_bytes(lambda: encoder.embed(wavs))
    assert memory.speaker_scoring_bytes(encoder, codes=100) == pytest.approx(measured, rel=0.15)
    assert memory.speaker_scoring_bytes(encoder, codes=400) == pytest.approx(2 * measured, rel=0.15)  # one clip of 8 s


def test_offloaded_models_are_counted_with_those_that_work_beside_them():
    """Codec and Whisper come to the device, then codec and speaker encoder: never all three."""
    part = {name: SimpleNamespace(model=torch.nn.Linear(1_000, out)) for name, out in (("codec", 10), ("whisper", 300))}
    part["whisper"].dtype, part["whisper"].batch_size = torch.float16, 1
    part["whisper"].model.dims = LARGE_V3
    config = SimpleNamespace(conv_stride=[5], conv_dim=[512])
    encoder = SimpleNamespace(model=torch.nn.Linear(1_000, 200), batch_seconds=1)
    encoder.model.config = config
    policy, args = small_llama(first=19_000), arguments(per_device_train_batch_size=1, max_completion_length=50)

    def estimated(offload: bool) -> dict[str, int]:
        scorers = SimpleNamespace(**part, speaker_encoder=encoder, offload=offload)
        return memory.estimate_run(policy, None, scorers, args, 100)

    codec, whisper, speaker = (memory.module_bytes(one.model) for one in (*part.values(), encoder))
    working = memory.scoring_bytes(part["whisper"]), memory.speaker_scoring_bytes(encoder, 50)
    assert estimated(False)["reward models"] == codec + whisper + speaker
    assert estimated(False)["scoring"] == max(working)
    away = estimated(True)
    assert away["reward models"] == 0
    assert away["scoring"] == codec + max(whisper + working[0], speaker + working[1])


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_what_the_optimizer_keeps_is_counted(optim, tmp_path):
    """As transformers builds it for --optim."""
    model = torch.nn.Linear(64, 64, bias=False)
    training_args = TrainingArguments(str(tmp_path), optim=optim, use_cpu=True)
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(training_args)
    optimizer = optimizer_class(model.parameters(), **settings)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    state = optimizer.state_dict()["state"].values()
    kept = sum(v.numel() for one in state for v in one.values() if isinstance(v, torch.Tensor) and v.ndim)
    assert kept == memory.optimizer_copies(training_args) * model.weight.numel()
    policy = small_llama(first=19_999)
    parts = memory.estimate_run(policy, None, None, arguments(per_device_train_batch_size=1, optim=optim), 100)
    assert parts["optimizer"] == memory.optimizer_copies(training_args) * memory.module_bytes(policy, trainable=True)


def test_an_evaluation_may_sample_more_than_a_step():
    """64 held-out rows at once by default, also where a step has 8 rollouts: it would end a run after 100 steps."""
    model = small_llama(first=19_999)
    sizes = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "per_device_eval_batch_size": 64}
    rollouts = [
        memory.shapes_of(model, arguments(**sizes, eval_strategy=strategy), 100).rollouts
        for strategy in ("no", "steps")
    ]
    assert rollouts == [8, 64]


def test_the_loss_of_llasa_1b_takes_what_was_estimated_in_bfloat16(monkeypatch):
    """On fake tensors, which have sizes and no memory. As on a GPU, where the Triton kernels work on tiles in place."""
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        monkeypatch.setattr(chunked_logprob, name, lambda *_, **__: None)
    rows, length, first, vocabulary = 8, 1_100, 128_261, LLASA_1B["vocab_size"]
    tracker = MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LlamaForCausalLM(LlamaConfig(**LLASA_1B)).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        for parameter in model.parameters():  # as in a step's last micro-batch: gradients and Adam's state are there
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        tracker.track_external(model, optimizer)
        ids = torch.zeros(rows, length, dtype=torch.long)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
                head = model.lm_head.weight[first:], torch.zeros(vocabulary - first)
                settings = ids[:, 1:].flatten(), 1.0, memory.TILE_ROWS, None, 1.0, ("entropy",)
                log_probs, *_ = chunked_logprob.ChunkedLogProbFunction.apply(hidden, *head, *settings)
            log_probs.sum().backward()
        confine_head(model, [first, vocabulary - 1])
    measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    args = arguments(bf16=True, per_device_train_batch_size=rows, device=torch.device("cuda"))
    parts = memory.estimate(model, None, [], 0, memory.shapes_of(model, args, length))
    assert measured > 24 * memory.GIB
    assert parts["peak"] == pytest.approx(measured, rel=0.15)
