"""Whispers in transformers' format against transformers' own forward, and checkpoints that are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fake_whisper import save_random_whisper
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel
from whisper.tokenizer import get_tokenizer

from common.cli import InputError
from speech.audio import load_audio
from speech.whisper_checkpoint import load_whisper
from speech.whisper_scorer import WhisperScorer, log_mel_spectrograms

SMALL = dict(
    vocab_size=51_865, num_mel_bins=80, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=64,
    max_target_positions=64,
)  # fmt: skip
LARGE_V3 = dict(
    vocab_size=51_866, num_mel_bins=128, d_model=1_280, encoder_layers=1, decoder_layers=1, encoder_attention_heads=20,
    decoder_attention_heads=20, encoder_ffn_dim=5_120, decoder_ffn_dim=5_120, max_source_positions=1_500,
    max_target_positions=448,
)  # fmt: skip
ENGLISH = SMALL | {"vocab_size": 51_864}


def random_model(**config) -> WhisperForConditionalGeneration:
    """No bias is 0 and no LayerNorm 1, as they are at first: each weight has to be in its own place."""
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**config, init_std=config["d_model"] ** -0.5)).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model, folder = random_model(**SMALL), tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def assert_same_outputs(ours, theirs) -> None:
    """Encoder output, and logits of a few tokens, against transformers' own forward."""
    config = theirs.config
    generator = torch.Generator().manual_seed(1)
    mels = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    tokens = torch.randint(config.vocab_size, (1, 7), generator=generator)
    expected = theirs(input_features=mels, decoder_input_ids=tokens)
    features = ours.encoder(mels)
    torch.testing.assert_close(features, expected.encoder_last_hidden_state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.decoder(tokens, features), expected.logits, atol=1e-4, rtol=1e-4)
    assert expected.logits.std() > 0.1


@pytest.mark.parametrize("config", [SMALL, ENGLISH], ids=["multilingual", "English"])
def test_outputs_are_those_of_transformers(config, tmp_path):
    model = random_model(**config)
    model.save_pretrained(tmp_path)
    ours = load_whisper(tmp_path)
    assert_same_outputs(ours, model)
    assert ours.is_multilingual == (config is SMALL) and ours.num_languages == 99


def test_outputs_at_large_v3s_sizes_in_float16_shards(tmp_path):
    model = random_model(**LARGE_V3).half()
    model.save_pretrained(tmp_path, max_shard_size="150MB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    ours = load_whisper(tmp_path)
    assert_same_outputs(ours, model.float())
    assert ours.is_multilingual and ours.num_languages == 100


def test_other_files_of_the_same_weights(small, tmp_path):
    model, folder = small
    shutil.copy(folder / "config.json", tmp_path)
    state = model.state_dict()
    assert "proj_out.weight" in state  # the tied head, which safetensors leave out
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_outputs(load_whisper(tmp_path), model)
    # A WhisperModel has no `model.` before its names. Other precisions beside the weights are not read.
    body = WhisperModel(model.config)
    body.load_state_dict(model.model.state_dict())
    body.save_pretrained(tmp_path)
    (tmp_path / "model.fp32-00001-of-00001.safetensors").write_text("not read")
    assert_same_outputs(load_whisper(tmp_path), model)


# --- tiny/whisper.pt in transformers' format --------------------------------------------------------------


def copy_attention(theirs, ours) -> None:
    for name, part in (("q_proj", ours.query), ("k_proj", ours.key), ("v_proj", ours.value), ("out_proj", ours.out)):
        getattr(theirs, name).load_state_dict(part.state_dict())


def copy_layer(theirs, ours) -> None:
    copy_attention(theirs.self_attn, ours.attn)
    theirs.self_attn_layer_norm.load_state_dict(ours.attn_ln.state_dict())
    if ours.cross_attn is not None:
        copy_attention(theirs.encoder_attn, ours.cross_attn)
        theirs.encoder_attn_layer_norm.load_state_dict(ours.cross_attn_ln.state_dict())
    theirs.fc1.load_state_dict(ours.mlp[0].state_dict())
    theirs.fc2.load_state_dict(ours.mlp[2].state_dict())
    theirs.final_layer_norm.load_state_dict(ours.mlp_ln.state_dict())


@torch.no_grad()
def in_transformers(ours) -> WhisperForConditionalGeneration:
    """A transformers model with an openai-whisper model's weights, set module by module."""
    dims = ours.dims
    theirs = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=dims.n_vocab,
            num_mel_bins=dims.n_mels,
            d_model=dims.n_text_state,
            encoder_layers=dims.n_audio_layer,
            decoder_layers=dims.n_text_layer,
            encoder_attention_heads=dims.n_audio_head,
            decoder_attention_heads=dims.n_text_head,
            encoder_ffn_dim=4 * dims.n_audio_state,
            decoder_ffn_dim=4 * dims.n_text_state,
            max_source_positions=dims.n_audio_ctx,
            max_target_positions=dims.n_text_ctx,
        )  # fmt: skip
    )
    encoder, decoder = theirs.model.encoder, theirs.model.decoder
    encoder.conv1.load_state_dict(ours.encoder.conv1.state_dict())
    encoder.conv2.load_state_dict(ours.encoder.conv2.state_dict())
    encoder.embed_positions.weight.copy_(ours.encoder.positional_embedding)
    encoder.layer_norm.load_state_dict(ours.encoder.ln_post.state_dict())
    decoder.embed_tokens.weight.copy_(ours.decoder.token_embedding.weight)
    decoder.embed_positions.weight.copy_(ours.decoder.positional_embedding)
    decoder.layer_norm.load_state_dict(ours.decoder.ln.state_dict())
    for part in ("encoder", "decoder"):
        for layer, block in zip(getattr(theirs.model, part).layers, getattr(ours, part).blocks, strict=True):
            copy_layer(layer, block)
    return theirs.eval()


@torch.no_grad()
def test_transcript_and_nll_of_a_recording(tmp_path):
    scorer = WhisperScorer("tiny/whisper.pt", device="cpu")
    theirs = in_transformers(scorer.model)
    theirs.save_pretrained(tmp_path)
    row = json.loads(Path("tiny/heldout/metadata.jsonl").read_text().splitlines()[0])
    wav = load_audio(Path("tiny/heldout") / row["file_name"])
    [converted] = WhisperScorer(tmp_path, device="cpu").score([wav], [row["text"]])
    [original] = scorer.score([wav], [row["text"]])
    assert converted == original and original.wer == 0  # the same weights, so the same bits

    # transformers' own NLL of the text, and its greedy transcript
    tokenizer = get_tokenizer(True, language="en", task="transcribe")
    text = tokenizer.encode(" " + row["text"])
    targets = [*text, tokenizer.eot]
    padded = F.pad(torch.from_numpy(wav)[None], (0, scorer.window - len(wav)))
    prompt = [*tokenizer.sot_sequence, tokenizer.no_timestamps]
    inputs = torch.tensor([[*prompt, *text]])
    logits = theirs(input_features=log_mel_spectrograms(padded, 80), decoder_input_ids=inputs).logits[0]
    logits = logits[len(prompt) - 1 :]
    assert converted.nll == pytest.approx(F.cross_entropy(logits, torch.tensor(targets)).item(), abs=1e-4)
    assert tokenizer.decode(logits.argmax(dim=1)[:-1].tolist()).strip() == converted.hyp_text
    half = WhisperScorer(tmp_path, device="cpu", dtype=torch.float16)
    assert half.model.decoder.token_embedding.weight.dtype == torch.float16
    assert half.score([wav], [row["text"]])[0].nll == pytest.approx(original.nll, abs=0.02)


# --- Refused ----------------------------------------------------------------------------------------------


def damaged(folder: Path, target: Path, config: dict | None = None, weights=None, **files) -> Path:
    """A copy of a checkpoint with other values in its config, its weights changed in place by `weights`."""
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    state = load_file(folder / "model.safetensors")
    if weights is not None:
        weights(state)
    (target / "config.json").write_text(json.dumps(settings))
    save_file(state, target / "model.safetensors")
    for name, content in files.items():
        (target / f"{name}.json").write_text(json.dumps(content))
    return target


LAYER_NORM = "model.encoder.layer_norm.bias"


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({}, lambda state: state.pop(LAYER_NORM), r"weights are missing: encoder\.ln_post\.bias\. Download"),
        ({}, lambda state: state.update(extra=torch.zeros(1)), r"weights are superfluous: extra\."),
        ({}, lambda state: state.update({LAYER_NORM: torch.zeros(3)}), r"of another shape: encoder\.ln_post\.bias"),
        ({}, lambda state: state[LAYER_NORM].fill_(torch.nan), r"NaN or infinite: encoder\.ln_post\.bias"),
        ({}, lambda state: state.update({LAYER_NORM[6:]: torch.zeros(32)}), r"encoder\.ln_post\.bias is there twice"),
        ({}, lambda state: state.update({"proj_out.weight": torch.zeros(51_865, 32)}), "not tied to the embeddings"),
        ({"decoder_layers": 1}, None, r"superfluous: .*decoder\.blocks\.1\..* and \d+ more"),
        ({"model_type": "llama"}, None, "not a Whisper .got model_type 'llama'."),
        ({"activation_function": "relu"}, None, "activation_function 'relu'"),
        ({"d_model": "32"}, None, "not the sizes of a Whisper"),
        ({"decoder_attention_heads": 3}, None, "heads do not divide its width"),
        ({"vocab_size": 51_870}, None, r"tokens were added to its vocabulary .got 51870.*51864, 51865, 51866"),
    ],
)
def test_what_does_not_fit_is_refused(small, tmp_path, config, weights, message):
    folder = damaged(small[1], tmp_path, config, weights)
    with pytest.raises(InputError, match=message) as error:
        load_whisper(folder)
    assert str(error.value).startswith(str(folder))


def test_an_added_token_is_not_a_hundredth_language(tmp_path):
    """51,866 tokens are those of large-v3, or 99 languages and one added token: then <|notimestamps|> is 50363."""
    random_model(**SMALL | {"vocab_size": 51_866}).save_pretrained(tmp_path)
    load_whisper(tmp_path)
    for name, key in (("generation_config", "no_timestamps_token_id"), ("added_tokens", "<|notimestamps|>")):
        (tmp_path / f"{name}.json").write_text(json.dumps({key: 50_364}))
        load_whisper(tmp_path)
        (tmp_path / f"{name}.json").write_text(json.dumps({key: 50_363}))
        with pytest.raises(InputError, match="tokens were added to its vocabulary"):
            load_whisper(tmp_path)
        (tmp_path / f"{name}.json").unlink()


def test_broken_files_are_named(small, tmp_path):
    weights = (small[1] / "model.safetensors").read_bytes()
    shutil.copy(small[1] / "config.json", tmp_path)
    for content in (weights[:-1_000], weights[:5], b"garbage" * 99, b""):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"model\.safetensors: the weights are broken"):
            load_whisper(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for content in (b"garbage", b""):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(InputError, match=r"pytorch_model\.bin: the weights are broken"):
            load_whisper(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="holds neither model.safetensors nor pytorch_model.bin"):
        load_whisper(tmp_path)
    for content in ("{", "[]", ""):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"config\.json: .*JSON"):
            load_whisper(tmp_path)


def test_broken_openai_files_are_named(tmp_path):
    path = save_random_whisper(tmp_path / "w.pt")
    content, checkpoint = path.read_bytes(), torch.load(path, weights_only=True)
    for damage in (content[:-1_000], content[:100], b"", b"garbage"):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"w\.pt: cannot be loaded as an openai-whisper model"):
            load_whisper(path)
    for damage in ([1], torch.zeros(3), {"model_state_dict": {}}, {"dims": 3, "model_state_dict": {}}):
        torch.save(damage, path)
        with pytest.raises(InputError, match=r"w\.pt: cannot be loaded as an openai-whisper model"):
            load_whisper(path)
    state = checkpoint["model_state_dict"]
    for dims in ({}, checkpoint["dims"] | {"n_mels": 0}, checkpoint["dims"] | {"n_text_ctx": None}):
        torch.save({"dims": dims, "model_state_dict": state}, path)
        with pytest.raises(InputError, match=r"w\.pt: not the sizes of a Whisper"):
            load_whisper(path)
    state["encoder.conv1.bias"][3] = torch.inf
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match=r"w\.pt: weights are NaN or infinite: encoder\.conv1\.bias"):
        load_whisper(path)


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"^large-v9: no such Whisper model.*openai/whisper-large-v3.*Names: .*large-v3"
    ):
        load_whisper("large-v9")
    with pytest.raises(InputError, match=r"^nowhere/whisper\.pt: no such Whisper model"):  # no hub id
        load_whisper("nowhere/whisper.pt")
    with pytest.raises(InputError, match=r"^openai/whisper-huge: no such folder, and the hub gave no such model"):
        load_whisper("openai/whisper-huge")
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_whisper(tmp_path)


def test_a_hub_id_is_a_snapshot_of_what_is_read(small, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(small[1])

    monkeypatch.setattr("speech.checkpoint_files.snapshot_download", snapshot_download)
    assert_same_outputs(load_whisper("owner/whisper-small-xy"), small[0])
    [(repo, patterns)] = asked
    assert repo == "owner/whisper-small-xy"
    assert {"config.json", "model.safetensors", "generation_config.json", "added_tokens.json"} <= set(patterns)
    assert not any(pattern.startswith("pytorch_model") for pattern in patterns)
