"""Small random x-vector models, saved as a checkpoint is."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForAudioXVector, Wav2Vec2FeatureExtractor

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": [24] * 7,
    "num_feat_extract_layers": 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "tdnn_dim": [32, 32, 32, 32, 64],
    "xvector_output_dim": 24,
    "num_codevectors_per_group": 8,
    "codevector_dim": 8,
}


def save_speaker_encoder(folder: Path, model_type: str = "wavlm", seed: int = 0, **sizes) -> str:
    torch.manual_seed(seed)
    model = AutoModelForAudioXVector.from_config(AutoConfig.for_model(model_type, **SIZES | sizes))
    for module in model.modules():  # a config's own initialisation tells no two clips apart
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d)):
            module.reset_parameters()
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return str(folder)
