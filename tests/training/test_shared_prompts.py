"""A long prompt that is read once for its group: the same scores and gradients."""

import pytest
import torch
from fake_llasa import TEXT, batch

from speech.tokens import asr_prompt, prepare_model, prepare_tokenizer, prompt_ids
from tiny.llasa import new_model
from training import shared_prompts
from training.scoring import score_confined


def long_prompts(tokenizer, tokens):
    """Six rollouts of two clips, mixed, the prompts padded on the left and the texts on the right."""
    texts = ["Anna", "Anna found", TEXT, "two", "boxes.", "found two"]
    pad, width = tokenizer.pad_token_id, 8
    prompts = [prompt_ids(tokenizer, asr_prompt(codes)) for codes in ([5, 6, 7] * 20, [9] * 40)]
    longest, rows = max(map(len, prompts)), []
    for i, text in enumerate(texts):
        prompt = prompts[i % 2]
        answer = tokenizer(text, add_special_tokens=False)["input_ids"][: width - 1] + [tokens.text_end_id]
        left, right = longest - len(prompt), width - len(answer)
        rows.append(
            (
                [pad] * left + prompt + answer + [pad] * right,
                [0] * left + [1] * (len(prompt) + len(answer)) + [0] * right,
                [-100] * longest + answer + [-100] * right,
            )
        )
    return [torch.tensor(part) for part in zip(*rows, strict=True)]


def test_a_long_prompt_read_once_gives_the_same_scores_and_gradients(tokenizer, monkeypatch):
    tokens = prepare_tokenizer(tokenizer, "asr")
    ids, mask, labels = long_prompts(tokenizer, tokens)
    results, inputs = [], []
    for packed in (False, True):
        monkeypatch.setattr(shared_prompts, "PACKED_FRAC", 0.5 if packed else 0.0)
        model = new_model(tokenizer, seed=0, hidden=48, layers=3)
        prepare_model(model, tokenizer, tokens, "asr")
        score_confined(model, temperature=0.7)
        model.base_model.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True)
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        (out.log_probs * torch.arange(1.0, 7)[:, None]).sum().backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters()}))
    prompt_length = ids.shape[1] - 8
    assert [given["input_ids"].shape for given in inputs] == [ids.shape, (2, prompt_length + 3 * 8)]
    assert inputs[1]["attention_mask"].any(dim=-1).all()  # of padding that sees nothing some kernels make NaN
    (each, each_grads), (once, once_grads) = results
    assert each.log_probs.abs().sum() > 1
    torch.testing.assert_close(once.log_probs, each.log_probs)
    torch.testing.assert_close(once.entropy, each.entropy)
    for name in each_grads:
        torch.testing.assert_close(once_grads[name], each_grads[name], msg=name)


def test_arguments_that_are_none_do_not_stop_the_packing(tokenizer, tokens):
    """PEFT passes on all arguments of a forward, most of them None."""
    model = new_model(tokenizer, seed=0, hidden=48, layers=1)
    ids, mask, labels = long_prompts(tokenizer, tokens)
    prompt_length = int((labels != -100).any(dim=0).int().argmax())
    inputs = {"input_ids": ids, "attention_mask": mask, "inputs_embeds": None, "output_attentions": None}
    assert shared_prompts.shared_prompts(model, inputs, prompt_length) is not None
    assert shared_prompts.shared_prompts(model, inputs | {"inputs_embeds": ids}, prompt_length) is None
    model.config._attn_implementation = "eager"  # which adds a mask to the scores, and would add one of truth values
    assert shared_prompts.shared_prompts(model, inputs, prompt_length) is None


@pytest.mark.parametrize(("rows_of_one", "packed"), [(1, False), (3, True)])
def test_a_packed_row_is_as_long_as_that_of_the_largest_group(model, rows_of_one, packed):
    """Six rows of 40 + 8 tokens are 288. Two prompts with 3 rows each are packed in 2 · (40 + 3 · 8) = 128, less than
    half of it; with 1 and 5 rows in 2 · (40 + 5 · 8) = 160. Padding tells one prompt from the other."""
    ids, mask = torch.zeros(2, 6, 48, dtype=torch.long)
    mask[:, 1:] = 1
    mask[rows_of_one:, 0] = 1
    groups = shared_prompts.shared_prompts(model, {"input_ids": ids, "attention_mask": mask}, prompt_length=40)
    assert (groups is not None) == packed
    if packed:
        assert groups.tolist() == [0] * 3 + [1] * 3


def test_short_prompts_are_not_packed(model, tokenizer, tokens):
    ids, mask, labels = batch(tokenizer, tokens)
    length = int((labels != -100).any(dim=0).int().argmax())
    assert shared_prompts.shared_prompts(model, {"input_ids": ids, "attention_mask": mask}, length) is None
