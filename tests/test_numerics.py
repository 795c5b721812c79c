"""train.py in a GPU's number formats, on the CPU: bfloat16 autocast for the policy, float16 for Whisper.

Every method × task × adapter trains two steps, saves after each, and is resumed from the first.
"""

import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from fake_policy import NUM_CODES, save_policy
from fake_token2text import small
from safetensors.torch import load_file

import train
from reward_models.rollouts import SpeechRolloutScorer
from speech.codec import SpeechCodec
from speech.policy import load_tokenizer
from speech.tokens import prompt_ids
from speech.whisper_scorer import MAX_NLL, WhisperScorer
from training import models
from training.gradients import stop_at_broken_gradients

AUTOCAST = ["--bf16", "true", "--use_cpu", "true"]
LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear"]
ADAPTERS = {
    "all weights": [],
    "lora": LORA,
    "on an sft lora": [],
    "all weights in bfloat16": ["--dtype", "bfloat16"],
    "lora on float32": [*LORA, "--dtype", "float32"],
}
TASKS = {"sft": ("tts", "asr"), "grpo": ("tts", "asr"), "diffro": ("tts",), "grpo+diffro": ("tts",), "dpo": ("tts",)}
RL = ("grpo", "diffro", "grpo+diffro")  # of rollouts
CELLS = [(method, task, adapter) for method in TASKS for task in TASKS[method] for adapter in [*ADAPTERS][:3]]
CELLS += [("grpo", "tts", "all weights in bfloat16"), ("grpo", "tts", "lora on float32")]

GROUP = 4


def mean_code(completion_ids, **_) -> list[float]:
    """A reward of the token ids alone; it differs within every group."""
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


@dataclass
class Run:
    """A finished run: its trainer, the parameters before and after, and its log."""

    folder: Path
    trainer: object
    before: dict[str, torch.Tensor]

    @property
    def log(self) -> list[dict]:
        history = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [entry for entry in history if "grad_norm" in entry]

    @property
    def saved(self) -> dict[str, torch.Tensor]:
        [weights] = self.folder.glob("*.safetensors")
        return load_file(weights)


def run(output_dir: Path, *flags: str, reward=None) -> Run:
    """train.py in a GPU's number formats, without its console; `reward` in place of those of the config."""
    runs = []

    def keep(trainer, *_):
        before = {name: weights.detach().clone() for name, weights in trainer.model.named_parameters()}
        runs.append(Run(output_dir, trainer, before))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "use_own_console_and_card", keep)
        patch.setattr(train, "plot_curves", lambda *_: None)  # seconds of matplotlib
        if reward is not None:
            patch.setattr(train, "build_rewards", lambda *_: ([reward], [1.0]))
        train.main(train.parse_args([*flags, *AUTOCAST, "--output_dir", str(output_dir), "--disable_tqdm", "true"]))
    return runs.pop()


class Setup:
    """A small random Llasa, rows with text and codes, and runs of train.py on them, each made once."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, {}
        self.policy = save_policy(folder / "policy", initializer_range=0.1)
        small(num_codes=NUM_CODES).save_pretrained(folder / "token2text")
        (folder / "duration.json").write_text('{"duration": {}}')  # needs neither codec nor Whisper
        texts = [json.loads(line)["text"] for line in Path("tiny/texts/train.jsonl").read_text().splitlines()[:8]]
        rows = [
            {"text": text, "audio_codes": [(7 * i + 3 * j) % 64 for j in range(30 + 3 * i)]}
            for i, text in enumerate(texts)
        ]
        pairs = [
            {"text": row["text"], "chosen_codes": row["audio_codes"], "rejected_codes": row["audio_codes"][:20]}
            for row in rows
        ]
        for name, lines in (("rows", rows), ("pairs", pairs)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def flags(self, method: str, task: str, adapter: str) -> list[str]:
        start = self.whole("sft", task, "lora").folder if adapter == "on an sft lora" else self.policy
        flags = ["--method", method, "--task", task, "--model_name_or_path", str(start), *ADAPTERS[adapter]]
        dataset = self.folder / ("pairs.jsonl" if method == "dpo" else "rows.jsonl")
        flags += ["--dataset", str(dataset), "--max_steps", "2", "--save_steps", "1"]
        flags += ["--logging_steps", "1", "--learning_rate", "3e-3", "--lr_scheduler_type", "constant"]
        flags += ["--per_device_train_batch_size", str(2 * GROUP), "--gradient_accumulation_steps", "1"]
        if method in ("sft", "dpo"):
            flags += ["--warmup_steps", "0"]  # or the first step changes nothing
        if method in RL:
            flags += ["--num_generations", str(GROUP), "--max_completion_length", "8", "--sample_steps", "0"]
        if method in RL and task == "tts":
            flags += ["--reward_config", str(self.folder / "duration.json")]
        if "diffro" in method:
            flags += ["--token2text", str(self.folder / "token2text"), "--diffro_filter", "none"]
        return flags

    def whole(self, *cell: str) -> Run:
        """The two steps of a cell without an interruption."""
        if cell not in self.runs:
            self.runs[cell] = run(self.folder / "-".join(cell), *self.flags(*cell), reward=mean_code)
        return self.runs[cell]


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    return Setup(tmp_path_factory.mktemp("numerics"))


@pytest.mark.parametrize(("method", "task", "adapter"), CELLS, ids=lambda value: value.replace(" ", "_"))
def test_two_steps_and_a_resumed_run(setup, tmp_path, method, task, adapter):
    whole = setup.whole(method, task, adapter)
    assert len(whole.log) == 2
    assert all(math.isfinite(entry["loss"]) and 0 < entry["grad_norm"] < math.inf for entry in whole.log)
    if method == "dpo":
        # Policy and reference are one model before the first update, whose two steps see all pairs
        assert whole.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and whole.log[0]["rewards/margins"] == 0
        assert whole.log[1]["rewards/margins"] > 0
    if method in RL:
        assert whole.log[0]["reward_std"] > 0
        assert abs(whole.log[0]["kl"]) < 1e-3  # policy and reference are one model before the first update
    if "diffro" in method:
        assert all(-20 < entry["diffro_reward"] < 0 for entry in whole.log)

    after = dict(whole.trainer.model.named_parameters())
    trained = {name for name, weights in after.items() if weights.requires_grad}
    moved = {name for name, weights in after.items() if not torch.equal(weights, whole.before[name])}
    assert moved == trained
    assert all(("lora" in name) == ("lora" in adapter) for name in trained)

    shutil.copytree(whole.folder / "checkpoint-1", tmp_path / "checkpoint-1")
    flags = [*setup.flags(method, task, adapter), "--resume_from_checkpoint", "true"]
    resumed = run(tmp_path, *flags, reward=mean_code)
    assert resumed.saved.keys() == whole.saved.keys()
    assert [name for name, weights in whole.saved.items() if not torch.equal(weights, resumed.saved[name])] == []

    if method in RL:
        difference, cache_dtype = sampled_minus_scored(whole.trainer)
        assert difference.mean() < 0.01 and cache_dtype == torch.bfloat16  # 0.003 at most here; LoRA's dropout: 0.02


@pytest.mark.parametrize(
    ("method", "value", "more"),
    [
        ("sft", math.nan, ""),
        ("grpo", math.nan, ""),
        ("dpo", math.nan, ""),
        ("sft", math.inf, "--max_grad_norm 0"),
        ("grpo", math.inf, "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"),
    ],
)
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_are(
    setup, tmp_path, method, value, more, monkeypatch
):
    torch.backends.cuda.enable_cudnn_sdp(True)  # PyTorch's default, which gives NaN on some GPUs
    trainers = []

    def broken_in_step_2(trainer, *_):
        trainers.append(trainer)
        weights = next(trainer.model.parameters())
        weights.register_hook(lambda grad: grad.fill_(value) if trainer.state.global_step == 1 else grad)

    monkeypatch.setattr(train, "use_own_console_and_card", broken_in_step_2)
    monkeypatch.setattr(train, "build_rewards", lambda *_: ([mean_code], [1.0]))
    flags = [*setup.flags(method, "tts", "all weights"), *AUTOCAST, *more.split(), "--disable_tqdm", "true"]
    rows = "prompt_ids|chosen_input_ids|input_ids"
    with pytest.raises(FloatingPointError, match=rf"norm is (nan|inf) in step 2, .* had .*({rows}) \[\d+, \d+\]"):
        train.main(train.parse_args([*flags, "--output_dir", str(tmp_path)]))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    after_step_1 = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    weights = dict(trainers[0].model.named_parameters())
    assert after_step_1 and all(torch.equal(weights[name], stored) for name, stored in after_step_1.items())


def trainer_of(norm: float | None, scaler: torch.amp.GradScaler | None) -> SimpleNamespace:
    trainer = SimpleNamespace(
        _get_grad_norm=lambda model, grad_norm=None: norm,
        compute_loss=lambda model, inputs: 0.0,
        accelerator=SimpleNamespace(scaler=scaler),
        state=SimpleNamespace(global_step=0),
        args=SimpleNamespace(output_dir="runs"),
    )
    stop_at_broken_gradients(trainer)
    return trainer


@pytest.mark.parametrize(("norm", "scaled"), [(None, False), (math.inf, True), (1.0, False)])
def test_what_does_not_end_a_run(norm, scaled):
    """DeepSpeed has no norm at first; float16's scaler leaves out the step by itself."""
    trainer = trainer_of(norm, torch.amp.GradScaler("cpu") if scaled else None)
    assert trainer._get_grad_norm(None) == norm


def test_float16_gradients_that_are_never_finite_end_a_run():
    """By PyTorch's own scaler: without an end it leaves out all steps, and the run goes on with the weights as are."""
    weight, scaler = torch.nn.Parameter(torch.ones(1)), torch.amp.GradScaler("cpu")
    optimizer, trainer = torch.optim.SGD([weight], lr=1.0), trainer_of(math.nan, scaler)
    with pytest.raises(FloatingPointError, match="float16's loss scale is 6.1e-05 before step 1"):
        for _ in range(100):
            scaler.scale(weight.sum() * math.nan).backward()
            trainer._get_grad_norm(None)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert scaler.get_scale() == 65_536 / 2**30 and weight.item() == 1


def sampled_minus_scored(trainer) -> tuple[torch.Tensor, torch.dtype]:
    """|sampled − scored| log-probs of two groups of rollouts in nats, shape (tokens,), and the KV cache's dtype."""
    tokenizer, outputs = trainer.processing_class, []
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in trainer.train_dataset.select([0, 1])]
    generate = trainer.model.generate

    def recorded(*args, **kwargs):
        outputs.append(generate(*args, **kwargs))
        return outputs[-1].sequences

    trainer.model.generate = recorded
    trainer.generation_config.update(output_logits=True, return_dict_in_generate=True)
    trainer._generate_single_turn([ids for ids in prompts for _ in range(GROUP)], None, {}, 1)
    [output] = outputs
    length = len(output.logits)
    completion, logits = output.sequences[:, -length:], torch.stack(output.logits, dim=1).float()
    sampled = logits.log_softmax(-1).gather(2, completion[..., None])[..., 0]
    mask = (output.sequences != tokenizer.pad_token_id).long()
    with trainer.accelerator.autocast():
        scored, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, output.sequences, mask, length)
    written = completion != tokenizer.pad_token_id
    return (sampled - scored)[written].detach().abs(), output.past_key_values.layers[0].keys.dtype


def test_the_toy_policy_and_whisper_in_half_precision(tmp_path, monkeypatch):
    """All of a GPU's formats at once: autocast, the reward's Whisper in float16; and a policy that was trained."""
    monkeypatch.setattr(models, "WhisperScorer", partial(WhisperScorer, dtype=torch.float16))
    flags = ["--config", "configs/tiny.yaml", "--max_steps", "1", "--beta", "0.1", "--sample_steps", "0"]
    flags += ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "140"]
    toy = run(tmp_path, *flags, "--save_strategy", "no")
    [entry] = toy.log
    assert entry["grad_norm"] > 0 and entry["reward_std"] > 0 and 0 < entry["nll"] < MAX_NLL
    assert abs(entry["kl"]) < 1e-3
    difference, cache_dtype = sampled_minus_scored(toy.trainer)
    assert difference.mean() < 0.02 and cache_dtype == torch.bfloat16


def test_whisper_in_half_precision_scores_rollouts_as_in_full():
    """Codes through the codec, which a GPU runs in float32 too, and through Whisper in both formats."""
    _, tokens = load_tokenizer("tiny/llasa")
    codec = SpeechCodec.from_pretrained("tiny/codec")
    rows = datasets.Dataset.from_parquet("tiny/speech.parquet").select(range(0, 320, 20))
    completions = [[*tokens.ids(codes), tokens.end_id] for codes in rows["audio_codes"]]
    completions[8:] = completions[:8]  # the speech of other texts, whose errors and NLL are high
    scores = []
    for dtype in (torch.float32, torch.float16):
        whisper = WhisperScorer("tiny/whisper.pt", device="cpu", dtype=dtype)
        scorer = SpeechRolloutScorer(tokens, codec, whisper, 1)
        scores.append(scorer.score(completions, rows["text"], None, lambda *_: None).scores)
    full, half = scores
    assert [score.wer for score in half] == [score.wer for score in full]
    assert min(score.wer for score in full) == 0 and max(score.nll for score in full) > 5
    # Logits of 16 to 32 are 1/64 apart in float16, so each is off by up to 1/128
    assert [score.nll for score in half] == pytest.approx([score.nll for score in full], abs=1 / 64)
