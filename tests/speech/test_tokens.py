"""The format: one prompt, rendered four ways; ids to codes and back; a policy that samples nothing but speech."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.cli import InputError
from speech.policy import Policy, load_tokenizer
from speech.tokens import (
    SPECIAL_TOKENS,
    SpeechTokens,
    asr_prompt,
    code_token,
    prepare_model,
    prepare_tokenizer,
    prompt_ids,
    tts_prompt,
    written_text,
)
from tiny.llasa import LLAMA_TOKENS, new_model, new_tokenizer

TEXT, REF_TEXT, REF_CODES = "Anna found two boxes.", "Peter sold six hats.", [3, 0, 7]

# The system turn and the dates of Llama-3.2-Instruct's template, in short.
LLAMA_TEMPLATE = (
    "{{- bos_token }}{%- if not date_string is defined %}"
    "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Cutting Knowledge Date: December 2023\n' }}"
    "{{- 'Today Date: ' + date_string + '\n\n' }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}\n"
)


def small_tokenizer():
    return new_tokenizer([TEXT, REF_TEXT], num_codes=64)


def llasa_1b_tokenizer():
    """Laid out as Llasa-1B: 128,256 base ids with Llama's markers at their end, 8 specials, 65,536 codes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    vocab |= {f"unused{i}": i for i in range(len(vocab), 128_000)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names = {
        128_000: "<|begin_of_text|>",
        128_001: "<|end_of_text|>",
        128_004: "<|finetune_right_pad_id|>",
        128_006: "<|start_header_id|>",
        128_007: "<|end_header_id|>",
        128_009: "<|eot_id|>",
    }
    reserved = [AddedToken(names.get(i, f"<|reserved_{i}|>"), special=True) for i in range(128_000, 128_256)]
    bpe.add_special_tokens(reserved)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    tokenizer.add_tokens([*SPECIAL_TOKENS, *map(code_token, range(65_536))])
    tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module", params=["small", "llasa_1b"])
def tokenizer(request):
    return small_tokenizer() if request.param == "small" else llasa_1b_tokenizer()


ASKED = {
    "tts": ("Convert the text to speech:", "<|TEXT_UNDERSTANDING_START|>", "<|TEXT_UNDERSTANDING_END|>"),
    "asr": ("Convert the speech to text:", "<|SPEECH_UNDERSTANDING_START|>", "<|SPEECH_UNDERSTANDING_END|>"),
}
OPENING = {"tts": "<|SPEECH_GENERATION_START|>", "asr": "<|TEXT_GENERATION_START|>"}


def by_hand(tokenizer, given: str, ref_codes: list[int], task: str = "tts") -> list[int]:
    """The prompt written out token by token; `given` is a text, or the tokens of codes."""
    asked, start, end = ASKED[task]
    token_id = tokenizer.convert_tokens_to_ids

    def words(string: str) -> list[int]:
        return tokenizer(string, add_special_tokens=False)["input_ids"]

    has_system = "Cutting Knowledge" in tokenizer.chat_template
    system = [
        token_id("<|start_header_id|>"),
        *words("system"),
        token_id("<|end_header_id|>"),
        *words("\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
        token_id("<|eot_id|>"),
    ]
    return [
        token_id("<|begin_of_text|>"),
        *(system if has_system else []),
        token_id("<|start_header_id|>"),
        *words("user"),
        token_id("<|end_header_id|>"),
        *words(f"\n\n{asked}"),
        token_id(start),
        *words(given),
        token_id(end),
        token_id("<|eot_id|>"),
        token_id("<|start_header_id|>"),
        *words("assistant"),
        token_id("<|end_header_id|>"),
        *words("\n\n"),
        token_id(OPENING[task]),
        *(token_id(f"<|s_{code}|>") for code in ref_codes),
    ]


def continue_final_message(tokenizer, template: str, given: str, ref_codes: list[int], task="tts") -> list[int]:
    """How Llasa's model card renders it: an assistant turn that is left open."""
    asked, start, end = ASKED[task]
    chat = [
        {"role": "user", "content": f"{asked}{start}{given}{end}"},
        {"role": "assistant", "content": OPENING[task] + "".join(f"<|s_{c}|>" for c in ref_codes)},
    ]
    return tokenizer.apply_chat_template(
        chat,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        continue_final_message=True,
        date_string="26 Jul 2024",
    )["input_ids"]


def by_trl(tokenizer, prompts: list, tmp_path) -> list[list[int]]:
    """TRL's own tokenisation, on a trainer made as train.py makes it; the model is too small to matter."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    args = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        num_generations=2,
        per_device_train_batch_size=2,
    )
    trainer = GRPOTrainer(
        model=LlamaForCausalLM(config),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    return trainer._tokenize_prompts(list(trainer.train_dataset["prompt"]))[0]


def test_one_prompt_four_ways(tokenizer, tmp_path):
    own_template = tokenizer.chat_template.split("{%- if add_generation_prompt %}{{- messages[-1]")[0]
    prepare_tokenizer(tokenizer)
    prompts = [tts_prompt(TEXT), tts_prompt(TEXT, REF_TEXT, REF_CODES)]
    texts, codes = [TEXT, f"{REF_TEXT} {TEXT}"], [[], REF_CODES]
    expected = [by_hand(tokenizer, t, c) for t, c in zip(texts, codes, strict=True)]
    assert [
        continue_final_message(tokenizer, own_template, t, c) for t, c in zip(texts, codes, strict=True)
    ] == expected
    assert by_trl(tokenizer, prompts, tmp_path) == expected
    policy = Policy(None, tokenizer, SpeechTokens.from_tokenizer(tokenizer))
    assert [prompt_ids(policy.tokenizer, prompt) for prompt in prompts] == expected

    speech = "<|s_3|><|s_0|><|s_63|>"
    expected = by_hand(tokenizer, speech, [], "asr")
    assert continue_final_message(tokenizer, own_template, speech, [], "asr") == expected
    assert by_trl(tokenizer, [asr_prompt([3, 0, 63])], tmp_path) == [expected]
    assert prompt_ids(policy.tokenizer, asr_prompt([3, 0, 63])) == expected


def test_ids_of_llasa_1b():
    tokens = prepare_tokenizer(llasa_1b_tokenizer())
    assert tokens == SpeechTokens(
        start_id=128_260,
        end_id=128_261,
        first_code_id=128_264,
        num_codes=65_536,
        num_text_ids=128_000,
        text_end_id=128_257,
    )
    assert tokens.ids([0, 65_535]) == [128_264, 193_799]


def test_prepare_is_idempotent_and_stops_at_end():
    tokenizer = small_tokenizer()
    prepare_tokenizer(tokenizer)
    template = tokenizer.chat_template
    prepare_tokenizer(tokenizer)
    assert tokenizer.chat_template == template
    assert tokenizer.eos_token == "<|SPEECH_GENERATION_END|>"
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)


@pytest.mark.parametrize(
    "added",
    [
        "{%- if add_generation_prompt %}{{- '<|SPEECH_GENERATION_START|>' }}{%- endif %}",  # would open it twice
        "{{- messages[0]['content'] }}",
    ],
)
def test_a_template_that_renders_something_else_is_refused(added):
    """As of a checkpoint of another tool: it would be prompted with what it was not trained on, without a word."""
    tokenizer = small_tokenizer()
    tokenizer.chat_template += added
    with pytest.raises(ValueError, match="renders a prompt as .*TEXT_UNDERSTANDING_START.*Use the"):
        prepare_tokenizer(tokenizer)


def test_ids_and_codes():
    tokens = SpeechTokens(start_id=4, end_id=5, first_code_id=8, num_codes=10, num_text_ids=3, text_end_id=3)
    assert tokens.codes(tokens.ids([3, 9])) == ([3, 9], True)
    assert tokens.codes([8, 17, 5]) == ([0, 9], False)
    assert tokens.codes([5]) == ([], False)
    assert tokens.codes([8, 5, 9]) == ([0], False)  # what follows END is not speech
    with pytest.raises(ValueError, match="code 10 is not in"):
        tokens.ids([10])
    with pytest.raises(ValueError, match="outside the speech codes"):
        tokens.codes([2])


def test_codes_are_text_that_decoding_keeps():
    """Registered as special tokens they would vanish from every transcript of a rollout."""
    tokenizer = small_tokenizer()
    tokens = prepare_tokenizer(tokenizer)
    assert tokenizer.decode(tokens.ids([1, 63]), skip_special_tokens=True) == "<|s_1|><|s_63|>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("  ",), "text is empty"),
        (("hi <|s_4|>",), "control token"),
        (("hi", "ref"), "voice prompt needs both"),
        (("hi", None, [1]), "voice prompt needs both"),
    ],
)
def test_bad_prompts(arguments, message):
    with pytest.raises(ValueError, match=message):
        tts_prompt(*arguments)


def test_a_tokenizer_without_speech():
    tokenizer = small_tokenizer()
    plain = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer.__class__.from_str(
            '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,'
            '"post_processor":null,"decoder":null,"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}'
        )
    )
    with pytest.raises(ValueError, match="not a Llasa one"):
        prepare_tokenizer(plain)


def test_confined_policy_samples_what_it_is_trained_on():
    """Every sampled id is a code or END, the entropy is finite, and nothing of the bias is trained or saved."""
    tokenizer = small_tokenizer()
    tokens = prepare_tokenizer(tokenizer)
    model = new_model(tokenizer, seed=0, hidden=48, layers=1)
    names = set(model.state_dict())
    prepare_model(model, tokenizer, tokens)
    prepare_model(model, tokenizer, tokens)
    assert set(model.state_dict()) == names
    ids = torch.tensor([prompt_ids(tokenizer, tts_prompt(TEXT))])
    probabilities = model(ids).logits[0, -1].softmax(-1)
    allowed = [*range(tokens.first_code_id, tokens.first_code_id + tokens.num_codes), tokens.end_id]
    assert probabilities[allowed].sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.isfinite(model(ids).logits[0, -1].log_softmax(-1)).all()
    torch.manual_seed(0)
    sampled = model.generate(
        ids.repeat(8, 1),
        attention_mask=torch.ones(8, ids.shape[1], dtype=torch.long),
        do_sample=True,
        max_new_tokens=20,
    )
    assert set(sampled[:, ids.shape[1] :].flatten().tolist()) <= {*allowed, tokenizer.pad_token_id}


def test_a_recognising_policy_writes_text_alone():
    tokenizer = small_tokenizer()
    tokens = prepare_tokenizer(tokenizer, "asr")
    assert tokenizer.eos_token == "<|TEXT_GENERATION_END|>" and tokenizer.pad_token != tokenizer.eos_token
    model = new_model(tokenizer, seed=0, hidden=48, layers=1)
    prepare_model(model, tokenizer, tokens, "asr")
    assert model.generation_config.eos_token_id == tokens.text_end_id
    ids = torch.tensor([prompt_ids(tokenizer, asr_prompt([1, 2, 3]))])
    torch.manual_seed(0)
    sampled = model.generate(
        ids.repeat(8, 1),
        attention_mask=torch.ones(8, ids.shape[1], dtype=torch.long),
        do_sample=True,
        max_new_tokens=20,
    )
    added = set(tokenizer.get_added_vocab().values()) - {tokens.text_end_id, tokenizer.pad_token_id}
    assert not set(sampled[:, ids.shape[1] :].flatten().tolist()) & added
    assert sorted(tokens.answer_ids("both")) == sorted([*tokens.text_ids, *tokens.speech_ids])


def test_text_is_read_up_to_its_end():
    tokenizer = small_tokenizer()
    tokens = prepare_tokenizer(tokenizer, "asr")
    written = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert written_text(tokenizer, [*written, tokens.text_end_id, *written], tokens.text_end_id) == (TEXT, False)
    assert written_text(tokenizer, written, tokens.text_end_id) == (TEXT, True)
    assert written_text(tokenizer, [tokens.text_end_id], tokens.text_end_id) == ("", False)
    with pytest.raises(ValueError, match="no speech to read"):
        asr_prompt([])


def test_llama_markers_come_before_the_added_tokens():
    tokenizer = small_tokenizer()
    assert max(tokenizer.convert_tokens_to_ids(LLAMA_TOKENS)) < tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[0])


def test_an_added_token_among_the_text_matters_to_asr_alone(tmp_path):
    """Only ASR samples text, which it takes to be one run of ids."""
    shutil.copytree("tiny/llasa", tmp_path / "llasa")
    file = tmp_path / "llasa" / "tokenizer.json"
    content = json.loads(file.read_text())
    first = next(token for token, token_id in content["model"]["vocab"].items() if token_id == 0)
    content["added_tokens"].insert(0, content["added_tokens"][0] | {"id": 0, "content": first})
    file.write_text(json.dumps(content))
    _, tokens = load_tokenizer(str(tmp_path / "llasa"), "tts")
    assert tokens == load_tokenizer("tiny/llasa")[1]
    for task in ("asr", "both"):
        with pytest.raises(InputError, match=f"do not follow its text vocabulary of .*; --task {task} supports"):
            load_tokenizer(str(tmp_path / "llasa"), task)
