"""A small random token-to-text model."""

import torch

from reward_models.token2text import Token2Text, new_text_tokenizer


def small(labels=None, seed: int = 0, num_codes: int = 64) -> Token2Text:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 1}
    config = {"num_codes": num_codes, "labels": labels or {}, "t5": shape}
    torch.manual_seed(seed)
    return Token2Text(config, new_text_tokenizer(["anna found 2 boxes", "peter bought"], 270)).eval()
