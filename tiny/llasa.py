"""The toy setup's Llasa before training: a small Llama-3.2 and its tokenizer."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from speech.tokens import SPECIAL_TOKENS, code_token, prepare_tokenizer

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
LLAMA_TOKENS = [BEGIN, END, PAD, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# The turns of Llama-3.2-Instruct, without its system turn (the date), which is the same in every prompt.
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
MAX_LENGTH = 512


def new_tokenizer(texts: list[str], num_codes: int, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`, Llama's special tokens, then Llasa's tokens as plain added tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token="<|eot_id|>",
        pad_token=PAD,
        additional_special_tokens=LLAMA_TOKENS,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([*SPECIAL_TOKENS, *map(code_token, range(num_codes))])
    tokenizer.chat_template = CHAT_TEMPLATE
    prepare_tokenizer(tokenizer)
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int, hidden: int = 192, layers: int = 4) -> LlamaForCausalLM:
    """Random weights; 2.8 M of them with tiny/llasa's tokenizer."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 48,
            num_key_value_heads=hidden // 48,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            rope_theta=10_000.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
