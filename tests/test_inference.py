"""inference.py: which files it writes, best-of-N, transcripts, and the exit code of each bad input."""

import doctest
import io
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
from fake_policy import ToneCodec, save_lora, save_policy
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast, set_seed

import inference
from reward_models.whisper import best_of_n
from reward_whisper import reward
from speech.audio import load_audio, save_audio
from speech.policy import Policy, Sample
from speech.tokens import asr_prompt, tts_prompt
from speech.whisper_scorer import Score

MULTITASK_MODEL = "tiny/llasa_asr"


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def codec(monkeypatch):
    monkeypatch.setattr(inference, "SpeechCodec", ToneCodec)
    monkeypatch.setattr(ToneCodec, "loaded", [])
    monkeypatch.setattr(ToneCodec, "decoded", [])
    return ToneCodec


def run(policy_path, *options, text="hello"):
    argv = ["--model_name_or_path", policy_path, "--max_length", "150", *map(str, options)]
    inference.main(inference.parse_args([*argv, "--text", text] if text is not None else argv))


# --- Text to speech: what is written ----------------------------------------------------------------------


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


def test_adapters_are_added_by_their_weights(policy_path, codec, tmp_path):
    slow, lively = (save_lora(policy_path, tmp_path / name, seed) for seed, name in enumerate(("slow", "lively")))

    def codes(*adapters):
        codec.decoded.clear()
        options = ("--adapters", *adapters) if adapters else ()
        run(policy_path, "--temperature", 0, "--output", tmp_path / "a.wav", *options)
        return codec.decoded[0]

    plain, both = codes(), codes(f"{slow}=0.5", lively)
    assert codes(f"{slow}=0", f"{lively}=0") == plain
    assert both == codes(lively, f"{slow}=0.5")
    assert len({tuple(each) for each in (plain, both, codes(slow), codes(f"{slow}=-1"), codes(slow, lively))}) == 5


def test_voice_prompt_reaches_the_policy_and_not_the_wav(policy_path, codec, tmp_path, monkeypatch):
    save_audio(tmp_path / "ref.wav", np.sin(np.arange(4_000) * 0.1))
    seen = []

    def sample(self, prompts, **_):
        seen.extend(prompts)
        yield {0: Sample([7, 8], False)}

    monkeypatch.setattr(Policy, "samples_by_batch", sample)
    options = ("--ref_audio", tmp_path / "ref.wav", "--ref_text", "say this")
    run(policy_path, *options, "--output", tmp_path / "a.wav")
    assert seen == [tts_prompt("hello", "say this", [1, 2, 3])]
    assert codec.decoded == [[7, 8]]


def test_best_of_keeps_the_clip_that_whisper_rewards_most(policy_path, codec, tmp_path, monkeypatch):
    lengths, checked = [3, 9, 5, 4, 2, 6], []

    class Scorer:
        def __init__(self, whisper, device):
            assert whisper == "the-whisper"

        def check_languages(self, languages):
            checked.extend(languages)

        def score(self, wavs, texts, languages):
            assert texts == ["hello"] * 6 and languages == ["en"] * 6
            return [Score("", 1 / len(wav), 0.5, 1, 1) for wav in wavs]  # the longest is the best

    monkeypatch.setattr(inference, "WhisperScorer", Scorer)
    rollouts = {i: Sample([1] * n, False) for i, n in enumerate(lengths)}
    batches = [{i: rollouts[i] for i in batch} for batch in ([4, 0, 1], [2, 5, 3])]  # in any order
    monkeypatch.setattr(Policy, "samples_by_batch", lambda self, prompts, **_: iter(batches))
    run(policy_path, "--num_samples", 2, "--best_of", 3, "--output", tmp_path / "a.wav")
    assert len(load_audio(tmp_path / "a_000_0.wav")) == 9 * 320
    assert len(load_audio(tmp_path / "a_000_1.wav")) == 6 * 320
    assert checked == ["en"]


def test_an_interrupted_run_keeps_the_clips_of_whole_texts(policy_path, codec, tmp_path, monkeypatch):
    def interrupted(self, prompts, **_):
        yield {0: Sample([1], False), 3: Sample([3, 3, 3], False), 1: Sample([1, 1], False)}
        raise KeyboardInterrupt

    monkeypatch.setattr(Policy, "samples_by_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(policy_path, "--text", "one", "--num_samples", 2, "--output", tmp_path / "a.wav", text="two")
    assert {path.name for path in tmp_path.iterdir()} == {"a_000_0.wav", "a_000_1.wav"}
    assert doctest.testmod(inference).attempted == 1 and doctest.testmod(inference).failed == 0


def test_best_of_n_ranks_failed_rollouts_last():
    """A truncated clip and a silent one earn 0 whatever their score, others 1 - tanh(3 * 0.1) and exp(-0.3 / 3)."""
    samples = [Sample([1], truncated=True), Sample([1], truncated=False), Sample([1], truncated=False)]
    scores = [Score("", 0.1, 0.3, 1, 10, failure) for failure in (None, None, "silent")]
    rewards = [reward(score, sample.truncated) for score, sample in zip(scores, samples, strict=True)]
    assert rewards == pytest.approx([0, 1 / (0.6 / 0.70869 + 0.4 / 0.90484), 0], abs=1e-4)
    scorer = SimpleNamespace(score=lambda *_: scores)
    assert best_of_n(scorer, samples, [None] * 3, ["a"] * 3, ["en"] * 3, 3) == [1]


def test_a_truncated_clip_is_reported_and_an_empty_one_not_written(policy_path, codec, tmp_path, monkeypatch, caplog):
    samples = {0: Sample([1, 2], True), 1: Sample([], False)}
    monkeypatch.setattr(Policy, "samples_by_batch", lambda self, prompts, **_: iter([samples]))
    run(policy_path, "--num_samples", 2, "--output", tmp_path / "a.wav")
    assert "truncated before END" in caplog.text and "empty, not written" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"a_000_0.wav", "a.jsonl"}
    [row] = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert row == {"text": "hello", "audio": "a_000_0.wav", "codes": [1, 2], "truncated": True}


def test_nothing_written_exits_1(policy_path, codec, tmp_path, monkeypatch):
    monkeypatch.setattr(Policy, "samples_by_batch", lambda self, prompts, **_: iter([{0: Sample([], False)}]))
    with pytest.raises(SystemExit) as exit:
        run(policy_path, "--output", tmp_path / "a.wav")
    assert exit.value.code == 1


@pytest.mark.skipif(not Path("tiny/llasa/run.json").is_file(), reason="tiny/llasa is not built: python -m tiny.build")
def test_tiny_needs_only_a_text(tmp_path):
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


# --- Speech to text ---------------------------------------------------------------------------------------


def transcribe(*argv: str) -> None:
    inference.main(inference.parse_args(["--task", "asr", "--model_name_or_path", MULTITASK_MODEL, *argv]))


def test_transcripts_of_files(tmp_path):
    lines = Path("tiny/heldout/metadata.jsonl").read_text().splitlines()[1:3]
    recordings = [json.loads(line) for line in lines]
    clips = [f"tiny/heldout/{recording['file_name']}" for recording in recordings]
    transcribe("--audio", *clips, "--output", str(tmp_path / "t.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [line["audio"] for line in lines] == clips
    assert all(len(line["transcripts"]) == 1 and line["truncated"] == [False] for line in lines)
    ref_words = [set(recording["text"].lower().rstrip(".").split()) for recording in recordings]
    hyp_words = [set(line["transcripts"][0].lower().rstrip(".").split()) for line in lines]
    assert sum(len(a & b) for a, b in zip(ref_words, hyp_words, strict=True)) >= 9  # of 11 words


def test_transcripts_of_a_dataset_are_what_select_rl_data_reads(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["Anna found two boxes."], "audio_codes": [[1, 2, 3]], "id": ["one"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    output = tmp_path / "t.jsonl"
    options = ["--num_samples", "3", "--temperature", "1", "--max_completion_length", "7"]
    transcribe("--dataset", str(tmp_path / "rows.parquet"), "--output", str(output), *options)
    [line] = [json.loads(line) for line in output.read_text().splitlines()]
    assert (line["index"], line["id"], len(line["transcripts"])) == (0, "one", 3)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Nine clips of one to nine codes: with two transcripts each and batches of five, clips straddle batches."""
    path = tmp_path_factory.mktemp("clips") / "rows.parquet"
    lengths = [4, 9, 1, 7, 3, 8, 2, 6, 5]
    rows = {"audio_codes": [list(range(length)) for length in lengths], "text": [""] * 9, "id": list("abcdefghi")}
    datasets.Dataset.from_dict(rows).to_parquet(path)
    return str(path)


def transcripts(policy_path, clips, output, *options) -> list[dict]:
    """What `--output` holds after the command."""
    flags = ["--num_samples", "2", "--batch_size", "5", "--max_completion_length", "6", "--max_length", "200"]
    argv = ["--task", "asr", "--model_name_or_path", policy_path, "--dataset", clips, "--output", str(output)]
    inference.main(inference.parse_args([*argv, *flags, *options]))
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def stop_after(monkeypatch, num_batches: int) -> None:
    """Have sampling fail in a later batch."""
    generate, calls = Policy._generate, []

    def counted(*args):
        if len(calls) == num_batches:
            raise KeyboardInterrupt
        calls.append(None)
        return generate(*args)

    monkeypatch.setattr(Policy, "_generate", counted)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_an_interrupted_run_resumes_as_if_it_had_not_stopped(policy_path, clips, tmp_path, monkeypatch, temperature):
    options = ("--temperature", temperature, "--seed", "3")
    whole = transcripts(policy_path, clips, tmp_path / "whole.jsonl", *options)
    assert [line["index"] for line in whole] == list(range(9)) and [line["id"] for line in whole] == list("abcdefghi")
    # The transcripts are those of one call of the library, in one stream of random numbers
    policy = Policy.from_pretrained(policy_path, "cpu", task="asr")
    prompts = [asr_prompt(codes) for codes in datasets.Dataset.from_parquet(clips)["audio_codes"] for _ in range(2)]
    set_seed(3)
    sampling = {"temperature": float(temperature), "batch_size": 5, "max_completion_length": 6, "max_length": 200}
    texts = [transcript.text for transcript in policy.transcribe(prompts, **sampling)]
    assert [text for line in whole for text in line["transcripts"]] == texts and len(set(texts)) > 5

    output = tmp_path / "t.jsonl"
    for _ in range(2):  # interrupted twice
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, 1)
            transcripts(policy_path, clips, output, *options)
        assert not output.exists()  # what is there is whole
    sampled = []
    generate = Policy._generate
    monkeypatch.setattr(
        Policy, "_generate", lambda self, ids, *args: sampled.append(len(ids)) or generate(self, ids, *args)
    )
    assert transcripts(policy_path, clips, output, *options) == whole
    assert sampled == [5, 3]  # of 18: two batches were there
    assert transcripts(policy_path, clips, output, *options) == whole and sampled == [5, 3]  # complete already


def test_transcripts_of_other_adapters_are_not_resumed(tmp_path, caplog):
    save_lora(MULTITASK_MODEL, tmp_path / "lora", seed=0)
    output = ("--audio", "tiny/heldout/heldout_103.ogg", "--output", str(tmp_path / "a.jsonl"))
    output += ("--max_completion_length", "20")
    transcribe(*output)
    plain = (tmp_path / "a.jsonl").read_text()
    lora = ("--adapters", f"{tmp_path}/lora=20")
    with pytest.raises(SystemExit):
        transcribe(*output, *lora)
    assert "adapters" in caplog.records[-1].message
    transcribe(*output, *lora, "--overwrite")
    assert (tmp_path / "a.jsonl").read_text() != plain


def test_transcripts_of_another_run_are_not_overwritten(policy_path, clips, tmp_path, monkeypatch, caplog):
    output = tmp_path / "t.jsonl"
    greedy = transcripts(policy_path, clips, output)
    other = save_policy(tmp_path / "policy", seed=1)
    shuffled = tmp_path / "rows.parquet"
    datasets.Dataset.from_parquet(clips).select(range(8, -1, -1)).to_parquet(shuffled)
    monkeypatch.setattr(Policy, "from_pretrained", lambda *_, **__: pytest.fail("a policy was loaded"))
    for model, dataset, options, changed in (
        (policy_path, clips, ("--temperature", "1"), "temperature (0.0, now 1.0)"),
        (other, clips, (), "weights ("),
        (policy_path, str(shuffled), (), "clips ("),
    ):
        with pytest.raises(SystemExit) as stop:
            transcripts(model, dataset, output, *options)
        assert stop.value.code == 2 and changed in caplog.records[-1].message
        assert "--overwrite" in caplog.records[-1].message and "\n" not in caplog.records[-1].message
    monkeypatch.undo()
    assert transcripts(policy_path, clips, output) == greedy
    assert transcripts(other, clips, output, "--overwrite") != greedy


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text", "hello"], "--text or --text_file is for --task tts"),
        (["--audio", "a.wav", "--ref_audio", "b.wav"], "--ref_audio: is for --task tts (got --task asr). Leave it out"),
        (["--audio", "a.wav", "--best_of", "4"], "--best_of: is for --task tts (got --task asr)"),
        (["--audio", "a.wav", "--language", "de"], "--language: is for --task tts (got --task asr)"),
        (["--dataset", "tiny/asr/heldout.parquet"], "Add --output with a .jsonl file"),
        (["--audio", "nowhere.wav"], "nowhere.wav"),
        (["--audio", "tiny/heldout/heldout_103.ogg", "--output", "a.wav"], "--output a.wav: not a .jsonl file"),
        (["--audio", "tiny/heldout/heldout_103.ogg", "--output", "{tmp}/a.jsonl"], "a.jsonl: is a folder"),
    ],
)
def test_bad_input_of_asr_exits_2(argv, message, tmp_path, caplog):
    (tmp_path / "a.jsonl").mkdir()
    argv = [word.replace("{tmp}", str(tmp_path)) for word in argv]
    with pytest.raises(SystemExit) as stop:
        transcribe(*argv)
    assert stop.value.code == 2 and message in caplog.text


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ("114 632 81", "audio_codes must be a list of whole numbers from 0 to 63 (got '114 632 81')"),
        (None, "audio_codes must be a list of whole numbers from 0 to 63 (got None)"),
        ([True, False], "audio_codes must be a list of whole numbers from 0 to 63 (got True among them)"),
        ([64], "audio_codes must be a list of whole numbers from 0 to 63 (got 64 among them)"),
        ([1] * 120, "a clip is too long: its prompt takes"),
    ],
)
def test_a_bad_clip_of_a_dataset_is_named(codes, message, policy_path, tmp_path, monkeypatch, caplog):
    if codes != [1] * 120:  # the model's context is known only with the model
        monkeypatch.setattr(Policy, "from_pretrained", lambda *_, **__: pytest.fail("a policy was loaded"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"audio_codes": row}) + "\n" for row in ([1, 2], codes)))
    with pytest.raises(SystemExit) as stop:
        transcripts(policy_path, str(rows), tmp_path / "t.jsonl", "--max_length", "150")
    assert stop.value.code == 2
    assert caplog.records[-1].message.startswith(f"error: {rows}, row 1: {message}")


# --- Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "  "], "text is empty"),
        (["--text", "<|s_1|>"], "control token"),
        (["--text_file", "{tmp}/none.txt"], "none.txt: No such file"),
        (["--text_file", "{tmp}/blank.txt"], "blank.txt: no text"),
        (["--text_file", "{tmp}/latin1.txt"], "latin1.txt: not UTF-8"),
        (["--text", "a", "--ref_audio", "{tmp}/ref.wav"], "needs both.*Add --ref_text"),
        (["--text", "a", "--ref_text", "b"], "needs both.*Add --ref_audio"),
        (["--text", "a", "--ref_audio", "{tmp}/no.wav", "--ref_text", "b"], "no.wav: no such audio"),
        (["--text", "a", "--ref_audio", "{tmp}/blank.txt", "--ref_text", "b"], "blank.txt: cannot read as audio"),
        (["--text", "a", "--split", "test"], "--split: is for --task asr .got --task tts.. Leave it out"),
        (["--text", "a", "--max_completion_length", "9"], "--max_completion_length: is for --task asr"),
        (["--text", "a", "--best_of", "0"], "--best_of: must be >= 1 .got 0"),
        (["--text", "...", "--best_of", "2"], "reference text '...' is empty"),
        (["--text", "a", "--best_of", "2", "--language", "xx"], "unknown language 'xx'"),
        (["--text", "a", "--num_samples", "0"], "--num_samples: must be >= 1 .got 0"),
        (["--text", "a", "--temperature", "-1"], "--temperature: must be .* >= 0.*got -1"),
        (["--text", "a", "--temperature", "nan"], "--temperature: must be finite.*got nan"),
        (["--text", "a", "--top_p", "0"], "--top_p: must be in .*got 0"),
        (["--text", "a", "--output", "{tmp}/blank.txt/a.wav"], "cannot write into .*blank.txt"),
        (["--text", "a", "--output", "{tmp}/folder.wav"], "folder.wav: is a folder"),
        (["--text", "a", "--seed", "-1"], "--seed: must be in .*got -1"),
        (["--text", "a", "--model_name_or_path", "no-such-run"], "no such model: 'no-such-run'"),
        (["--text", "a", "--model_name_or_path", "{tmp}"], "no model in this folder"),
        (["--text", "a", "--device", "gpu"], "--device gpu"),
        (["--text", "a", "--adapters", "no-such-lora=0.5"], "--adapters no-such-lora: no LoRA folder"),
        (["--text", "a", "--adapters", "tiny/llasa"], "--adapters tiny/llasa: a model without LoRA"),
        (["--text", "a", "--adapters", "tiny/llasa=lots"], "--adapters tiny/llasa=lots: the weight must be a finite"),
    ],
)
def test_bad_input_exits_2_before_any_model_is_loaded(options, message, tmp_path, monkeypatch, caplog):
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    save_audio(tmp_path / "ref.wav", np.sin(np.arange(4_000) * 0.1))
    for loader in ("policy.AutoTokenizer", "weights.AutoModelForCausalLM"):
        monkeypatch.setattr(f"speech.{loader}.from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    argv = ["--model_name_or_path", "owner/name", "--output", "{tmp}/a.wav", *options]
    with pytest.raises(SystemExit) as exit:
        inference.main(inference.parse_args([option.replace("{tmp}", str(tmp_path)) for option in argv]))
    assert exit.value.code == 2
    assert caplog.records[-1].levelno == logging.ERROR
    assert re.search(message, caplog.text)


@pytest.mark.parametrize("task", ["tts", "asr"])
def test_of_three_hours_less_than_a_minute_is_read(task, policy_path, tmp_path, monkeypatch, caplog):
    read, frames_read = soundfile.SoundFile.read, []

    def counted(self, *args, **kwargs):
        samples = read(self, *args, **kwargs)
        frames_read.append(len(samples))
        return samples

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    with soundfile.SoundFile(tmp_path / "long.flac", "w", samplerate=1_000, channels=1) as file:
        for _ in range(3 * 60):
            file.write(np.zeros(60_000))  # a minute
    long = str(tmp_path / "long.flac")
    options = {"tts": ["--text", "a", "--ref_audio", long, "--ref_text", "b"], "asr": ["--audio", long]}
    argv = ["--task", task, "--model_name_or_path", policy_path, *options[task]]
    with pytest.raises(SystemExit) as stop:
        inference.main(inference.parse_args(argv))
    assert stop.value.code == 2
    assert sum(frames_read) < 60_000
    assert "long.flac: 10800.00 s is over 40.96 s. Use a shorter recording, or raise --max_length 2048" in caplog.text


def test_text_too_long_exits_2(policy_path, codec, tmp_path, caplog):
    with pytest.raises(SystemExit) as exit:
        run(policy_path, "--output", tmp_path / "a.wav", text="wordy " * 40)
    assert exit.value.code == 2 and "too long" in caplog.text


def test_another_models_codec_exits_2(policy_path, codec, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ToneCodec, "codebook_size", 7)
    with pytest.raises(SystemExit) as exit:
        run(policy_path, "--output", tmp_path / "a.wav")
    assert exit.value.code == 2 and "the codec has 7 codes and the policy has 64" in caplog.text


def test_an_adapter_of_another_base_exits_2(policy_path, codec, tmp_path, monkeypatch, caplog):
    other = save_policy(tmp_path / "other", seed=1)
    lora = save_lora(other, tmp_path / "lora", seed=0)
    monkeypatch.setattr("speech.policy.load_causal_lm", lambda *_, **__: pytest.fail("the weights were loaded"))
    for task in (("--text", "a"), ("--task", "asr", "--audio", "tiny/heldout/heldout_103.ogg")):
        with pytest.raises(SystemExit) as stop:
            run(policy_path, *task, "--adapters", lora, text=None)
        assert stop.value.code == 2
        assert f"--adapters {lora}: a LoRA of another base, {other!r}" in caplog.records[-1].message


def test_model_without_speech_tokens_exits_2(policy_path, codec, tmp_path, caplog):
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    plain.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=1).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run(str(tmp_path), "--output", tmp_path / "a.wav")
    assert exit.value.code == 2 and "not a Llasa one" in caplog.text


def test_help_exits_0_and_a_missing_text_exits_2(capsys):
    for argv, code in ((["--help"], 0), (["--model_name_or_path", "m"], 2)):
        with pytest.raises(SystemExit) as exit:
            inference.parse_args(argv)
        assert exit.value.code == code
    assert "sample_000.wav" in capsys.readouterr().out
