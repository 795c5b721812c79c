"""The model card: what it says, what it uploads, and that its code samples what inference.py samples."""

import json
import re
from pathlib import Path

import pytest
from transformers import set_seed

import train
from speech.policy import Policy
from speech.tokens import asr_prompt, tts_prompt
from training.model_card import final_metrics, licence_of, model_card

SHORT = ["--max_steps", "1", "--per_device_train_batch_size", "8", "--num_generations", "4", "--save_strategy", "no"]
SHORT += ["--max_completion_length", "60"]


def trained(folder: Path, config: str, *flags: str) -> Path:
    train.main(train.parse_args(["--config", config, *SHORT, "--output_dir", str(folder), *flags]))
    return folder


@pytest.fixture(scope="module")
def tts(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("tts"), "configs/tiny.yaml", "--sample_steps", "1")


def code_of(card: str) -> str:
    [code] = re.findall(r"```python\n(import torch\n.*?)```", card, re.DOTALL)
    return code


def test_a_card_says_what_the_model_is(tts):
    card = (tts / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "license: apache-2.0" in card  # tiny/llasa's
    for part in ("tiny/llasa", "GRPO", "`whisper` × 1 (alpha_wer 3", "tiny/texts/train.jsonl", "tiny/codec", "1 steps"):
        assert part in card, part
    log = json.loads((tts / "trainer_state.json").read_text())["log_history"]
    assert f"| wer | {final_metrics(log)['wer']:.4g} |" in card
    assert "time machine" not in card  # TRL's own card


def test_the_code_of_the_card_samples_what_inference_samples(tts):
    """With nothing but transformers, the very codes."""
    scope = {}
    exec(code_of((tts / "README.md").read_text(encoding="utf-8")), scope)
    policy = Policy.from_pretrained(str(tts))
    set_seed(0)
    [sample] = policy.sample([tts_prompt("Did Susan find the yellow boat?")], temperature=0.8, max_length=512)
    assert scope["codes"] == sample.codes and len(sample.codes) > 10


def test_the_code_of_an_adapters_card_too(tmp_path):
    folder = trained(tmp_path, "configs/tiny.yaml", "--use_peft", "--lora_r", "4", "--learning_rate", "1e-2")
    scope = {}
    exec(code_of((folder / "README.md").read_text(encoding="utf-8")), scope)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card and "Framework versions" not in card  # PEFT's own card
    policy = Policy.from_pretrained(str(folder))
    set_seed(0)
    [sample] = policy.sample([tts_prompt("Did Susan find the yellow boat?")], temperature=0.8, max_length=512)
    assert scope["codes"] == sample.codes


def test_the_code_of_an_asr_card_transcribes(tmp_path):
    folder = trained(tmp_path, "configs/tiny_asr.yaml")
    card = (folder / "README.md").read_text(encoding="utf-8")
    import datasets

    codes = datasets.Dataset.from_parquet("tiny/asr/heldout.parquet")[0]["audio_codes"]
    scope = {}
    exec(code_of(card).replace("[...]", repr(codes)), scope)
    [transcript] = Policy.from_pretrained(str(folder), task="asr").transcribe([asr_prompt(codes)], max_length=512)
    assert scope["text"] == transcript.text


def test_licences(tmp_path):
    assert licence_of("HKUSTAudio/Llasa-1B-Multilingual") == "cc-by-nc-4.0"
    assert licence_of("somebody/else") is None and licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of(str(tmp_path)) == "mit"
    facts = {"method": "sft", "task": "both", "dataset": "rows", "rewards": None, "codec_id": "c", "log_history": []}
    card = model_card(name="a/b", base_model="somebody/else", max_length=2048, **facts)
    assert "license:" not in card and "that of its base model, somebody/else" in card
    assert "base_model: somebody/else" in card and "## At the end" not in card


def test_push_to_hub_sends_card_and_samples(tmp_path, monkeypatch):
    """What is uploaded, without a hub."""
    uploads = []

    class Hub:
        def create_repo(self, name, **_):
            return type("Url", (), {"repo_id": f"somebody/{name}"})

        def upload_folder(self, folder_path, ignore_patterns, **_):
            uploads.append({str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*")})

        def __getattr__(self, _):
            return lambda *args, **kwargs: None

    monkeypatch.setattr("transformers.trainer.hf_api", Hub, raising=False)
    trained(tmp_path, "configs/tiny.yaml", "--sample_steps", "1", "--push_to_hub", "true", "--hub_model_id", "toy")
    assert {"README.md", "model.safetensors", "run.json", "reward_curve.png"} <= uploads[-1]
    assert any(name.startswith("samples/") and name.endswith(".wav") for name in uploads[-1])
