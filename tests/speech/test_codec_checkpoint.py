"""Both published layouts of XCodec2, and parity with the xcodec2 package."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from fake_codec import build_native, random_codes
from safetensors.torch import load_file, save_file
from transformers import Xcodec2Config, Xcodec2Model
from xcodec2_oracle import build_oracle, build_published_sizes, chirp, save_oracle

from common.cli import InputError
from speech.codec import SpeechCodec
from speech.codec_checkpoint import original_config, rename_original

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("xcodec2") is None,
    reason="the xcodec2 package is not on the path; `make test` has a second run with it",
)


@pytest.fixture(scope="module")
def oracle():
    return build_oracle(seed=0)


@pytest.fixture(scope="module")
def original_folder(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    save_oracle(oracle, folder)
    return folder


def test_missing_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"no/such-codec: no such folder.*Accepted: "):
        SpeechCodec.from_pretrained("no/such-codec")
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        SpeechCodec.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"holds no config\.json"):
        SpeechCodec.from_pretrained(str(tmp_path))


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type 'llama' is no XCodec2; accepted: 'xcodec2'"):
        SpeechCodec.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"16000 Hz with 160 samples per code; accepted: 16000 Hz"):
        SpeechCodec(build_native(seed=0, downsampling_ratios=[8, 4, 5]))


@pytest.mark.parametrize("damage, problem", [("drop", "missing"), ("add", "unexpected"), ("cut", "mismatched")])
def test_weights_that_do_not_fit(native_folder, tmp_path, damage, problem):
    state = load_file(native_folder / "model.safetensors")
    name = "acoustic_decoder.head.linear.bias"
    if damage == "drop":
        del state[name]
    elif damage == "add":
        state[name + "_2"] = state[name].clone()
    else:
        state[name] = state[name][1:]
    (tmp_path / "config.json").write_text((native_folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 {problem}_keys: .*head\.linear\.bias"):
        SpeechCodec.from_pretrained(str(tmp_path))


@needs_package
def test_parity_with_the_xcodec2_package(oracle, original_folder):
    codec = SpeechCodec.from_pretrained(str(original_folder))
    assert codec.codebook_size == 65_536
    wavs = [chirp(n) for n in (200, 16_000, 24_001, 48_123)]
    expected = [oracle.encode_code(torch.from_numpy(wav)[None])[0, 0].tolist() for wav in wavs]
    codes = codec.encode(wavs)
    assert [len(ids) for ids in codes] == [len(ids) for ids in expected] == [1, 51, 76, 151]
    assert len(set(expected[3])) > 100  # of 151: a codec that never changes its mind is no oracle
    # All are equal where this was written. A latent may lie within float noise (1e-6) of a rounding
    # boundary, so another CPU may flip one of the 279.
    same = np.mean([a == b for x, y in zip(codes, expected, strict=True) for a, b in zip(x, y, strict=True)])
    assert same >= 0.99, f"only {same:.1%} of the codes are the package's"
    for ids, wav in zip(expected, codec.decode(expected), strict=True):
        audio = oracle.decode_code(torch.tensor([[ids]]))[0, 0].numpy()
        assert audio.std() > 0.01
        np.testing.assert_allclose(wav, audio, rtol=0, atol=1e-5)


@needs_package
def test_published_sizes():
    """The parity test runs small; here every weight of the real size has its place and shape."""
    state = rename_original(build_published_sizes().state_dict())
    config = original_config(state)
    published = Xcodec2Config()  # the defaults are those of HKUSTAudio/xcodec2-hf
    ours, theirs = config.to_dict(), published.to_dict()
    ours["semantic_model_config"].pop("mask_time_prob")
    theirs["semantic_model_config"].pop("mask_time_prob")
    assert ours == theirs
    with torch.device("meta"):
        native = Xcodec2Model(config).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in native.items()}


@needs_package
def test_older_spelling_and_pickles(oracle, original_folder, tmp_path):
    """`weight_g`, `weight_v` and `beta`, which drafts of transformers' converter expect on the hub."""
    spelling = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
        ".act.bias": ".act.beta",
    }
    state = {}
    for name, weight in oracle.state_dict().items():
        for new, old in spelling.items():
            name = name.replace(new, old)
        state[name] = weight
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((original_folder / "config.json").read_text())
    older = SpeechCodec.from_pretrained(str(tmp_path)).model.state_dict()
    package = SpeechCodec.from_pretrained(str(original_folder)).model.state_dict()
    assert older.keys() == package.keys()
    assert all(torch.equal(older[name], package[name]) for name in older)


@needs_package
def test_original_saved_natively_is_the_same_codec(original_folder, tmp_path):
    codec = SpeechCodec.from_pretrained(str(original_folder))
    codec.model.save_pretrained(tmp_path)
    again = SpeechCodec.from_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "xcodec2"
    codes = random_codes([20], codec.codebook_size)
    np.testing.assert_array_equal(again.decode(codes)[0], codec.decode(codes)[0])
    assert again.encode([chirp(8_000)]) == codec.encode([chirp(8_000)])


@needs_package
@pytest.mark.parametrize(
    "name, new_name, message",
    [
        ("fc_prior.bias", None, r"1 missing_keys: fc_encoder\.bias"),
        ("fc_prior.bias", "fc_prior.bias_2", r"1 (missing|unexpected)_keys: fc_encoder\.bias"),
        ("generator.backbone.embed.weight", None, r"lacks 'acoustic_decoder\.embed\.weight'"),
        ("CodecEnc.conv_blocks.0.parametrizations.weight.original0", None, r"lacks|_keys: .*conv1"),
    ],
)
def test_original_weights_that_do_not_fit(original_folder, tmp_path, name, new_name, message):
    state = load_file(original_folder / "model.safetensors")
    weight = state.pop(name)
    if new_name:
        state[new_name] = weight
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((original_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        SpeechCodec.from_pretrained(str(tmp_path))
