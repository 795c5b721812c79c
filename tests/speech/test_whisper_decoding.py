"""Greedy decoding token for token as the library's, with any draft and in any batch."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import whisper
from fake_whisper import TEXTS, babble, save_random_whisper

from speech import whisper_decoding
from speech.audio import load_audio
from speech.text_marks import plain_text
from speech.whisper_decoding import WindowReader
from speech.whisper_scorer import WhisperScorer

HELDOUT = Path("tiny/heldout")


@pytest.fixture(scope="module")
def tiny():
    """The shipped Whisper, features of 12 held-out clips and 4 of noise, and the tokens of the clips' texts."""
    scorer = WhisperScorer("tiny/whisper.pt", device="cpu")
    rows = [json.loads(line) for line in (HELDOUT / "metadata.jsonl").read_text().splitlines()[:12]]
    clips = [load_audio(HELDOUT / row["file_name"])[: scorer.window] for row in rows]
    noises = [babble(1.0, seed) for seed in range(4)]
    texts = [plain_text(row["text"]) for row in rows]
    return scorer, scorer._encode(clips + noises), [scorer._text_ids(text, "en") for text in texts + texts[:4]]


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A random Whisper that ends some of its transcripts: the end-of-text often has an extreme logit."""
    path = save_random_whisper(tmp_path_factory.mktemp("whisper") / "ending.pt")
    scorer = WhisperScorer(path, device="cpu")
    scorer.model.decoder.token_embedding.weight[50_257] *= 4
    features = scorer._encode([babble(0.3 + 0.08 * seed, seed) for seed in range(12)])
    return scorer, features, [scorer._text_ids(text, "en") for text in 3 * TEXTS[:4]]


def library_transcripts(scorer, features, max_tokens):
    """`whisper.decode` of each window alone."""
    options = [
        whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False, sample_len=limit)
        for limit in max_tokens
    ]
    return [whisper.decode(scorer.model, row[None], o)[0].tokens for row, o in zip(features, options, strict=True)]


@pytest.mark.parametrize("model", ["tiny", "ending"])
def test_transcripts_equal_the_librarys_token_for_token(request, model):
    scorer, features, texts = request.getfixturevalue(model)
    # Bounds that cut, that do not, and that only the context of 128 or 64 tokens stops
    max_tokens = [(1, 3, 8, 20, 200)[n % 5] for n in range(len(texts))]
    expected = library_transcripts(scorer, features, max_tokens)
    lengths = [len(tokens) for tokens in expected]
    assert len(set(lengths)) > 2 and any(n < limit for n, limit in zip(lengths, max_tokens, strict=True))
    reader = WindowReader(scorer.model, "en")
    drafts = {
        "none": [[] for _ in texts],
        "the texts": texts,
        "the transcripts": expected,
        "too long": [[*tokens, 11, 12, 13] for tokens in expected],
        "too short": [tokens[:-2] for tokens in expected],
        "longer than the context": [[*tokens, *range(1_000, 1_140)] for tokens in expected],
    }
    for name, draft in drafts.items():
        assert [reading.tokens for reading in reader.read(features, draft, max_tokens)] == expected, name


def test_a_transcript_never_starts_with_its_end(tmp_path):
    scorer = WhisperScorer(save_random_whisper(tmp_path / "random.pt"), device="cpu")
    decoder = scorer.model.decoder
    decoder.ln.bias += 20 * decoder.token_embedding.weight[50_257]  # the end-of-text is the likeliest anywhere
    features = scorer._encode([babble(0.5, seed) for seed in range(3)])
    readings = WindowReader(scorer.model, "en").read(features, [[], [440], [220, 440]], [9] * 3)
    assert [reading.tokens for reading in readings] == library_transcripts(scorer, features, [9] * 3)
    assert [len(reading.tokens) for reading in readings] == [1, 1, 1]


def test_real_clips_are_transcribed_correctly(tiny):
    scorer, features, texts = tiny
    readings = WindowReader(scorer.model, "en").read(features, texts, [30] * len(texts))
    assert sum(reading.tokens == text for reading, text in zip(readings[:12], texts[:12], strict=True)) >= 10
    assert all(reading.tokens != text for reading, text in zip(readings[12:], texts[12:], strict=True))  # noise


def test_nll_is_the_same_in_any_batch(tiny):
    scorer, features, texts = tiny
    reader = WindowReader(scorer.model, "en")
    together = reader.read(features, texts, [0] * len(texts))
    for n, (reading, text) in enumerate(zip(together, texts, strict=True)):
        [alone] = reader.read(features[n : n + 1], [text], [30])
        assert reading.tokens == [] and len(reading.nlls) == len(text) + 1
        assert reading.nlls == pytest.approx(alone.nlls, rel=1e-4, abs=1e-5)


def test_nll_keeps_the_tail_of_the_vocabulary(tiny, monkeypatch):
    """One token at logit 0 and 51,864 at -16.8: 51,864 * e^-16.8 = 0.002622, so its NLL is ln 1.002622 = 0.002619.

    In a running float32 sum each of them is less than 1's last place: cross_entropy gives 0.0023, or 0.00002 where
    the vocabulary is not the last axis.
    """
    scorer, features, _ = tiny

    def logits(reader, hidden):
        rows = torch.full((len(hidden), 51_865), -16.8)
        rows[:, 440] = 0.0
        return rows

    monkeypatch.setattr(WindowReader, "_logits", logits)
    [reading] = WindowReader(scorer.model, "en").read(features[:1], [[440]], [0])
    assert reading.nlls == pytest.approx([0.002619, 16.802619], abs=2e-6)


class OnAGPU(torch.Tensor):
    """A CPU's tensor whose device is said to be a GPU."""

    device = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_half_precision_leave_a_gpu_s_product_in_float32(dtype, monkeypatch):
    """PyTorch has `out_dtype` on GPUs alone, so here a stand-in computes what it is documented to."""
    products = []

    def mm(a, b, *, out_dtype):
        products.append((a.dtype, b.dtype, out_dtype))
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    hidden, embedding = torch.randn(3, 512).to(dtype), torch.randn(70, 512)
    reader = SimpleNamespace(model=SimpleNamespace(decoder=SimpleNamespace(token_embedding=SimpleNamespace())))
    reader.model.decoder.token_embedding.weight = embedding
    logits = WindowReader._logits(reader, hidden.as_subclass(OnAGPU))
    assert products == ([] if dtype is torch.float32 else [(dtype, dtype, torch.float32)])
    assert logits.shape == (3, 70) and logits.dtype == torch.float32
    exact = hidden.double() @ embedding.to(dtype).double().T
    assert (logits - exact).abs().max() < 1e-4
    rounded = WindowReader._logits(reader, hidden)  # as before, on a CPU
    assert len(products) <= 1 and (dtype is torch.float32 or (rounded - exact).abs().max() > 1e-3)


def test_finished_windows_leave_the_batch(tiny, monkeypatch):
    scorer, features, texts = tiny
    reader = WindowReader(scorer.model, "en")
    passes = []
    forward = whisper_decoding._Decoder.forward

    def spy(decoder, tokens, starts, attention=None):
        caches = (decoder.audio_cache, decoder.text_cache)
        audio, text = ({len(part) for layer in cache for part in layer} for cache in caches)
        assert audio == text == {len(tokens)}  # keys and values left too
        passes.append((len(tokens), len(tokens[0])))
        return forward(decoder, tokens, starts, attention)

    monkeypatch.setattr(whisper_decoding._Decoder, "forward", spy)
    max_tokens = [1, 2, 2, 4] + [30] * (len(texts) - 4)
    transcripts = [reading.tokens for reading in reader.read(features, [[] for _ in texts], max_tokens)]
    # The first pass chooses the first token of each; step n is for those whose token n is not END or out of bounds.
    steps = [min(len(tokens) + 1, limit) - 1 for tokens, limit in zip(transcripts, max_tokens, strict=True)]
    expected = [sum(step >= n for step in steps) for n in range(1, max(steps) + 1)]
    assert passes == [(len(texts), 4), *((rows, 1) for rows in expected)]
    assert expected[-1] < expected[2] < expected[0] < len(texts)

    passes.clear()
    reader.read(features, transcripts, [30] * len(texts))  # a draft that is the transcript needs no step
    cut = sum(limit < 30 for limit in max_tokens)
    assert passes[0][0] == len(texts) and all(rows <= cut for rows, _ in passes[1:])
    passes.clear()
    reader.read(features, texts, [0] * len(texts))
    assert len(passes) == 1
