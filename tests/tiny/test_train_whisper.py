"""tiny/train_whisper.py: clips made of words, spectrograms, and that it learns."""

import numpy as np
import torch
import whisper

from tiny import train_whisper as tw
from tiny.corpus import vocabulary
from tiny.train_whisper import CompactVocabulary

ROW = {"speaker": "joe", "words": [["maria", 0.04, 0.4], ["found", 0.4, 0.7], ["keys", 0.8, 1.2]]}
CLIP = tw.word_clip(ROW, list(range(62)))


def test_a_clip_is_cut_between_its_words():
    # cuts at 0.40 and 0.75 s: 20 and 37.5 codes, rounded to even
    assert [word.text for word in CLIP.words] == ["maria", "found", "keys"]
    assert [(word.codes[0], word.codes[-1]) for word in CLIP.words] == [(0, 19), (20, 37), (38, 61)]
    assert tw.word_clip({**ROW, "words": [["susan", 0, 1]]}, [1, 2]).words == [("Susan", [1, 2])]


def test_spliced_clips_have_the_codes_of_the_words_of_one_voice():
    other = tw.WordClip("slt", [tw.Word("bench", [900] * 8), tw.Word("of", [901] * 3)])  # too short to cut out
    made = tw.spliced([CLIP, other], 60, np.random.default_rng(0))
    of = {word.text: word.codes for word in [*CLIP.words, *other.words]}
    voices = set()
    for text, codes in made:
        words = text.rstrip(".").lower().split()
        assert text[0].isupper() and text[-1] == "." and 2 <= len(words) <= 6
        assert codes == [code for word in words for code in of[word]]
        voices.add("bench" in words)
        assert "of" not in words and len({word == "bench" for word in words}) == 1
    assert voices == {True, False}


def test_garbled_words_are_not_in_the_text():
    made = tw.garbled([CLIP], 80, np.random.default_rng(0))
    assert len({text for text, _ in made}) > 5
    for text, codes in made:
        words = text.rstrip(".").lower().split()
        intact = [word for word in CLIP.words if word.codes == codes[word.codes[0] : word.codes[-1] + 1]]
        assert len(intact) < 3 or len(words) == 3
        assert all(word.text in words for word in intact)


def test_random_words_are_half_of_the_grammar_and_half_others():
    assert not set(tw.OTHER_WORDS) & {word.lower() for word in vocabulary()}
    rows = tw.random_rows(0)
    words = [word for row in rows for word in row["text"].rstrip(".").lower().split()]
    assert 0.47 < np.mean([word in tw.OTHER_WORDS for word in words]) < 0.53
    assert {row["speaker"] for row in rows} == {"joe", "slt", "rms"} and len(rows) == tw.RANDOM_CLIPS


def test_spectrograms_equal_whisper_s():
    rng = np.random.default_rng(0)
    wavs = [rng.normal(0, 0.01 * (i + 1), 12_000 + 5_000 * i).astype(np.float32) for i in range(3)]
    made = tw.spectrograms(wavs, torch.device("cpu"))
    assert made.shape == (3, 80, tw.WINDOW_FRAMES)
    for wav, spectrogram in zip(wavs, made, strict=True):
        expected = whisper.log_mel_spectrogram(whisper.pad_or_trim(wav, tw.WINDOW_SAMPLES))
        assert torch.allclose(spectrogram.float(), expected, atol=2e-3)


def test_augmented_spectrograms_are_rolled_and_masked():
    torch.manual_seed(0)
    mels = torch.zeros(4, 80, tw.WINDOW_FRAMES)
    mels[:, :, 100] = 5.0
    mels[:, 0, 0] = -1.0  # the floor
    made = tw.augmented(mels)
    columns = made.mean(1).argmax(1)
    assert all(100 <= column < 100 + tw.MAX_SHIFT_FRAMES for column in columns) and len(set(columns.tolist())) > 1
    assert ((made < -0.5).sum((1, 2)) > 80).all()


def test_training_lowers_the_loss_and_keeps_unused_tokens_tied(monkeypatch, caplog):
    monkeypatch.setattr("tiny.train_codec.LOG_STEPS", 5)
    texts = ["Keys.", "", "Boats."]
    mels = torch.randn(3, 80, tw.WINDOW_FRAMES).half()
    with caplog.at_level("INFO"):
        checkpoint = tw.train_whisper(mels, texts, steps=15, batch_size=4, learning_rate=2e-3, seed=0)
    losses = [float(line.split(": ")[1].split(",")[0]) for line in caplog.messages if "step" in line]
    assert losses[-1] < losses[0]
    embedding = checkpoint["model_state_dict"]["decoder.token_embedding.weight"]
    assert embedding.shape == (51_865, 96) and embedding.dtype == torch.float16
    used = CompactVocabulary(["Keys.", "Boats."]).used
    unused = [i for i in range(60_000 % 51_865, 51_865, 997) if i not in used]
    assert (embedding[unused] == embedding[unused[0]]).all() and (embedding[used[0]] != embedding[unused[0]]).any()
    model = whisper.Whisper(whisper.model.ModelDimensions(**checkpoint["dims"]))
    model.load_state_dict(checkpoint["model_state_dict"])


def test_training_goes_on_from_a_checkpoint_with_other_words():
    """With a learning rate of 0 all stays, but for the words that are not in use any more."""
    mels = torch.randn(2, 80, tw.WINDOW_FRAMES).half()
    before = tw.train_whisper(mels, ["Keys.", "Boats."], steps=3, batch_size=2, learning_rate=2e-3, seed=0)
    texts = ["Hammers.", "Boats."]
    after = tw.train_whisper(mels, texts, steps=1, batch_size=2, learning_rate=0.0, seed=0, start=before)
    before, after = before["model_state_dict"], after["model_state_dict"]
    before_rows, after_rows = (state.pop("decoder.token_embedding.weight") for state in (before, after))
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    in_use = CompactVocabulary(texts).used
    assert torch.equal(before_rows[in_use], after_rows[in_use])
