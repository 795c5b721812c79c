"""Load a language model and be sure that its weights are whole: transformers would fill what is missing at random."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from common.cli import InputError, library_errors_are_input
from speech.checkpoint_files import UNREADABLE

LLAMA_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_causal_lm(id_or_path: str, **options) -> torch.nn.Module:
    """A causal LM with every weight from its checkpoint.

    Args:
        id_or_path: a model folder, a LoRA adapter folder (whose base is loaded with it), or a hub id.
        options: of `from_pretrained`.
    Raises:
        InputError: unreadable, or weights that are missing, of another shape, NaN or infinite; the first are named.
    """
    _check_sizes(Path(id_or_path))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of missing weights has a line a weight
    try:
        with library_errors_are_input(f"{id_or_path}: the model cannot be loaded", *UNREADABLE):
            model, info = AutoModelForCausalLM.from_pretrained(id_or_path, output_loading_info=True, **options)
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"{id_or_path}: its weights lack {len(missing)} of the model's: {', '.join(missing[:3])} …. Download or "
            "save the checkpoint again"
        )
    check_adapter(id_or_path, model)
    check_finite(id_or_path, model)
    return model


def _check_sizes(folder: Path) -> None:
    """Raises InputError for a Llama's config.json without its sizes: the defaults are those of a model of 7 B."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a hub id or a LoRA folder; transformers names a file that is no JSON
    if isinstance(config, dict) and config.get("model_type") == "llama":
        missing = [name for name in LLAMA_SIZES if name not in config]
        if missing:
            raise InputError(
                f"{folder / 'config.json'}: lacks {', '.join(missing)}. Use a checkpoint's own config.json"
            )


def check_adapter(id_or_path: str, model: torch.nn.Module) -> None:
    """Raises InputError where the model's LoRA weights are not all in the folder: PEFT would leave them at 0."""
    file = Path(id_or_path) / ADAPTER_WEIGHTS
    if not file.is_file():
        return
    with library_errors_are_input(f"{file}: cannot be read", *UNREADABLE), safe_open(file, "pt") as weights:
        saved = {bare_lora_name(name) for name in weights.keys()}  # noqa: SIM118: an open file has no other iterator
    missing = sorted(
        name for name, _ in model.named_parameters() if "lora_" in name and bare_lora_name(name) not in saved
    )
    if missing:
        raise InputError(
            f"{file}: lacks {len(missing)} LoRA weights: {', '.join(missing[:3])} …. Save the adapter again"
        )


def bare_lora_name(name: str) -> str:
    """A LoRA weight's name without PEFT's prefix and the adapter's name."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def check_finite(name: str, model: torch.nn.Module) -> None:
    """Raises InputError for weights that are NaN or infinite, with the first one's name."""
    for weight_name, weight in model.named_parameters():
        if not torch.isfinite(weight.detach().sum(dtype=torch.float32)):
            raise InputError(
                f"{name}: {weight_name} holds NaN or infinite values: the training that wrote it diverged. Use an "
                "earlier checkpoint"
            )
