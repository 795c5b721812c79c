"""The codec: ragged lists in order, batch equals loop, errors, and parity with the xcodec2 package."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2BertConfig, Xcodec2Config, Xcodec2Model
from xcodec2_oracle import build_oracle, build_published_sizes, chirp, save_oracle

from speech_codec import SpeechCodec, _original_config, _rename_original

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("xcodec2") is None,
    reason="the xcodec2 package is not on the path; `make test` has a second run with it",
)


def build_native(seed: int, **sizes) -> Xcodec2Model:
    """A small random codec of 4 ** 4 codes, under whose weights the audio is not silent."""
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "encoder_hidden_size": 4,
        "downsampling_ratios": [8, 8, 5],
        "quantization_dim": 128,
        "quantization_levels": [4, 4, 4, 4],
        "semantic_model_config": Wav2Vec2BertConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        ),
    }
    torch.manual_seed(seed)
    model = Xcodec2Model(Xcodec2Config(**config | sizes)).eval()
    for module in model.modules():  # a config's own initialisation comes out dead
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.LayerNorm)):
            module.reset_parameters()
    with torch.no_grad():
        model.quantizer.project_in.weight.mul_(20.0)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    build_native(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def codec(native_folder):
    return SpeechCodec.from_pretrained(str(native_folder))


@pytest.fixture(scope="module")
def oracle():
    return build_oracle(seed=0)


@pytest.fixture(scope="module")
def original_folder(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    save_oracle(oracle, folder)
    return folder


RAGGED = [40, 1, 75, 40, 2, 40, 1]


def random_codes(lengths: list[int], codebook_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(codebook_size, size=length).tolist() for length in lengths]


def test_decode_batch_equals_loop(codec):
    assert codec.codebook_size == 4**4
    codes = random_codes(RAGGED, codec.codebook_size)
    batch = codec.decode(codes)
    assert [wav.shape for wav in batch] == [(length * 320,) for length in RAGGED]
    for ids, wav in zip(codes, batch, strict=True):
        assert wav.dtype == np.float32
        assert wav.std() > 1e-2  # not silent, else anything equals anything
        np.testing.assert_allclose(wav, codec.decode([ids])[0], rtol=0, atol=1e-5)


def test_decode_is_the_models_own(codec):
    [ids] = random_codes([30], codec.codebook_size)
    with torch.no_grad():
        expected = codec.model.decode(audio_codes=torch.tensor([[ids]])).audio_values
    np.testing.assert_array_equal(codec.decode([ids])[0], expected[0, 0].numpy())


def test_encode_batch_equals_loop(codec):
    wavs = [chirp(n) for n in (16_000, 1, 319, 320, 16_100, 24_321, 16_000)]
    batch = codec.encode(wavs)
    # 16000 = 50 * 320, and a whole number of codes gets one more: 51
    assert [len(ids) for ids in batch] == [51, 1, 1, 2, 51, 77, 51]
    assert batch == [codec.encode([wav])[0] for wav in wavs]
    assert batch[0] == batch[6] != batch[4]
    assert len(set(batch[5])) > 10  # codes vary, else anything equals anything
    assert all(0 <= i < codec.codebook_size for ids in batch for i in ids)


def test_batches_are_bounded(codec, monkeypatch):
    codes = random_codes([10] * 7, codec.codebook_size)
    whole = codec.decode(codes)
    monkeypatch.setattr("speech_codec.BATCH_CODES", 25)  # two items of ten at a time
    sizes = []
    decode = codec.model.decode

    def spy(audio_codes):
        sizes.append(len(audio_codes))
        return decode(audio_codes=audio_codes)

    monkeypatch.setattr(codec.model, "decode", spy)
    np.testing.assert_allclose(np.stack(codec.decode(codes)), np.stack(whole), rtol=0, atol=1e-5)
    assert sizes == [2, 2, 2, 1]


def test_nothing_in_nothing_out(codec):
    assert codec.encode([]) == [] and codec.decode([]) == []


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_close_and_returns_float32(codec, native_folder, dtype, tolerance):
    half = SpeechCodec.from_pretrained(str(native_folder), dtype=dtype)
    assert half.model.dtype == dtype
    codes = random_codes([40, 25], codec.codebook_size)
    for wav, expected in zip(half.decode(codes), codec.decode(codes), strict=True):
        assert wav.dtype == np.float32
        assert np.linalg.norm(wav - expected) < tolerance * np.linalg.norm(expected)
    [ids] = half.encode([chirp(16_000)])
    [expected] = codec.encode([chirp(16_000)])
    assert len(ids) == len(expected)
    assert np.mean(np.equal(ids, expected)) > 0.5  # rounding boundaries are crossed


@pytest.mark.parametrize(
    "codes, message",
    [
        ([[1], []], r"codes\[1\] is empty"),
        ([[0, 256]], r"codes\[0\] holds 256; accepted: 0 to 255"),
        ([[3], [5, -1]], r"codes\[1\] holds -1; accepted: 0 to 255"),
    ],
)
def test_decode_errors(codec, codes, message):
    with pytest.raises(ValueError, match=message):
        codec.decode(codes)


@pytest.mark.parametrize(
    "wav, message",
    [
        (np.zeros(0), r"wavs\[1\] has shape \(0,\)"),
        (np.zeros((2, 100)), r"wavs\[1\] has shape \(2, 100\); accepted: mono"),
        (np.array([0.0, np.nan]), r"wavs\[1\] holds NaN or infinity"),
        (np.array([0.0, -np.inf]), r"wavs\[1\] holds NaN or infinity"),
    ],
)
def test_encode_errors(codec, wav, message):
    with pytest.raises(ValueError, match=message):
        codec.encode([chirp(100), wav])


def test_missing_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"no/such-codec: no such folder.*Accepted: "):
        SpeechCodec.from_pretrained("no/such-codec")
    with pytest.raises(OSError, match=r"nowhere: no such folder"):
        SpeechCodec.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match=r"holds no config\.json"):
        SpeechCodec.from_pretrained(str(tmp_path))


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type 'llama' is no XCodec2; accepted: 'xcodec2'"):
        SpeechCodec.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"16000 Hz with 160 samples per code; accepted: 16000 Hz"):
        SpeechCodec(build_native(seed=0, downsampling_ratios=[8, 4, 5]))


@pytest.mark.parametrize(
    "damage, problem", [("drop", "missing"), ("add", "unexpected"), ("cut", "mismatched")]
)
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
    state = _rename_original(build_published_sizes().state_dict())
    config = _original_config(state)
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
