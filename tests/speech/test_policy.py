"""Sampling a checkpoint: left padding, the context's limit, seeds, adapters, and both tasks of one model."""

import json

import pytest
import torch
from fake_policy import CONTEXT, NUM_CODES, save_policy
from transformers import GenerationConfig, LlamaForCausalLM, set_seed

from speech.policy import Policy, recorded
from speech.tokens import prompt_ids, tts_prompt


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder)
    # What a checkpoint says of sampling must not mix with what it is sampled with.
    GenerationConfig(do_sample=True, repetition_penalty=5.0, min_p=0.5).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policy(policy_path):
    return Policy.from_pretrained(policy_path, "cpu")


def test_a_batch_is_sampled_as_each_prompt_alone(policy):
    prompts = [tts_prompt(text) for text in ("a", "several words more", "two words")]
    settings = {"temperature": 0, "max_length": CONTEXT}
    batched = policy.sample(prompts, batch_size=3, **settings)
    alone = [policy.sample([prompt], **settings)[0] for prompt in prompts]
    assert batched == alone
    assert len({tuple(sample.codes) for sample in batched}) == 3


def test_each_prompt_may_fill_the_context_whatever_else_is_in_its_batch(policy):
    prompts = [tts_prompt("a"), tts_prompt("several words more")]
    for prompt, sample in zip(prompts, policy.sample(prompts, max_length=160), strict=True):
        assert not sample.truncated or len(prompt_ids(policy.tokenizer, prompt)) + len(sample.codes) == 160


def test_sampling_is_seeded_and_confined_to_codes(policy):
    def draw(seed):
        set_seed(seed)
        return policy.sample([tts_prompt("hello")] * 4, temperature=1.0, max_length=150)

    first = draw(1)
    assert first == draw(1) != draw(2)
    assert len({tuple(sample.codes) for sample in first}) == 4
    assert all(0 <= code < NUM_CODES for sample in first for code in sample.codes)


def test_sampled_frequencies_are_the_softmax_of_the_logits(policy):
    """No top-k or checkpoint default slips in: the first code's frequencies are softmax(logits / temperature)."""
    prompt = tts_prompt("hello")
    ids = torch.tensor([prompt_ids(policy.tokenizer, prompt)])
    with torch.no_grad():
        expected = (policy.model(ids).logits[0, -1] / 1.5).softmax(-1)
    set_seed(0)
    n = 2_000
    first = policy._generate(ids.tolist() * n, [ids.shape[1] + 1] * n, 1.5, 1.0)
    counts = torch.bincount(torch.tensor([row[0] for row in first]), minlength=len(expected)) / n
    assert 0.5 * (counts - expected).abs().sum() < 0.1


def test_no_prompts_give_no_samples(policy):
    assert policy.sample([]) == []


def test_a_text_too_long_is_named_before_sampling(policy, monkeypatch):
    monkeypatch.setattr(policy.model, "generate", lambda **_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="wordy wordy.*too long.*256.*Shorten"):
        policy.sample([tts_prompt("short"), tts_prompt("wordy " * 40)])
    with pytest.raises(ValueError, match="a.jsonl, row 1: the text 'wordy"):
        policy.encode([tts_prompt("short"), tts_prompt("wordy " * 40)], names=["a.jsonl, row 0", "a.jsonl, row 1"])


def test_an_adapter_folder_loads(policy_path, policy, tmp_path):
    peft = pytest.importorskip("peft")
    base = LlamaForCausalLM.from_pretrained(policy_path)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    loaded = Policy.from_pretrained(str(tmp_path), "cpu")
    prompt = [tts_prompt("hello")]
    ids = torch.tensor([prompt_ids(policy.tokenizer, prompt[0])])
    with torch.no_grad():
        difference = (loaded.model(ids).logits - adapted(ids).logits)[..., loaded.tokens.end_id].abs().max()
    assert difference < 1e-4
    assert loaded.sample(prompt, temperature=0, max_length=150) != policy.sample(prompt, temperature=0, max_length=150)


def test_no_progress_bar_in_a_log_file(policy, capsys):
    """The stderr of a test is no terminal."""
    policy.sample([tts_prompt("hello")], max_length=150, progress="sampling")
    assert capsys.readouterr().err == ""


def test_recorded_is_of_the_run_of_a_checkpoint_or_the_default(tmp_path):
    assert recorded(str(tmp_path), "codec_id", "default") == "default"
    (tmp_path / "run.json").write_text(json.dumps({"codec_id": "mine"}))
    assert recorded(str(tmp_path / "checkpoint-5"), "codec_id", "default") == "mine"
    assert recorded(str(tmp_path), "whisper", "default") == "default"
