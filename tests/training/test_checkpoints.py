"""Which checkpoint a run resumes from."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from common.cli import InputError
from training.checkpoints import check_continues, check_same_shapes, find_checkpoint, last_complete_checkpoint


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    for step, state in ((9, "{}"), (10, '{"cut'), (11, "")):
        write_checkpoint(tmp_path / f"checkpoint-{step}", state)
    (tmp_path / "checkpoint-12").mkdir()
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")


@pytest.mark.parametrize("kept", [0, 0.6])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_that_has_lost_the_end_of_a_file_is_passed_over(name, kept, tmp_path):
    """A node that goes down has perhaps the small last file of a checkpoint on its disk, and not all of a large one."""
    for step in (9, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    cut = tmp_path / "checkpoint-10" / name
    os.truncate(cut, int(kept * cut.stat().st_size))
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")


def write_checkpoint(folder, state="{}", states=("optimizer.pt", "rng_state.pth")):
    folder.mkdir()
    save_file({"weight": torch.zeros(500)}, folder / "model.safetensors")
    for name in states:
        torch.save({"state": torch.zeros(500)}, folder / name)
    (folder / "trainer_state.json").write_text(state)


def test_no_resuming_however_it_is_written(tmp_path):
    """A YAML file has a boolean; and folders of other names are the user's."""
    (tmp_path / "checkpoint-best").mkdir()
    for wanted in (None, False, "false"):
        assert find_checkpoint(SimpleNamespace(resume_from_checkpoint=wanted, output_dir=str(tmp_path))) is None


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("files", "processes"), [(["rng_state.pth"], 2), (["rng_state_0.pth", "rng_state_1.pth"], 1)])
def test_other_processes_than_before_are_warned_of(files, processes, named, tmp_path, caplog):
    """Two GPUs make twice the rollouts a step: the run is not the one it was."""
    checkpoint = tmp_path / "checkpoint-1"
    write_checkpoint(checkpoint, states=["optimizer.pt", *files])
    wanted = str(checkpoint) if named else "true"
    for world_size, warned in ((len(files), False), (processes, True)):
        args = SimpleNamespace(resume_from_checkpoint=wanted, output_dir=str(tmp_path), world_size=world_size)
        assert find_checkpoint(args) == str(checkpoint)
        assert (f"written by {len(files)} processes, and {processes} resume it" in caplog.text) == warned


@pytest.mark.parametrize(
    ("schedule", "warned"),
    [("cosine", True), ("linear", True), ("constant", False), ("constant_with_warmup", False)],
)
def test_more_steps_than_before_are_warned_of_where_they_change_the_schedule(schedule, warned, tmp_path, caplog):
    def record(steps: int) -> dict:
        recipe = {"max_steps": steps, "lr_scheduler_type": schedule, "per_device_train_batch_size": 2}
        model = {"use_peft": False, "model_name_or_path": "llasa"}
        return {"script": {"method": "sft", "task": "tts"}, "recipe": recipe, "model": model, "reward": None}

    (tmp_path / "run.json").write_text(json.dumps(record(2)))
    checkpoint = str(tmp_path / "checkpoint-1")
    assert check_continues(checkpoint, record(2)) == record(2) and caplog.text == ""
    assert check_continues(checkpoint, record(3)) == record(2)
    assert (f"With 3 the {schedule} schedule of the learning rate is another" in caplog.text) == warned


def test_what_a_checkpoint_does_not_hold_ends_the_resuming(tmp_path):
    def record(**recipe) -> dict:
        recipe |= {"max_steps": 2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2}
        model = {"use_peft": False, "model_name_or_path": "llasa"}
        return {"script": {"method": "grpo", "task": "tts"}, "recipe": recipe, "model": model, "reward": None}

    checkpoint = str(tmp_path / "checkpoint-1")
    shuffled = record(shuffle_dataset=False)  # as every run of an earlier version says
    (tmp_path / "run.json").write_text(json.dumps(shuffled))
    assert check_continues(checkpoint, shuffled | {"shuffled": True}) == shuffled
    (tmp_path / "run.json").write_text(json.dumps(shuffled | {"shuffled": True}))
    with pytest.raises(InputError, match="is of a run with other settings: shuffled"):
        check_continues(checkpoint, shuffled | {"shuffled": False})
    (tmp_path / "run.json").write_text(json.dumps(record(sync_ref_model=True)))
    with pytest.raises(InputError, match="of a run with --sync_ref_model"):
        check_continues(checkpoint, record(sync_ref_model=False))


def test_a_data_set_that_has_changed_ends_the_resuming(tmp_path):
    """The order of its rows and which were seen are no longer those of the run; another name is the user's wish."""

    def record(dataset: str, digest: str | None) -> dict:
        recipe = {"max_steps": 2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2}
        script, model = {"method": "grpo", "task": "tts", "dataset": dataset}, {"use_peft": False}
        model["model_name_or_path"] = "llasa"
        return {"script": script, "recipe": recipe, "model": model, "reward": None, "dataset_digest": digest}

    checkpoint, before = str(tmp_path / "checkpoint-1"), record("texts.jsonl", "0123")
    (tmp_path / "run.json").write_text(json.dumps(before))
    for now in (before, record("moved.jsonl", "4567"), record("texts.jsonl", None)):
        assert check_continues(checkpoint, now) == before
    with pytest.raises(InputError, match="checkpoint-1: texts.jsonl has changed since"):
        check_continues(checkpoint, record("texts.jsonl", "4567"))


def small_llama(size: int, lora_rank: int | None = None):
    sizes = {"hidden_size": size, "intermediate_size": size, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, tie_word_embeddings=True, **sizes))
    if lora_rank is None:
        return model
    return get_peft_model(model, LoraConfig(r=lora_rank, target_modules=["q_proj"], modules_to_save=["lm_head"]))


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_its_own_checkpoint_fits(lora_rank, tmp_path):
    small_llama(8, lora_rank).save_pretrained(tmp_path)
    check_same_shapes(str(tmp_path), small_llama(8, lora_rank))
    check_same_shapes(None, small_llama(8, lora_rank))


@pytest.mark.parametrize(
    ("written", "resumed", "reason"),
    [
        ((8,), (16,), r"model.embed_tokens.weight has shape \[8, 8\] there, and this run's model has shape \[8, 16\]"),
        ((8, 2), (8, 4), r"lora_A.weight has shape \[2, 8\] there, and this run's model has shape \[4, 8\]"),
        ((8,), (8, 2), "this run's model has no such weight"),
    ],
)
def test_another_models_checkpoint_does_not(written, resumed, reason, tmp_path):
    small_llama(*written).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: is of another model: .*{reason}"):
        check_same_shapes(str(tmp_path), small_llama(*resumed))
