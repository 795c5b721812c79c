"""benchmarks/gradient_noise.py: cosines of known gradients, and batches measured without training."""

import pytest
import torch

from benchmarks import gradient_noise


def test_cosines_of_known_gradients():
    """A signal of length 1 under noise that is orthogonal to everything else."""
    noise = torch.eye(5)[1:]
    batches = [[torch.eye(5)[0] + noise[2 * i + j] for j in range(2)] for i in range(2)]
    assert gradient_noise.cosines(batches) == pytest.approx((0.5, 0.5))
    same = [[torch.eye(5)[i]] * 2 for i in range(2)]
    assert gradient_noise.cosines(same) == pytest.approx((0.0, 1.0))
    assert gradient_noise.cosines([batch[:1] for batch in batches]) == (pytest.approx(0.5), None)


def test_toy_setup(tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Anna found two boxes."}\n{"text": "Peter washed nine apples."}\n')
    flags = "--batches 2 --draws 1 2 --per_device_train_batch_size 8 --max_completion_length 60"
    flags += f" --generation_batch_size 8 --dataset {texts}"
    gradient_noise.main(gradient_noise.parse_args(flags.split()))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| GRPO", "| DiffRO"))]
    assert len(lines) == 5
    norms = [float(line.strip(" |").split("|")[-1]) for line in lines]
    assert norms[0] > 0 and norms[1] > 0
