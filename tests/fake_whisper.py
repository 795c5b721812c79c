"""A small random Whisper, and noise to score with it."""

import struct
from pathlib import Path

import numpy as np
import torch
import whisper

from speech.tokens import SAMPLE_RATE

TEXTS = ["Hello there.", "One, two, three, four, five, six!", "Yes.", "The cat sat on the mat.", "今天天气很好。"]


def babble(duration_s: float, seed: int, level: float = 0.1) -> np.ndarray:
    """Low-pass noise, float32, shape (n_samples,)."""
    noise = np.random.default_rng(seed).standard_normal(round(duration_s * SAMPLE_RATE))
    return (level * np.convolve(noise, np.ones(4) / 2, mode="same")).astype(np.float32)


def save_random_whisper(path: Path, n_vocab: int = 51_865) -> Path:
    """Write a checkpoint of two layers with a window of 1.28 s; 51,864 tokens are an English-only model."""
    dims = whisper.ModelDimensions(
        n_mels=80,
        n_audio_ctx=64,
        n_audio_state=32,
        n_audio_head=2,
        n_audio_layer=1,
        n_vocab=n_vocab,
        n_text_ctx=64,
        n_text_state=32,
        n_text_head=2,
        n_text_layer=1,
    )
    torch.manual_seed(0)
    model = whisper.model.Whisper(dims)
    torch.nn.init.normal_(model.decoder.positional_embedding)
    # Enough for the audio to matter, not so much that every NLL is clamped
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.1)
    model.decoder.blocks[0].cross_attn.out.weight.data *= 10
    torch.save({"dims": vars(dims), "model_state_dict": model.state_dict()}, path)
    return path


# --- CTranslate2's format ---------------------------------------------------------------------------------


def write_ctranslate2(path: Path, arrays: dict[str, np.ndarray], version: int = 6, spec: str = "WhisperSpec") -> None:
    """A model.bin of these arrays, and one alias, as CTranslate2's converter writes it."""
    dtypes = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}

    def name(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    content = struct.pack("<I", version) + name(spec) + struct.pack("<II", 3, len(arrays))
    for key, array in arrays.items():
        content += name(key) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content += struct.pack("<BI", dtypes[str(array.dtype)], array.nbytes) + array.tobytes()
    content += struct.pack("<I", 1) + name("decoder/projection/weight") + name("decoder/embeddings/weight")
    path.write_bytes(content)


def ctranslate2_arrays(model: whisper.Whisper, dtype: str = "float16") -> dict[str, np.ndarray]:
    """A Whisper's weights, stacked and named as CTranslate2's converter does."""
    dims, arrays = model.dims, {}

    def put(name: str, *parts: torch.Tensor) -> None:
        arrays[name] = torch.cat(parts).detach().numpy().astype(dtype)

    def put_norm(name: str, norm) -> None:
        put(f"{name}/gamma", norm.weight)
        put(f"{name}/beta", norm.bias)

    def put_linear(name: str, *linears) -> None:
        put(f"{name}/weight", *(linear.weight for linear in linears))
        put(
            f"{name}/bias",
            *(torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears),
        )

    for side, part, heads in (
        ("encoder", model.encoder, dims.n_audio_head),
        ("decoder", model.decoder, dims.n_text_head),
    ):
        arrays[f"{side}/num_heads"] = np.array(heads, np.int16)
        put(f"{side}/position_encodings/encodings", part.positional_embedding)
        for number, block in enumerate(part.blocks):
            layer = f"{side}/layer_{number}"
            put_norm(f"{layer}/self_attention/layer_norm", block.attn_ln)
            put_linear(f"{layer}/self_attention/linear_0", block.attn.query, block.attn.key, block.attn.value)
            put_linear(f"{layer}/self_attention/linear_1", block.attn.out)
            if block.cross_attn is not None:
                put_norm(f"{layer}/attention/layer_norm", block.cross_attn_ln)
                put_linear(f"{layer}/attention/linear_0", block.cross_attn.query)
                put_linear(f"{layer}/attention/linear_1", block.cross_attn.key, block.cross_attn.value)
                put_linear(f"{layer}/attention/linear_2", block.cross_attn.out)
            put_norm(f"{layer}/ffn/layer_norm", block.mlp_ln)
            put_linear(f"{layer}/ffn/linear_0", block.mlp[0])
            put_linear(f"{layer}/ffn/linear_1", block.mlp[2])
    for name in ("conv1", "conv2"):
        put_linear(f"encoder/{name}", getattr(model.encoder, name))
    put_norm("encoder/layer_norm", model.encoder.ln_post)
    put_norm("decoder/layer_norm", model.decoder.ln)
    put("decoder/embeddings/weight", model.decoder.token_embedding.weight)
    return arrays


def save_ctranslate2(folder: Path, model: whisper.Whisper, dtype: str = "float16") -> Path:
    """The folder of a Whisper in CTranslate2's format; without a tokenizer, which the .bin does not need."""
    folder.mkdir(parents=True, exist_ok=True)
    write_ctranslate2(folder / "model.bin", ctranslate2_arrays(model, dtype))
    return folder
