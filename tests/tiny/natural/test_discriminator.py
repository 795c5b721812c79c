"""tiny/natural/discriminator.py: the losses by hand, and what a discriminator can tell apart."""

import pytest
import torch

from tiny.natural.discriminator import N_FFTS, Discriminators, discriminator_loss, generator_losses


def outputs(score: float, feature: float) -> list[list[torch.Tensor]]:
    """Of one discriminator with one layer."""
    return [[torch.full((2, 3), feature), torch.full((2, 1), score)]]


def test_losses_by_hand():
    # relu(1 - 0.5) + relu(1 + 0.25) = 0.5 + 1.25
    assert discriminator_loss(outputs(0.5, 0), outputs(-0.25 + 0.5, 0)).item() == pytest.approx(0.5 + 1.25)
    assert discriminator_loss(outputs(2, 0), outputs(-3, 0)).item() == 0
    adversarial, features = generator_losses(outputs(0, 2.0), outputs(0.25, 3.0))
    assert adversarial.item() == -0.25
    assert features.item() == 0.5  # |3 - 2| / 2


def test_features_are_learnt_from_by_the_decoded_audio_only():
    real, decoded = outputs(0, 2.0), outputs(0, 3.0)
    real[0][0].requires_grad_()
    decoded[0][0].requires_grad_()
    generator_losses(real, decoded)[1].backward()
    assert real[0][0].grad is None and decoded[0][0].grad.abs().sum() > 0


def test_discriminators_learn_to_tell_noise_from_a_tone():
    torch.manual_seed(0)
    discriminators = Discriminators()
    optimizer = torch.optim.AdamW(discriminators.parameters(), lr=2e-3)
    tone = torch.sin(torch.arange(8_000) * 0.1).expand(2, -1)
    for _ in range(12):
        real = discriminators(tone + 0.01 * torch.randn(2, 8_000))
        loss = discriminator_loss(real, discriminators(0.7 * torch.randn(2, 8_000)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(real) == len(N_FFTS)
    assert loss.item() < 1.0  # 2 at the start
