"""Both published layouts of XCodec2, and parity with the xcodec2 package."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from fake_codec import build_native, random_codes
from safetensors.torch import load_file, save_file
from transformers import Xcodec2Config, Xcodec2Model
from xcodec2_oracle import build_oracle, build_published_sizes, chirp, save_oracle

from common.cli import InputError
from speech import codec_checkpoint
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


def refused(folder) -> str:
    """The error of one line that names the folder."""
    with pytest.raises(InputError) as error:
        SpeechCodec.from_pretrained(str(folder))
    message = str(error.value)
    assert message.startswith(str(folder)) and message.endswith("Download or save it again") and "\n" not in message
    return message


@pytest.mark.parametrize("damage, problem", [("drop", "missing"), ("add", "unknown"), ("cut", "wrongly shaped")])
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
    assert f"1 {problem} tensors: {name}" in refused(tmp_path)


def test_every_tensor_of_another_shape_is_counted_and_four_are_named(native_folder, tmp_path):
    settings = json.loads((native_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"quantization_levels": [4, 4]}))
    shutil.copy(native_folder / "model.safetensors", tmp_path)
    assert "quantizer.project_in.weight (got (4, 128), expected (2, 128))" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"hidden_size": 128}))
    message = refused(tmp_path)
    assert "51 wrongly shaped tensors" in message and message.count("(got (") == 4


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 1_000, b"version https://git-lfs.github.com/spec/v1\n", 5_000, -100],
    ids=["empty", "garbage", "a pointer of git-lfs", "cut in its header", "cut in its tensors"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_of_weights_that_cannot_be_read(native_folder, tmp_path, name, content):
    whole = native_folder / "model.safetensors"
    if name == "pytorch_model.bin":
        whole = tmp_path / "whole.bin"
        torch.save(load_file(native_folder / "model.safetensors"), whole)
    (tmp_path / name).write_bytes(whole.read_bytes()[:content] if isinstance(content, int) else content)
    shutil.copy(native_folder / "config.json", tmp_path)
    assert f"{name}: the weights are broken (" in refused(tmp_path)


def test_a_pickle_of_something_else(native_folder, tmp_path):
    shutil.copy(native_folder / "config.json", tmp_path)
    for content in ([torch.ones(1)], {"model": {"a": torch.ones(1)}}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        assert f"holds no weights by name (got {type(content).__name__})" in refused(tmp_path)


@pytest.mark.parametrize(
    "config, problem",
    [
        ("", "cannot be read as JSON (Expecting value"),
        ("{", "cannot be read as JSON (Expecting property name"),
        ("[]", "not a JSON object (got [])"),
        ('{"model_type": "xcodec2", "hidden_size": "abc"}', "'hidden_size' expected int, got str (value: 'abc')"),
        ('{"model_type": "xcodec2", "num_attention_heads": 3}', "is not a multiple of the number of attention heads"),
    ],
)
def test_a_config_that_makes_no_model(native_folder, tmp_path, config, problem):
    shutil.copy(native_folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(config)
    assert problem in refused(tmp_path)


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


@pytest.fixture(scope="module")
def published_state():
    """Names and shapes of HKUSTAudio/xcodec2, without memory."""
    return build_published_sizes().state_dict()


@needs_package
def test_published_sizes(published_state):
    """The parity test runs small; here every weight of the real size has its place and shape."""
    state = rename_original(published_state)
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
def test_a_second_of_codes_at_the_published_sizes(published_state, tmp_path, monkeypatch):
    """From both layouts, the decoder random and the encoders, which it does not need, 0: no file is written."""
    torch.manual_seed(0)
    original = {name: torch.zeros(()).expand(w.shape) for name, w in published_state.items()}
    for name, weight in original.items():
        if name.startswith("generator.") or name.startswith("fc_post_a."):
            spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.02
            original[name] = torch.empty(weight.shape).normal_(std=spread)
    weights = {"model.safetensors": original}
    monkeypatch.setattr(codec_checkpoint, "load_weights", lambda folder: weights["model.safetensors"])
    (tmp_path / "config.json").write_text('{"codec_decoder_hidden_size": 1024}')
    codec = SpeechCodec.from_pretrained(str(tmp_path))
    assert sum(weight.numel() for weight in codec.model.parameters()) == pytest.approx(629e6, rel=0.01)
    codes = random_codes([50], codec.codebook_size)
    [wav] = codec.decode(codes)
    assert codec.codebook_size == 65_536 and wav.shape == (16_000,) and np.isfinite(wav).all() and wav.std() > 0

    decoding = ("acoustic_decoder.", "quantizer.")
    native = {
        name: w if name.startswith(decoding) else torch.zeros(()).expand(w.shape)
        for name, w in codec.model.state_dict().items()
    }
    native["semantic_encoder.masked_spec_embed"] = torch.zeros(1_024)  # of w2v-bert's pre-training, published with it
    assert len(native) == 811
    weights["model.safetensors"] = native
    (tmp_path / "config.json").write_text(Xcodec2Config().to_json_string())
    del codec
    np.testing.assert_array_equal(SpeechCodec.from_pretrained(str(tmp_path)).decode(codes)[0], wav)


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
    "name, damage, problem",
    [
        ("fc_prior.bias", "drop", "1 missing tensors: fc_encoder.bias"),
        ("fc_prior.bias", "rename", "1 missing tensors: fc_encoder.bias"),
        ("fc_prior.bias", "add", "1 unknown tensors: fc_encoder.bias_2"),
        ("fc_prior.bias", "cut", "1 wrongly shaped tensors: fc_encoder.bias (got (223,), expected (224,))"),
        ("generator.backbone.embed.weight", "drop", "1 missing tensors: acoustic_decoder.embed.weight"),
        ("generator.backbone.embed.weight", "flatten", "acoustic_decoder.embed.weight must have 3 dimensions"),
        ("generator.backbone.transformers.0.att.c_attn.weight", "cut", "qkv_proj.weight cannot be split into query"),
        ("CodecEnc.conv_blocks.0.parametrizations.weight.original0", "drop", "missing tensors: acoustic_encoder.conv1"),
        # torch does not check this one: the process could die of it.
        ("CodecEnc.conv_blocks.0.parametrizations.weight.original0", "cut", "weight norm of acoustic_encoder.conv1."),
        ("CodecEnc.conv_blocks.0.bias", "cut", "acoustic_encoder.conv1.bias (got (3,), expected (4,))"),
    ],
)
def test_original_weights_that_do_not_fit(original_folder, tmp_path, name, damage, problem):
    state = load_file(original_folder / "model.safetensors")
    weight = state.pop(name)
    if damage in ("rename", "add"):
        state[name + "_2"] = weight.clone()
    if damage == "add":
        state[name] = weight
    elif damage == "cut":
        state[name] = weight[1:].contiguous()
    elif damage == "flatten":
        state[name] = weight.flatten()
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(original_folder / "config.json", tmp_path)
    assert problem in refused(tmp_path)
