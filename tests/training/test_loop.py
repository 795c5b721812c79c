"""training/loop.py: what ends it. Resuming and held-out texts are tested with the scripts that call it."""

import argparse
import logging
import math
import os

import pytest
import torch

from common.cli import InputError
from training import loop


def train(model, losses_of, args, rows_digest: str = "rows") -> dict[str, float]:
    logger = logging.getLogger("test")
    return loop.train("test", model, [1, 1, 1, 1], losses_of, {"error": 1.0}, args, "cpu", logger, rows_digest, None)


def test_a_gradient_that_is_not_finite_ends_it_before_the_weights_are(tmp_path):
    model = torch.nn.Linear(2, 1)
    losses_of_steps = iter((1.0, math.nan))

    def losses_of(rows, rng):
        return {"error": next(losses_of_steps) * model(torch.ones(len(rows), 2)).square().mean()}

    args = argparse.Namespace(seed=0, learning_rate=0.1, steps=3, batch_size=2, logging_steps=1, save_steps=1)
    args.output_dir = str(tmp_path)
    with pytest.raises(FloatingPointError, match="norm is nan in step 2, whose losses are .*error.*nan"):
        train(model, losses_of, args)
    assert all(weights.isfinite().all() for weights in model.parameters())
    assert (tmp_path / loop.CHECKPOINT).exists()


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 11])
def test_a_run_of_few_steps_has_a_schedule(steps, tmp_path):
    model = torch.nn.Linear(2, 1)
    args = argparse.Namespace(seed=0, learning_rate=0.1, steps=steps, batch_size=2, logging_steps=1, save_steps=100)
    args.output_dir = str(tmp_path)
    before = model.weight.detach().clone()
    losses = train(model, lambda rows, rng: {"error": model(torch.ones(len(rows), 2)).square().mean()}, args)
    assert math.isfinite(losses["error"]) and model.weight.isfinite().all() and not model.weight.equal(before)


def test_a_checkpoint_of_other_rows_is_refused(tmp_path):
    args = argparse.Namespace(output_dir=str(tmp_path))
    loop.check_same_rows(args, None, "now")
    loop.check_same_rows(args, {"rows": "before"}, "before")
    with pytest.raises(InputError, match="of a run on other data"):
        loop.check_same_rows(args, {"rows": "before"}, "now")


@pytest.mark.parametrize("kept", [0, 500])
def test_a_broken_checkpoint_is_named(kept, tmp_path):
    torch.save({"args": {}}, tmp_path / loop.CHECKPOINT)
    os.truncate(tmp_path / loop.CHECKPOINT, kept)
    args = argparse.Namespace(output_dir=str(tmp_path), resume_from_checkpoint="true")
    with pytest.raises(InputError, match=f"{loop.CHECKPOINT} cannot be read .* delete it to start anew"):
        loop.checkpoint_to_resume(args, "model.safetensors")


def test_a_text_is_held_out_in_all_its_spellings():
    texts = [f"Is it {i}?" for i in range(40)]
    held_out = loop.drawn_texts([*texts, *(f" is  it *{i}*? " for i in range(40))], 0.1, seed=0)
    assert len(held_out) == 4 and held_out <= {loop.text_key(text) for text in texts}
