"""Word times: the path through a made attention, tokens grouped into words, and clips whose word times are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import whisper
from fake_whisper import save_random_whisper
from whisper import ModelDimensions
from whisper.timing import find_alignment

from speech.audio import load_audio
from speech.text_marks import plain_text
from speech.tokens import SAMPLE_RATE
from speech.whisper_checkpoint import attention_lag_s, load_whisper, openai_size
from speech.whisper_scorer import WhisperScorer, log_mel_spectrograms
from speech.word_times import Word, token_frames, words_of_tokens

CLIPS = Path("tiny/heldout")


@pytest.fixture(scope="module")
def scorer():
    return WhisperScorer("tiny/whisper.pt", device="cpu")


@pytest.fixture(scope="module")
def clips() -> list[tuple[np.ndarray, str]]:
    rows = [json.loads(line) for line in (CLIPS / "metadata.jsonl").read_text().splitlines()[:6]]
    return [(load_audio(CLIPS / row["file_name"]), plain_text(row["text"])) for row in rows]


def test_path_through_a_made_attention():
    starts = [0, 20, 35, 60]  # of three tokens and the end, in 80 positions
    logits = torch.zeros(2, 2 + 4, 80)  # two tokens of the prompt before
    for token, (start, end) in enumerate(zip(starts, [*starts[1:], 80], strict=True)):
        logits[:, 2 + token, start:end] = 5.0
    assert token_frames(logits, 2) == pytest.approx(starts, abs=1)


def test_path_of_a_very_short_clip():
    frames = token_frames(torch.zeros(1, 6, 1), 2)
    assert frames == [0, 0, 0, 0]


def test_the_path_leaves_pytorch_its_number_of_threads():
    """In a process of its own, since Numba starts its threads once."""
    code = (
        "import numpy as np, torch; from speech.word_times import cheapest_path; cheapest_path(np.eye(3)); "
        "print(torch.get_num_threads())"
    )
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | threads, capture_output=True, check=True)
    assert run.stdout == b"1\n"


def test_tokens_become_words():
    words = words_of_tokens("It rains", [b" It", b" r", b"ains"], [0.1, 0.3, 0.4, 0.7], [0.5, 2.0, 1.0, 9.0])
    assert words == [Word("It", 0.1, 0.3, 0.5), Word("rains", 0.3, 0.7, 1.5)]
    # Two spaces, a letter of two bytes that tokens divide, a dash by itself
    tokens = [b" A", b" ", b" \xc3", b"\xa9t", b" \xe2\x80", b"\x94", b" b", b"."]
    words = words_of_tokens("A  ét — b.", tokens, [0, 1, 2, 3, 4, 5, 6, 7, 8], [1.0] * 9)
    assert words == [Word("A", 0, 2, 1), Word("ét", 2, 4, 1), Word("—", 4, 6, 1), Word("b.", 6, 8, 1)]
    assert words_of_tokens("", [], [0.5], [1.0]) == []


def test_equal_to_the_librarys_within_a_position(scorer, clips):
    """The library's input has one token more, the end-of-text, which moves the mean that it normalises by."""
    for wav, text in clips:
        [score] = scorer.score([wav], [text], word_times=True)
        padded = F.pad(torch.from_numpy(wav)[None], (0, scorer.window - len(wav)))
        mel = log_mel_spectrograms(padded, 80)[0]
        ids = scorer._text_ids(text, "en")
        theirs = find_alignment(scorer.model, scorer._tokenizer("en"), ids, mel, len(wav) // 160)
        theirs = [word for word in theirs if word.word.strip(" .?")]
        assert [word.text.strip(".?") for word in score.words] == [word.word.strip() for word in theirs]
        ours = [word.start_s for word in score.words[1:]]
        assert ours == pytest.approx([word.start for word in theirs[1:]], abs=0.021)


def test_a_sentence_begins_after_the_silence_before_it(scorer, clips):
    """Two sentences with half a second between them: more than the window of 3.8 s, so two windows as well."""
    (first, first_text), (second, second_text) = clips[:2]
    silence = np.zeros(SAMPLE_RATE // 2, np.float32)
    [score] = scorer.score([np.concatenate([first, silence, second])], [f"{first_text} {second_text}"], word_times=True)
    assert len(first) + len(silence) + len(second) > scorer.window
    assert [word.text for word in score.words] == f"{first_text} {second_text}".split()
    starts = [word.start_s for word in score.words]
    assert starts == sorted(starts)
    count, end_s = len(first_text.split()), len(first) / SAMPLE_RATE
    assert end_s - 0.1 < starts[count] < end_s + 0.6
    assert starts[count - 1] < end_s - 0.1


def test_times_come_with_the_same_scores_in_any_batch(scorer, clips):
    wavs, texts = zip(*clips, strict=True)
    plain = scorer.score(list(wavs), list(texts))
    timed = scorer.score(list(wavs), list(texts), word_times=True)
    for i, (without, score) in enumerate(zip(plain, timed, strict=True)):
        assert without.words is None
        assert (score.hyp_text, score.wer) == (without.hyp_text, without.wer)
        assert score.nll == pytest.approx(without.nll, abs=1e-4)
        [alone] = scorer.score([wavs[i]], [texts[i]], word_times=True)
        assert [w.nll for w in alone.words] == pytest.approx([w.nll for w in score.words], rel=1e-3, abs=1e-4)
        assert [w.start_s for w in alone.words] == pytest.approx([w.start_s for w in score.words], abs=0.021)


def test_a_marked_text_scores_as_without_marks(scorer, clips):
    wav, text = clips[0]
    first, rest = text.split(" ", 1)
    assert scorer.score([wav], [f"*{first}* {rest}"], word_times=True) == scorer.score([wav], [text], word_times=True)


def test_failures_and_texts_that_do_not_fit_have_no_times(scorer, clips):
    wav, _ = clips[0]
    failed, long = scorer.score([np.zeros(800, np.float32), wav], ["One.", "one two " * 80], word_times=True)
    assert failed.failure == "silent" and failed.words is None and long.words is None


def test_float16_gives_the_same_times(clips):
    wavs, texts = zip(*clips, strict=True)
    half = WhisperScorer("tiny/whisper.pt", device="cpu", dtype=torch.float16).score(wavs, texts, word_times=True)
    full = WhisperScorer("tiny/whisper.pt", device="cpu").score(wavs, texts, word_times=True)
    for a, b in zip(half, full, strict=True):
        assert [w.start_s for w in a.words] == pytest.approx([w.start_s for w in b.words], abs=0.041)


def test_alignment_heads_of_openais_sizes(tmp_path):
    random = load_whisper(save_random_whisper(tmp_path / "random.pt"))
    assert random.alignment_heads.to_dense().all()  # one layer: all its heads
    tiny = load_whisper("tiny/whisper.pt")
    assert tiny.alignment_heads.to_dense().tolist() == [[False] * 3, [True] * 3]
    assert attention_lag_s(tiny.dims) == 0


@pytest.mark.parametrize(
    ("layers", "width", "n_vocab", "n_mels", "size"),
    [
        (4, 384, 51_864, 80, "tiny.en"),
        (4, 384, 51_865, 80, "tiny"),
        (24, 1024, 51_864, 80, "medium.en"),
        (32, 1280, 51_865, 80, "large-v2"),
        (32, 1280, 51_866, 128, "large-v3"),
        (4, 1280, 51_866, 128, "large-v3-turbo"),
        (2, 1280, 51_866, 128, None),
    ],
)
def test_openais_sizes(layers, width, n_vocab, n_mels, size):
    dims = ModelDimensions(n_mels, 1500, width, 6, layers, n_vocab, 448, width, 6, layers)
    assert openai_size(dims) == size
    assert attention_lag_s(dims) == (0.06 if size == "tiny.en" else 0)
    if size is not None:
        assert size in whisper._ALIGNMENT_HEADS
