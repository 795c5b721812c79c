"""Whisper checkpoints in CTranslate2's format, as faster-whisper loads them, under openai-whisper's names.

model.bin, little-endian: uint32 version, name of the spec, uint32 revision, uint32 number of arrays; of each array its
name, uint8 rank, uint32 dimensions, uint8 dtype, uint32 number of bytes, data; then aliases, which are not read. A
name is a uint16 length, and so many bytes, the last of them 0.
"""

import re
import struct
from pathlib import Path

import torch

from common.cli import InputError, first_line

WEIGHTS = "model.bin"
VERSION = 6  # of every release of CTranslate2 since 2021
DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
# Names in CTranslate2 → names in openai-whisper, every substitution tried in this order
_RENAMES = {
    "encoder/layer_norm/": "encoder/ln_post/",
    "decoder/layer_norm/": "decoder/ln/",
    "coder/layer_": "coder/blocks/",
    "/self_attention/layer_norm/": "/attn_ln/",
    "/self_attention/linear_0/": "/attn/query+key+value/",
    "/self_attention/linear_1/": "/attn/out/",
    "/attention/layer_norm/": "/cross_attn_ln/",
    "/attention/linear_0/": "/cross_attn/query/",
    "/attention/linear_1/": "/cross_attn/key+value/",
    "/attention/linear_2/": "/cross_attn/out/",
    "/ffn/layer_norm/": "/mlp_ln/",
    "/ffn/linear_0/": "/mlp/0/",
    "/ffn/linear_1/": "/mlp/2/",
    "/embeddings/": "/token_embedding/",
    "/position_encodings/encodings": "/positional_embedding",
    "/gamma": "/weight",
    "/beta": "/bias",
    "/": ".",
}


def is_ctranslate2_folder(path: str | Path) -> bool:
    return (Path(path) / WEIGHTS).is_file()


def read_ctranslate2_folder(folder: str | Path) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """ModelDimensions and weights, under openai-whisper's names and in the file's precision, of a folder.

    Raises:
        InputError: the file is broken, not a Whisper, or quantised.
    """
    path = Path(folder) / WEIGHTS
    arrays = read_arrays(path)
    quantised = next((name for name, array in arrays.items() if array.dim() and not array.is_floating_point()), None)
    if quantised is not None:
        raise InputError(
            f"{path}: the weights are quantised ({quantised} is {arrays[quantised].dtype}). Use a conversion to "
            "float16 or float32, or --judge faster-whisper:FOLDER"
        )
    try:
        return dimensions(arrays), rename_arrays(arrays)
    except KeyError as error:
        raise InputError(f"{path}: no array {error}. Use a Whisper converted by CTranslate2") from error


def read_arrays(path: Path) -> dict[str, torch.Tensor]:
    """All arrays of a model.bin by CTranslate2's names; InputError for one that is broken or not a Whisper."""
    try:
        return _parse(bytearray(path.read_bytes()))
    except (OSError, struct.error, UnicodeDecodeError, KeyError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"{path}: cannot be read as a Whisper of CTranslate2 ({reason}). Download or convert it again"
        ) from error


def _parse(content: bytearray) -> dict[str, torch.Tensor]:
    position = 0

    def read(layout: str) -> tuple:
        nonlocal position
        values = struct.unpack_from(f"<{layout}", content, position)
        position += struct.calcsize(f"<{layout}")
        return values

    def read_name() -> str:
        [length] = read("H")
        [name] = read(f"{length}s")
        return name.removesuffix(b"\0").decode()

    [version] = read("I")
    if version != VERSION:
        raise ValueError(f"version {version}, expected {VERSION}")
    spec = read_name()
    if spec != "WhisperSpec":
        raise ValueError(f"the model is a {spec}, expected a WhisperSpec")
    _revision, num_arrays = read("II")
    arrays = {}
    for _ in range(num_arrays):
        name = read_name()
        [rank] = read("B")
        shape = read(f"{rank}I")
        dtype_id, num_bytes = read("BI")
        dtype = DTYPES[dtype_id]
        flat = torch.frombuffer(content, dtype=dtype, count=num_bytes // dtype.itemsize, offset=position)
        arrays[name] = flat.reshape(shape).clone()
        position += num_bytes
    return arrays


def dimensions(arrays: dict[str, torch.Tensor]) -> dict[str, int]:
    """openai-whisper's ModelDimensions of a model's arrays; KeyError for a missing one."""
    sizes = {"n_mels": arrays["encoder/conv1/weight"].shape[1]}
    for part, prefix in (("audio", "encoder"), ("text", "decoder")):
        num_positions, width = arrays[f"{prefix}/position_encodings/encodings"].shape
        sizes |= {f"n_{part}_ctx": num_positions, f"n_{part}_state": width}
        sizes[f"n_{part}_head"] = arrays[f"{prefix}/num_heads"].item()
        layers = {name.split("/")[1] for name in arrays if re.match(rf"{prefix}/layer_\d", name)}
        sizes[f"n_{part}_layer"] = len(layers)
    return sizes | {"n_vocab": arrays["decoder/embeddings/weight"].shape[0]}


def rename_arrays(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under openai-whisper's names, projections of attention apart.

    CTranslate2 stacks query, key and value of a self-attention, and key and value of a cross-attention. Its key has a
    bias of 0; openai-whisper's has none.
    """
    state = {}
    for name, array in arrays.items():
        if array.dim() == 0:  # a setting, such as num_heads
            continue
        for old, replacement in _RENAMES.items():
            name = name.replace(old, replacement)
        prefix, dot, stacked = name.rpartition("attn.")
        projections, kind = stacked.split(".") if dot else ("", "")
        if "+" not in projections:
            state[name] = array
            continue
        names = projections.split("+")
        for projection, part in zip(names, array.chunk(len(names)), strict=True):
            state[f"{prefix}attn.{projection}.{kind}"] = part.clone()
    return {name: weight for name, weight in state.items() if not name.endswith(".key.bias") or weight.any()}
