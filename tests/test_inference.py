"""inference.py: left padding, the context's limit, what is written where, and every bad input's exit code."""

import io
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import inference
import reward_whisper
from speech import codec as speech_codec
from speech.audio import load_audio, save_audio
from speech.tokens import SPECIAL_TOKENS, code_token, prompt_ids, tts_prompt

NUM_CODES = 64
CONTEXT = 256  # tokens
CHAT_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llasa_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, Llama 3's special tokens, and Llasa's as plain added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    llama = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "finetune_right_pad_id")
    backend.add_special_tokens([f"<|{name}|>" for name in llama])
    plain = [*SPECIAL_TOKENS, *map(code_token, range(NUM_CODES))]
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=CHAT_TEMPLATE
    )


def save_policy(folder, seed: int = 0) -> str:
    """A small random Llasa, saved as train.py saves one, run.json included."""
    tokenizer = llasa_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # logits with a spread, so that a wrong position or mask shows
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"codec_id": "the-codec", "whisper": "the-whisper"}))
    return str(folder)


class ToneCodec:
    """Stands in for XCodec2: each code is 20 ms of one tone. Records how it was loaded and what it decoded."""

    loaded: ClassVar = []
    decoded: ClassVar = []
    codebook_size = NUM_CODES

    @classmethod
    def from_pretrained(cls, id_or_path, *args):
        cls.loaded.append(id_or_path)
        return cls()

    def encode(self, wavs):
        return [[1, 2, 3] for _ in wavs]

    def decode(self, codes):
        assert all(codes), "the codec must not be given an empty item"
        self.decoded.extend(codes)
        return [0.1 * np.sin(np.arange(len(c) * 320) * 0.1).astype(np.float32) for c in codes]


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def policy(policy_path):
    return inference.Policy.from_pretrained(policy_path, "cpu")


@pytest.fixture
def codec(monkeypatch):
    monkeypatch.setattr(speech_codec, "SpeechCodec", ToneCodec)
    monkeypatch.setattr(ToneCodec, "loaded", [])
    monkeypatch.setattr(ToneCodec, "decoded", [])
    return ToneCodec


def run(policy_path, *options, text="hello"):
    argv = ["--model_name_or_path", policy_path, "--max_length", "150", *map(str, options)]
    inference.main(inference.parse_args([*argv, "--text", text] if text is not None else argv))


# --- Sampling ---------------------------------------------------------------------------------------------


def test_batched_is_one_by_one(policy):
    prompts = [tts_prompt(text) for text in ("a", "several words more", "two words")]
    settings = {"temperature": 0, "max_length": CONTEXT}
    batched = policy.sample(prompts, batch_size=3, **settings)
    alone = [policy.sample([prompt], **settings)[0] for prompt in prompts]
    assert batched == alone
    assert len({tuple(sample.codes) for sample in batched}) == 3


def test_each_prompt_may_fill_the_context_whoever_shares_its_batch(policy):
    prompts = [tts_prompt("a"), tts_prompt("several words more")]
    for prompt, sample in zip(prompts, policy.sample(prompts, max_length=160), strict=True):
        assert sample.ended or len(prompt_ids(policy.tokenizer, prompt)) + len(sample.codes) == 160


def test_sampling_is_seeded_and_confined_to_codes(policy):
    def draw(seed):
        set_seed(seed)
        return policy.sample([tts_prompt("hello")] * 4, temperature=1.0, max_length=150)

    first = draw(1)
    assert first == draw(1) != draw(2)
    assert len({tuple(sample.codes) for sample in first}) == 4
    assert all(0 <= code < NUM_CODES for sample in first for code in sample.codes)


def test_sampled_frequencies_are_the_models(policy):
    """No top-k or checkpoint default slips in: the first code's frequencies are softmax(logits / temperature)."""
    prompt = tts_prompt("hello")
    ids = torch.tensor([prompt_ids(policy.tokenizer, prompt)])
    with torch.no_grad():
        expected = (policy.model(ids).logits[0, -1] / 1.5).softmax(-1)
    set_seed(0)
    n = 2_000
    first = policy._generate(ids.tolist() * n, [ids.shape[1] + 1] * n, 1.5, 1.0)
    counts = torch.bincount(torch.tensor([row[0] for row in first]), minlength=len(expected)) / n
    assert 0.5 * (counts - expected).abs().sum() < 0.1


def test_nothing_to_sample(policy):
    assert policy.sample([]) == []


def test_text_too_long_is_named_before_sampling(policy, monkeypatch):
    monkeypatch.setattr(policy.model, "generate", lambda **_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="wordy wordy.*too long.*256.*Shorten"):
        policy.sample([tts_prompt("short"), tts_prompt("wordy " * 40)])


def test_adapter_folder_loads(policy_path, policy, tmp_path):
    peft = pytest.importorskip("peft")
    base = LlamaForCausalLM.from_pretrained(policy_path)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    loaded = inference.Policy.from_pretrained(str(tmp_path), "cpu")
    prompt = [tts_prompt("hello")]
    ids = torch.tensor([prompt_ids(policy.tokenizer, prompt[0])])
    with torch.no_grad():
        difference = (loaded.model(ids).logits - adapted(ids).logits)[..., loaded.tokens.end_id].abs().max()
    assert difference < 1e-4
    assert loaded.sample(prompt, temperature=0, max_length=150) != policy.sample(prompt, temperature=0, max_length=150)


# --- Output -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "texts", "samples", "names"),
    [
        ("a/b.wav", 1, 1, ["a/b.wav"]),
        ("b.wav", 2, 1, ["b_000.wav", "b_001.wav"]),
        ("b.wav", 1, 2, ["b_000_0.wav", "b_000_1.wav"]),
        ("out", 1, 1, ["out/sample_000.wav"]),
        ("out", 2, 2, [f"out/sample_00{t}_{k}.wav" for t in (0, 1) for k in (0, 1)]),
    ],
)
def test_output_names(output, texts, samples, names):
    assert [str(path) for path in inference.output_paths(output, texts, samples)] == names


def test_writes_one_clip_with_the_codec_of_run_json(policy_path, codec, tmp_path):
    run(policy_path, "--output", tmp_path / "new" / "a.wav")
    wav = load_audio(tmp_path / "new" / "a.wav")
    assert len(wav) == 320 * len(codec.decoded[0]) > 0
    assert codec.loaded == ["the-codec"]


def test_texts_of_a_file_and_of_stdin(policy_path, codec, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    run(policy_path, "--text_file", tmp_path / "t.txt", "--output", tmp_path / "file", text=None)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo"))
    run(policy_path, "--text_file", "-", "--output", tmp_path / "stdin", text=None)
    for name in ("sample_000.wav", "sample_001.wav"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "stdin" / name).read_bytes()


def test_voice_prompt_reaches_the_policy_and_not_the_wav(policy_path, codec, tmp_path, monkeypatch):
    save_audio(tmp_path / "ref.wav", np.sin(np.arange(4_000) * 0.1))
    seen = []

    def sample(self, prompts, **_):
        seen.extend(prompts)
        return [inference.Sample([7, 8], True)]

    monkeypatch.setattr(inference.Policy, "sample", sample)
    options = ("--ref_audio", tmp_path / "ref.wav", "--ref_text", "say this")
    run(policy_path, *options, "--output", tmp_path / "a.wav")
    assert seen == [tts_prompt("hello", "say this", [1, 2, 3])]
    assert codec.decoded == [[7, 8]]


def test_best_of_keeps_the_clip_that_whisper_rewards_most(policy_path, codec, tmp_path, monkeypatch):
    lengths = [3, 9, 5, 4, 2, 6]

    class Scorer:
        def __init__(self, whisper, device):
            assert whisper == "the-whisper"

        def score(self, wavs, texts, languages):
            assert texts == ["hello"] * 6 and languages == ["en"] * 6
            return [SimpleNamespace(wer=1 / len(wav), nll=0.5, failure=None) for wav in wavs]  # the longest is the best

    monkeypatch.setattr(reward_whisper, "WhisperScorer", Scorer)
    monkeypatch.setattr(
        inference.Policy, "sample", lambda self, prompts, **_: [inference.Sample([1] * n, True) for n in lengths]
    )
    run(policy_path, "--num_samples", 2, "--best_of", 3, "--output", tmp_path / "a.wav")
    assert len(load_audio(tmp_path / "a_000_0.wav")) == 9 * 320
    assert len(load_audio(tmp_path / "a_000_1.wav")) == 6 * 320


def test_best_of_does_not_keep_what_training_would_not_reward():
    """An unended clip and a silent one earn 0, however well they score: 1 - tanh(3 * 0.1) and exp(-0.3 / 3) else."""
    samples = [inference.Sample([1], False), inference.Sample([1], True), inference.Sample([1], True)]
    failures = (None, None, "silent")
    scorer = SimpleNamespace(score=lambda *_: [SimpleNamespace(wer=0.1, nll=0.3, failure=f) for f in failures])
    rewards = inference.whisper_rewards(scorer, samples, [None] * 3, ["a"] * 3, ["en"] * 3)
    assert rewards == pytest.approx([0, 1 / (0.6 / 0.70869 + 0.4 / 0.90484), 0], abs=1e-4)
    assert inference.best_of(rewards, 3) == [1]


def test_unended_is_said_and_empty_is_not_written(policy_path, codec, tmp_path, monkeypatch, caplog):
    samples = [inference.Sample([1, 2], False), inference.Sample([], True)]
    monkeypatch.setattr(inference.Policy, "sample", lambda self, prompts, **_: samples)
    run(policy_path, "--num_samples", 2, "--output", tmp_path / "a.wav")
    assert "never ended" in caplog.text and "empty, not written" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["a_000_0.wav"]


def test_nothing_written_exits_1(policy_path, codec, tmp_path, monkeypatch):
    monkeypatch.setattr(inference.Policy, "sample", lambda self, prompts, **_: [inference.Sample([], True)])
    with pytest.raises(SystemExit) as exit:
        run(policy_path, "--output", tmp_path / "a.wav")
    assert exit.value.code == 1


@pytest.mark.skipif(not Path("tiny/llasa/run.json").is_file(), reason="tiny/llasa is not built: python -m tiny.build")
def test_tiny_speaks_with_nothing_more_said(tmp_path):
    argv = [
        "--model_name_or_path",
        "tiny/llasa",
        "--text",
        "Anna found two boxes.",
        "--output",
        str(tmp_path / "a.wav"),
    ]
    inference.main(inference.parse_args([*argv, "--best_of", "2"]))
    assert len(load_audio(tmp_path / "a.wav")) > 8_000


# --- Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "  "], "text is empty"),
        (["--text", "<|s_1|>"], "control token"),
        (["--text_file", "{tmp}/none.txt"], "none.txt: No such file"),
        (["--text_file", "{tmp}/blank.txt"], "blank.txt: no text"),
        (["--text_file", "{tmp}/latin1.txt"], "latin1.txt: not UTF-8"),
        (["--text", "a", "--ref_audio", "{tmp}/ref.wav"], "needs both.*only --ref_audio"),
        (["--text", "a", "--ref_text", "b"], "needs both.*only --ref_text"),
        (["--text", "a", "--ref_audio", "{tmp}/no.wav", "--ref_text", "b"], "no.wav: no such audio"),
        (["--text", "a", "--ref_audio", "{tmp}/blank.txt", "--ref_text", "b"], "blank.txt: cannot read as audio"),
        (["--text", "a", "--best_of", "0"], "--best_of 0"),
        (["--text", "a", "--num_samples", "0"], "--num_samples 0"),
        (["--text", "a", "--temperature", "-1"], "--temperature -1"),
        (["--text", "a", "--temperature", "nan"], "--temperature nan"),
        (["--text", "a", "--top_p", "0"], "--top_p 0"),
        (["--text", "a", "--output", "{tmp}/blank.txt/a.wav"], "cannot write into .*blank.txt"),
        (["--text", "a", "--model_name_or_path", "no-such-run"], "no such model: 'no-such-run'"),
        (["--text", "a", "--model_name_or_path", "{tmp}"], "no model in this folder"),
        (["--text", "a", "--device", "gpu"], "--device gpu"),
    ],
)
def test_bad_input_exits_2_before_any_model_is_loaded(options, message, tmp_path, monkeypatch, caplog):
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    save_audio(tmp_path / "ref.wav", np.sin(np.arange(4_000) * 0.1))
    for loader in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"policy.{loader}.from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    argv = ["--model_name_or_path", "owner/name", "--output", "{tmp}/a.wav", *options]
    with pytest.raises(SystemExit) as exit:
        inference.main(inference.parse_args([option.replace("{tmp}", str(tmp_path)) for option in argv]))
    assert exit.value.code == 2
    assert caplog.records[-1].levelno == logging.ERROR
    assert re.search(message, caplog.text)


def test_text_too_long_exits_2(policy_path, codec, tmp_path, caplog):
    with pytest.raises(SystemExit) as exit:
        run(policy_path, "--output", tmp_path / "a.wav", text="wordy " * 40)
    assert exit.value.code == 2 and "too long" in caplog.text


def test_another_models_codec_exits_2(policy_path, codec, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ToneCodec, "codebook_size", 7)
    with pytest.raises(SystemExit) as exit:
        run(policy_path, "--output", tmp_path / "a.wav")
    assert exit.value.code == 2 and "the codec has 7 codes and the policy speaks 64" in caplog.text


def test_model_without_speech_tokens_exits_2(policy_path, codec, tmp_path, caplog):
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    plain.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=1).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run(str(tmp_path), "--output", tmp_path / "a.wav")
    assert exit.value.code == 2 and "not a Llasa one" in caplog.text


def test_help_and_the_flag_that_takes_one_source_of_text(capsys):
    for argv, code in ((["--help"], 0), (["--model_name_or_path", "m"], 2)):
        with pytest.raises(SystemExit) as exit:
            inference.parse_args(argv)
        assert exit.value.code == code
    assert "sample_000.wav" in capsys.readouterr().out


def test_recorded_falls_back_and_finds_the_runs_folder(tmp_path):
    assert inference.recorded(str(tmp_path), "codec_id", "default") == "default"
    (tmp_path / "run.json").write_text(json.dumps({"codec_id": "mine"}))
    assert inference.recorded(str(tmp_path / "checkpoint-5"), "codec_id", "default") == "mine"
    assert inference.recorded(str(tmp_path), "whisper", "default") == "default"
