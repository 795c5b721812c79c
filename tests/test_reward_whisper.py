"""The WER + NLL reward: formulas by hand, error rates against jiwer, a small Whisper against plain loops and the
library's own decoding."""

import itertools
import json
import math
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import whisper
from whisper.tokenizer import get_tokenizer

import reward_whisper
from reward_whisper import harmonic_mean, nll_reward, wer_reward
from speech import whisper_decoding
from speech.audio import audio_failure, load_audio, save_audio, split_at_pauses
from speech.error_rate import corpus_error_rate, error_rate, language_code, normalize_text, split_reference
from speech.tokens import SAMPLE_RATE
from speech.whisper_decoding import WindowReader
from speech.whisper_scorer import MAX_NLL, WhisperScorer, log_mel_spectrograms

# --- formulas ---


def test_wer_reward_by_hand():
    assert wer_reward(0.0) == 1.0
    # tanh(0.3) = (e^0.6 - 1) / (e^0.6 + 1) = 0.8221188 / 2.8221188 = 0.2913126
    assert wer_reward(0.1) == pytest.approx(1 - 0.2913126, abs=1e-7)
    # alpha 1, WER 1: tanh(1) = (e^2 - 1) / (e^2 + 1) = 6.3890561 / 8.3890561 = 0.7615942
    assert wer_reward(1.0, alpha_wer=1.0) == pytest.approx(0.2384058, abs=1e-7)


def test_nll_reward_by_hand():
    assert nll_reward(0.0) == 1.0
    assert nll_reward(0.6) == pytest.approx(0.8187308, abs=1e-7)  # e^-0.2
    assert nll_reward(3.0) == pytest.approx(0.3678794, abs=1e-7)  # e^-1
    assert nll_reward(1.0, alpha_nll=0.5) == pytest.approx(0.1353353, abs=1e-7)  # e^-2
    assert 0.001 < nll_reward(MAX_NLL) < 0.0013  # e^-6.67: the worst, and still above 0


def test_harmonic_mean_by_hand():
    # 1 / (0.6 / 0.5 + 0.4 / 0.8) = 1 / (1.2 + 0.5) = 0.5882353
    assert harmonic_mean(0.5, 0.8) == pytest.approx(0.5882353, abs=1e-7)
    # weights need not add up to 1: 3 / (1 / 0.5 + 2 / 0.25) = 3 / 10
    assert harmonic_mean(0.5, 0.25, lambda_wer=1, lambda_nll=2) == pytest.approx(0.3)
    assert harmonic_mean(0.7, 0.7) == pytest.approx(0.7)
    assert harmonic_mean(0.0, 1.0) == harmonic_mean(1.0, 0.0) == harmonic_mean(0.0, 0.0) == 0.0
    # A weight of 0 leaves its term out, even when that term is 0.
    assert harmonic_mean(0.5, 0.0, lambda_wer=1, lambda_nll=0) == 0.5
    assert harmonic_mean(0.0, 0.5, lambda_wer=0, lambda_nll=1) == 0.5


def test_rewards_are_bounded_and_monotone():
    grid = np.linspace(0, 5, 51)
    for reward in (wer_reward, nll_reward):
        values = [reward(x) for x in grid]
        assert all(0 <= v <= 1 for v in values)
        assert all(a > b for a, b in itertools.pairwise(values))
    unit = np.linspace(0.05, 1, 20)
    for fixed in unit:
        for values in ([harmonic_mean(r, fixed) for r in unit], [harmonic_mean(fixed, r) for r in unit]):
            assert all(a < b for a, b in itertools.pairwise(values))
            assert all(min(r, fixed) - 1e-12 <= v <= max(r, fixed) + 1e-12 for r, v in zip(unit, values, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1])
def test_rewards_refuse_what_is_no_measurement(bad):
    for call in (
        lambda: wer_reward(bad),
        lambda: nll_reward(bad),
        lambda: harmonic_mean(bad, 0.5),
        lambda: harmonic_mean(0.5, bad),
        lambda: harmonic_mean(0.5, 0.5, lambda_wer=bad),
        lambda: wer_reward(0.5, alpha_wer=bad),
        lambda: nll_reward(0.5, alpha_nll=bad),
    ):
        with pytest.raises(ValueError, match="got"):
            call()


# --- text and error rates ---


@pytest.mark.parametrize(
    ("ref", "hyp", "substitutions", "deletions", "insertions", "ref_length"),
    [
        ("The cat sat.", "the cat sat", 0, 0, 0, 3),
        ("The cat sat.", "the hat sat", 1, 0, 0, 3),
        ("The cat sat on the mat.", "the cat on mat", 0, 2, 0, 6),
        ("The cat.", "the big fat cat", 0, 0, 2, 2),
        ("I didn't see Mr. Brown", "i did not see mister brown", 0, 0, 0, 6),
        ("Twenty-three dollars", "$23", 0, 0, 0, 1),
        ("The colour grey", "the color gray", 0, 0, 0, 3),
        ("Hello there", "", 0, 2, 0, 2),
        ("Hello there", " ... ", 0, 2, 0, 2),
        ("Hello", "a b c d", 1, 0, 3, 1),
        ("Well... wait...", "well wait", 0, 0, 0, 2),
    ],
)
def test_wer_is_jiwers_on_normalised_text(ref, hyp, substitutions, deletions, insertions, ref_length):
    errors = error_rate(ref, hyp, "en")
    assert errors[1:] == (substitutions, deletions, insertions, ref_length)
    assert errors.edits == substitutions + deletions + insertions
    assert errors.rate == pytest.approx(jiwer.wer(normalize_text(ref, "en"), normalize_text(hyp, "en")))


def test_empty_transcript_is_the_worst_not_the_best():
    for language, ref in (("en", "Hello there"), ("de", "Guten Tag"), ("zh", "你好"), ("ko", "안녕하세요")):
        assert error_rate(ref, "", language).rate == 1.0


def test_cer_for_languages_without_word_spaces():
    # 6 characters, one wrong; neither punctuation nor spaces count
    errors = error_rate("今天天气很好。", "今天 天汽很好", "zh")
    assert errors == (1 / 6, 1, 0, 0, 6)
    # Korean: 5 syllables whatever the spacing
    assert error_rate("나는 학교에", "나는학교에", "ko") == (0.0, 0, 0, 0, 5)
    # Other languages with spaces are scored by words, without English spelling rules
    assert error_rate("Mr. Müller kommt", "mister müller kommt", "de") == (1 / 3, 1, 0, 0, 3)


def test_reference_empty_after_normalisation_is_our_fault():
    for text in ("", "...", "[laughs]", "Hmm."):
        with pytest.raises(ValueError, match="empty after Whisper's normalisation"):
            error_rate(text, "hello", "en")


def test_corpus_error_rate_is_edits_over_length():
    # 1 of 1 and 1 of 9 words wrong: 2 / 10, where the mean of the rates is 0.56
    errors = corpus_error_rate(["one", "a b c d e f g h i"], ["two", "a b c d x f g h i"], "de")
    assert errors == (0.2, 2, 0, 0, 10)
    with pytest.raises(ValueError, match="as many"):
        corpus_error_rate(["one"], [], "en")


def test_language_names():
    assert [language_code(name) for name in ("en", "EN", "English", "Mandarin", "yue")] == [
        "en",
        "en",
        "en",
        "zh",
        "yue",
    ]
    with pytest.raises(ValueError, match="Did you mean 'english'"):
        language_code("englisch")


@pytest.mark.parametrize(
    ("text", "hyps", "language", "shares"),
    [
        (" One, two! ", ["anything"], "en", ["One, two!"]),
        ("One, two, three. Four!", ["one two", "three four"], "en", ["One, two,", "three. Four!"]),
        # A word nobody heard goes with the one before it.
        ("one two three four", ["one too", "four"], "en", ["one two three", "four"]),
        ("one two", ["uh one um", "er two oh no"], "en", ["one", "two"]),
        ("one two", ["", "one two"], "en", ["", "one two"]),
        ("one two", ["one two", "babble on"], "en", ["one two", ""]),
        ("one - two", ["one", "two"], "en", ["one -", "two"]),
        ("one two", ["", ""], "en", ["one two", ""]),
        ("今天,天气很好。", ["今天", "天气很号"], "zh", ["今天,", "天气很好。"]),
    ],
)
def test_split_reference(text, hyps, language, shares):
    assert split_reference(text, hyps, language) == shares


# --- audio ---


def babble(duration_s: float, seed: int, level: float = 0.1) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(round(duration_s * SAMPLE_RATE))
    return (level * np.convolve(noise, np.ones(4) / 2, mode="same")).astype(np.float32)


@pytest.mark.parametrize(
    ("wav", "failure"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.zeros(16_000, np.float32), "silent"),
        (np.full(16_000, 0.5, np.float32), "silent"),
        (babble(1, 0, level=1e-4), "silent"),
        (np.array([0.1, np.nan], np.float32), "non_finite"),
        (np.array([0.1, -np.inf], np.float32), "non_finite"),
        (babble(1, 0, level=0.01), None),
    ],
)
def test_audio_failures(wav, failure):
    assert audio_failure(wav) == failure


@pytest.mark.parametrize("duration_s", [0.5, 2.0, 2.01, 3.1, 3.3, 7.0])
def test_pieces_fit_the_window_and_lose_nothing(duration_s):
    wav = babble(duration_s, seed=1)
    pieces = split_at_pauses(wav, 2 * SAMPLE_RATE)
    assert np.array_equal(np.concatenate(pieces), wav)
    assert max(map(len, pieces)) <= 2 * SAMPLE_RATE
    assert duration_s <= 2 or min(map(len, pieces)) >= 0.4 * 2 * SAMPLE_RATE


def test_pieces_end_in_pauses():
    wav = babble(5, seed=2)
    pauses = [(1.7, 1.9), (3.2, 3.4)]
    for start, end in pauses:
        wav[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)] *= 0.001
    cuts = np.cumsum([len(piece) for piece in split_at_pauses(wav, 2 * SAMPLE_RATE)])[:-1] / SAMPLE_RATE
    assert len(cuts) == 2
    assert all(start < cut < end for cut, (start, end) in zip(cuts, pauses, strict=True))


def test_silent_pieces_are_dropped():
    wav = np.concatenate([babble(1.5, seed=3), np.zeros(10 * SAMPLE_RATE, np.float32)])
    assert len(split_at_pauses(wav, 2 * SAMPLE_RATE)) == 1
    # A step between two constants is not silence as a whole, but its pieces are: one is left all the same.
    step = np.repeat(np.float32([-0.1, 0.1]), 2 * SAMPLE_RATE)
    assert audio_failure(step) is None
    assert len(split_at_pauses(step, 2 * SAMPLE_RATE)) == 1


def test_audio_files_round_trip(tmp_path):
    wav = babble(0.5, seed=4)
    save_audio(tmp_path / "new" / "a.wav", wav)
    read = load_audio(tmp_path / "new" / "a.wav")
    assert read.dtype == np.float32 and read.shape == wav.shape
    assert np.abs(read - wav).max() < 1 / 32_768
    assert np.array_equal(load_audio((tmp_path / "new" / "a.wav").read_bytes()), read)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_load_audio_mixes_down_and_resamples(tmp_path, suffix):
    t = np.arange(44_100) / 44_100
    tone = np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / f"a.{suffix}", np.stack([0.6 * tone, 0.2 * tone], axis=1), 44_100)
    wav = load_audio(tmp_path / f"a.{suffix}")
    assert wav.dtype == np.float32 and wav.ndim == 1 and abs(len(wav) - SAMPLE_RATE) <= 1_600
    spectrum = np.abs(np.fft.rfft(wav[4_000:12_000]))
    assert spectrum.argmax() * 2 == 440  # bins of 2 Hz
    assert np.abs(wav[4_000:12_000]).max() == pytest.approx(0.4, abs=0.02)  # the mean of the channels


def test_unreadable_audio_names_the_file(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), SAMPLE_RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), SAMPLE_RATE, subtype="FLOAT")
    for name, why in (("text", "cannot read"), ("none", "no samples"), ("nan", "NaN"), ("missing", "no such")):
        with pytest.raises(ValueError, match=rf"{name}\.wav: .*{why}"):
            load_audio(tmp_path / f"{name}.wav")
    with pytest.raises(ValueError, match="mono"):
        save_audio(tmp_path / "b.wav", np.zeros((2, 3)))
    with pytest.raises(ValueError, match="NaN"):
        save_audio(tmp_path / "b.wav", np.array([np.nan]))


# --- Whisper ---


def save_random_whisper(path, n_vocab=51_865):
    dims = whisper.ModelDimensions(
        n_mels=80,
        n_audio_ctx=64,
        n_audio_state=32,
        n_audio_head=2,
        n_audio_layer=1,
        n_vocab=n_vocab,
        n_text_ctx=64,
        n_text_state=32,
        n_text_head=2,
        n_text_layer=1,
    )
    torch.manual_seed(0)
    model = whisper.model.Whisper(dims)
    torch.nn.init.normal_(model.decoder.positional_embedding)
    # Enough for the sound to matter, not so much that every NLL is clamped
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.1)
    model.decoder.blocks[0].cross_attn.out.weight.data *= 10
    torch.save({"dims": vars(dims), "model_state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_random_whisper(tmp_path_factory.mktemp("whisper") / "random.pt")


@pytest.fixture(scope="module")
def scorer(checkpoint):
    return WhisperScorer(checkpoint, device="cpu", batch_size=3)


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


TEXTS = ["Hello there.", "One, two, three, four, five, six!", "Yes.", "The cat sat on the mat.", "今天天气很好。"]
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
    assert len({a.hyp_text for a in together}) == len(wavs), "the sound must matter, or the order is not tested"
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
    # The reward of a failure is low, and not 0: 1 / (0.6 / 0.00494 + 0.4 / 0.00127) = 0.0023
    assert harmonic_mean(wer_reward(1.0), nll_reward(MAX_NLL)) == pytest.approx(0.0023, abs=1e-4)


def test_huge_samples_are_clipped_not_overflowed(scorer):
    score = scorer.score([babble(0.5, 0, level=1e30)], ["Hello there."])[0]
    assert score.failure is None and math.isfinite(score.nll)


def test_transcripts_are_bounded(scorer, wavs, monkeypatch):
    bounds = []
    read = WindowReader.read

    def spy(reader, features, drafts, max_tokens):
        bounds.extend(max_tokens)
        return read(reader, features, drafts, max_tokens)

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


def test_special_tokens_are_not_spelt_out(scorer, wavs, monkeypatch):
    tokenizer = get_tokenizer(True, language="en", task="transcribe")
    tokens = [*tokenizer.encode(" Hello there."), tokenizer.no_timestamps, tokenizer.sot + 1, tokenizer.timestamp_begin]
    reading = whisper_decoding.Reading(tokens, nll=0.0, nll_tokens=1)
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

    monkeypatch.setattr(scorer, "_write", lambda readings, language: ["the big.", "hat sat"][: len(readings)])
    score = scorer.score([wav], ["The big, cat sat!"])[0]
    tokenizer = get_tokenizer(True, language="en", task="transcribe")
    shares = [tokenizer.encode(" The big,"), tokenizer.encode(" cat sat!")]
    total = sum(nll_by_hand(scorer, piece, ids) for piece, ids in zip(pieces, shares, strict=True))
    assert score.hyp_text == "the big. hat sat"
    assert (score.wer, score.edits, score.ref_length) == (0.25, 1, 4)
    assert score.nll == pytest.approx(total / (len(shares[0]) + len(shares[1]) + 2), rel=1e-5)


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
    with pytest.raises(ValueError, match="one text for each"):
        scorer.score([wav], ["Hello.", "Hello."])
    with pytest.raises(ValueError, match="one text for each"):
        scorer.score([wav] * 6, "Hello.")
    with pytest.raises(ValueError, match="one language for each"):
        scorer.score([wav], ["Hello."], ["en", "de"])
    with pytest.raises(ValueError, match="unknown language"):
        scorer.score([wav], ["Hello."], "klingon")
    with pytest.raises(ValueError, match=r"'\.\.\.' is empty after"):
        scorer.score([wav], ["..."])


def test_a_text_that_spells_a_special_token_is_text(scorer, wavs):
    assert math.isfinite(scorer.score(wavs[:1], ["Say <|endoftext|> now"])[0].nll)


def test_wrong_models_raise(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"large-v9: no such Whisper.*large-v3"):
        WhisperScorer("large-v9", device="cpu")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be loaded as an openai-whisper model"):
            WhisperScorer(tmp_path / name, device="cpu")
    with pytest.raises(ValueError, match="float16 or float32"):
        WhisperScorer(checkpoint, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="batch_size"):
        WhisperScorer(checkpoint, device="cpu", batch_size=0)


# --- Whisper: mel and decoding against the library's ---

HELDOUT = Path("tiny/heldout")


def test_mels_equal_whispers_clip_by_clip():
    # The quiet one lies 60 dB under the loud one: with a floor of the batch's it would lose most of itself.
    clips = np.stack([babble(1.28, 0, level=0.3), babble(1.28, 1, level=3e-4), np.zeros(20_480, np.float32)])
    clips[1, 9_000:] = 0
    for n_mels in (80, 128):
        mels = log_mel_spectrograms(torch.from_numpy(clips), n_mels)
        assert mels.shape == (3, n_mels, 128)
        for mel, clip in zip(mels, clips, strict=True):
            torch.testing.assert_close(mel, whisper.log_mel_spectrogram(clip, n_mels), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def tiny():
    """The shipped Whisper, features of 12 held-out clips and 4 of noise, and the tokens of the clips' texts."""
    scorer = WhisperScorer("tiny/whisper.pt", device="cpu")
    rows = [json.loads(line) for line in (HELDOUT / "metadata.jsonl").read_text().splitlines()[:12]]
    clips = [load_audio(HELDOUT / row["file_name"])[: scorer.window] for row in rows]
    noises = [babble(1.0, seed) for seed in range(4)]
    texts = [row["text"] for row in rows]
    return scorer, scorer._encode(clips + noises), [scorer._text_ids(text, "en") for text in texts + texts[:4]]


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A random Whisper that ends some of its transcripts: the end-of-text often has an extreme logit."""
    path = save_random_whisper(tmp_path_factory.mktemp("whisper") / "ending.pt")
    scorer = WhisperScorer(path, device="cpu")
    scorer.model.decoder.token_embedding.weight[50_257] *= 4
    features = scorer._encode([babble(0.3 + 0.08 * seed, seed) for seed in range(12)])
    return scorer, features, [scorer._text_ids(text, "en") for text in 3 * TEXTS[:4]]


def whispers_own(scorer, features, max_tokens):
    """`whisper.decode` of each window alone."""
    options = [
        whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False, sample_len=limit)
        for limit in max_tokens
    ]
    return [whisper.decode(scorer.model, row[None], o)[0].tokens for row, o in zip(features, options, strict=True)]


@pytest.mark.parametrize("model", ["tiny", "ending"])
def test_transcripts_equal_whispers_token_for_token(request, model):
    scorer, features, texts = request.getfixturevalue(model)
    # Bounds that cut, that do not, and that only the context of 128 or 64 tokens stops
    max_tokens = [(1, 3, 8, 20, 200)[n % 5] for n in range(len(texts))]
    expected = whispers_own(scorer, features, max_tokens)
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
    assert [reading.tokens for reading in readings] == whispers_own(scorer, features, [9] * 3)
    assert [len(reading.tokens) for reading in readings] == [1, 1, 1]


def test_real_clips_are_heard_right(tiny):
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
        assert reading.tokens == [] and reading.nll_tokens == alone.nll_tokens == len(text) + 1
        assert reading.nll == pytest.approx(alone.nll, rel=1e-5, abs=1e-5)


def test_nll_keeps_the_tail_of_the_vocabulary(tiny, monkeypatch):
    """One token at logit 0 and 51,864 at -16.8: 51,864 * e^-16.8 = 0.002622, so its NLL is ln 1.002622 = 0.002619.

    In a running float32 sum each of them is less than 1's last place: cross_entropy says 0.0023, or 0.00002 where
    the vocabulary is not the last axis.
    """
    scorer, features, _ = tiny

    def logits(reader, hidden):
        rows = torch.full((len(hidden), 51_865), -16.8)
        rows[:, 440] = 0.0
        return rows

    monkeypatch.setattr(WindowReader, "_logits", logits)
    [reading] = WindowReader(scorer.model, "en").read(features[:1], [[440]], [0])
    assert reading.nll == pytest.approx(0.002619 + 16.8 + 0.002619, abs=4e-6)


def test_finished_windows_leave_the_batch(tiny, monkeypatch):
    scorer, features, texts = tiny
    reader = WindowReader(scorer.model, "en")
    passes = []
    forward = whisper_decoding._Decoder.forward

    def spy(decoder, tokens, starts):
        sound, text = ({len(part) for layer in cache for part in layer} for cache in (decoder.sound, decoder.text))
        assert sound == text == {len(tokens)}  # keys and values left too
        passes.append((len(tokens), len(tokens[0])))
        return forward(decoder, tokens, starts)

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


def test_batches_fit_the_budget(checkpoint, monkeypatch):
    def batch_size(**options):
        return WhisperScorer(checkpoint, device="cpu", **options).batch_size

    assert batch_size() == reward_whisper.MAX_BATCH_SIZE
    # keys and values of 1 layer * 64 positions * 32 numbers * 4 bytes: 16,384 bytes a window
    monkeypatch.setattr(reward_whisper, "BATCH_BYTES", 3 * 16_384)
    assert batch_size() == 3
    assert batch_size(dtype=torch.float16) == 6
    assert batch_size(batch_size=7) == 7
    monkeypatch.setattr(reward_whisper, "BATCH_BYTES", 1)
    assert batch_size() == 1


# --- the script ---


def test_script_prints_the_components(scorer, checkpoint, tmp_path, capsys):
    save_audio(tmp_path / "a.wav", babble(1, 9))
    argv = [
        "--audio",
        str(tmp_path / "a.wav"),
        "--text",
        "Hello there.",
        "--whisper",
        str(checkpoint),
        "--device",
        "cpu",
    ]
    reward_whisper.main(reward_whisper.parse_args([*argv, "--alpha_nll", "6"]))
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    score = scorer.score([load_audio(tmp_path / "a.wav")], ["Hello there."])[0]
    r_wer, r_nll = wer_reward(score.wer), nll_reward(score.nll, 6)
    assert list(printed) == ["audio", "transcript", "WER", "NLL", "R_wer", "R_nll", "R"]
    assert printed["NLL"] == f"{score.nll:.4f} nats per token"
    assert printed["R_nll"] == f"{r_nll:.4f}"
    assert printed["R"] == f"{harmonic_mean(r_wer, r_nll):.4f}"


@pytest.mark.parametrize(
    "change",
    [
        {"--audio": "missing.wav"},
        {"--text": "..."},
        {"--language": "klingon"},
        {"--whisper": "missing.pt"},
        {"--lambda_wer": "-1"},
        {"--alpha_nll": "0"},
    ],
)
def test_script_tells_bad_input_in_one_line(checkpoint, tmp_path, capsys, change):
    save_audio(tmp_path / "a.wav", babble(1, 9))
    options = {"--audio": str(tmp_path / "a.wav"), "--text": "Hello", "--whisper": str(checkpoint)} | change
    with pytest.raises(SystemExit) as stop:
        reward_whisper.main(reward_whisper.parse_args(list(itertools.chain(*options.items()))))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("reward_whisper.py: error: ") and error.count("\n") == 1
