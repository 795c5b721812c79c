"""LoRA folders added to a model: the sum by hand, weights, order, bad folders, and the three ways to the same model."""

import json
import math
import shutil

import pytest
import torch
from fake_policy import save_lora, save_policy
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from common.cli import InputError
from speech.adapters import Adapter, add_adapters, check_base, parse_adapters
from speech.policy import Policy, recorded_with_adapters

QUERIES = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_policy(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def loras(base, tmp_path_factory) -> list[str]:
    """Of other ranks, scales and layers: 8 / 4 of two kinds of layers, 6 / √3 of one."""
    folder = tmp_path_factory.mktemp("loras")
    other = {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj"]}
    return [
        save_lora(base, folder / "slow", 1, r=4, lora_alpha=8),
        save_lora(base, folder / "lively", 2, **other),
        save_lora(base, folder / "high", 3, r=2, lora_alpha=1),
    ]


def load(base: str, *adapters: Adapter) -> torch.nn.Module:
    return add_adapters(AutoModelForCausalLM.from_pretrained(base), adapters)


def product(lora: str, module: str) -> torch.Tensor:
    """B A of a folder in float64."""
    weights = load_file(f"{lora}/adapter_model.safetensors")
    b, a = (weights[f"base_model.model.{module}.lora_{factor}.weight"].double() for factor in "BA")
    return b @ a


def test_the_sum_is_that_of_the_formula_in_float64(base, loras):
    slow, lively, _ = loras
    merged = load(base, Adapter(slow, 0.5), Adapter(lively, -2.0)).state_dict()
    before = LlamaForCausalLM.from_pretrained(base).state_dict()
    queries, down = f"{QUERIES}.weight", "model.layers.0.mlp.down_proj.weight"
    # scale: alpha / r = 8 / 4, with rsLoRA alpha / √r = 6 / √3
    expected = before[queries].double() + 0.5 * 2 * product(slow, QUERIES)
    expected += -2.0 * 6 / math.sqrt(3) * product(lively, QUERIES)
    assert torch.equal(merged[queries], expected.float())
    expected = before[down].double() + 0.5 * 2 * product(slow, "model.layers.0.mlp.down_proj")  # lively has none there
    assert torch.equal(merged[down], expected.float())
    assert merged.keys() == before.keys()
    changed = {name.split(".")[-2] for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == {"q_proj", "down_proj"}


def test_the_order_does_not_matter(base, loras):
    adapters = [Adapter(folder, weight) for folder, weight in zip(loras, (0.3, 1.0, -0.7), strict=True)]
    first, second = load(base, *adapters).state_dict(), load(base, *reversed(adapters)).state_dict()
    assert all(torch.allclose(first[name], second[name], rtol=1e-6, atol=1e-7) for name in first)


def test_in_half_precision_the_sum_is_rounded_once(base, loras):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    weight = model.get_submodule(QUERIES).weight.double()
    add_adapters(model, [Adapter(loras[0])])
    assert torch.equal(model.get_submodule(QUERIES).weight, (weight + 2 * product(loras[0], QUERIES)).bfloat16())


def test_weight_1_is_the_lora_folder_itself_and_weight_0_the_base(base, loras):
    ids = torch.arange(60, 90)[None]

    def logits(policy: Policy) -> torch.Tensor:
        with torch.no_grad():
            return policy.model(ids).logits

    shutil.copy(f"{base}/tokenizer.json", loras[0])
    shutil.copy(f"{base}/tokenizer_config.json", loras[0])
    shutil.copy(f"{base}/chat_template.jinja", loras[0])
    plain, folder = Policy.from_pretrained(base, "cpu"), Policy.from_pretrained(loras[0], "cpu")
    added = Policy.from_pretrained(base, "cpu", adapters=[Adapter(loras[0])])
    off = Policy.from_pretrained(base, "cpu", adapters=[Adapter(loras[0], 0.0)])
    assert (logits(added) - logits(folder)).abs().max() < 1e-3 < (logits(added) - logits(plain)).abs().max()
    assert torch.equal(logits(off), logits(plain))
    assert type(added.model) is type(plain.model) and type(added.model.lm_head) is type(plain.model.lm_head)


def test_weights_of_the_words(loras, tmp_path):
    slow, lively, high = loras
    assert parse_adapters([f"{slow}=0.5", lively, f"{high}=-1e-1"]) == [
        Adapter(slow, 0.5),
        Adapter(lively, 1.0),
        Adapter(high, -0.1),
    ]
    assert parse_adapters(None) == []
    assert [str(Adapter("slow", weight)) for weight in (1, 0.5, -2.0)] == ["slow", "slow=0.5", "slow=-2"]
    with_sign = tmp_path / "lr=1e-4"
    shutil.copytree(slow, with_sign)
    assert parse_adapters([str(with_sign)]) == [Adapter(str(with_sign), 1.0)]
    assert parse_adapters([f"{with_sign}=2"]) == [Adapter(str(with_sign), 2.0)]


@pytest.mark.parametrize("weight", ["", "much", "nan", "inf"])
def test_bad_weights(loras, weight):
    with pytest.raises(InputError, match=f"slow={weight}: the weight must be a finite number .got '{weight}'"):
        parse_adapters([f"{loras[0]}={weight}"])


def test_bad_folders(base, loras, tmp_path):
    for folder, message in ((tmp_path / "none", "no LoRA folder"), (base, "a model without LoRA")):
        with pytest.raises(InputError, match=f"--adapters {folder}: {message}, it has no adapter_config.json"):
            parse_adapters([str(folder)])
    with pytest.raises(InputError, match="given twice"):
        parse_adapters([loras[0], f"{loras[0]}/=0.5"])
    prefix = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    prefix.save_pretrained(tmp_path / "prefix")
    with pytest.raises(InputError, match="peft_type 'PREFIX_TUNING', only LORA"):
        parse_adapters([str(tmp_path / "prefix")])


def test_another_base_is_refused(base, loras, tmp_path):
    other = save_policy(tmp_path / "other", seed=5)
    with pytest.raises(InputError, match="a LoRA of another base, .*Use its base"):
        check_base(other, [Adapter(loras[0])])
    with pytest.raises(InputError, match=f"slow is a LoRA itself. Use its base, --model_name_or_path {base}"):
        check_base(loras[0], [Adapter(loras[1])])
    check_base(loras[0], [])
    moved = shutil.copytree(base, tmp_path / "moved")
    check_base(str(moved), [Adapter(loras[0])])  # another name of the same weights
    with pytest.raises(InputError, match="a LoRA of another base"):
        check_base("HKUSTAudio/Llasa-1B", [Adapter(loras[0])])


def damaged(lora: str, folder, change) -> Adapter:
    shutil.copytree(lora, folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    return Adapter(str(folder))


def test_loras_that_do_not_fit_are_refused(base, loras, tmp_path):
    name = f"base_model.model.{QUERIES}.lora_A.weight"

    def wrong_shape(weights):
        weights[name] = weights[name][:, :-1].contiguous()

    def of_a_deeper_model(weights):
        weights[name.replace("layers.1", "layers.7")] = weights[name].clone()

    def with_nan(weights):
        weights[name][0, 0] = math.nan

    def with_a_bias(weights):
        weights[f"base_model.model.{QUERIES}.bias"] = torch.zeros(64)

    cases = {
        wrong_shape: "does not fit the model: ",
        of_a_deeper_model: "lacks 1 of its layers: model.layers.7",
        (lambda weights: weights.pop(name)): "lacks 1 LoRA weights",
        with_nan: "NaN or infinite",
        with_a_bias: "bias, which is not of a plain LoRA",
    }
    for i, (change, message) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            load(base, Adapter(loras[1]), damaged(loras[0], tmp_path / str(i), change))
    (tmp_path / "0" / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read"):
        load(base, Adapter(str(tmp_path / "0")))


def test_dora_is_refused(base, tmp_path):
    dora = save_lora(base, tmp_path / "dora", 1, use_dora=True)
    with pytest.raises(InputError, match="lora_magnitude_vector.*, which is not of a plain LoRA"):
        load(base, Adapter(dora))


def test_settings_are_the_models_or_else_the_adapters(base, loras, tmp_path):
    adapters = [Adapter(shutil.copytree(loras[0], tmp_path / "slow")), Adapter(loras[1])]
    (tmp_path / "slow" / "run.json").write_text(json.dumps({"codec_id": "another", "seed": 7}))
    assert recorded_with_adapters(base, adapters, "codec_id", "default") == "the-codec"
    assert recorded_with_adapters("HKUSTAudio/Llasa-1B", adapters, "codec_id", "default") == "another"
    assert recorded_with_adapters("HKUSTAudio/Llasa-1B", adapters, "whisper", "default") == "default"
