"""LoRA folders added to one base model, each with a weight: W ← W + Σ_k weight_k · scale_k · B_k A_k.

A LoRA a style or a voice, added and scaled, is GLASS's (arXiv 2606.05889), which publishes no code. The sum is computed
in float64 and rounded once, so neither the order nor the ranks of the LoRAs matter, and the model that comes out is an
ordinary one: it costs nothing in sampling.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from common.cli import InputError, library_errors_are_input
from common.run_record import content_digest
from speech.checkpoint_files import UNREADABLE, read_json
from speech.weights import ADAPTER_WEIGHTS, bare_lora_name, check_adapter, check_finite

ADAPTER_CONFIG = "adapter_config.json"
# The weights of a plain LoRA; others (DoRA's magnitudes, biases, whole modules) cannot be scaled and added
FACTORS = ("lora_A.weight", "lora_B.weight")


class Adapter(NamedTuple):
    """A LoRA folder and the weight it is added with; a negative one takes the opposite of what was learnt."""

    folder: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.folder if self.weight == 1 else f"{self.folder}={self.weight:g}"


def parse_adapters(words: list[str] | None) -> list[Adapter]:
    """The words of --adapters, each FOLDER or FOLDER=WEIGHT; the folders' configs are read, their weights are not.

    Raises:
        InputError: a folder that is none of a LoRA or is named twice, a weight that is no finite number.
    """
    adapters = []
    for word in words or []:
        folder, equals, weight = word.rpartition("=")
        if not equals or Path(word).is_dir():  # a folder's name may have a = in it
            folder, weight = word, "1"
        adapter = Adapter(folder, _number(weight, word))
        if Path(folder).resolve() in [Path(other.folder).resolve() for other in adapters]:
            raise InputError(f"--adapters {word}: the folder is given twice. Give it once, with the sum of the weights")
        _check_folder(folder)
        adapters.append(adapter)
    return adapters


def _number(weight: str, word: str) -> float:
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"--adapters {word}: the weight must be a finite number (got {weight!r}). Use FOLDER=WEIGHT")
    return number


def _check_folder(folder: str) -> None:
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        kind = "a model without LoRA" if (Path(folder) / "config.json").is_file() else "no LoRA folder"
        raise InputError(
            f"--adapters {folder}: {kind}, it has no {ADAPTER_CONFIG}. Use a folder of train.py --use_peft true"
        )
    kind = read_json(Path(folder) / ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise InputError(f"--adapters {folder}: peft_type {kind!r}, only LORA can be scaled and added. Use a LoRA")


def check_base(id_or_path: str, adapters: Sequence[Adapter]) -> None:
    """Raises InputError where the model is a LoRA itself, or an adapter's base is another one than the model."""
    if adapters and (Path(id_or_path) / ADAPTER_CONFIG).is_file():
        base = read_json(Path(id_or_path) / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise InputError(
            f"--adapters: {id_or_path} is a LoRA itself. Use its base, --model_name_or_path {base}, and add it, "
            f"--adapters {id_or_path} …"
        )
    for adapter in adapters:
        base = read_json(Path(adapter.folder) / ADAPTER_CONFIG).get("base_model_name_or_path")
        if base != id_or_path and (content_digest(str(base)) or base) != (content_digest(id_or_path) or id_or_path):
            raise InputError(
                f"--adapters {adapter.folder}: a LoRA of another base, {base!r} (got {id_or_path!r}). Use its base; if "
                f"that has moved, correct base_model_name_or_path in {adapter.folder}/{ADAPTER_CONFIG}"
            )


def add_adapters(model: torch.nn.Module, adapters: Sequence[Adapter]) -> torch.nn.Module:
    """The model with Σ weight · scale · B A added to its weights, in place; scale is alpha / r, or PEFT's other rules.

    Args:
        model: their base, a model of transformers without LoRA.
    Raises:
        InputError: a LoRA that does not fit the model, lacks weights, has others than a plain LoRA's, or NaN.
    """
    products = defaultdict(list)
    for adapter in adapters:
        for name, (scale, b, a) in _factors(model, adapter.folder).items():
            products[name].append((adapter.weight * scale, b, a))
    with torch.no_grad():
        for name, factors in products.items():  # one module's at a time: all would take 8 bytes a weight
            weight = model.get_submodule(name).weight
            weight.copy_(weight.double() + sum(scale * (b @ a) for scale, b, a in factors))
    return model


def _factors(model: torch.nn.Module, folder: str) -> dict[str, tuple[float, torch.Tensor, torch.Tensor]]:
    """Module name -> scale, B (out, r) and A (r, in) in float64; the model is left as it was."""
    saved = _saved_names(folder)
    with library_errors_are_input(f"--adapters {folder}: does not fit the model", *UNREADABLE):
        adapted = PeftModel.from_pretrained(model, folder)
    check_adapter(folder, adapted)
    check_finite(folder, adapted)
    used = {bare_lora_name(name) for name, _ in adapted.named_parameters()}
    unused = sorted(saved - used)
    if unused:
        raise InputError(
            f"--adapters {folder}: does not fit the model, which lacks {len(unused)} of its layers: {unused[0]} …. Use "
            "its base"
        )
    factors = {}
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            b, a = (part["default"].weight.detach().double() for part in (module.lora_B, module.lora_A))
            factors[name] = module.scaling["default"], b, a
    adapted.unload()
    return factors


def _saved_names(folder: str) -> set[str]:
    """The names of a LoRA folder's weights; InputError for other weights than a plain LoRA's."""
    file = Path(folder) / ADAPTER_WEIGHTS
    with library_errors_are_input(f"{file}: cannot be read", *UNREADABLE), safe_open(file, "pt") as weights:
        names = {bare_lora_name(name) for name in weights.keys()}  # noqa: SIM118: an open file has no other iterator
    others = sorted(name for name in names if not name.endswith(FACTORS))
    if others:
        raise InputError(
            f"{file}: holds {others[0]}, which is not of a plain LoRA and cannot be scaled and added. Train one "
            "without DoRA, biases and --lora_modules_to_save"
        )
    return names
