"""Ragged codes through XCodec2's decoder in one forward pass, each item as if it were alone.

Its attention is non-causal and takes a mask, but its convolutions, its GroupNorm (whose statistics run over time) and
its overlap-add take none: padding would change every sample. For the length of one call, hooks stand where frames of
different times meet; the model's own code runs, and nothing stays behind in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Xcodec2Model
from transformers.masking_utils import create_bidirectional_mask


def decode_ragged(model: Xcodec2Model, codes: list[list[int]]) -> torch.Tensor:
    """Decode all items in one forward pass; equal to decoding each alone, up to the rounding of float sums.

    Args:
        codes: ragged, no item empty. Items of one length go through the model as it is.
    Returns:
        audio of shape (batch, samples of the longest) on the model's device; an item's own are the first
        len(ids) * hop_length, the rest is to be cut off.
    """
    ids = pad_sequence([torch.tensor(ids) for ids in codes], batch_first=True).to(model.device)
    if all(len(item) == ids.shape[1] for item in codes):
        return model.decode(audio_codes=ids[:, None]).audio_values[:, 0]
    lengths = torch.tensor([len(item) for item in codes], device=model.device)
    valid = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
    latents = model.quantizer.from_codes(ids[..., None])
    attention_mask = create_bidirectional_mask(model.config, latents, valid)
    with padding_hidden(model.acoustic_decoder, valid):
        output = model.decode(latents=latents.transpose(1, 2), attention_mask=attention_mask)
    return output.audio_values[:, 0]


@contextmanager
def padding_hidden(decoder: nn.Module, valid: torch.Tensor) -> Iterator[None]:
    """While it lasts, frames of padding do not reach the others; attention is masked by the caller.

    Args:
        decoder: the `acoustic_decoder` of an `Xcodec2Model`.
        valid: (batch, frames), bool; an item's frames come first, its padding after them.
    """
    head = decoder.head
    inside = valid[..., None]

    def zero_padding(conv, inputs):
        return inputs[0] * inside.transpose(1, 2)

    def normalise(norm, inputs, output):
        return masked_group_norm(norm, inputs[0], valid)

    def silence_padding(linear, inputs, output):
        # exp(-inf) is a magnitude of 0: such frames add nothing to the samples they share with others.
        magnitude, _ = output.chunk(2, dim=-1)
        magnitude += torch.zeros_like(inside, dtype=output.dtype).masked_fill(~inside, -torch.inf)

    def rescale(head, inputs, audio):
        # The head divided by the windows of all frames; an item's last samples lie under fewer.
        everywhere = window_envelope(head, torch.ones_like(valid[:1]))
        return audio * (everywhere / window_envelope(head, valid))[:, None]

    hooks = [
        # The only convolution to need it: the others follow a GroupNorm, which zeroes the padding, and a SiLU.
        decoder.embed.register_forward_pre_hook(zero_padding),
        head.linear.register_forward_hook(silence_padding),
        head.register_forward_hook(rescale),
    ]
    norms = (module for module in decoder.modules() if isinstance(module, nn.GroupNorm))
    hooks += [norm.register_forward_hook(normalise) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def masked_group_norm(norm: nn.GroupNorm, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """GroupNorm with the statistics of the valid frames, in float32; 0 elsewhere.

    Args:
        x: (batch, channels, frames).
        valid: (batch, frames), bool.
    """
    inside = valid[:, None, None].float()
    groups = x.float().unflatten(1, (norm.num_groups, -1))  # (batch, groups, channels of one, frames)
    count = groups.shape[2] * inside.sum(dim=-1, keepdim=True)
    mean = (groups * inside).sum(dim=(2, 3), keepdim=True) / count
    centred = (groups - mean) * inside
    variance = centred.square().sum(dim=(2, 3), keepdim=True) / count
    scale = norm.weight.view(norm.num_groups, -1, 1) * torch.rsqrt(variance + norm.eps)
    scaled = torch.addcmul(norm.bias.view(norm.num_groups, -1, 1), centred, scale) * inside
    return scaled.flatten(1, 2).to(x.dtype)


def window_envelope(head: nn.Module, valid: torch.Tensor) -> torch.Tensor:
    """The squared windows of the valid frames, summed over each sample.

    Args:
        valid: (batch, frames), bool.
    Returns:
        (batch, frames * hop_length), float32; at least 1e-11, as in the head.
    """
    parts = head.window.square().view(-1, head.hop_length)  # a window is as long as 4 hops
    overlap = len(parts) - 1
    hops = sum(F.pad(valid, (i, overlap - i))[..., None] * part for i, part in enumerate(parts))
    return hops.flatten(1)[:, head.padding : -head.padding].clamp(min=1e-11)
