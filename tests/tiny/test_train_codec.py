"""tiny/train_codec.py: what it trains on is what it says, and a few steps of it learn."""

import itertools

import numpy as np
import pytest
import torch

from speech.tokens import HOP_LENGTH
from tiny import train_codec as tc
from tiny.train_codec import NUM_CODES

CPU = torch.device("cpu")
LENGTHS = [90, 86]


@pytest.fixture(scope="module")
def codec():
    return tc.new_codec(seed=0)


@pytest.fixture(scope="module")
def frames() -> tc.Frames:
    """Two clips: tones of 150 and 220 Hz whose loudness varies, with noise."""
    rng = np.random.default_rng(0)
    wavs, features = [], []
    for length, frequency in zip(LENGTHS, (150, 220), strict=True):
        time = np.arange(length * HOP_LENGTH) / 16_000
        loudness = 0.2 * np.sin(2 * np.pi * 3 * time) ** 2
        wavs.append(loudness * np.sin(2 * np.pi * frequency * time) + 0.002 * rng.standard_normal(len(time)))
        features.append(rng.standard_normal((length, 160)))
    return tc.frames_of(wavs, features, CPU)


def test_crops_do_not_leave_their_clip():
    # Clips are rows 0-2 and 3-7; three rows may begin at 0, or at 3, 4 and 5.
    assert tc.crop_starts([3, 5], 3, CPU).tolist() == [0, 3, 4, 5]
    assert tc.crop_starts([2, 3], 3, CPU).tolist() == [2]


def test_encode_gives_the_codes_of_the_model(codec, frames):
    wavs, features = frames.wavs[:86].flatten()[None], frames.features[:86][None]
    with torch.no_grad():
        codes = codec.eval().quantizer(tc.encode(codec, features))[1][..., 0]
        assert codes.equal(codec.encode(wavs[:, None], features).audio_codes[:, 0])
        assert codes.equal(codec.encode(-2 * wavs[:, None], features).audio_codes[:, 0])  # the waveform has no say


def test_harmonics_are_heard_where_mel_bands_blur_them():
    time = torch.arange(16_000) / 16_000
    voice, higher = (sum(torch.sin(2 * torch.pi * f0 * k * time) / k for k in range(1, 10))[None] for f0 in (100, 110))
    distance = tc.HarmonicLoss()
    assert distance(voice, voice) == 0 and distance(voice, -voice) == 0
    assert distance(voice, higher) > 2 * tc.MelLoss()(voice, higher)


def test_inputs_of_the_stated_mean_and_deviation_use_the_levels_equally(codec):
    inputs = tc.INPUT_MEAN + tc.INPUT_STD * torch.randn(4_000, 6, generator=torch.Generator().manual_seed(0))
    latents, _ = codec.quantizer.quantizer(codec.quantizer.quantizer.bound(inputs))
    for level in (-1, -0.5, 0, 0.5):  # of each of the six dimensions, a quarter
        assert ((latents == level).float().mean(dim=0) - 0.25).abs().max() < 0.05


def test_spread_codes_makes_correlated_outputs_independent(codec):
    generator = torch.Generator().manual_seed(1)
    width = tc.HIDDEN + tc.SEMANTIC
    hidden = 3 + torch.randn(8, 500, width, generator=generator) @ torch.randn(width, width, generator=generator)
    tc.spread_codes(codec, hidden)
    inputs = codec.quantizer.project_in(hidden)
    assert tc.spread_loss(inputs) < 1e-3
    assert tc.spread_loss(inputs[..., :1].expand_as(inputs)) > 0.5  # six times the same: 30 of 36 moments are 1, not 0


def test_fit_ends_after_its_steps_or_its_seconds(monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, rates = tc.new_optimizer([weight]), []

    def step() -> torch.Tensor:
        rates.append(optimizer.param_groups[0]["lr"].item())
        return torch.zeros(1)

    tc.fit("test", step, optimizer, 1.0, steps=100)
    assert len(rates) == 100
    assert max(rates) > 0.99 and rates[1] < 0.5 and rates[-1] < 0.01

    rates.clear()
    clock = itertools.count()  # every look at the clock is a second later
    monkeypatch.setattr(tc.time, "monotonic", lambda: next(clock))
    tc.fit("test", step, optimizer, 1.0, steps=100, max_seconds=10)
    assert len(rates) == 10 and rates[-1] < 0.05


def test_training_moves_every_weight_and_lowers_the_loss(frames, caplog):
    codec = tc.new_codec(seed=1)
    before = {name: weight.detach().clone() for name, weight in codec.named_parameters()}
    caplog.set_level("INFO")
    tc.train_codec(codec, frames, steps=1, batch_size=2, learning_rate=1e-3, seed=0)
    tc.train_codec(codec, frames, steps=8, batch_size=2, learning_rate=1e-3, seed=0)
    first, last = (float(message.split(": ")[1].split()[0]) for message in caplog.messages)
    assert last < 0.9 * first  # the mean over the second run, and the first step's
    unmoved = {name for name, weight in codec.named_parameters() if weight.equal(before[name])}
    unmoved = {name for name in unmoved if not name.startswith("acoustic_encoder.")}
    assert unmoved == {"semantic_encoder.masked_spec_embed"}  # of SpecAugment, which is off
    assert (
        codec.fc_encoder.weight[:, : tc.SEMANTIC].ne(0).all() and codec.fc_encoder.weight[:, tc.SEMANTIC :].eq(0).all()
    )


def test_training_of_the_decoder_leaves_the_codes_alone(frames):
    codec = tc.new_codec(seed=2)
    before = {name: weight.detach().clone() for name, weight in codec.named_parameters()}
    codes = torch.arange(sum(LENGTHS)) % NUM_CODES
    tc.train_decoder(codec, frames, codes, steps=2, batch_size=2, learning_rate=1e-3, seed=0)
    decoder = ("acoustic_decoder.", "quantizer.project_out.")
    for name, weight in codec.named_parameters():
        assert weight.equal(before[name]) is not name.startswith(decoder), name
