"""Two processes under the shipped accelerate configs, on the CPU: DDP and FSDP2 give the weights of one process."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import several_runs
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from fake_policy import NUM_CODES, save_policy
from fake_token2text import small
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from training.grpo_trainer import SpeechGRPOTrainer

CONFIGS = Path("configs/accelerate")
LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear"]
# With plain SGD a rounding error stays one; Adam's first steps take its sign.
FIXED = ["--optim", "sgd", "--learning_rate", "0.1", "--save_strategy", "no"]
FIXED_RUNS = {
    "grpo": [],
    "grpo with lora": LORA,
    "grpo with credit in time": ["--credit", "time"],
    "diffro": ["--method", "diffro"],
    "grpo and diffro": ["--method", "grpo+diffro"],
}
SFT_IN_HALF = ["--method", "sft", "--bf16", "true"]
SAMPLED = ["--learning_rate", "1e-3", "--save_steps", "1"]
SHARDS = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true"}  # accelerate's defaults


class Setup:
    """A small random Llasa, texts with codes, a token-to-text reward; and runs of train.py on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        save_policy(folder / "policy", initializer_range=0.1)
        small(num_codes=NUM_CODES).save_pretrained(folder / "token2text")
        (folder / "reward.json").write_text('{"token2text": {}}')
        texts = [json.loads(line)["text"] for line in Path("tiny/texts/train.jsonl").read_text().splitlines()[:16]]
        codes = [[(7 * i + 3 * j) % NUM_CODES for j in range(10 + i)] for i in range(len(texts))]
        rows = [{"text": text, "audio_codes": speech} for text, speech in zip(texts, codes, strict=True)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = [{"text": row["text"], "chosen_codes": row["audio_codes"], "rejected_codes": [1, 2, 3]} for row in rows]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (folder / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))

    def flags(self, output_dir: Path, *flags: str, accumulated: int = 2) -> list[str]:
        """Two steps of 16 rollouts on two processes."""
        given = ["--model_name_or_path", self.folder / "policy", "--dataset", self.folder / "rows.jsonl"]
        given += ["--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4"]
        given += ["--gradient_accumulation_steps", accumulated, "--use_cpu", "true", "--disable_tqdm", "true"]
        if not {"sft", "dpo"} & set(flags):
            given += ["--token2text", self.folder / "token2text", "--reward_config", self.folder / "reward.json"]
            given += ["--num_generations", "4", "--max_completion_length", "12", "--sample_steps", "0"]
            given += ["--diffro_filter", "none"]
        return [str(flag) for flag in [*given, *flags, "--output_dir", output_dir]]

    def one(self, folder: Path, fixed: bool = False, environment: dict | None = None, *flags: str) -> dict:
        return {"flags": self.flags(folder, *flags), "fixed": fixed, "environment": environment or {}}

    def launch(self, config: str, more: list[tuple]) -> Path:
        """FIXED_RUNS, SFT, DPO, and `more` (name, environment, *flags), in two processes: their folders' folder."""
        out = self.folder / config
        runs = [self.one(out / name, True, None, *FIXED, *flags) for name, flags in FIXED_RUNS.items()]
        runs.append(self.one(out / "sft", False, None, *FIXED, "--method", "sft"))
        pairs = ["--dataset", self.folder / "pairs.jsonl", "--warmup_steps", "0", "--bf16", "false"]
        runs.append(self.one(out / "dpo", False, None, *FIXED, "--method", "dpo", *pairs))
        runs += [self.one(out / name, False, environment, *flags) for name, environment, *flags in more]
        (self.folder / f"{config}.json").write_text(json.dumps(runs))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml"]
        command += ["--num_processes", "2", "--main_process_port", "0", "tests/several_runs.py"]
        done = subprocess.run(
            [*map(str, command), str(self.folder / f"{config}.json")],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        supervised = sum(bool({"sft", "dpo"} & set(run["flags"])) for run in runs)
        assert done.stderr.count("memory: about") == len(runs) - supervised, "once a run of RL, not once a process"
        return out


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    return Setup(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def alone(setup) -> Path:
    """FIXED_RUNS in one process, with twice the accumulation."""
    out = setup.folder / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeechGRPOTrainer, "_generate_single_turn", several_runs.generate_then_fix)
        patch.setattr(train, "plot_curves", lambda *_: None)
        for name in ("grpo", "grpo with lora"):
            flags = setup.flags(out / name, *FIXED, *FIXED_RUNS[name], accumulated=4)
            train.main(train.parse_args(flags))
    return out


@pytest.fixture(scope="module")
def ddp(setup) -> Path:
    evaluated = ["--eval_dataset", setup.folder / "three.jsonl", "--eval_strategy", "steps", "--eval_steps", "1"]
    whole = ["--bf16", "false", *SAMPLED, *evaluated]
    checkpoint = setup.folder / "ddp" / "whole" / "checkpoint-1"
    runs = [("whole", None, *whole), ("resumed", None, *whole, "--resume_from_checkpoint", checkpoint)]
    return setup.launch("ddp", [*runs, ("bf16 sft", None, *FIXED, *SFT_IN_HALF)])


@pytest.fixture(scope="module")
def fsdp2(setup) -> Path:
    """With what a GPU has besides: bfloat16, and a LoRA adapter on bfloat16 weights."""
    evaluated = ["--eval_dataset", setup.folder / "three.jsonl", "--eval_strategy", "steps", "--eval_steps", "1"]
    runs, half = [], ["--bf16", "true", *SAMPLED]
    for name, environment, flags in (
        ("whole", None, [*half, *evaluated]),
        ("shards", SHARDS, half),
        ("lora", None, [*half, *LORA]),
        ("bf16 diffro", SHARDS, ["--bf16", "true", "--method", "diffro", "--beta", "0.1", "--save_strategy", "no"]),
    ):
        runs.append((name, environment, *flags))
        if "--save_steps" in flags:
            checkpoint = setup.folder / "fsdp2" / name / "checkpoint-1"
            runs.append((f"{name} resumed", environment, *flags, "--resume_from_checkpoint", checkpoint))
    runs.append(("bf16 sft", None, *FIXED, *SFT_IN_HALF))
    runs.append(("bf16 sft lora", None, *FIXED, *SFT_IN_HALF, *LORA))
    mixtures = ["--method", "grpo+diffro", "--gumbel_hard", "false", "--save_strategy", "no"]
    runs.append(("bf16 mixtures", None, "--bf16", "true", *mixtures))
    return setup.launch("fsdp2", runs)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [path] = folder.glob("*.safetensors")
    return load_file(path)


def logged(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def seen(folder: Path) -> dict:
    return json.loads((folder / "seen.json").read_text())


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def distance_moved(setup: Setup, folder: Path) -> float:
    """The largest change of the weight that changed least."""
    start, after = weights(setup.folder / "policy"), weights(folder)
    return min((after[name] - start[name]).abs().max().item() for name in start)


@pytest.mark.parametrize("name", ["grpo", "grpo with lora"])
def test_two_processes_learn_what_one_does(setup, alone, ddp, name):
    """16 rollouts as 2 processes × 2 micro-batches of 4, and as 4 of one: each process has rollouts of its own."""
    assert largest_difference(weights(ddp / name), weights(alone / name)) < 1e-6
    if name == "grpo":
        assert distance_moved(setup, ddp / name) > 1e-4
    for entries in zip(logged(ddp / name), logged(alone / name), strict=True):
        for key in {"reward", "reward_std", "num_tokens", "grad_norm"} & entries[0].keys():
            assert entries[0][key] == pytest.approx(entries[1][key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", [*FIXED_RUNS, "sft", "dpo"])
def test_fsdp2_learns_what_ddp_does(setup, ddp, fsdp2, name):
    assert largest_difference(weights(fsdp2 / name), weights(ddp / name)) < 1e-6
    if name == "dpo":
        assert distance_moved(setup, ddp / name) > 1e-4
        assert logged(fsdp2 / name)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    if name in FIXED_RUNS:
        assert seen(ddp / name)["distributed_type"] == "MULTI_CPU" and not seen(ddp / name)["sharded"]
        assert seen(fsdp2 / name)["distributed_type"] == "FSDP" and seen(fsdp2 / name)["sharded"]


def test_ddp_resumes_exactly(setup, ddp):
    assert distance_moved(setup, ddp / "whole") > 1e-4
    assert largest_difference(weights(ddp / "whole"), weights(ddp / "resumed")) == 0
    assert len([entry for entry in logged(ddp / "resumed") if "reward" in entry]) == 2


@pytest.mark.parametrize("name", ["whole", "shards", "lora"])
def test_fsdp2_resumes_exactly_in_bfloat16(fsdp2, name):
    """From a whole checkpoint, from accelerate's shards, and with an adapter."""
    assert (fsdp2 / name / "checkpoint-1" / "pytorch_model_fsdp_0").exists() == (name == "shards")
    assert largest_difference(weights(fsdp2 / name), weights(fsdp2 / f"{name} resumed")) == 0
    assert seen(fsdp2 / name) == {"distributed_type": "FSDP", "sharded": True, "log_probs": "torch.float32"}
    first, *_ = logged(fsdp2 / name)
    assert abs(first["kl"]) < 1e-4 and first["grad_norm"] > 0


def test_diffro_under_fsdp2_in_bfloat16(fsdp2):
    entries = [entry for entry in logged(fsdp2 / "bf16 diffro") if "reward" in entry]
    assert len(entries) == 2 and all(-20 < entry["diffro_reward"] < 0 < entry["grad_norm"] for entry in entries)
    assert abs(entries[0]["kl"]) < 1e-4


def test_losses_of_sft_are_not_rounded_under_fsdp2(ddp, fsdp2):
    """bfloat16 tells losses of 4 in steps of 0.03; and a head of its own is spread, its bias is not."""
    of_ddp, of_fsdp2 = (logged(folder / "bf16 sft")[0] for folder in (ddp, fsdp2))
    for name in ("loss", "entropy"):
        assert of_fsdp2[name] == pytest.approx(of_ddp[name], rel=3e-4)
        assert of_fsdp2[name] != torch.tensor(of_fsdp2[name]).bfloat16().item()
    assert logged(fsdp2 / "bf16 sft lora")[0]["grad_norm"] > 0


def test_mixtures_of_codes_under_fsdp2_in_bfloat16(fsdp2):
    entries = [entry for entry in logged(fsdp2 / "bf16 mixtures") if "reward" in entry]
    assert len(entries) == 2 and all(-20 < entry["diffro_reward"] < 0 for entry in entries)


@pytest.mark.parametrize("name", ["grpo", "whole", "shards", "lora"])
def test_what_fsdp2_saves_loads_with_plain_transformers(setup, fsdp2, name):
    """Also where checkpoints are shards."""
    model, info = AutoModelForCausalLM.from_pretrained(fsdp2 / name, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if name != "lora":
        state = model.state_dict()
        assert all(torch.equal(state[key], saved) for key, saved in weights(fsdp2 / name).items())
        assert distance_moved(setup, fsdp2 / name) > 1e-4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_held_out_rows_are_shared_out(parallel, request):
    """Three rows, two processes."""
    folder = request.getfixturevalue(parallel) / "whole"
    found = [entry["eval_text_log_prob"] for entry in logged(folder) if "eval_text_log_prob" in entry]
    assert len(found) == 2 and all(math.isfinite(value) and value < 0 for value in found)


# --- The shipped configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))  # raises for an unknown key
    assert isinstance(config, ClusterConfig) and config.num_processes >= 1
    assert config.mixed_precision == "no", (
        "--bf16 of train.py decides; with bf16 here --bf16 false would have no effect"
    )
    flags = {action.dest for action in launch_command_parser()._actions}
    assert {key if key.startswith("fsdp_") else f"fsdp_{key}" for key in config.fsdp_config} <= flags
    assert config.deepspeed_config.keys() <= flags


def test_the_configs_are_what_their_names_say():
    configs = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.glob("*.yaml")}
    types = {name: config.distributed_type.value for name, config in configs.items()}
    assert types == {
        "one_gpu": "NO",
        "ddp": "MULTI_GPU",
        "zero2": "DEEPSPEED",
        "fsdp2": "FSDP",
        "two_nodes": "MULTI_GPU",
    }
    assert configs["zero2"].deepspeed_config["zero_stage"] == 2
    assert configs["two_nodes"].num_machines == 2 and configs["two_nodes"].main_process_ip
    fsdp = configs["fsdp2"].fsdp_config
    assert fsdp["fsdp_version"] == 2 and fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    model = AutoModelForCausalLM.from_pretrained("tiny/llasa")
    assert fsdp["fsdp_transformer_layer_cls_to_wrap"] == type(model.model.layers[0]).__name__
