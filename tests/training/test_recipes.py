"""train.py's flags: --help, --config, --debug, and what is refused."""

from dataclasses import MISSING, fields

import pytest
import torch
from transformers import TrainingArguments, get_scheduler, training_args

import train
from common.cli import InputError
from speech.tokens import MAX_COMPLETION_LENGTH
from training.recipes import DPORecipe, GRPORecipe, ScriptArguments, SFTRecipe


def shown(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        train.parse_args(list(flags))
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_fits_on_two_screens_and_names_every_flag_of_ours(capsys):
    text = shown(capsys, "--help")
    assert len(text.splitlines()) <= 100
    assert max(map(len, text.splitlines())) <= 120
    for flag in ("--dataset", "--method", "--reward_config", "--sample_steps", "--learning_rate", "--beta", "--debug"):
        assert f"{flag} " in text, flag
    assert "--adam_beta1" not in text and "--epsilon_high" not in text
    assert all(len(line.split("  ")[-1]) > 5 for line in text.splitlines() if line.startswith("  --")), "a flag's help"


def test_help_all_shows_trls_flags_too(capsys):
    text = shown(capsys, "--help_all")
    assert "--adam_beta1" in text and "--epsilon_high" in text and "--dataset " in text
    assert "--packing" in shown(capsys, "--method", "sft", "--help_all")
    assert "--label_smoothing" in shown(capsys, "--method", "dpo", "--help_all")


def test_the_two_ways_to_name_a_config_file():
    for flags in (["--config", "configs/tiny.yaml"], ["--config=configs/tiny.yaml"]):
        script_args, training_args, model_args = train.parse_args(flags)
        assert model_args.model_name_or_path == "tiny/llasa" and training_args.num_generations == 8
    script_args, training_args, _ = train.parse_args(["--config", "configs/tiny.yaml", "--num_generations", "4"])
    assert training_args.num_generations == 4  # the command line wins


def test_the_length_of_an_answer_is_the_tasks():
    for task, longest in MAX_COMPLETION_LENGTH.items():
        assert train.parse_args(["--task", task])[1].max_completion_length == longest


def test_grpo_has_a_fixed_learning_rate_and_warms_up_to_it_where_asked():
    parameter = torch.nn.Parameter(torch.zeros(1))
    for flags, expected in (([], [1, 1, 1, 1, 1]), (["--warmup_steps", "4"], [0, 0.25, 0.5, 0.75, 1])):
        args = train.parse_args(["--config", "configs/tiny.yaml", *flags])[1]
        optimizer = torch.optim.AdamW([parameter], lr=1.0)
        schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(75), 75)
        factors = []
        for _ in range(5):
            factors += schedule.get_last_lr()
            optimizer.step()
            schedule.step()
        assert factors == expected


# Written out a second time, from the sources named: a changed default is another experiment
GRPO_VALUES = {
    # arXiv 2509.18798, §4; its loss is a mean per sequence with the plain k3 KL, its learning rate fixed
    "num_generations": 8,
    "beta": 0.1,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0,
    "loss_type": "grpo",
    "use_bias_correction_kl": False,
    # Sampled and trained with one distribution, the model's own
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "disable_dropout": True,
    # Ours: 8 prompts of 8 rollouts a step, each used once, the truncated ones too
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "num_iterations": 1,
    "epsilon": 0.2,
    "scale_rewards": "group",
    "mask_truncated_completions": False,
    "multi_objective_aggregation": "sum_then_normalize",
    "credit": "rollout",
    "max_length": 2048,
    "max_completion_length": 1500,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "num_train_epochs": 1.0,
    "gradient_checkpointing": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "seed": 0,
}
SFT_VALUES = {
    # Llasa, arXiv 2502.04128
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "max_length": 2048,
    # Ours
    "completion_only_loss": True,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.01,
    "num_train_epochs": 1.0,
    "train_sampling_strategy": "random",
    "seed": 0,
}
DPO_VALUES = {
    # arXiv 2305.18290
    "beta": 0.1,
    "loss_type": ["sigmoid"],
    "label_smoothing": 0.0,
    # Ours, for rounds of a few hundred pairs
    "learning_rate": 5e-6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 1.0,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "max_length": 2048,
    "disable_dropout": True,
    "precompute_ref_log_probs": False,
    "sync_ref_model": False,
    "gradient_checkpointing": True,
    "train_sampling_strategy": "random",
    "seed": 0,
}


@pytest.mark.parametrize("method", ["grpo", "sft", "dpo"])
def test_the_values_of_a_recipe(method):
    expected = {"grpo": GRPO_VALUES, "sft": SFT_VALUES, "dpo": DPO_VALUES}[method]
    args = train.parse_args(["--method", method])[1]
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as the flags can tell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cuda"))
    monkeypatch.setattr(TrainingArguments, "distributed_state", None, raising=False)


@pytest.mark.parametrize("method", ["grpo", "sft", "dpo"])
def test_a_gpu_computes_in_bfloat16_without_a_flag(gpu, method):
    def formats(*flags: str) -> tuple[bool, bool, str]:
        _, args, model_args = train.parse_args(["--method", method, *flags])
        return args.bf16, args.fp16, model_args.dtype

    assert formats() == (True, False, "float32")
    assert formats("--use_peft", "true") == (True, False, "bfloat16")
    assert formats("--bf16", "false") == formats("--use_cpu", "true") == (False, False, "float32")
    assert formats("--fp16", "true") == (False, True, "float32")


def test_a_cpu_computes_in_float32_without_a_flag():
    assert [train.parse_args(["--method", method])[1].bf16 for method in ("grpo", "sft", "dpo")] == [False] * 3


@pytest.mark.parametrize("recipe", [ScriptArguments, GRPORecipe, SFTRecipe, DPORecipe])
def test_no_switch_has_a_default_that_the_parser_ignores(recipe):
    """transformers' parser takes False for a bool with a default_factory: bf16 was off on every GPU."""
    assert [one.name for one in fields(recipe) if one.type in (bool, "bool") and one.default is MISSING] == []


def test_lora_is_in_half_precision_where_autocast_is(tmp_path):
    """Autocast would cast frozen float32 weights anew for every code."""

    def dtype(*flags: str) -> str:
        return train.parse_args(["--use_cpu", "true", *flags])[2].dtype

    assert dtype("--bf16", "true", "--use_peft", "true") == "bfloat16"
    assert dtype("--bf16", "true", "--use_peft", "true", "--dtype", "float32") == "float32"
    assert dtype("--bf16", "true") == dtype("--use_peft", "true") == "float32"
    (tmp_path / "adapter_config.json").write_text("{}")  # a LoRA folder, which is trained further without --use_peft
    folder = ["--model_name_or_path", str(tmp_path)]
    assert dtype("--bf16", "true", *folder) == "bfloat16"
    assert dtype(*folder) == dtype("--bf16", "true", "--dtype", "float32", *folder) == "float32"


@pytest.mark.parametrize("flag", ["--use_transformers_continuous_batching", "--use_transformers_paged"])
def test_what_would_round_the_weights_for_good_is_refused(flag, caplog):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--use_cpu", "true", "--bf16", "true", flag, "true"])
    assert stop.value.code == 2 and "TRL rounds the weights themselves" in caplog.text


def test_debug_shows_the_traceback_of_an_input_error(caplog):
    with pytest.raises(InputError, match="needs --token2text"):
        train.parse_args(["--method", "diffro", "--debug"])
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--method", "diffro"])
    assert stop.value.code == 2 and "needs --token2text" in caplog.text


def test_a_broken_config_file_is_named_whatever_else_is_given(tmp_path, caplog):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    for flags in (["--config", str(broken)], ["--method", "grpo", "--config", str(broken)]):
        caplog.clear()
        with pytest.raises(SystemExit):
            train.parse_args(flags)
        assert str(broken) in caplog.text and "cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: foo", "task must be one of tts, asr, both (got 'foo')"),
        ("method: sftt", "method must be one of grpo, diffro, grpo+diffro, sft, dpo (got 'sftt')"),
        ("max_steps: 1.5", "max_steps must be a whole number (got 1.5)"),
        ("learning_rate:", "learning_rate must be a number (got None)"),
        ("learning_rate: [1.0e-5]", "learning_rate must be a number (got [1e-05])"),
        ("beta: yes", "beta must be a number (got True)"),
        ("1: 2", "unknown key 1"),
        ("output_dir: 5", "output_dir must be text (got 5)"),
        ("token2text: 3", "token2text must be text (got 3)"),
        ("dataset: [a, b]", "dataset must be text (got ['a', 'b'])"),
        ("method: sft\nnum_generations: 4", "unknown key 'num_generations': it is a setting of --method grpo."),
    ],
)
def test_values_of_a_config_file_are_checked_as_flags_are(content, message, tmp_path, caplog):
    config = tmp_path / "config.yaml"
    config.write_text(content + "\n")
    with pytest.raises(SystemExit):
        train.parse_args(["--config", str(config)])
    assert f"{config}: {message}" in caplog.text


def test_a_config_files_numbers_may_be_strings(tmp_path):
    """YAML takes 1e-5 for one."""
    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 1e-5\nmax_steps: 3\nresume_from_checkpoint: true\nreport_to: [none]\nwhisper:\n")
    training_args = train.parse_args(["--config", str(config), "--use_cpu", "true"])[1]
    assert (training_args.learning_rate, training_args.max_steps) == (1e-5, 3)


def test_epochs_on_the_command_line_beside_steps_of_a_config(tmp_path, caplog):
    """max_steps goes first in transformers, so they would do nothing."""
    config = ["--config", "configs/tiny.yaml", "--use_cpu", "true"]
    with pytest.raises(SystemExit):
        train.parse_args([*config, "--num_train_epochs", "2"])
    assert (
        "--num_train_epochs: has no effect beside max_steps: 75 of configs/tiny.yaml. Add --max_steps -1" in caplog.text
    )
    assert train.parse_args([*config, "--num_train_epochs", "2", "--max_steps", "-1"])[1].num_train_epochs == 2
    (tmp_path / "epochs.yaml").write_text("max_steps: -1\n")
    by_epochs = ["--config", str(tmp_path / "epochs.yaml"), "--use_cpu", "true", "--num_train_epochs", "2"]
    assert train.parse_args(by_epochs)[1].num_train_epochs == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "0"], "--beta: must be in (0, inf) (got 0.0)"),
        (["--label_smoothing", "0.5"], "--label_smoothing: must be in [0, 0.5) (got 0.5)"),
        (["--loss_type", "sigmoid", "sigmod"], "--loss_type: must be of sigmoid, hinge"),
        (["--learning_rate", "nan"], "--learning_rate: must be in [0, inf) (got nan)"),
        (["--task", "asr"], "--task asr: for --method dpo tts only"),
        (["--num_generations", "4"], "unknown flag --num_generations"),
    ],
)
def test_values_that_dpo_refuses(flags, message, caplog):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--method", "dpo", *flags])
    assert stop.value.code == 2 and message in caplog.text


def test_losses_of_dpo_from_a_config_file(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("method: dpo\nloss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.2]\n")
    assert train.parse_args(["--config", str(config)])[1].loss_type == ["sigmoid", "sft"]
    config.write_text("method: dpo\nloss_type: ipo\n")
    assert train.parse_args(["--config", str(config)])[1].loss_type == ["ipo"]


def test_one_label_in_a_config_file_is_a_list_of_one(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("method: diffro\ntoken2text: tiny/token2text\ndiffro_labels: speaker\n")
    assert train.parse_args(["--config", str(config)])[0].diffro_labels == ["speaker"]


@pytest.mark.parametrize("flags", [["--config"], ["--config", "--method", "sft"]])
def test_config_without_a_file(flags, caplog):
    with pytest.raises(SystemExit):
        train.parse_args(flags)
    assert "--config: needs the path of a YAML file" in caplog.text
