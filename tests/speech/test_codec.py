"""The codec: ragged lists in order, batches equal loops, errors."""

import numpy as np
import pytest
import torch
from fake_codec import RAGGED, build_native, decode_alone, random_codes
from transformers import SeamlessM4TFeatureExtractor
from xcodec2_oracle import chirp

from speech.codec import SpeechCodec, _batches, encoder_inputs
from speech.tokens import SAMPLE_RATE


@pytest.fixture(scope="module")
def codec(native_folder):
    return SpeechCodec.from_pretrained(str(native_folder))


def test_decode_batch_equals_loop(codec):
    assert codec.codebook_size == 4**4
    codes = random_codes(RAGGED, codec.codebook_size)
    batch = codec.decode(codes)
    assert [wav.shape for wav in batch] == [(length * 320,) for length in RAGGED]
    for ids, wav in zip(codes, batch, strict=True):
        assert wav.dtype == np.float32
        assert wav.std() > 1e-2  # not silent, else anything equals anything
        # Less than a step of 16-bit audio; on a Xeon it was 1.2e-5
        np.testing.assert_allclose(wav, codec.decode([ids])[0], rtol=0, atol=3e-5)


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


def test_inputs_of_each_clip_are_those_of_its_batch(codec):
    """transformers' extractor on a batch of one length, as XCodec2's own pipeline calls it."""
    wavs = [chirp(n) for n in (16_000, 16_100, 16_319)]
    clips = [encoder_inputs(wav) for wav in wavs]
    padded = [np.pad(wav, (160, 160 + 320 - len(wav) % 320)) for wav in wavs]
    batch = SeamlessM4TFeatureExtractor()(padded, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    for clip, wav, features in zip(clips, wavs, batch, strict=True):
        assert np.array_equal(clip.features, features.numpy()) and clip.features.dtype == np.float32
        assert np.array_equal(clip.wav, wav) and clip.features.shape == (51, 160)
    assert codec.encode_inputs(clips) == codec.encode(wavs)


def test_encode_never_pads(codec, monkeypatch):
    monkeypatch.setattr(codec, "padding_codes", 1_000)
    wavs = [chirp(n) for n in (3_000, 2_900, 3_000)]
    assert codec.encode(wavs) == [codec.encode([wav])[0] for wav in wavs]


def test_without_its_encoder_it_decodes_the_same(native_folder, codec):
    codes = random_codes([30, 20], codec.codebook_size)
    lean = SpeechCodec.from_pretrained(str(native_folder))
    lean.drop_encoder()
    for ours, whole in zip(lean.decode(codes), codec.decode(codes), strict=True):
        np.testing.assert_array_equal(ours, whole)
    assert sum(p.numel() for p in lean.model.parameters()) < sum(p.numel() for p in codec.model.parameters())
    with pytest.raises(AttributeError):
        lean.encode([np.zeros(3_200, np.float32)])


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
