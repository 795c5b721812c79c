"""Noise of a batch's gradient: GRPO's and DiffRO's, from the same batches, at the start of a training.

    python benchmarks/gradient_noise.py                                      # the toy setup, some minutes
    python benchmarks/gradient_noise.py --draws 1 4 --batches 6 --gumbel_temperature 2

Prints for each gradient estimator the mean cosine similarity of its estimates from two batches, and for DiffRO also of
two estimates from one batch, which has the same rollouts and other Gumbel draws. If both are small and the second is
not much above the first, the draws are most of the noise, and more of them help; if the second is near 1, only more
rollouts help.
Flags of train.py may follow; nothing is trained.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # `python benchmarks/X.py` finds the project's files

import train
from benchmarks.harness import silence
from common.arithmetic import set_up_arithmetic
from common.cli import HelpFormatter, bad_input_exits, check_at_least, set_up_logging
from common.tables import markdown_table
from reward_models import load_config
from speech.policy import load_tokenizer
from training.diffro import DiffROTrainer, sample_filter
from training.grpo_trainer import SpeechGRPOTrainer


class GradientCollector:
    """Takes the place of a trainer's `training_step`: collects gradients, updates nothing.

    Args:
        draws: numbers of Gumbel draws to estimate DiffRO's gradient with.
    Attributes:
        gradients: by estimator, for each batch its estimates, each of shape (trained parameters,).
    """

    def __init__(self, trainer: DiffROTrainer, draws: list[int]):
        self.trainer, self.draws = trainer, draws
        self.gradients: dict[str, list[list[torch.Tensor]]] = {}

    def __call__(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        trainer = self.trainer
        model.train()
        batch = trainer._prepare_inputs(inputs)
        self.collect("GRPO", model, lambda: SpeechGRPOTrainer._compute_loss(trainer, model, batch), times=1)
        masks = batch["completion_mask"].bool()
        completions = [ids[mask].tolist() for ids, mask in zip(batch["completion_ids"], masks, strict=True)]
        codes, truncated = zip(*map(trainer.tokens.codes, completions), strict=True)
        for filter, draws in itertools.product(("none", "clean"), self.draws):
            trainer.gumbel_draws = draws
            kept = sample_filter(filter, batch["advantages"].tolist(), codes, truncated)
            batch["diffro_kept"] = torch.tensor(kept, device=masks.device)
            name = f"DiffRO, filter {filter}, draws: {draws}"
            self.collect(name, model, lambda: trainer._diffro_loss(model, batch), times=2)
        return torch.zeros((), device=masks.device)

    def collect(self, name: str, model, loss: Callable[[], torch.Tensor], times: int) -> None:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        estimates = []
        for _ in range(times):
            gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
            parts = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
            estimates.append(torch.cat([part.flatten() for part in parts]).float().cpu())
        self.gradients.setdefault(name, []).append(estimates)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def cosines(batches: list[list[torch.Tensor]]) -> tuple[float, float | None]:
    """Mean cosine between estimates of two batches, and of one batch (None with one estimate each)."""
    between = [
        cosine(a, b) for one, other in itertools.combinations(batches, 2) for a, b in itertools.product(one, other)
    ]
    within = [cosine(a, b) for batch in batches for a, b in itertools.combinations(batch, 2)]
    return float(np.mean(between)), float(np.mean(within)) if within else None


def collect_gradients(args: argparse.Namespace) -> dict[str, list[list[torch.Tensor]]]:
    """`GradientCollector.gradients` of a run of train.py over --batches batches."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = f"--method grpo+diffro --credit rollout --max_steps {args.batches} --save_strategy no --sample_steps 0"
        flags = ["--config", args.config, "--token2text", args.token2text, *fixed.split(), *args.train_flags]
        script_args, training_args, model_args = train.parse_args([*flags, "--output_dir", folder])
        with bad_input_exits():
            rewards = load_config(script_args.reward_config, script_args.task)
            tokenizer, tokens = load_tokenizer(model_args.model_name_or_path)
            trainer = train.grpo_trainer(script_args, training_args, model_args, rewards, tokenizer, tokens)
        silence(trainer)
        collector = trainer.training_step = GradientCollector(trainer, args.draws)
        trainer.train()
    return collector.gradients


def main(args: argparse.Namespace) -> None:
    set_up_logging("benchmarks")
    set_up_arithmetic()
    with bad_input_exits():
        check_at_least(args, batches=2)
    rows = []
    for name, batches in collect_gradients(args).items():
        between, within = cosines(batches)
        norm = float(np.median([estimate.norm() for batch in batches for estimate in batch]))
        rows.append([name, f"{between:.4f}", "–" if within is None else f"{within:.2f}", f"{norm:.2f}"])
    header = ["gradient", "cosine between batches", "cosine within a batch", "median norm"]
    print("\n" + markdown_table(header, rows))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        usage="%(prog)s [flags] [flags of train.py]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--batches", type=int, default=8, help="number of batches of rollouts")
    add("--draws", type=int, nargs="+", default=[1, 8], help="numbers of Gumbel draws of DiffRO's estimates to compare")
    add("--config", default="configs/tiny.yaml", help="YAML file of train.py")
    add("--token2text", default="tiny/token2text", help="folder of the token-to-text model, DiffRO's reward model")
    args, args.train_flags = parser.parse_known_args(argv)
    return args


if __name__ == "__main__":
    main(parse_args())
