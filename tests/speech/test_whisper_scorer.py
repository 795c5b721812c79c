"""Transcripts and NLLs of a small Whisper against plain loops; batches, long clips, failures and wrong calls."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import whisper
from fake_whisper import TEXTS, babble, save_random_whisper
from whisper.tokenizer import get_tokenizer

from speech import whisper_decoding, whisper_scorer
from speech.audio import cut_at_pauses, split_at_pauses
from speech.error_rate import error_rate
from speech.whisper_decoding import WindowReader
from speech.whisper_scorer import MAX_NLL, WhisperScorer, log_mel_spectrograms


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random_whisper(tmp_path_factory.mktemp("whisper") / "random.pt")


@pytest.fixture(scope="module")
def scorer(checkpoint):
    scorer = WhisperScorer(checkpoint, device="cpu")
    scorer.batch_size = 3
    return scorer


@torch.no_grad()
def nll_by_hand(scorer, wav, text_ids, language="en", end=True):
    """Summed NLL of `text_ids` and the end-of-text: one decoder pass on the whole prefix for every token."""
    model = scorer.model
    tokenizer = get_tokenizer(model.is_multilingual, num_languages=model.num_languages, language=language)
    sot = {True: [50258, 50259 + ["en", "zh"].index(language), 50359, 50363], False: [50257, 50362]}
    tokens = sot[model.is_multilingual]
    audio = np.zeros(64 * 320, np.float32)
    audio[: len(wav)] = wav
    features = model.encoder(whisper.log_mel_spectrogram(audio)[None])
    total = 0.0
    for target in [*text_ids, tokenizer.eot] if end else text_ids:
        logits = model.decoder(torch.tensor([tokens]), features)[0, -1]
        total += F.cross_entropy(logits[None], torch.tensor([target])).item()
        tokens = [*tokens, target]
    return total


LANGUAGES = ["en", "en", "en", "en", "zh"]


@pytest.fixture(scope="module")
def wavs():
    return [babble(d, seed) for seed, d in enumerate((0.4, 1.28, 0.7, 0.9, 1.1))]


def test_nll_equals_a_plain_loop(scorer, wavs):
    tokenizer = get_tokenizer(True, language="en", task="transcribe")
    ids = tokenizer.encode(" The cat sat on the mat.")
    score = scorer.score([wavs[3]], ["The cat sat on the mat. "])[0]
    assert score.nll == pytest.approx(nll_by_hand(scorer, wavs[3], ids) / (len(ids) + 1), rel=1e-5)
    assert 0 < score.nll < MAX_NLL
    # Chinese: its own language token, and no space before the text
    ids = tokenizer.encode("今天天气很好。")
    score = scorer.score([wavs[4]], ["今天天气很好。"], "zh")[0]
    assert score.nll == pytest.approx(nll_by_hand(scorer, wavs[4], ids, "zh") / (len(ids) + 1), rel=1e-5)


def test_english_only_model_has_its_own_prefix(tmp_path, wavs):
    scorer = WhisperScorer(save_random_whisper(tmp_path / "en.pt", n_vocab=51_864), device="cpu")
    ids = get_tokenizer(False).encode(" Hello there.")
    score = scorer.score(wavs[:1], ["Hello there."])[0]
    assert score.nll == pytest.approx(nll_by_hand(scorer, wavs[0], ids) / (len(ids) + 1), rel=1e-5)
    with pytest.raises(ValueError, match="does not know the language 'zh'"):
        scorer.score(wavs[:1], ["你好"], "zh")


def test_batch_equals_one_by_one_in_the_callers_order(scorer, wavs):
    together = scorer.score(wavs, TEXTS, LANGUAGES)
    alone = [scorer.score([w], [t], lang)[0] for w, t, lang in zip(wavs, TEXTS, LANGUAGES, strict=True)]
    for a, b, text, language in zip(together, alone, TEXTS, LANGUAGES, strict=True):
        assert a.nll == pytest.approx(b.nll, rel=1e-5)
        assert (a.hyp_text, a.wer, a.edits, a.ref_length, a.failure) == (b.hyp_text, b.wer, b.edits, b.ref_length, None)
        errors = error_rate(text, a.hyp_text, language)
        assert (a.wer, a.edits, a.ref_length) == (errors.rate, errors.edits, errors.ref_length)
    assert len({a.hyp_text for a in together}) == len(wavs), "the audio must matter, or the order is not tested"
    assert [scorer.transcribe([w], lang)[0] for w, lang in zip(wavs, LANGUAGES, strict=True)] == scorer.transcribe(
        wavs, LANGUAGES
    )
    assert scorer.score([], []) == [] == scorer.transcribe([])


def test_one_encoder_pass_serves_transcript_and_nll(scorer, wavs):
    rows = []
    hook = scorer.model.encoder.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    scorer.score(wavs, TEXTS, "en")
    hook.remove()
    assert rows == [3, 2]  # five windows, batches of at most three, each seen once


def test_failures_are_scores_and_never_reach_whisper(scorer, wavs, monkeypatch):
    seen = []
    encode = scorer._encode
    monkeypatch.setattr(scorer, "_encode", lambda batch: seen.extend(batch) or encode(batch))
    broken = wavs[1].copy()
    broken[7] = np.nan
    items = [np.zeros(0, np.float32), wavs[0], np.zeros(9_000, np.float32), broken]
    scores = scorer.score(items, ["Hello there."] * 4)
    assert [s.failure for s in scores] == ["empty", None, "silent", "non_finite"]
    assert len(seen) == 1 and np.array_equal(seen[0], wavs[0])
    for score in (scores[0], scores[2], scores[3]):
        assert (score.hyp_text, score.wer, score.nll, score.edits, score.ref_length) == ("", 1.0, MAX_NLL, 2, 2)
    texts = scorer.transcribe(items)
    assert [texts[i] for i in (0, 2, 3)] == ["", "", ""] and texts[1]


def test_huge_samples_are_clipped_not_overflowed(scorer):
    score = scorer.score([babble(0.5, 0, level=1e30)], ["Hello there."])[0]
    assert score.failure is None and math.isfinite(score.nll)


def test_transcripts_are_bounded(scorer, wavs, monkeypatch):
    bounds = []
    read = WindowReader.read

    def spy(reader, features, drafts, max_tokens, num_frames):
        bounds.extend(max_tokens)
        return read(reader, features, drafts, max_tokens, num_frames)

    monkeypatch.setattr(WindowReader, "read", spy)
    scorer.score(wavs[:1], ["Hello there."])  # " Hello", " there", "." are 3 tokens: 2 * 3 + 8
    scorer.transcribe(wavs[:1], max_tokens=5)
    scorer.transcribe(wavs[:1])
    assert bounds == [14, 5, 32]
    # A random model never ends by itself, so the bound is what ended it.
    tokenizer = get_tokenizer(True)
    assert len(tokenizer.encode(scorer.transcribe(wavs[:1], max_tokens=5)[0])) <= 12
    with pytest.raises(ValueError, match="max_tokens"):
        scorer.transcribe(wavs[:1], max_tokens=0)


def test_words_have_the_mean_nll_of_their_tokens(scorer, wavs):
    ids = get_tokenizer(True).encode(" Hello there.")  # " Hello", " there", "."
    [score] = scorer.score(wavs[3:4], ["Hello there."], word_times=True)
    first, whole = (nll_by_hand(scorer, wavs[3], part, end=False) for part in (ids[:1], ids))
    assert [word.text for word in score.words] == ["Hello", "there."]
    assert [word.nll for word in score.words] == pytest.approx([first, (whole - first) / 2], rel=1e-4)


def test_special_tokens_are_not_spelt_out(scorer, wavs, monkeypatch):
    tokenizer = get_tokenizer(True, language="en", task="transcribe")
    tokens = [*tokenizer.encode(" Hello there."), tokenizer.no_timestamps, tokenizer.sot + 1, tokenizer.timestamp_begin]
    reading = whisper_decoding.Reading(tokens, nlls=[0.0])
    monkeypatch.setattr(WindowReader, "read", lambda *_: [reading])
    assert scorer.transcribe(wavs[:1]) == ["Hello there."]


def test_text_longer_than_the_decoders_context(scorer, wavs):
    # 100 tokens and the end; the decoder's 64 positions hold 4 of prefix, and so predict 61
    tokenizer = get_tokenizer(True, language="en", task="transcribe")
    text = " ".join(["cat"] * 100)
    ids = tokenizer.encode(" " + text)
    assert len(ids) == 100
    score = scorer.score(wavs[:1], [text])[0]
    total = nll_by_hand(scorer, wavs[0], ids[:61], end=False)
    assert score.nll == pytest.approx((total + 40 * MAX_NLL) / 101, rel=1e-5)


def test_clip_longer_than_the_window(scorer, wavs, monkeypatch):
    # 0.9 s, a pause, 1.0 s: more than the window of 1.28 s, so two pieces
    wav = np.concatenate([babble(0.9, 5), np.zeros(3_200, np.float32), babble(1.0, 6)])
    pieces = split_at_pauses(wav, scorer.window)
    assert len(pieces) == 2
    assert scorer.transcribe([wav]) == [" ".join(scorer.transcribe(pieces))]

    monkeypatch.setattr(scorer, "_transcripts", lambda readings, language: ["the big.", "hat sat"][: len(readings)])
    score = scorer.score([wav], ["The big, cat sat!"])[0]
    tokenizer = get_tokenizer(True, language="en", task="transcribe")
    shares = [tokenizer.encode(" The big,"), tokenizer.encode(" cat sat!")]
    total = sum(nll_by_hand(scorer, piece, ids) for piece, ids in zip(pieces, shares, strict=True))
    assert score.hyp_text == "the big. hat sat"
    assert (score.wer, score.edits, score.ref_length) == (0.25, 1, 4)
    assert score.nll == pytest.approx(total / (len(shares[0]) + len(shares[1]) + 2), rel=1e-5)


def test_a_text_without_spaces_over_two_windows_has_no_words(scorer, monkeypatch):
    """Each window would have a word of its own, where the text has one."""
    monkeypatch.setattr(scorer, "_transcripts", lambda readings, _: ["猫坐在", "大帽子上"][: len(readings)])
    wav = np.concatenate([babble(0.9, 5), np.zeros(3_200, np.float32), babble(1.0, 6)])
    short, long = scorer.score([babble(0.9, 5), wav], ["猫坐", "猫坐在大帽子上"], "zh", word_times=True)
    assert [word.text for word in short.words] == ["猫坐"] and long.words is None


def test_long_clips_among_short_ones(scorer, wavs):
    items = [wavs[0], babble(6, 7), wavs[1], babble(2.5, 8)]  # the second alone has more windows than a batch
    texts = ["Hello there.", "One two three four five six seven", "Yes, no.", "Good morning"]
    rows = []
    hook = scorer.model.encoder.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    together = scorer.score(items, texts)
    hook.remove()
    assert sum(rows) == sum(len(split_at_pauses(wav, scorer.window)) for wav in items) and max(rows) == 3
    for a, wav, text in zip(together, items, texts, strict=True):
        b = scorer.score([wav], [text])[0]
        assert a.hyp_text == b.hyp_text
        assert a.nll == pytest.approx(b.nll, rel=1e-5)


def test_float16_is_close_to_float32(scorer, checkpoint, wavs):
    half = WhisperScorer(checkpoint, device="cpu", dtype=torch.float16)
    assert half.model.decoder.token_embedding.weight.dtype == torch.float16
    for a, b in zip(half.score(wavs, TEXTS, LANGUAGES), scorer.score(wavs, TEXTS, LANGUAGES), strict=True):
        assert a.nll == pytest.approx(b.nll, abs=0.02)


def test_wrong_calls_raise(scorer, wavs):
    wav = wavs[0]
    for wrong in ((wav * 32_767).astype(np.int16), wav.tolist(), wav[None], torch.from_numpy(wav)):
        with pytest.raises(TypeError, match="waveform 1: expected a float numpy array"):
            scorer.score([wav, wrong], ["Hello.", "Hello."])
    with pytest.raises(ValueError, match="expected one text for each"):
        scorer.score([wav], ["Hello.", "Hello."])
    with pytest.raises(ValueError, match="expected one text for each"):
        scorer.score([wav] * 6, "Hello.")
    with pytest.raises(ValueError, match="expected one for each"):
        scorer.score([wav], ["Hello."], ["en", "de"])
    with pytest.raises(ValueError, match="unknown language"):
        scorer.score([wav], ["Hello."], "klingon")
    with pytest.raises(ValueError, match=r"'\.\.\.' is empty after"):
        scorer.score([wav], ["..."])


def test_a_text_that_spells_a_special_token_is_text(scorer, wavs):
    assert math.isfinite(scorer.score(wavs[:1], ["Say <|endoftext|> now"])[0].nll)


def test_wrong_models_raise(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"large-v9: no such Whisper model.*large-v3"):
        WhisperScorer("large-v9", device="cpu")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be loaded as an openai-whisper model"):
            WhisperScorer(tmp_path / name, device="cpu")
    with pytest.raises(ValueError, match="float16 or float32"):
        WhisperScorer(checkpoint, device="cpu", dtype=torch.bfloat16)


def test_mels_equal_whispers_clip_by_clip():
    # The quiet one lies 60 dB under the loud one: with a floor of the batch's it would lose most of itself.
    clips = np.stack([babble(1.28, 0, level=0.3), babble(1.28, 1, level=3e-4), np.zeros(20_480, np.float32)])
    clips[1, 9_000:] = 0
    for n_mels in (80, 128):
        mels = log_mel_spectrograms(torch.from_numpy(clips), n_mels)
        assert mels.shape == (3, n_mels, 128)
        for mel, clip in zip(mels, clips, strict=True):
            torch.testing.assert_close(mel, whisper.log_mel_spectrogram(clip, n_mels), atol=1e-5, rtol=0)


def test_batches_fit_the_budget(checkpoint, monkeypatch):
    def batch_size(**options):
        return WhisperScorer(checkpoint, device="cpu", **options).batch_size

    assert batch_size() == whisper_scorer.MAX_BATCH_SIZE
    # keys and values of 1 layer * 64 positions * 32 numbers * 4 bytes: 16,384 bytes a window
    monkeypatch.setattr(whisper_scorer, "BATCH_BYTES", 3 * 16_384)
    assert batch_size() == 3
    assert batch_size(dtype=torch.float16) == 6
    monkeypatch.setattr(whisper_scorer, "BATCH_BYTES", 1)
    assert batch_size() == 1


def test_features_are_the_encoder_s_of_the_clip_alone(scorer, wavs):
    """Those of the scoring pass too; without the padding, and the windows of a long clip one after the other."""
    scores = scorer.score(wavs, TEXTS, LANGUAGES, features=True)
    assert all(score.features is None for score in scorer.score(wavs, TEXTS, LANGUAGES))
    for wav, score, features in zip(wavs, scores, scorer.encode(wavs), strict=True):
        padded = np.zeros(64 * 320, np.float32)
        padded[: len(wav)] = wav
        with torch.no_grad():
            [expected] = scorer.model.encoder(whisper.log_mel_spectrogram(padded)[None])
        assert features.shape == (len(wav) // 320, 32)
        torch.testing.assert_close(features, expected[: len(features)], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(score.features, features, rtol=1e-4, atol=1e-4)
    assert scorer.encode([np.zeros(0, np.float32), np.zeros(9_000, np.float32)]) == [None, None]
    assert scorer.score([np.zeros(0, np.float32)], ["so"], features=True)[0].features is None


def test_the_features_of_a_long_clip_stand_where_they_are_heard(scorer):
    """Whether a window begins between two frames, or one of silence is left out."""
    long = np.concatenate([babble(1.6, seed=9), np.zeros(40_000, np.float32), babble(0.9, seed=10)])
    pieces = cut_at_pauses(long, scorer.window)
    [features] = scorer.encode([long])
    assert len(pieces) >= 3 and sum(len(piece) for _, piece in pieces) < len(long) - 10_000
    assert any(start % 320 for start, _ in pieces) and len(features) == len(long) // 320
    heard = np.zeros(len(features), bool)
    for start, piece in pieces:
        first, end = start // 320, (start + len(piece)) // 320
        heard[first:end] = True
        [own] = scorer.encode([piece])
        torch.testing.assert_close(features[first : first + len(own)], own, rtol=1e-4, atol=1e-4)
    assert not features[~heard].any() and (~heard).sum() > 30


def test_the_fingerprint_is_of_the_weights_not_of_their_format(scorer, checkpoint):
    half = WhisperScorer(checkpoint, device="cpu", dtype=torch.float16)
    assert half.fingerprint() == scorer.fingerprint()
    half.model.encoder.conv1.weight[0, 0, 0] += 1
    assert half.fingerprint() != scorer.fingerprint()
