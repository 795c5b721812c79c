"""Ragged codes in one forward pass equal each alone."""

import numpy as np
import pytest
import torch
from fake_codec import build_native, decode_alone, random_codes
from transformers import Wav2Vec2BertConfig, Xcodec2Config

from speech.codec import SpeechCodec
from speech.codec_batching import decode_ragged, masked_group_norm, window_envelope

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


def decode_together(model, codes) -> list[np.ndarray]:
    with torch.no_grad():
        audio = decode_ragged(model, codes).float().numpy()
    return [wav[: len(ids) * 320] for wav, ids in zip(audio, codes, strict=True)]


@pytest.fixture(scope="module")
def codec(native_folder):
    return SpeechCodec.from_pretrained(str(native_folder))


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
        monkeypatch.setattr("speech.codec_batching.padding_hidden", None)
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
