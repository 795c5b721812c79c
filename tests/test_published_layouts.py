"""The scripts on checkpoints laid out as the published ones: 193,800 tokens, Llama's template, head and embeddings in
the file. The policy has Llasa-1B's width and two of its 16 layers (0.5 B weights, 0.9 B where the head is another
matrix), the codec is smaller; the full sizes are benchmarks/readiness.py's. The step of all weights takes 6.4 GiB
of memory, the rest at most 4; the checkpoints take 5 GB of disk, and are deleted after use."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import whisper
from fake_codec import build_native
from fake_whisper import babble
from safetensors.torch import load_file

import evaluation
import inference
import train
from benchmarks.published_layout import save_llasa
from benchmarks.reward import LARGE_V3
from speech.audio import load_audio
from speech.codec import SpeechCodec
from speech.policy import Policy
from speech.tokens import XCODEC2_CODES, prompt_ids, tts_prompt
from speech.whisper_scorer import MAX_NLL, Score, WhisperScorer

TEXTS = ["Anna found two boxes.", "Peter washed nine apples."]
NUM_LAYERS = 2
CODES = 6  # after so many a rollout ends on average
REWARD_MODELS = ["--whisper", "tiny/whisper.pt", "--codec_id"]


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> str:
    """A small XCodec2 with the published codebook."""
    folder = tmp_path_factory.mktemp("codec")
    build_native(seed=0, quantization_levels=[4] * 8).save_pretrained(folder)
    assert SpeechCodec.from_pretrained(str(folder)).codebook_size == XCODEC2_CODES
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tied")
    save_llasa(folder, TEXTS, codes=CODES, num_hidden_layers=NUM_LAYERS)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def untied(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("untied")
    save_llasa(folder, TEXTS, codes=CODES, tied=False, num_hidden_layers=NUM_LAYERS)
    yield folder
    shutil.rmtree(folder)


def train_a_step(policy: Path, codec: str, texts: Path, output_dir: Path, *flags: str) -> dict:
    """One update as on a GPU: bfloat16 autocast and the static cache; returns what it logged."""
    given = ["--model_name_or_path", str(policy), "--dataset", str(texts), *REWARD_MODELS, codec]
    batch = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--num_generations", "4"]
    run = ["--max_steps", "1", "--save_strategy", "no", "--sample_steps", "0"]
    number_format = ["--bf16", "true", "--use_cpu", "true", "--max_completion_length", str(2 * CODES)]
    argv = [*given, *batch, *run, *number_format, "--output_dir", str(output_dir), *flags]
    train.main(train.parse_args(argv))
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"][0]


@pytest.fixture(scope="module")
def trained(tied, codec, texts, tmp_path_factory) -> Iterator[tuple[Path, dict]]:
    """All weights in float32, without AdamW's moments and a reference model: they would take 6 GiB more."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--beta", "0", "--optim", "sgd", "--learning_rate", "1e-2"]
    yield folder, train_a_step(tied, codec, texts, folder, *flags)
    shutil.rmtree(folder)


def test_a_prompt_of_the_published_tokenizer(tied):
    policy = Policy.from_pretrained(str(tied), dtype=torch.bfloat16)
    tokenizer, tokens = policy.tokenizer, policy.tokens
    ids = prompt_ids(tokenizer, tts_prompt(TEXTS[0]))
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nConvert the text to speech:"
        f"<|TEXT_UNDERSTANDING_START|>{TEXTS[0]}<|TEXT_UNDERSTANDING_END|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|SPEECH_GENERATION_START|>"
    )
    assert ids.count(128_000) == 1 and tokenizer(TEXTS[0])["input_ids"][0] == 128_000
    assert (tokens.start_id, tokens.end_id, tokens.first_code_id, tokens.num_codes) == (
        128_260,
        128_261,
        128_264,
        65_536,
    )
    assert tokenizer.pad_token_id == policy.model.config.pad_token_id == 128_009
    assert policy.model.config.eos_token_id == tokens.end_id
    rope = policy.model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 32.0, 500_000.0)
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight


def test_a_step_of_all_weights(trained, tied):
    folder, entry = trained
    for name in ("reward", "loss", "grad_norm", "entropy", "wer", "nll"):
        assert math.isfinite(float(entry[name])), name
    assert entry["reward_std"] > 0 and entry["grad_norm"] > 0
    assert entry["frac_truncated"] < 1 and entry["frac_empty"] < 1
    before, after = (load_file(path / "model.safetensors") for path in (tied, folder))
    assert "lm_head.weight" not in after, "head and embeddings are one, and saved once"
    last = slice(-1_000, None)  # rows of each matrix; of the embeddings those of codes
    moved = [name for name in after if not torch.equal(before[name][last].float(), after[name][last])]
    assert sorted(moved) == sorted(after)
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == 193_800 and config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 128_261, "what loads it elsewhere stops at the end of the speech"


def test_inference_and_evaluation_of_what_was_trained(trained, texts, codec, tmp_path):
    """run.json names codec and Whisper, so nothing more is said."""
    folder, _ = trained
    output = tmp_path / "sample.wav"
    flags = ["--text", TEXTS[0], "--output", str(output), "--max_length", "150", "--device", "cpu", "--best_of", "4"]
    inference.main(inference.parse_args(["--model_name_or_path", str(folder), *flags]))
    wav = load_audio(output)
    assert len(wav) % 320 == 0 and 0 < len(wav) <= 150 * 320 and abs(wav).max() > 0
    page = tmp_path / "evaluation"
    flags = ["--texts", str(texts), "--seeds", "0", "--max_length", "130", "--device", "cpu", "--output_dir", str(page)]
    results = evaluation.main(evaluation.parse_args(["--models", f"GRPO={folder}", *flags]))
    [row] = results["rows"]
    assert len(row["clips"]) == len(TEXTS)
    assert (page / "report.html").stat().st_size > 1_000


def test_a_head_that_differs_from_the_embeddings(untied, codec, texts, tmp_path, caplog):
    """Its config calls the two tied; both are in the file, and both are used, trained and saved."""
    stored = load_file(untied / "model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    lora = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear", "--learning_rate", "1e-3"]
    entry = train_a_step(untied, codec, texts, tmp_path, *lora, "--beta", "0.1")
    assert "its config ties head and embeddings, its weights differ" in caplog.text
    assert entry["grad_norm"] > 0 and entry["reward_std"] > 0 and abs(entry["kl"]) < 1e-3
    policy = Policy.from_pretrained(str(tmp_path), dtype=torch.bfloat16)  # the adapter's base is the published folder
    model = policy.model.get_base_model() if hasattr(policy.model, "get_base_model") else policy.model
    assert torch.equal(model.get_output_embeddings().weight, stored["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, stored["model.embed_tokens.weight"])
    samples = policy.sample([tts_prompt(text) for text in TEXTS * 2], temperature=1.0, max_length=150)
    assert any(sample.codes for sample in samples)


def score_with_large_v3s_sizes(folder: Path, n_audio_ctx: int, *dtypes: torch.dtype) -> list[Score]:
    """A clip's score by a Whisper of 128 mels, 51,866 tokens and a width of 1,280; one layer of 32 on each side."""
    dims = LARGE_V3 | {"n_audio_layer": 1, "n_text_layer": 1, "n_audio_ctx": n_audio_ctx}
    torch.manual_seed(0)
    model = whisper.model.Whisper(whisper.ModelDimensions(**dims))
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.02)
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.05)
    torch.save({"dims": dims, "model_state_dict": model.half().state_dict()}, folder / "large-v3.pt")
    scorers = [WhisperScorer(folder / "large-v3.pt", device="cpu", dtype=dtype) for dtype in dtypes]
    assert all(scorer.model.decoder.token_embedding.weight.dtype == scorer.dtype for scorer in scorers)
    scores = [scorer.score([babble(1.0, seed=0)], ["Yes."])[0] for scorer in scorers]
    for score in scores:
        assert score.failure is None and score.wer > 0
        assert 5 < score.nll < MAX_NLL, "ln 51,866 is 10.9, and random weights are a little worse"
    return scores


def test_scores_of_a_whisper_of_large_v3s_sizes(tmp_path):
    score_with_large_v3s_sizes(tmp_path, 1_500, torch.float32)


def test_scores_in_the_half_precision_of_a_gpu(tmp_path):
    """Whose products a CPU computes too, slowly: of a window of one second, not of 30."""
    single, half = score_with_large_v3s_sizes(tmp_path, 50, torch.float32, torch.float16)
    assert half.nll == pytest.approx(single.nll, rel=1e-2)
