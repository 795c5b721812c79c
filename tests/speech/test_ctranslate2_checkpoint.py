"""Whispers in CTranslate2's format: equal to what they were made of, and files that are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import whisper
from fake_whisper import ctranslate2_arrays, save_ctranslate2, save_random_whisper, write_ctranslate2
from transformers import WhisperConfig, WhisperForConditionalGeneration
from whisper.tokenizer import get_tokenizer

from common.cli import InputError
from speech.audio import load_audio
from speech.ctranslate2_checkpoint import is_ctranslate2_folder, read_ctranslate2_folder
from speech.whisper_checkpoint import load_whisper, weights_digest


def random_whisper(folder: Path, n_vocab: int = 51_865):
    """No weight is 0 or 1, as biases and LayerNorms are at first: each has to be in its own place."""
    model = load_whisper(save_random_whisper(folder / "w.pt", n_vocab))
    for weight in model.parameters():
        weight.requires_grad_(False).add_(0.1 * torch.randn_like(weight))
    return model


@pytest.fixture
def model(tmp_path):
    return random_whisper(tmp_path)


@pytest.mark.parametrize("n_vocab", [51_864, 51_865])
def test_it_is_the_whisper_it_was_made_of(n_vocab, tmp_path):
    model = random_whisper(tmp_path, n_vocab)
    assert not is_ctranslate2_folder(tmp_path)
    folder = save_ctranslate2(tmp_path / "whisper", model, "float32")
    assert is_ctranslate2_folder(folder)
    loaded = load_whisper(folder)
    assert loaded.dims == model.dims and loaded.is_multilingual == (n_vocab == 51_865)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())


def test_float16_stays_float16(model, tmp_path):
    dims, state = read_ctranslate2_folder(save_ctranslate2(tmp_path / "whisper", model))
    assert dims == vars(model.dims)
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    for name, weight in state.items():
        assert weight.dtype == torch.float16 and torch.equal(weight, expected[name].half()), name


def test_the_digest_is_the_same_in_every_format(model, tmp_path):
    folder = save_ctranslate2(tmp_path / "whisper", model)
    dims, state = read_ctranslate2_folder(folder)
    torch.save({"dims": dims, "model_state_dict": state}, tmp_path / "half.pt")
    torch.save({"dims": dims, "model_state_dict": model.state_dict()}, tmp_path / "full.pt")
    digests = {weights_digest(str(path)) for path in (folder, tmp_path / "half.pt", tmp_path / "full.pt")}
    assert len(digests) == 1
    state["decoder.ln.bias"][0] += 1
    torch.save({"dims": dims, "model_state_dict": state}, tmp_path / "half.pt")
    assert weights_digest(str(tmp_path / "half.pt")) not in digests


def test_files_of_ctranslate2_s_own_converter(tmp_path):
    transformers_loaders = pytest.importorskip(
        "ctranslate2.converters.transformers", reason="ctranslate2 is not installed: requirements-asr.txt"
    )
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in
             (("layers", 2), ("attention_heads", 2), ("ffn_dim", 128))}  # fmt: skip
    config = WhisperConfig(d_model=32, max_source_positions=64, max_target_positions=64, init_std=0.2, **sizes)
    theirs = WhisperForConditionalGeneration(config).eval()
    for weight in theirs.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    theirs.save_pretrained(tmp_path / "transformers")
    spec = transformers_loaders.WhisperLoader().get_model_spec(theirs)
    spec.register_vocabulary([str(token) for token in range(config.vocab_size)])
    spec.validate()
    spec.optimize()
    (tmp_path / "ctranslate2").mkdir()
    spec.save(str(tmp_path / "ctranslate2"))
    expected, ours = (load_whisper(tmp_path / name).state_dict() for name in ("transformers", "ctranslate2"))
    assert ours.keys() == expected.keys() and len(ours) > 60
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("decoder/layer_norm/gamma"), r"weights are missing: decoder\.ln\.weight"),
        (lambda arrays: arrays.pop("encoder/num_heads"), "no array 'encoder/num_heads'"),
        (lambda arrays: arrays.update({"decoder/x": np.ones(3, np.float16)}), r"weights are superfluous: decoder\.x"),
        (
            lambda arrays: arrays.update({"encoder/conv1/bias": np.ones(32, np.int8)}),
            r"quantised .encoder/conv1/bias is torch.int8.. Use a conversion to float16",
        ),
        (
            lambda arrays: arrays["encoder/layer_0/self_attention/linear_0/bias"].__setitem__(40, 1),
            r"superfluous: encoder\.blocks\.0\.attn\.key\.bias",
        ),
        (lambda arrays: arrays["encoder/conv1/bias"].__setitem__(3, np.nan), "weights are NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, model, tmp_path):
    arrays = ctranslate2_arrays(model)
    change(arrays)
    write_ctranslate2(tmp_path / "model.bin", arrays)
    with pytest.raises(InputError, match=message):
        load_whisper(tmp_path)


def test_broken_files_are_named(model, tmp_path):
    path, arrays = tmp_path / "model.bin", ctranslate2_arrays(model)
    write_ctranslate2(path, arrays)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:30], content[:3], b"", b"garbage" * 99):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError, match=r"model\.bin: cannot be read as a Whisper of CTranslate2 .*convert it again"
        ):
            load_whisper(tmp_path)
    for other, message in (
        ({"version": 5}, "version 5, expected 6"),
        ({"spec": "TransformerSpec"}, "a TransformerSpec"),
    ):
        write_ctranslate2(path, arrays, **other)
        with pytest.raises(InputError, match=message):
            load_whisper(tmp_path)


@torch.no_grad()
def test_log_probs_of_openai_s_weights_are_those_of_ctranslate2(whisper_tiny_en):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed: requirements-asr.txt")
    ours = load_whisper(whisper_tiny_en)
    theirs = ctranslate2.models.Whisper(whisper_tiny_en, compute_type="float32", intra_threads=1)
    tokenizer = get_tokenizer(multilingual=False)
    tokens, start = tokenizer.encode(" Diana bought five boxes."), list(tokenizer.sot_sequence)
    wav = whisper.pad_or_trim(load_audio("tiny/heldout/heldout_103.ogg"))
    mels = whisper.log_mel_spectrogram(wav, ours.dims.n_mels)[None]
    [alignment] = theirs.align(ctranslate2.StorageView.from_array(mels.numpy()), start, [tokens], mels.shape[-1])
    expected = torch.tensor(alignment.text_token_probs).log()  # of a vocabulary without special tokens
    prompt = [*start, tokenizer.no_timestamps, *tokens]
    logits = ours.decoder(torch.tensor([prompt]), ours.encoder(mels))[0, len(start) : -1, : tokenizer.eot]
    log_probs = logits.log_softmax(dim=-1)[range(len(tokens)), tokens]
    torch.testing.assert_close(log_probs, expected, atol=1e-3, rtol=0)
    assert log_probs.std() > 0.1
