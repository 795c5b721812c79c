"""The `xcodec2` package as the oracle of the parity test: a small one with random weights.

Installed by `pip install --no-deps -r tests/requirements-parity.txt`; no project code needs it.
"""

import importlib
import sys
import types
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

HIDDEN, SEMANTIC_HIDDEN = 192, 32  # 192: three heads of 64, and a multiple of GroupNorm's 32
SEMANTIC_LAYERS = 18  # the package reads the 16th; the two above it must not matter


def import_package() -> types.ModuleType:
    """`xcodec2.modeling_xcodec2`; it imports torchaudio, of which there is no CPU build, unused."""
    # Transformers asks for torchaudio's version when it first imports a speech model.
    assert transformers.Wav2Vec2BertModel and transformers.SeamlessM4TFeatureExtractor
    with_stand_in = "torchaudio" not in sys.modules
    if with_stand_in:
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    try:
        return importlib.import_module("xcodec2.modeling_xcodec2")
    finally:
        if with_stand_in:
            del sys.modules["torchaudio"]


def build_oracle(seed: int) -> torch.nn.Module:
    """The package's model with its hard-coded sizes shrunk, and random weights."""
    package = import_package()
    torch.manual_seed(seed)
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=SEMANTIC_HIDDEN,
        num_hidden_layers=SEMANTIC_LAYERS,
        num_attention_heads=2,
        intermediate_size=48,
        conv_depthwise_kernel_size=7,
        output_hidden_states=True,
    )
    both = HIDDEN + SEMANTIC_HIDDEN
    encoder = partial(package.CodecEncoder_Transformer, ngf=4, hidden_dim=HIDDEN)
    decoder = partial(package.CodecDecoderVocos, hidden_dim=HIDDEN, depth=2, heads=HIDDEN // 64, vq_dim=both)
    with (
        mock.patch.object(package, "CodecEncoder_Transformer", encoder),
        mock.patch.object(package, "CodecDecoderVocos", decoder),
    ):
        model = _build(package, config)
    model.fc_prior, model.fc_post_a = torch.nn.Linear(both, both), torch.nn.Linear(both, HIDDEN)
    _randomise(model)
    return model


def build_published_sizes() -> torch.nn.Module:
    """The package's model as it is, without memory: only names and shapes."""
    package = import_package()
    vocos = importlib.import_module("xcodec2.vq.codec_decoder_vocos")

    def quantizer_on_cpu(residual_fsq=vocos.ResidualFSQ, **sizes) -> torch.nn.Module:
        with torch.device("cpu"):  # its constructor reads values
            return residual_fsq(**sizes)

    with torch.device("meta"), mock.patch.object(vocos, "ResidualFSQ", quantizer_on_cpu):
        return _build(package, transformers.Wav2Vec2BertConfig())


def _build(package: types.ModuleType, semantic_config: transformers.Wav2Vec2BertConfig) -> torch.nn.Module:
    """Without the download of w2v-bert-2.0 that its constructor asks for."""
    with (
        mock.patch.object(package, "Wav2Vec2BertModel") as semantic_model,
        mock.patch.object(package, "AutoFeatureExtractor") as feature_extractor,
    ):
        semantic_model.from_pretrained.return_value = transformers.Wav2Vec2BertModel(semantic_config)
        feature_extractor.from_pretrained.return_value = transformers.SeamlessM4TFeatureExtractor()
        return package.XCodec2Model(package.BigCodecConfig(semantic_hidden_size=semantic_config.hidden_size))


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Weights under which codes vary and audio is not silent; none is left at 0 or 1."""
    for name, weight in model.named_parameters():
        if name.endswith("original0"):  # the gain of a weight norm
            weight.uniform_(0.7, 1.3)
        elif weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
        elif name.endswith("weight"):  # of a norm
            weight.uniform_(0.7, 1.3)
        else:  # bias, alpha, beta
            weight.normal_(std=0.2)
    # Spread one clip over all levels of the quantizer; untrained, it sits in a few corners.
    project_in = model.generator.quantizer.project_in
    seen = []
    hook = project_in.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.eval().encode_code(torch.from_numpy(chirp(32_000))[None])
    hook.remove()
    std, mean = torch.std_mean(seen[0].flatten(0, -2), dim=0)
    project_in.weight.div_(std[:, None])
    project_in.bias.sub_(mean).div_(std)


def chirp(n_samples: int) -> np.ndarray:
    """A sound that changes all the time: float32, shape (n_samples,), in [-1, 1]."""
    t = np.arange(n_samples) / 16_000
    noise = np.random.default_rng(n_samples).normal(size=n_samples)
    tone = np.sin(2 * np.pi * (200 + 900 * np.sin(3 * t)) * t)
    wav = 0.3 * tone * (1 + np.sin(20 * t)) + 0.1 * noise * np.sin(7 * t)
    return wav.clip(-1, 1).astype(np.float32)


def save_oracle(model: torch.nn.Module, folder: Path) -> None:
    """Write the checkpoint in the package's layout."""
    model.config.save_pretrained(folder)
    state = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
