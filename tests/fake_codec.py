"""A small random XCodec2 for tests."""

import numpy as np
import torch
from transformers import Wav2Vec2BertConfig, Xcodec2Config, Xcodec2Model

RAGGED = [40, 1, 75, 40, 2, 40, 1]  # codes an item


def build_native(seed: int, **sizes) -> Xcodec2Model:
    """A small random codec of 4 ** 4 codes, under whose weights the audio is not silent."""
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "encoder_hidden_size": 4,
        "downsampling_ratios": [8, 8, 5],
        "quantization_dim": 128,
        "quantization_levels": [4, 4, 4, 4],
        "semantic_model_config": Wav2Vec2BertConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        ),
    }
    torch.manual_seed(seed)
    model = Xcodec2Model(Xcodec2Config(**config | sizes)).eval()
    for module in model.modules():  # a config's own initialisation comes out dead
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.LayerNorm)):
            module.reset_parameters()
    with torch.no_grad():
        model.quantizer.project_in.weight.mul_(20.0)
    return model


def random_codes(lengths: list[int], codebook_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(codebook_size, size=length).tolist() for length in lengths]


def decode_alone(model, ids) -> np.ndarray:
    """What the model itself makes of one item: shape (n_samples,)."""
    with torch.no_grad():
        return model.decode(audio_codes=torch.tensor([[ids]])).audio_values[0, 0].float().numpy()
