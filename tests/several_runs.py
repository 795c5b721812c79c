"""Runs of train.py one after another in the processes of one `accelerate launch`: tests/test_several_processes.py.

    accelerate launch … tests/several_runs.py runs.json

runs.json is a list of {"flags": […], "fixed": bool, "environment": {…}}. What is not as on a GPU:

- Where accelerate's environment asks for FSDP, processes on a CPU are taken for GPUs when it decides between DDP and
  FSDP (AcceleratorState); all else, the sharding included, is accelerate's, transformers' and torch's own, over gloo.
- "fixed": what is sampled is replaced by codes that depend on the prompt and the place in its group alone, so that runs
  of other processes learn from the same rollouts.
- The process group is kept until the last run has ended.

Each run of GRPO leaves seen.json in its folder: how the trainer was spread, and the log-probs' dtype,
at the first step.
"""

import faulthandler
import json
import os
import random
import sys
from pathlib import Path

from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

import train
from speech.tokens import prepare_tokenizer
from training.grpo_trainer import SpeechGRPOTrainer

generate, score = SpeechGRPOTrainer._generate_single_turn, SpeechGRPOTrainer._get_per_token_logps_and_entropies


def take_processes_for_gpus() -> None:
    init = AcceleratorState.__init__

    def init_as_on_gpus(self, *args, **kwargs):
        shared = PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    AcceleratorState.__init__ = init_as_on_gpus


def generate_and_note(trainer, *args, **kwargs):
    note(trainer, "distributed_type", trainer.accelerator.distributed_type.value)
    note(trainer, "sharded", all(isinstance(weights, DTensor) for weights in trainer.model.parameters()))
    return generate(trainer, *args, **kwargs)


def generate_then_fix(trainer, prompt_ids, *args, **kwargs):
    """Sample, and give back other completions: of 3 to 12 codes, with END."""
    generate_and_note(trainer, prompt_ids, *args, **kwargs)
    tokens, completions, places = prepare_tokenizer(trainer.processing_class), [], {}
    for prompt in prompt_ids:
        place = places[tuple(prompt)] = places.get(tuple(prompt), -1) + 1
        rng = random.Random(f"{prompt} {place}")
        completions.append(tokens.ids(rng.choices(range(tokens.num_codes), k=rng.randint(3, 12))) + [tokens.end_id])
    return completions, None


def score_and_note(trainer, *args, **kwargs):
    log_probs, *rest = score(trainer, *args, **kwargs)
    note(trainer, "log_probs", str(log_probs.dtype))
    return log_probs, *rest


def note(trainer, name: str, value) -> None:
    """Into seen.json: the first value of each name."""
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir, "seen.json")
        seen = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({name: value} | seen))


def run_all(runs: list[dict]) -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # a process that waits for another must not outlive the test
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        take_processes_for_gpus()
    train.plot_curves = lambda *_: None  # seconds of matplotlib
    SpeechGRPOTrainer._get_per_token_logps_and_entropies = score_and_note
    end_training = Accelerator.end_training
    Accelerator.end_training = lambda self: None
    environment = dict(os.environ)
    for run in runs:
        os.environ.update(environment | run["environment"])
        SpeechGRPOTrainer._generate_single_turn = generate_then_fix if run["fixed"] else generate_and_note
        if run is runs[-1]:
            Accelerator.end_training = end_training
        train.main(train.parse_args(run["flags"]))


if __name__ == "__main__":
    run_all(json.loads(Path(sys.argv[1]).read_text()))
