"""The codec: ragged lists in order, batch equals loop, errors, and parity with the xcodec2 package."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2BertConfig, Xcodec2Config, Xcodec2Model
from xcodec2_oracle import build_oracle, build_published_sizes, chirp, save_oracle

from speech.codec import SpeechCodec, _batches
from speech.codec_batching import decode_ragged, masked_group_norm, window_envelope

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


def decode_alone(model, ids) -> np.ndarray:
    """What the model itself makes of one item: shape (n_samples,)."""
    with torch.no_grad():
        return model.decode(audio_codes=torch.tensor([[ids]])).audio_values[0, 0].float().numpy()


def decode_together(model, codes) -> list[np.ndarray]:
    with torch.no_grad():
        audio = decode_ragged(model, codes).float().numpy()
    return [wav[: len(ids) * 320] for wav, ids in zip(audio, codes, strict=True)]


REAL_DECODER = {  # the published sizes; the encoders, not needed here, are small
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "encoder_hidden_size": 2,
    "downsampling_ratios": [2, 2, 4, 4, 5],
    "quantization_dim": 2048,
    "quantization_levels": [4] * 8,
    "semantic_model_config": Wav2Vec2BertConfig(hidden_size=1024, num_hidden_layers=1, intermediate_size=64),
}


@pytest.mark.parametrize(
    "size, lengths",
    [
        ("small", [40, 1, 1500, 3, 2, 41]),
        ("tiny", [1, 70, 2, 1500, 3, 96, 70]),
        ("real", [3, 120, 1, 2, 60]),  # 1500 as well where this was written; too slow for every day
    ],
)
def test_a_ragged_forward_equals_each_alone(codec, size, lengths):
    if size == "real":
        model = build_native(seed=0, **REAL_DECODER)
        published = Xcodec2Config().to_dict()
        same = REAL_DECODER.keys() - {"encoder_hidden_size", "semantic_model_config"}
        assert all(model.config.to_dict()[name] == published[name] for name in same)
    else:
        model = SpeechCodec.from_pretrained("tiny/codec").model if size == "tiny" else codec.model
    levels = model.config.quantization_levels
    codes = random_codes(lengths, int(np.prod(levels)))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    alone = [decode_alone(model, ids) for ids in codes]
    for expected, wav in zip(alone, decode_together(model, codes), strict=True):
        assert expected.std() > 5e-3
        assert np.abs(wav - expected).max() < 1e-4  # at most 1.3e-6 where this was written
    # Nothing stays behind: the same weights under the same names, and bit for bit the same audio.
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    np.testing.assert_array_equal(decode_alone(model, codes[0]), alone[0])


def test_neighbours_do_not_leak(codec):
    first, second, other = random_codes([30, 50, 50], codec.codebook_size)
    assert second != other
    [a, _], [b, _] = decode_together(codec.model, [first, second]), decode_together(codec.model, [first, other])
    np.testing.assert_array_equal(a, b)
    [c, _] = decode_together(codec.model, [first, second + other])
    np.testing.assert_allclose(c, a, rtol=0, atol=1e-5)


def test_equal_lengths_need_no_masks(codec, monkeypatch):
    codes = random_codes([30, 30], codec.codebook_size)
    with torch.no_grad():
        expected = codec.model.decode(audio_codes=torch.tensor(codes)[:, None]).audio_values[:, 0]
        monkeypatch.setattr("codec_batching.padding_hidden", None)
        assert torch.equal(decode_ragged(codec.model, codes), expected)


def test_hooks_are_gone_after_an_error(codec, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    codes = random_codes([30, 20], codec.codebook_size)
    expected = decode_alone(codec.model, codes[0])
    monkeypatch.setattr(codec.model, "decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        decode_together(codec.model, codes)
    monkeypatch.undo()
    np.testing.assert_array_equal(decode_alone(codec.model, codes[0]), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_attention_is_masked(attention):
    model = build_native(seed=0)
    model.set_attn_implementation(attention)
    codes = random_codes([9, 20], 4**4)
    for ids, wav in zip(codes, decode_together(model, codes), strict=True):
        np.testing.assert_allclose(wav, decode_alone(model, ids), rtol=0, atol=1e-5)


def test_masked_group_norm_by_hand():
    norm = torch.nn.GroupNorm(1, 2, eps=0.0)
    norm.weight.data, norm.bias.data = torch.tensor([1.0, 10.0]), torch.tensor([0.0, 5.0])
    # valid are 1, 3 | 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5; the 100s are padding
    x = torch.tensor([[[1.0, 3.0, 100.0], [5.0, 7.0, 100.0]]])
    root = 5**0.5
    expected = torch.tensor([[[-3 / root, -1 / root, 0.0], [5 + 10 / root, 5 + 30 / root, 0.0]]])
    torch.testing.assert_close(masked_group_norm(norm, x, torch.tensor([[True, True, False]])), expected)


def test_window_envelope_is_the_heads(codec):
    head = codec.model.acoustic_decoder.head
    windows = head.window.square().numpy()
    expected = np.zeros(4 * 320 + 2 * head.padding)
    for frame in range(3):  # the fourth is padding
        expected[frame * 320 : frame * 320 + len(windows)] += windows
    envelope = window_envelope(head, torch.tensor([[True, True, True, False]]))
    assert envelope.shape == (1, 4 * 320)
    np.testing.assert_allclose(envelope[0].numpy(), expected[head.padding : -head.padding].clip(1e-11), atol=1e-6)


@pytest.mark.parametrize(
    "batch_codes, padding_codes, expected",
    [
        (100, 0, [[6], [3, 5], [1], [0, 4], [2]]),  # one length only
        (100, 10, [[6, 3, 5], [1, 0], [4], [2]]),  # 40 brings 1 into [39]; two items of 40 fill 80 of 100
        (100, 100, [[6, 3, 5], [1, 0], [4], [2]]),  # 39 after three items of 9 or 10 would make 4 * 39 = 156
        (120, 2, [[6, 3, 5], [1, 0, 4], [2]]),  # 75 is alone: 4 * 75 = 300
        (9, 100, [[6], [3], [5], [1], [0], [4], [2]]),
    ],
)
def test_batches_by_budget(batch_codes, padding_codes, expected):
    assert _batches([40, 39, 75, 10, 40, 10, 9], batch_codes, padding_codes) == expected


def test_forward_passes_keep_to_the_budget():
    codec = SpeechCodec(build_native(seed=0))
    codes = random_codes([10, 31, 12, 400, 11, 10, 30, 12], codec.codebook_size)
    expected = [decode_alone(codec.model, ids) for ids in codes]
    passes = []  # (items, frames) of each
    codec.model.acoustic_decoder.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[:2]))
    for codec.batch_codes, codec.padding_codes, planned in (
        (24, 0, [(2, 10), (1, 11), (2, 12), (1, 30), (1, 31), (1, 400)]),
        (48, 5, [(4, 12), (1, 12), (1, 30), (1, 31), (1, 400)]),
        (60, 5, [(5, 12), (1, 30), (1, 31), (1, 400)]),
        (62, 5, [(5, 12), (2, 31), (1, 400)]),
    ):
        passes.clear()
        wavs = codec.decode(codes)
        assert passes == planned
        for wav, alone in zip(wavs, expected, strict=True):  # the caller's order
            np.testing.assert_allclose(wav, alone, rtol=0, atol=1e-5)


def test_encode_never_pads(codec, monkeypatch):
    monkeypatch.setattr(codec, "padding_codes", 1_000)
    wavs = [chirp(n) for n in (3_000, 2_900, 3_000)]
    assert codec.encode(wavs) == [codec.encode([wav])[0] for wav in wavs]


def test_nothing_in_nothing_out(codec):
    assert codec.encode([]) == [] and codec.decode([]) == []


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_close_and_returns_float32(codec, native_folder, dtype, tolerance):
    half = SpeechCodec.from_pretrained(str(native_folder), dtype=dtype)
    assert half.model.dtype == dtype
    half.padding_codes = 100  # one pass, padded
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
