"""Evaluation ASRs: which of them are held-out, and what pocketsphinx and faster-whisper make of known clips."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_whisper import save_ctranslate2, save_random_whisper

from common.cli import InputError
from metrics.judges import (
    HELD_OUT,
    REWARD_ASR,
    FasterWhisperScorer,
    PocketsphinxScorer,
    asr_label,
    asr_roles,
    dictionary_words,
    load_evaluation_asrs,
    load_faster_whisper,
    word_timer,
)
from speech.audio import load_audio
from speech.ctranslate2_checkpoint import read_ctranslate2_folder
from speech.whisper_checkpoint import load_whisper
from speech.whisper_scorer import WhisperScorer


def save_run(folder, **facts) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(facts))
    return str(folder)


def test_an_asr_that_a_run_records_is_the_reward_s_and_comes_last(tmp_path):
    models = [save_run(tmp_path / "a", whisper="small"), save_run(tmp_path / "b", whisper="openai/whisper-base")]
    roles = asr_roles(["base", "large-v3", "small", "pocketsphinx", "tiny"], "tiny", [*models, "no/run"])
    assert list(roles.items()) == [
        ("large-v3", HELD_OUT), ("pocketsphinx", HELD_OUT),
        ("base", REWARD_ASR), ("small", REWARD_ASR), ("tiny", REWARD_ASR),
    ]  # fmt: skip
    assert asr_label("large-v3", roles["large-v3"]) == "large-v3 (held-out)"
    assert asr_label("base", roles["base"]) == "base (reward's ASR)"


def test_words_are_timed_by_a_whisper_of_openai_whisper():
    whisper, other = WhisperScorer.__new__(WhisperScorer), FasterWhisperScorer.__new__(FasterWhisperScorer)
    assert word_timer({"other": other, "base": whisper, "small": whisper}) == "base"
    assert word_timer({"other": other}) is None


def test_a_file_is_the_same_asr_by_any_path(tmp_path, monkeypatch):
    (tmp_path / "whisper.pt").touch()
    (tmp_path / "link.pt").symlink_to(tmp_path / "whisper.pt")
    monkeypatch.chdir(tmp_path)
    model = save_run(tmp_path / "run", whisper=str(tmp_path / "whisper.pt"))
    for name in ("whisper.pt", "./whisper.pt", "link.pt"):
        assert asr_roles([name], "large-v3", [f"{model}/checkpoint-5"]) == {name: REWARD_ASR}
    (tmp_path / "folder").mkdir()  # in transformers' format
    assert asr_roles(["./folder"], str(tmp_path / "folder"), []) == {"./folder": REWARD_ASR}


def test_dictionary_words():
    assert dictionary_words("“Don’t stop,” she said: 'now'!") == ["don't", "stop", "she", "said", "now"]


def test_pocketsphinx_names_what_it_cannot_transcribe():
    with pytest.raises(ValueError, match="lacks '7', 'xqzzt'"):
        PocketsphinxScorer(["Anna bought 7 xqzzt."], ["en"])
    with pytest.raises(ValueError, match="English only .got texts in 'de'"):
        PocketsphinxScorer(["Hallo."], ["de"])


def test_pocketsphinx_counts_silence_as_all_words_deleted():
    asr = PocketsphinxScorer(["Anna bought apples."], ["en"])
    for wav, failure in ((np.zeros(0, np.float32), "empty"), (np.zeros(16_000, np.float32), "silent")):
        score = asr.score([wav], ["Anna bought apples."], ["en"])[0]
        assert (score.hyp_text, score.edits, score.ref_length, score.failure) == ("", 3, 3, failure)
        assert np.isnan(score.nll)


def test_pocketsphinx_transcribes_flite_in_any_order(tmp_path):
    if not shutil.which("flite"):
        pytest.skip("flite is not installed: it synthesizes the known clips")
    texts = ["Mary sold eight old boats near the river.", "Anna sees four small cats."]
    for i, text in enumerate(texts):
        subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", tmp_path / f"{i}.wav"], check=True)
    wavs = [load_audio(tmp_path / f"{i}.wav") for i in range(2)]
    asr = PocketsphinxScorer(texts, ["en"] * 2)
    transcripts = [asr.transcribe(wav) for wav in wavs]
    assert transcripts == ["mary sold eight old boats near the river", "anna sees four small cats"]
    assert [asr.transcribe(wav) for wav in wavs[::-1]] == transcripts[::-1]


# --- faster-whisper ---------------------------------------------------------------------------------------


class FakeWhisperModel:
    """In place of faster_whisper.WhisperModel: "transcribes" the loudness of each window, in two segments."""

    supported_languages = ["en", "ja"]
    hf_tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: SimpleNamespace(ids=text.split()))

    def __init__(self, path, **options):
        if path.startswith("Systran/"):
            raise OSError("offline\nsecond line")
        self.path, self.options, self.calls = path, options, []

    def transcribe(self, wav, **options):
        self.calls.append((wav, options))
        peak = round(10 * float(wav.max()))
        return iter([SimpleNamespace(text=f" {peak} red"), SimpleNamespace(text=" hats.")]), None


@pytest.fixture
def fake_faster_whisper(monkeypatch, tmp_path):
    """Stands in for the package; the path of a folder that looks like a model's."""
    package = SimpleNamespace(WhisperModel=FakeWhisperModel, available_models=lambda: ["tiny.en", "base"])
    monkeypatch.setitem(sys.modules, "faster_whisper", package)
    for file in ("model.bin", "config.json", "tokenizer.json"):
        (tmp_path / file).touch()
    return str(tmp_path)


def test_faster_whisper_transcribes_30_s_windows_deterministically(fake_faster_whisper):
    for name, path in (("base", "base"), (fake_faster_whisper, fake_faster_whisper)):
        asr = load_evaluation_asrs([f"faster-whisper:{name}"], [], ["English"], "cpu")[f"faster-whisper:{name}"]
        assert asr.model.path == path
    places = {key: asr.model.options[key] for key in ("device", "device_index", "compute_type")}
    assert places == {"device": "cpu", "device_index": 0, "compute_type": "float32"}
    loud, silent = 0.5 * np.sin(np.arange(16_000, dtype=np.float32)), np.zeros(16_000, np.float32)
    long = np.concatenate([loud, np.zeros(480_000, np.float32), loud])  # 32 s with a pause
    scores = asr.score(
        [loud, silent, long, 3 * loud], ["5 red hats", "red hats", "big red hats", "10 red hats"], ["en"] * 4
    )
    assert [score.hyp_text for score in scores] == ["5 red hats.", "", "5 red hats. 5 red hats.", "10 red hats."]
    assert [(score.edits, score.ref_length, score.failure) for score in scores] == [
        (0, 3, None), (2, 2, "silent"), (4, 3, None), (0, 3, None),
    ]  # fmt: skip
    assert all(np.isnan(score.nll) for score in scores)
    assert len(asr.model.calls) == 4 and all(wav.shape == (480_000,) for wav, _ in asr.model.calls)
    wav, options = next(call for call in asr.model.calls if call[0].max() < 0.6 and not call[0][16_000:].any())
    assert wav[:16_000].any()  # and after the clip silence, where faster-whisper would pad the spectrogram
    assert options == {
        "language": "en", "beam_size": 5, "temperature": 0.0, "condition_on_previous_text": False,
        "without_timestamps": True, "max_new_tokens": 2 * 3 + 8,
    }  # fmt: skip
    asr.transcribe(loud, "en")
    assert asr.model.calls[-1][1]["max_new_tokens"] == 224
    assert asr.transcribe(long, "ja") == "5 redhats.5 redhats."


def test_faster_whisper_on_a_gpu(fake_faster_whisper):
    options = load_faster_whisper("faster-whisper:base", "cuda:1").options
    assert (options["device"], options["device_index"], options["compute_type"]) == ("cuda", 1, "float16")
    assert options["num_workers"] == 1


@pytest.mark.parametrize(
    ("threads", "workers", "threads_of_each"), [(1, 1, 1), (2, 2, 1), (6, 3, 2), (7, 1, 7), (16, 4, 4)]
)
def test_the_threads_of_a_cpu_are_divided_among_clips(
    fake_faster_whisper, monkeypatch, threads, workers, threads_of_each
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    asr = FasterWhisperScorer("faster-whisper:base", ["en"], "cpu")
    assert (asr.model.options["num_workers"], asr.model.options["cpu_threads"]) == (workers, threads_of_each)
    assert asr.workers == workers


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "large-v9",
            r"no such model\. Accepted: faster-whisper: and a name such.* Names: tiny\.en, base",
        ),
        ("", "no such model"),
        ("Systran/x", r"cannot be loaded \(offline\)\. Accepted: faster-whisper: and a name"),
        ("tiny/llasa", r"no CTranslate2 folder, model\.bin missing\. Accepted"),
        ("tiny/whisper.pt", r"no CTranslate2 folder, model\.bin, config\.json, tokenizer\.json missing"),
    ],
)
def test_faster_whisper_names_what_it_cannot_load(name, message, fake_faster_whisper):
    with pytest.raises(InputError, match=f"^--judge faster-whisper:{name}: {message}") as error:
        load_evaluation_asrs([f"faster-whisper:{name}"], [], ["en"], "cpu")
    assert "\n" not in str(error.value)


def test_faster_whisper_names_an_unknown_language(fake_faster_whisper):
    with pytest.raises(InputError, match="does not know the language 'de'. Known: en, ja"):
        load_evaluation_asrs(["faster-whisper:base"], [], ["en", "German"], "cpu")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)  # as if it were not installed
    with pytest.raises(
        InputError, match=r"not installed .faster_whisper.\. Install it: pip install -r requirements-asr"
    ):
        load_evaluation_asrs(["faster-whisper:base"], [], ["en"], "cpu")


def test_the_reward_s_whisper_is_no_held_out_asr_in_another_format(tmp_path):
    model = load_whisper(save_random_whisper(tmp_path / "w.pt"))
    folder = save_ctranslate2(tmp_path / "folder", model)
    dims, state = read_ctranslate2_folder(folder)
    torch.save({"dims": dims, "model_state_dict": state}, tmp_path / "half.pt")
    names = [f"faster-whisper:{folder}", str(folder), str(tmp_path / "half.pt"), "faster-whisper:base"]
    expected = {names[3]: HELD_OUT} | dict.fromkeys(names[:3], REWARD_ASR)
    assert asr_roles(names, str(tmp_path / "w.pt"), []) == expected
    names = ["faster-whisper:large-v3", "faster-whisper:Systran/faster-whisper-large-v3", "faster-whisper:base"]
    assert list(asr_roles(names, "openai/whisper-large-v3", []).values()) == [HELD_OUT, REWARD_ASR, REWARD_ASR]


def test_faster_whisper_transcribes_as_openai_s_code(whisper_tiny_en):
    pytest.importorskip("faster_whisper", reason="faster-whisper is not installed: requirements-asr.txt")
    readings = [json.loads(line) for line in Path("tiny/heldout/metadata.jsonl").read_text().splitlines()[:3]]
    wavs = [load_audio(f"tiny/heldout/{reading['file_name']}") for reading in readings]
    asr = FasterWhisperScorer(f"faster-whisper:{whisper_tiny_en}", ["en"], "cpu")
    asr.BEAM_SIZE = 1  # the two beam searches break ties differently
    assert [asr.transcribe(wav, "en") for wav in wavs] == WhisperScorer(whisper_tiny_en, "cpu").transcribe(wavs)


def test_a_language_that_the_whisper_does_not_know_is_refused_when_it_is_loaded():
    """Before anything is synthesized; the toy setup's Whisper knows 99 languages, Cantonese not among them."""
    with pytest.raises(InputError, match="does not know the language 'yue'"):
        load_evaluation_asrs(["tiny/whisper.pt"], ["Go."], ["en", "yue"], "cpu")
