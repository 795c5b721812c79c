"""Scoring over the confined head: TRL's numbers for less work."""

from types import SimpleNamespace

import pytest
import torch
from fake_llasa import batch
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl.trainer.utils import add_fused_lm_head

from speech.tokens import prepare_model
from tiny.llasa import new_model
from training.scoring import keep_output_dtype, score_confined


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_gradients_are_those_of_trls_full_head(tokenizer, tokens, temperature):
    ids, mask, labels = batch(tokenizer, tokens)
    results = []
    for narrow in (False, True):
        model = new_model(tokenizer, seed=0, hidden=48, layers=1)
        prepare_model(model, tokenizer, tokens)
        add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
        if narrow:
            score_confined(model, temperature)
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        (out.log_probs.sum() + 0.1 * out.entropy.sum()).backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (full, full_grads), (narrow, narrow_grads) = results
    torch.testing.assert_close(narrow.log_probs, full.log_probs)
    torch.testing.assert_close(narrow.entropy, full.entropy)
    assert full_grads.keys() == narrow_grads.keys()
    for name in full_grads:
        torch.testing.assert_close(narrow_grads[name], full_grads[name], msg=name)
    # By hand: the log-softmax over what is allowed, at the positions before the labels
    logits = model(ids, attention_mask=mask).logits[:, :-1] / temperature
    by_hand = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(narrow.log_probs, by_hand.masked_fill(labels[:, 1:] == -100, 0))


def test_a_batch_with_nothing_to_score(tokenizer, tokens):
    """--mask_truncated_completions leaves truncated rollouts out: here all of a micro-batch."""
    ids, mask, labels = batch(tokenizer, tokens)
    model = new_model(tokenizer, seed=0, hidden=48, layers=1)
    prepare_model(model, tokenizer, tokens)
    score_confined(model, temperature=1.0)
    out = model(input_ids=ids, attention_mask=mask, labels=torch.full_like(labels, -100), fused_lm_head=True)
    assert not out.label_mask.any() and not out.log_probs.any()
    out.log_probs.sum().backward()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_a_token_that_the_head_cannot_say_has_no_score(tokenizer, tokens):
    """TRL's kernel would take 0 for its logit: a loss without a bound."""
    model = new_model(tokenizer, seed=0, hidden=48, layers=1)
    prepare_model(model, tokenizer, tokens)
    score_confined(model, 1.0)
    ids, mask, _ = batch(tokenizer, tokens)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100  # the rest of the prompt is no answer either
    with pytest.raises(ValueError, match="a token is to be scored that the confined head cannot say"):
        model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)


def test_the_row_behind_the_last_one_has_no_score_either(tokenizer, tokens):
    model = new_model(tokenizer, seed=0, hidden=48, layers=1)
    prepare_model(model, tokenizer, tokens, "asr")  # the codes and some markers stand behind the head's last row
    score_confined(model, 1.0)
    ids = torch.tensor([[0, 1, tokens.text_end_id, tokens.text_end_id + 1]])
    labels = ids.clone()
    labels[:, 3] = -100
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert (out.log_probs != 0).tolist() == [[True, True, False]]
    with pytest.raises(ValueError, match="a token is to be scored that the confined head cannot say"):
        model(input_ids=ids, labels=ids, fused_lm_head=True)


def test_fsdp_leaves_the_outputs_as_they_are():
    """accelerate's policy would round log-probs to bfloat16; what else it says stays."""
    plugin = SimpleNamespace(mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16))
    keep_output_dtype(plugin)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.float32, None)
    plugin.mixed_precision_policy = None
    keep_output_dtype(plugin)
    assert plugin.mixed_precision_policy is None
