"""The confined head gives the full head's logits where it computes any."""

import pytest
import torch
from fake_llasa import batch

from common.cli import InputError
from speech.confined_head import ConfinedHead, confine_head
from speech.tokens import prepare_model


def test_logits_are_the_full_heads_where_allowed(model, tokenizer, tokens):
    ids, mask, _ = batch(tokenizer, tokens)
    full = model(ids, attention_mask=mask).logits
    prepare_model(model, tokenizer, tokens)
    confined = model(ids, attention_mask=mask).logits
    assert confined.shape == full.shape
    torch.testing.assert_close(confined[..., tokens.speech_ids], full[..., tokens.speech_ids])
    others = sorted(set(range(full.shape[-1])) - set(tokens.speech_ids))
    assert (confined.float().softmax(-1)[..., others] == 0).all()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_only_the_allowed_rows_are_multiplied(model, tokenizer, tokens, monkeypatch):
    prepare_model(model, tokenizer, tokens)
    sizes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: sizes.append(len(w)) or linear(x, w, b))
    ConfinedHead.forward(model.lm_head, torch.zeros(1, 48))
    # END, the two markers after it, and the 64 codes
    assert sizes == [67]


def test_kept_rows_give_the_same_logits_and_go(model, tokenizer, tokens):
    prepare_model(model, tokenizer, tokens)
    head, hidden = model.lm_head, torch.randn(3, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_each_time = head(hidden)
        with head.kept_rows(torch.bfloat16):
            assert head._kept[0].dtype == torch.bfloat16
            assert torch.equal(head(hidden), cast_each_time)
    assert head._kept is None


def test_weights_rounded_without_the_bias(model, tokenizer, tokens):
    """As DeepSpeed does in bfloat16: it rounds parameters, and keeps buffers in float32."""
    prepare_model(model, tokenizer, tokens)
    head, hidden = model.lm_head, torch.randn(3, 48, dtype=torch.bfloat16)
    head.weight.data = head.weight.data.bfloat16()
    rounded = head(hidden)
    head.bias.data = head.bias.data.bfloat16()
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, head(hidden))


def test_confine_refuses_a_trained_bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with pytest.raises(InputError, match="bias of its own"):
        confine_head(model, [1, 2])
