"""A batch of two rollouts of a small Llasa."""

import torch

from speech.tokens import prompt_ids, tts_prompt

TEXT = "Anna found two boxes."


def batch(tokenizer, tokens):
    """Two rollouts after one prompt, the second shorter: ids, attention mask, labels."""
    prompt = prompt_ids(tokenizer, tts_prompt(TEXT))
    rows = [prompt + tokens.ids([5, 63, 0, 7]) + [tokens.end_id], prompt + tokens.ids([9]) + [tokens.end_id]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : len(prompt)] = -100
    return ids, mask, labels
