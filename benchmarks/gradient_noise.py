"""How much of one batch's gradient is signal: GRPO's and DiffRO's, of the same batches, on the policy they start from.

    python benchmarks/gradient_noise.py                                      # the small world, some minutes
    python benchmarks/gradient_noise.py --draws 1 4 --batches 6 --gumbel_temperature 2

For each way to estimate a gradient, its mean cosine between two batches, and, for DiffRO, between two estimates from
one batch, whose rollouts are the same and whose drawn codes are not. If both are small and the second is not much above
the first, the draws are most of the noise and more of them help; if the second is near 1, only more rollouts do.
Flags of train.py may follow; nothing is trained.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from benchmarks.harness import table  # noqa: E402
from training.diffro import DiffROTrainer, sample_filter  # noqa: E402
from training.grpo_trainer import SpeechGRPOTrainer  # noqa: E402


class NoiseMeter:
    """Takes the place of a trainer's `training_step`: collects gradients, updates nothing.

    Args:
        draws: of DiffRO's estimates.
    """

    def __init__(self, trainer: DiffROTrainer, draws: list[int]):
        self.trainer, self.draws = trainer, draws
        self.found: dict[str, list[list[torch.Tensor]]] = {}  # by estimate: for each batch its gradients

    def __call__(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        trainer = self.trainer
        model.train()
        batch = trainer._prepare_inputs(inputs)
        self.collect("GRPO", model, lambda: SpeechGRPOTrainer._compute_loss(trainer, model, batch), times=1)
        masks = batch["completion_mask"].bool()
        said = [ids[mask].tolist() for ids, mask in zip(batch["completion_ids"], masks, strict=True)]
        codes, truncated = zip(*map(trainer.tokens.codes, said), strict=True)
        for filter, draws in itertools.product(("none", "clean"), self.draws):
            trainer.gumbel_draws = draws
            kept = sample_filter(filter, batch["advantages"].tolist(), codes, truncated)
            batch["diffro_kept"] = torch.tensor(kept, device=masks.device)
            self.collect(
                f"DiffRO, filter {filter}, draws: {draws}", model, lambda: trainer._diffro_loss(model, batch), times=2
            )
        return torch.zeros((), device=masks.device)

    def collect(self, name: str, model, loss, times: int) -> None:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        estimates = []
        for _ in range(times):
            slopes = torch.autograd.grad(loss(), weights, allow_unused=True)
            flat = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, slopes, strict=True)]
            estimates.append(torch.cat([g.flatten() for g in flat]).float().cpu())
        self.found.setdefault(name, []).append(estimates)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def cosines(batches: list[list[torch.Tensor]]) -> tuple[float, float | None]:
    """Mean cosine between estimates of two batches, and of one batch (None with one estimate each)."""
    between = [
        cosine(a, b) for one, other in itertools.combinations(batches, 2) for a, b in itertools.product(one, other)
    ]
    within = [cosine(a, b) for batch in batches for a, b in itertools.combinations(batch, 2)]
    return float(np.mean(between)), float(np.mean(within)) if within else None


def main(args: argparse.Namespace) -> None:
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        fixed = f"--method grpo+diffro --max_steps {args.batches} --save_strategy no --sample_steps 0"
        flags = ["--config", args.recipe, "--token2text", args.token2text, *fixed.split(), *args.flags]
        script, recipe, model = train.parse_args([*flags, "--output_dir", folder])
        tokenizer, tokens = train.load_tokenizer(model.model_name_or_path, "tts")
        rows, longest = train.grpo_dataset(script, recipe, tokenizer, tokens)
        trainer = train.grpo_trainer(script, recipe, model, tokenizer, tokens, rows, longest)
        meter = trainer.training_step = NoiseMeter(trainer, args.draws)
        trainer.train()
    lines = []
    for name, batches in meter.found.items():
        between, within = cosines(batches)
        norm = float(np.median([estimate.norm() for batch in batches for estimate in batch]))
        lines.append([name, f"{between:.4f}", "–" if within is None else f"{within:.2f}", f"{norm:.2f}"])
    print("\n" + table(["gradient", "cosine of two batches", "of two estimates of one batch", "median norm"], lines))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8, help="of rollouts (8)")
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 8], help="of DiffRO's estimates (1 8)")
    parser.add_argument("--recipe", default="configs/tiny.yaml", help="file of configs/ (tiny.yaml)")
    parser.add_argument("--token2text", default="tiny/token2text")
    args, args.flags = parser.parse_known_args(argv)  # what is not ours goes to train.py
    return args


if __name__ == "__main__":
    main(parse_args())
