"""Speech of checkpoints: voice prompts, and the round trip of a multitask model."""

import json
from pathlib import Path

import numpy as np
import pytest
from fake_policy import ToneCodec

import evaluation
from common.cli import InputError
from metrics.synthesis import EvaluationTexts, digests_of, prompts_of, resynthesize
from metrics.texts import Item
from speech.audio import save_audio
from speech.tokens import tts_prompt

MULTITASK_MODEL = "tiny/llasa_asr"


def test_results_know_the_weights_of_a_faster_whisper(tmp_path):
    """Another model.bin in the same folder is another evaluation ASR."""
    judge = f"faster-whisper:{tmp_path}"
    argv = ["--models", "tiny/llasa", "--texts", "t.txt", "--judge", judge, "faster-whisper:base"]
    digests = []
    for content in (b"one", b"other"):
        (tmp_path / "model.bin").write_bytes(content)
        texts = EvaluationTexts([], [], [], "words")
        digests.append(digests_of(evaluation.parse_args(argv), {"tiny/llasa": "tiny/llasa"}, texts))
    first, second = (digest[f"content of {judge}"] for digest in digests)
    assert first and second and first != second
    assert digests[0]["content of faster-whisper:base"] is None


class CountingCodec(ToneCodec):
    def __init__(self):
        self.num_encoded = 0

    def encode(self, wavs):
        self.num_encoded += len(wavs)
        return [[len(wav) // 320] for wav in wavs]


def test_each_voice_prompt_is_encoded_once(tmp_path):
    for name, num_codes in (("a.wav", 5), ("b.wav", 7)):
        save_audio(tmp_path / name, 0.1 * np.sin(np.arange(320 * num_codes) * 0.1))
    items = [
        Item("1", "One.", "en", str(tmp_path / "a.wav"), "Ref."),
        Item("2", "Two.", "en"),
        Item("3", "Three.", "en", str(tmp_path / "b.wav"), "Other."),
        Item("4", "Four.", "en", str(tmp_path / "a.wav"), "Ref."),
    ]
    codec = CountingCodec()
    assert prompts_of(items, codec, max_length=8) == [
        tts_prompt("One.", "Ref.", [5]),
        tts_prompt("Two."),
        tts_prompt("Three.", "Other.", [7]),
        tts_prompt("Four.", "Ref.", [5]),
    ]
    assert codec.num_encoded == 2
    with pytest.raises(InputError, match="b.wav.*raise --max_length 6"):
        prompts_of(items, codec, max_length=6)


def test_resynthesis_has_the_codes_of_the_recordings():
    speech = resynthesize(CountingCodec(), [np.zeros(640, np.float32), np.zeros(960, np.float32)])
    assert [sample.codes for sample in speech.samples] == [[2], [3]]
    assert not any(sample.truncated for sample in speech.samples) and [len(wav) for wav in speech.wavs] == [320, 320]


def test_round_trip_wer_of_a_multitask_model(tmp_path):
    (tmp_path / "t.txt").write_text("Nancy took the lamp.\nMartin carried seven chairs.\n")
    argv = ["--models", f"both={MULTITASK_MODEL}", "--texts", str(tmp_path / "t.txt"), "--seeds", "0", "--cycle"]
    recording = Path("tiny/heldout/heldout_103.ogg").absolute()
    (tmp_path / "natural.jsonl").write_text(
        json.dumps({"text": "My teacher carried eleven hammers.", "audio": str(recording)})
    )
    argv += ["--max_length", "240", "--output_dir", str(tmp_path / "out")]
    argv += ["--references", str(tmp_path / "natural.jsonl")]
    results = evaluation.main(evaluation.parse_args(argv))
    synthesized, natural, _ = results["rows"]
    assert 0 <= synthesized["metrics"]["asr"]["round trip"]["error_rate"] <= 2
    assert "round trip" not in natural["metrics"]["asr"]
    assert "round trip (own ASR)" in (tmp_path / "out" / "report.html").read_text()
    assert "WER, round trip (own ASR)" in (tmp_path / "out" / "results.md").read_text()
