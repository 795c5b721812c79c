"""Checkpoints laid out as the published ones, with random weights: a Llasa with its tokenizer, XCodec2, Whisper.

What a real checkpoint has and the toy setup has not: 193,800 tokens of which Llama's 256 special ones lie between text
and speech, a chat template that writes a date, a config in the words of older transformers, a head beside the
embeddings that it is tied to, and a padding token that ends Llama's turns.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.rollout import LLASA_1B, LLASA_1B_TOKENS, PAD_ID
from speech.tokens import SPECIAL_TOKENS, XCODEC2_CODES, code_token, prepare_tokenizer, prompt_ids, tts_prompt

NUM_TEXT_IDS = LLASA_1B_TOKENS.num_text_ids
BOS_ID = NUM_TEXT_IDS  # Llama's special tokens follow the text
NUM_LLAMA_TOKENS = 256
LLAMA_TOKENS = {
    BOS_ID: "<|begin_of_text|>",
    128_001: "<|end_of_text|>",
    PAD_ID: "<|finetune_right_pad_id|>",
    128_006: "<|start_header_id|>",
    128_007: "<|end_header_id|>",
    128_008: "<|eom_id|>",
    128_009: "<|eot_id|>",
    128_010: "<|python_tag|>",
}
ENDS_OF_TURN = [128_001, 128_008, 128_009]
# Llama-3.2-Instruct's own, without the branches for tools in a system turn
LLAMA_TEMPLATE = r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""  # noqa: E501


def llasa_tokenizer(texts: list[str], num_text_ids: int = NUM_TEXT_IDS) -> PreTrainedTokenizerFast:
    """193,800 tokens in the published order. Its text tokens are a byte-level BPE of `texts` and of fillers.

    As published it writes a begin-of-text before what it encodes outside the chat template, and pads with <|eot_id|>.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [*texts, LLAMA_TEMPLATE], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    trained = json.loads(bpe.to_str())["model"]
    vocab = trained["vocab"] | {f"filler{i}": i for i in range(len(trained["vocab"]), num_text_ids)}
    bpe.model = models.BPE(vocab=vocab, merges=[tuple(merge) for merge in trained["merges"]])
    bpe.decoder = decoders.ByteLevel()
    names = {i - NUM_TEXT_IDS: name for i, name in LLAMA_TOKENS.items()}
    names = [names.get(i, f"<|reserved_special_token_{i}|>") for i in range(NUM_LLAMA_TOKENS)]
    bpe.add_special_tokens([AddedToken(name, special=True) for name in names])
    bpe.add_tokens([*SPECIAL_TOKENS, *map(code_token, range(XCODEC2_CODES))])
    begin = "<|begin_of_text|>"
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, bpe.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=begin,
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
        model_max_length=131_072,
        clean_up_tokenization_spaces=False,
        chat_template=LLAMA_TEMPLATE,
    )


def save_llasa(
    folder: Path,
    texts: list[str],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    codes: int | None = None,
    tied: bool = True,
    **sizes: int,
) -> None:
    """Write a Llasa in bfloat16: Llasa-1B's sizes but for those given in `sizes`, embeddings and head both in the file.

    Args:
        texts: what the tokenizer's text tokens are made for.
        device: where the weights are drawn.
        codes: after how many codes a rollout ends on average (`end_after`); None leaves the weights as drawn, and a
            rollout never ends.
        tied: whether the head's values are the embeddings'; the config calls them tied either way, as published.
    """
    tokenizer = llasa_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = LLASA_1B | sizes | {"tie_word_embeddings": tied}
    config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):  # drawn once, in bfloat16: PyTorch's own initialisation is never kept
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device=device)
    model.init_weights()
    model.tie_weights()
    if codes is not None:
        end_after(model, tokenizer, texts[0], codes)
    model.config.save_pretrained(folder)
    state = model.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"].clone()  # safetensors saves no tensor under two names
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for new in ("dtype", "rope_parameters"):
        config.pop(new, None)
    config |= {
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "bos_token_id": BOS_ID,
        "eos_token_id": ENDS_OF_TURN,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    # Llama's own sampling, which must not mix with what the scripts ask for
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": BOS_ID}
    generation = sampling | {"eos_token_id": ENDS_OF_TURN}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


@torch.no_grad()
def end_after(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, codes: int) -> None:
    """Turn END's row of the head so that its log-probability is −ln `codes` on average over positions.

    With weights as drawn it is −11, no rollout ends, every reward is 0, and so is every gradient.
    """
    tokens = prepare_tokenizer(tokenizer)
    prompt = prompt_ids(tokenizer, tts_prompt(text))
    speech = tokens.ids(torch.randint(tokens.num_codes, (64,)).tolist())
    ids = torch.tensor([prompt + speech], device=model.device)
    hidden = model.model(input_ids=ids).last_hidden_state[0, len(prompt) :].float()
    weight = model.get_output_embeddings().weight
    of_codes = hidden @ weight[tokens.first_code_id :][: tokens.num_codes].float().T
    of_end = hidden @ weight[tokens.end_id].float()
    missing = (of_codes.logsumexp(dim=-1) - of_end).mean() - math.log(codes)
    mean = hidden.mean(dim=0)
    weight[tokens.end_id] += (missing * mean / (mean @ mean)).to(weight.dtype)
