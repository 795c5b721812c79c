"""Speaker embeddings: batches equal to clips alone for every kind of model, clips without a voice, bad models."""

import json

import numpy as np
import pytest
import torch
from fake_speaker_encoder import save_speaker_encoder
from transformers import AutoModelForAudioXVector, WavLMModel

from common.cli import InputError
from speech.audio import load_audio
from speech.speaker_encoder import SpeakerEncoder, cosines
from speech.tokens import SAMPLE_RATE

CLIPS = [f"tiny/heldout/heldout_{number}.ogg" for number in ("103", "059", "073", "047", "022")]
KINDS = {  # group norm over time in the first layer, or layer norm in all
    "wavlm": {},
    "wavlm, weighted layers": {"use_weighted_layer_sum": True},  # microsoft/wavlm-base-plus-sv
    "wavlm, layer norm": {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
    "wav2vec2": {},
    "wav2vec2-conformer": {},
    "unispeech-sat": {},
    "data2vec-audio": {"conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2},
}


@pytest.fixture(scope="module")
def wavs() -> list[np.ndarray]:
    """Of 0.5 to 2 s, each of its own length."""
    clips = [load_audio(path) for path in CLIPS]
    return [*clips, clips[0][:8000], clips[1][:12_345]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_what_each_clip_alone_gives(kind, wavs, tmp_path):
    path = save_speaker_encoder(tmp_path, kind.split(",")[0], **KINDS[kind])
    encoder = SpeakerEncoder.from_pretrained(path)
    encoder.batch_seconds = 60
    together = encoder.embed(wavs)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1.0, abs=1e-6)
    bare = AutoModelForAudioXVector.from_pretrained(path).eval()  # transformers' own, one clip at a time, no mask
    for wav, embedding in zip(wavs, together, strict=True):
        inputs = encoder.feature_extractor(wav, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.no_grad():
            alone = bare(inputs.input_values).embeddings[0].numpy()
        assert embedding == pytest.approx(alone / np.linalg.norm(alone), abs=2e-5)
    assert np.abs(together[0] - together[1]).max() > 2e-4  # clips differ by more than the tolerance


def test_batches_are_bounded_and_in_order(wavs, tmp_path):
    encoder = SpeakerEncoder.from_pretrained(save_speaker_encoder(tmp_path))
    encoder.batch_seconds = 3
    sizes, embed_batch = [], encoder._embed_batch
    encoder._embed_batch = lambda batch: sizes.append([len(wav) for wav in batch]) or embed_batch(batch)
    some = encoder.embed(wavs)
    assert len(sizes) > 2 and all(len(batch) * max(batch) <= 3 * SAMPLE_RATE for batch in sizes)
    encoder.batch_seconds = 60
    assert encoder.embed(wavs) == pytest.approx(some, abs=2e-5)


def test_clips_without_a_voice_have_no_embedding(wavs, tmp_path):
    encoder = SpeakerEncoder.from_pretrained(save_speaker_encoder(tmp_path))
    broken = wavs[0].copy()
    broken[100] = np.nan
    odd = [np.zeros(0, np.float32), wavs[0], wavs[0][:7999], np.zeros(16_000, np.float32), broken]
    embeddings = encoder.embed(odd)
    assert np.isnan(embeddings).all(axis=1).tolist() == [True, False, True, True, True]
    assert np.isfinite(embeddings[1]).all()
    assert encoder.embed([]).shape == (0, 24)


def test_cosines_by_hand():
    # 0.6 · 1 + 0.8 · 0;  0.6 · -0.6 + 0.8 · -0.8 = -1
    pairs = np.array([[0.6, 0.8], [0.6, 0.8], [np.nan, np.nan]], np.float32)
    others = np.array([[1, 0], [-0.6, -0.8], [1, 0]], np.float32)
    assert cosines(pairs, others) == pytest.approx([0.6, -1.0, float("nan")], nan_ok=True)


def test_models_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"speaker encoder nowhere: cannot be loaded. Use an x-vector model"):
        SpeakerEncoder.from_pretrained("nowhere")
    path = tmp_path / "no_head"
    save_speaker_encoder(path)
    WavLMModel.from_pretrained(path).save_pretrained(path)
    with pytest.raises(InputError, match=r"is no such model \(got WavLMModel\). Use an x-vector model"):
        SpeakerEncoder.from_pretrained(str(path))
    config = json.loads((path / "config.json").read_text())  # says that there is a head, and there is none
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["WavLMForXVector"]}))
    with pytest.raises(InputError, match=r"its weights lack \d+ of the model's: .* Download or save it again"):
        SpeakerEncoder.from_pretrained(str(path))
    other = save_speaker_encoder(tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "preprocessor_config.json").read_text())
    (tmp_path / "other" / "preprocessor_config.json").write_text(json.dumps(settings | {"sampling_rate": 8000}))
    with pytest.raises(InputError, match="is for 8000 Hz. Use an x-vector model"):
        SpeakerEncoder.from_pretrained(other)
