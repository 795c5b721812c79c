"""openai-whisper models from OpenAI's releases, .pt files, and checkpoints in transformers' or CTranslate2's format.

The computation is openai-whisper's in every case: a checkpoint in another format is converted when it is loaded. So is
its tokenizer, and with it the tokens that a transcript may not have: a `suppress_tokens` of a fine-tuned model's
generation_config.json is not read.
"""

import hashlib
import os
from pathlib import Path

import torch
import whisper
from whisper.tokenizer import get_tokenizer

from common.cli import InputError, first_line
from speech.checkpoint_files import UNREADABLE, find_checkpoint, load_pickle, load_weights, read_json
from speech.ctranslate2_checkpoint import is_ctranslate2_folder, read_ctranslate2_folder

DEFAULT_WHISPER = "large-v3"  # of the reward
ACCEPTED = (
    "the name of an openai-whisper model, the path of its .pt file, a folder of a Whisper in CTranslate2's format, or "
    "a folder or hub id of one in transformers' format, such as openai/whisper-large-v3"
)
# Files of a checkpoint in transformers' format → their key with the id of <|notimestamps|>
NO_TIMESTAMPS = {"generation_config.json": "no_timestamps_token_id", "added_tokens.json": "<|notimestamps|>"}
# Names in transformers → names in openai-whisper, every substitution tried in this order
_RENAMES = {
    "coder.layers.": "coder.blocks.",
    "encoder.layer_norm.": "encoder.ln_post.",
    "decoder.layer_norm.": "decoder.ln.",
    "decoder.embed_tokens.": "decoder.token_embedding.",
    ".embed_positions.weight": ".positional_embedding",
    ".self_attn_layer_norm.": ".attn_ln.",
    ".encoder_attn_layer_norm.": ".cross_attn_ln.",
    ".final_layer_norm.": ".mlp_ln.",
    ".self_attn.": ".attn.",
    ".encoder_attn.": ".cross_attn.",
    ".q_proj.": ".query.",
    ".k_proj.": ".key.",
    ".v_proj.": ".value.",
    ".out_proj.": ".out.",
    ".fc1.": ".mlp.0.",
    ".fc2.": ".mlp.2.",
}
# Keys of transformers' config.json → ModelDimensions
_DIMENSIONS = {
    "num_mel_bins": ("n_mels",),
    "max_source_positions": ("n_audio_ctx",),
    "d_model": ("n_audio_state", "n_text_state"),
    "encoder_attention_heads": ("n_audio_head",),
    "encoder_layers": ("n_audio_layer",),
    "vocab_size": ("n_vocab",),
    "max_target_positions": ("n_text_ctx",),
    "decoder_attention_heads": ("n_text_head",),
    "decoder_layers": ("n_text_layer",),
}
# Layers and width of the decoder → OpenAI's name
_SIZES = {
    (4, 384): "tiny",
    (6, 512): "base",
    (12, 768): "small",
    (24, 1024): "medium",
    (32, 1280): "large",
    (4, 1280): "large-v3-turbo",
}
# How far the attention of a model runs behind the speech (ahead of it, where negative), in s; measured on clips with
# known word times (docs/melody.md)
_ATTENTION_LAG_S = {"tiny.en": 0.06, "base": -0.08}


def load_whisper(name_or_path: str | os.PathLike) -> whisper.Whisper:
    """An openai-whisper model, float32 on the CPU.

    Args:
        name_or_path: 'large-v3' or another name of openai-whisper, a .pt file in OpenAI's format, a folder of a Whisper
            in CTranslate2's format, or a folder or hub id ('openai/whisper-large-v3') of one in transformers' format.
    Raises:
        InputError: no such model, not a Whisper, its weights are broken or do not fit, tokens were added to it, or the
            download failed.
    """
    name = os.fspath(name_or_path)
    if name in whisper.available_models():
        try:
            return whisper.load_model(name, device="cpu")
        except (OSError, RuntimeError) as error:
            raise InputError(f"{name}: the download failed ({first_line(error)}). Try again") from error
    if os.path.exists(name) or ("/" in name and Path(name).suffix != ".pt"):
        return build_whisper(*read_checkpoint(name), name)
    raise InputError(
        f"{name}: no such Whisper model. Accepted: {ACCEPTED}. Names: {', '.join(whisper.available_models())}"
    )


def read_checkpoint(path: str) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Dimensions and weights, under openai-whisper's names, of a file, folder or hub id."""
    if Path(path).is_file():
        return read_openai_file(path)
    if is_ctranslate2_folder(path):
        return read_ctranslate2_folder(path)
    return read_transformers_checkpoint(path)


def weights_digest(path: str) -> str:
    """The same for a Whisper's file and folders in any format, float16 or float32.

    Raises:
        InputError: it cannot be read.
    """
    _, state = read_checkpoint(path)
    state.pop("encoder.positional_embedding", None)  # a sinusoid, which formats round differently
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_openai_file(path: str) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Dimensions and weights of a .pt file."""
    try:
        checkpoint = load_pickle(Path(path))
        lacking = {"dims", "model_state_dict"} - set(checkpoint)
        if lacking:
            raise KeyError(*sorted(lacking))
        return dict(checkpoint["dims"]), dict(checkpoint["model_state_dict"])
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"{path}: cannot be loaded as an openai-whisper model ({reason}). Use a .pt file in OpenAI's format, or "
            "the folder of one in transformers' or CTranslate2's format"
        ) from error


def read_transformers_checkpoint(id_or_path: str) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Dimensions and weights, under openai-whisper's names, of a folder or hub id in transformers' format."""
    folder = find_checkpoint(id_or_path, ACCEPTED, other_files=tuple(NO_TIMESTAMPS))
    config = read_json(folder / "config.json")
    if config.get("model_type") != "whisper":
        raise InputError(f"{id_or_path}: not a Whisper (got model_type {config.get('model_type')!r}). Use {ACCEPTED}")
    for key, expected in (("activation_function", "gelu"), ("scale_embedding", False)):
        if config.get(key, expected) != expected:
            raise InputError(
                f"{id_or_path}: {key} {config[key]!r} in its config.json, which OpenAI's architecture does not have "
                f"(expected {expected!r}). Use another Whisper"
            )
    missing = [key for key in _DIMENSIONS if key not in config]
    if missing:
        raise InputError(f"{id_or_path}: its config.json lacks {', '.join(missing)}. Download or save it again")
    dims = {name: config[key] for key, names in _DIMENSIONS.items() for name in names}
    check_dimensions(dims, id_or_path)
    check_vocabulary(folder, dims["n_vocab"], id_or_path)
    return dims, rename_weights(load_weights(folder), id_or_path)


def check_vocabulary(folder: Path, n_vocab: int, name: str) -> None:
    """Raises InputError for a vocabulary to which tokens were added.

    99 languages and an added token are as many tokens as 100 languages: the id of <|notimestamps|>, where a file of
    the checkpoint has it, tells them apart.
    """
    languages = {51_864: 99, 51_865: 99, 51_866: 100}
    ids = [read_json(folder / file).get(key) for file, key in NO_TIMESTAMPS.items() if (folder / file).is_file()]
    if n_vocab in languages:
        tokenizer = get_tokenizer(n_vocab > 51_864, num_languages=languages[n_vocab])
        if all(token_id in (None, tokenizer.no_timestamps) for token_id in ids):
            return
    raise InputError(
        f"{name}: tokens were added to its vocabulary (got {n_vocab} tokens). Accepted: OpenAI's vocabularies, of "
        f"{', '.join(map(str, languages))} tokens"
    )


def rename_weights(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Weights of transformers' model under openai-whisper's names; unknown names pass unchanged."""
    renamed = {}
    for key, weight in state.items():
        new = key.removeprefix("model.")  # of WhisperForConditionalGeneration; a WhisperModel has none
        for old, replacement in _RENAMES.items():
            new = new.replace(old, replacement)
        if new in renamed:
            raise InputError(f"{name}: the weight {new} is there twice. Download or save it again")
        renamed[new] = weight
    head = renamed.pop("proj_out.weight", None)  # a copy of the embeddings where it is stored at all
    if head is not None and not torch.equal(head, renamed.get("decoder.token_embedding.weight", head[:0])):
        raise InputError(f"{name}: its output layer is not tied to the embeddings as OpenAI's is. Use another Whisper")
    return renamed


def build_whisper(dims: dict[str, int], state: dict[str, torch.Tensor], name: str) -> whisper.Whisper:
    """The model of these dimensions with these weights, each used once; InputError for what does not fit."""
    check_dimensions(dims, name)
    model = whisper.model.Whisper(whisper.ModelDimensions(**dims))
    expected = model.state_dict()
    refuse(name, "missing", [key for key in expected if key not in state])
    refuse(name, "superfluous", [key for key in state if key not in expected])
    shapes = {key: getattr(weight, "shape", None) for key, weight in state.items()}
    refuse(name, "of another shape", [key for key in expected if shapes[key] != expected[key].shape])
    refuse(name, "NaN or infinite", [key for key, weight in state.items() if not weight.isfinite().all()])
    model.load_state_dict(state)
    set_alignment_heads(model)
    return model


def set_alignment_heads(model: whisper.Whisper) -> None:
    """Give a model of one of OpenAI's sizes the heads that follow the audio in OpenAI's weights of that size.

    `whisper.load_model` knows them by a model's name. A model of another size keeps the library's default, all heads
    of the upper half of the decoder. large-v1 and large-v2 are of one size: v2's.
    """
    size = openai_size(model.dims)
    if size is not None:
        model.set_alignment_heads(whisper._ALIGNMENT_HEADS[size])


def openai_size(dims: whisper.ModelDimensions) -> str | None:
    """OpenAI's name of the model of these dimensions, such as 'tiny.en'; None for another size."""
    size = _SIZES.get((dims.n_text_layer, dims.n_text_state))
    if size == "large":
        return "large-v3" if dims.n_mels == 128 else "large-v2"
    has_english = size in ("tiny", "base", "small", "medium")
    return f"{size}.en" if has_english and dims.n_vocab == 51_864 else size


def attention_lag_s(dims: whisper.ModelDimensions) -> float:
    """How far the alignment heads of a model run behind the speech, in s; 0 where nobody has measured it."""
    return _ATTENTION_LAG_S.get(openai_size(dims), 0.0)


def refuse(name: str, problem: str, keys: list[str]) -> None:
    """Raises InputError if any weight has this problem."""
    if keys:
        listed = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        raise InputError(f"{name}: weights are {problem}: {listed}. Download or save the Whisper again")


def check_dimensions(dims: dict[str, int], name: str) -> None:
    """Raises InputError for dimensions of which no Whisper can be built."""
    names = list(whisper.ModelDimensions.__annotations__)
    if sorted(dims) != sorted(names) or not all(type(size) is int and size > 0 for size in dims.values()):
        raise InputError(f"{name}: not the sizes of a Whisper (got {dims}). Needed, above 0: {', '.join(names)}")
    if dims["n_audio_state"] != dims["n_text_state"]:
        raise InputError(f"{name}: encoder and decoder differ in width (got {dims}). Use another Whisper")
    for part in ("audio", "text"):
        if dims[f"n_{part}_state"] % (2 * dims[f"n_{part}_head"]):
            raise InputError(f"{name}: its heads do not divide its width (got {dims}). Use another Whisper")
