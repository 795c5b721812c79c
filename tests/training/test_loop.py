"""training/loop.py: what ends it. Resuming and held-out texts are tested with the scripts that call it."""

import argparse
import logging
import math

import pytest
import torch

from training import loop


def test_a_gradient_that_is_not_finite_ends_it_before_the_weights_are(tmp_path):
    model = torch.nn.Linear(2, 1)
    losses_of_steps = iter((1.0, math.nan))

    def losses_of(rows, rng):
        return {"error": next(losses_of_steps) * model(torch.ones(len(rows), 2)).square().mean()}

    args = argparse.Namespace(seed=0, learning_rate=0.1, steps=3, batch_size=2, logging_steps=1, save_steps=1)
    args.output_dir = str(tmp_path)
    with pytest.raises(FloatingPointError, match="norm is nan in step 2, whose losses are .*error.*nan"):
        loop.train("test", model, [1, 1, 1, 1], losses_of, {"error": 1.0}, args, "cpu", logging.getLogger("test"))
    assert all(weights.isfinite().all() for weights in model.parameters())
    assert (tmp_path / loop.CHECKPOINT).exists()
