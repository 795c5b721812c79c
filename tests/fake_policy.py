"""A small random Llasa, and stand-ins for the codec and the ASR, so that scripts run in milliseconds."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from speech.error_rate import error_rate
from speech.tokens import SAMPLE_RATE, SPECIAL_TOKENS, code_token
from speech.whisper_scorer import Score
from speech.word_times import Word

NUM_CODES = 64
CONTEXT = 256  # tokens
CHAT_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llasa_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, Llama 3's special tokens, and Llasa's as plain added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    llama = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "finetune_right_pad_id")
    backend.add_special_tokens([f"<|{name}|>" for name in llama])
    plain = [*SPECIAL_TOKENS, *map(code_token, range(NUM_CODES))]
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=CHAT_TEMPLATE
    )


def save_policy(folder: Path, seed: int = 0, initializer_range: float = 0.3) -> str:
    """A small random Llasa, saved as train.py saves one, run.json included."""
    tokenizer = llasa_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=initializer_range,  # logits with a spread, so that a wrong position or mask shows
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"codec_id": "the-codec", "whisper": "the-whisper"}))
    return str(folder)


def save_lora(base: str, folder: Path, seed: int, **options) -> str:
    """A LoRA folder with random weights, far from its base."""
    torch.manual_seed(seed)
    options = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**options)).save_pretrained(folder)
    return str(folder)


class ToneCodec:
    """Stands in for XCodec2: each code is 20 ms of one tone. Records how it was loaded and what it decoded."""

    loaded: ClassVar = []
    decoded: ClassVar = []
    codebook_size = NUM_CODES

    @classmethod
    def from_pretrained(cls, id_or_path, *args):
        cls.loaded.append(id_or_path)
        return cls()

    def encode(self, wavs):
        return [[1, 2, 3] for _ in wavs]

    def decode(self, codes):
        assert all(codes), "the codec must not be given an empty item"
        self.decoded.extend(codes)
        return [0.1 * np.sin(np.arange(len(c) * 320) * 0.1).astype(np.float32) for c in codes]


class FirstWordLostASR:
    """Stands in for a Whisper: its transcript is the text without the first word, its NLL the clip's seconds.

    All words are equally long.
    """

    def __init__(self, name="other-asr", device="cpu"):
        assert name in ("other-asr", "the-whisper")

    def check_languages(self, languages):
        """It knows all of them."""

    def score(self, wavs, texts, languages, word_times=False):
        scores = []
        for wav, text in zip(wavs, texts, strict=True):
            hyp_text = " ".join(text.split()[1:]) if len(wav) else ""
            errors, duration_s, spoken = error_rate(text, hyp_text, "en"), len(wav) / SAMPLE_RATE, text.split()
            edges = [duration_s * i / len(spoken) for i in range(len(spoken) + 1)]
            words = tuple(map(Word, spoken, edges, edges[1:])) if word_times else None
            scores.append(Score(hyp_text, errors.rate, duration_s, errors.edits, errors.ref_length, words=words))
        return scores
