"""Evaluation ASRs: which of them are held-out, and what pocketsphinx makes of known clips."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from metrics.judges import HELD_OUT, REWARD_ASR, PocketsphinxScorer, asr_label, asr_roles, dictionary_words
from speech.audio import load_audio


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
