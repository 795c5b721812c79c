"""tiny/train_policy.py: guided attention, its word numbers, and that a small policy learns from a prompt."""

import json
import math

import datasets
import pytest
import torch

from common.cli import InputError
from speech.tokens import SpeechTokens
from tiny import train_policy as policy
from tiny.train_codec import LEVELS

TEXTS = ["My neighbor lost *her* picture today.", "Did Nancy count the letter?"]
TIMES = {
    "a": [["my", 0.0, 0.04], ["neighbor", 0.04, 0.1], ["lost", 0.1, 0.12], ["her", 0.14, 0.2], ["picture", 0.2, 0.3]]
    + [["today", 0.3, 0.36]],
    "b": [["did", 0.0, 0.02], ["nancy", 0.02, 0.08], ["count", 0.08, 0.1], ["the", 0.1, 0.12], ["letter", 0.12, 0.2]],
}


def rows(**voice_prompts) -> datasets.Dataset:
    table = {"id": ["a", "b"], "text": TEXTS, "audio_codes": [list(range(18)), list(range(100, 110))]}
    return datasets.Dataset.from_dict(table | voice_prompts)


@pytest.fixture(scope="module")
def made():
    model, tokenizer = policy.new_policy(TEXTS, seed=0)
    return model, tokenizer, SpeechTokens.from_tokenizer(tokenizer)


def test_every_token_of_the_text_knows_its_word(made):
    _, tokenizer, tokens = made
    with_prompt = rows(ref_text=[TEXTS[1], None], ref_codes=[[5, 6], None])
    for row, example in zip(with_prompt, policy.tts_examples(with_prompt, TIMES, tokenizer, tokens), strict=True):
        text = " ".join(filter(None, [row["ref_text"], row["text"]]))
        for number, word in enumerate(text.split()):
            places = (example.prompt_word == number).nonzero()[:, 0]
            assert tokenizer.decode(example.ids[places]).strip() == word
        assert (example.prompt_word >= 0).sum() == len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_position_knows_the_word_of_the_code_that_comes_next(made):
    _, tokenizer, tokens = made
    alone = policy.tts_examples(rows(), TIMES, tokenizer, tokens)[0]
    first = len(alone.ids) - alone.answer  # place of the first code
    assert alone.ids[first] == tokens.first_code_id and alone.answer == 19
    # codes of 0.02 s; the pause from 0.12 to 0.14 s is the word's before it
    words = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5]
    assert alone.target_word.tolist() == [-1] * (first - 1) + words + [-1, -1]
    prompted = policy.tts_examples(rows(ref_text=[TEXTS[1], None], ref_codes=[[5], None]), TIMES, tokenizer, tokens)[0]
    assert prompted.target_word[prompted.target_word >= 0].tolist() == [word + 5 for word in words]


def test_neighbouring_levels_have_neighbouring_embeddings():
    vectors = policy.embeddings_by_level(64, seed=0)
    assert vectors.shape == (math.prod(LEVELS), 64) and math.isclose(vectors.std(), policy.EMBEDDING_STD, rel_tol=1e-4)
    distance = (vectors[:4] - vectors[0]).norm(dim=1)  # codes 0 to 3 differ in the first dimension alone
    assert distance[0] < distance[1] < distance[2] < distance[3]
    last = math.prod(LEVELS[:-1])  # one level of the last dimension
    assert torch.allclose(vectors[last] - vectors[0], vectors[last + 3] - vectors[3], atol=1e-6)


def test_both_losses_of_a_batch_are_those_of_the_model(made):
    model, tokenizer, tokens = made
    model.set_attn_implementation("eager")
    both = policy.tts_examples(rows(), TIMES, tokenizer, tokens)
    answer_ids = torch.tensor(sorted(tokens.speech_ids))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        nll, guide = policy.losses(model, policy.batch_of(both, torch.device("cpu")), answer_ids, guided=True)
        parts, heads = [], []
        for row in both:
            out = model(row.ids[None], output_attentions=True)
            logits = out.logits[0, -row.answer - 1 : -1, answer_ids].float()
            target = torch.searchsorted(answer_ids, row.ids[-row.answer :])
            parts.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
            for place in (row.target_word >= 0).nonzero()[:, 0]:
                word, end = out.attentions[policy.GUIDED_LAYER][0, [policy.WORD_HEAD, policy.WORD_END_HEAD], place]
                own = (row.prompt_word == row.target_word[place]).nonzero()[:, 0]
                heads += [word[own].sum(), end[own[-1]]]
                if row.target_word[place] == 4:  # of TEXTS[1], "letter?"; of TEXTS[0], "picture"
                    assert tokenizer.decode(row.ids[own[-1]]).strip() in ("?", "picture")
    assert torch.allclose(nll, torch.cat(parts).mean(), atol=5e-3)  # bfloat16 on one side
    assert torch.allclose(guide, -torch.stack(heads).log().mean(), atol=2e-2)
    unguided = policy.losses(model, policy.batch_of(both, torch.device("cpu")), answer_ids, guided=False)
    assert unguided[1] == 0 and torch.allclose(unguided[0], nll, atol=1e-3)


def test_an_epoch_has_every_row_once_in_the_seeds_order(made):
    _, tokenizer, tokens = made
    two = policy.tts_examples(rows(), TIMES, tokenizer, tokens)
    many = [row._replace(answer=number) for number, row in enumerate(two * 5)]
    orders = []
    for seed in (0, 0, 1):
        epoch = [row for _, batch in zip(range(4), policy.batches(many, 3, seed), strict=False) for row in batch]
        orders.append([row.answer for row in epoch])
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] == orders[1] != orders[2]


def two_texts() -> datasets.Dataset:
    """Two texts whose codes begin alike."""
    table = {"id": ["a", "b"], "text": TEXTS, "audio_codes": [[1] * 10, [2000] * 10]}
    return datasets.Dataset.from_dict(table | {"ref_text": [None, None], "ref_codes": [None, None]})


@pytest.fixture
def streams(made):
    """Both tasks, on `two_texts`."""
    _, tokenizer, tokens = made
    both = {}
    for task, examples in (("tts", policy.tts_examples), ("asr", policy.asr_examples)):
        rows = examples(two_texts(), TIMES, tokenizer, tokens)
        both[task] = policy.Stream(rows * 4, rows, torch.tensor(sorted(tokens.answer_ids(task))))
    return both


def test_a_token_of_a_transcript_knows_the_codes_of_its_word(made):
    _, tokenizer, tokens = made
    row = policy.asr_examples(rows(), TIMES, tokenizer, tokens)[0]
    words = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5]
    codes = (row.ids >= tokens.first_code_id) & (row.ids < tokens.first_code_id + tokens.num_codes)
    assert row.prompt_word[codes].tolist() == words and (row.prompt_word[~codes] == -2).all()
    answer = row.ids[-row.answer :]
    assert answer[-1] == tokens.text_end_id and (row.target_word[: -row.answer - 1] == -1).all()
    for number, word in enumerate("My neighbor lost her picture today.".split()):
        due = row.target_word[-row.answer - 1 : -1] == number
        assert tokenizer.decode(answer[due]).strip() == word
    assert row.target_word[-2:].tolist() == [-1, -1]


def test_a_clip_without_words_has_no_guide(made):
    _, tokenizer, tokens = made
    silent = datasets.Dataset.from_dict({"id": ["a"], "text": [""], "audio_codes": [[1, 2]]})
    row = policy.asr_examples(silent, {"a": []}, tokenizer, tokens)[0]
    assert (row.target_word == -1).all() and (row.prompt_word == -2).all() and row.answer == 1
    model, batch = made[0], policy.batch_of([row], torch.device("cpu"))
    answer_ids = torch.tensor(sorted(tokens.text_ids))
    model.set_attn_implementation("eager")
    nll, guide = policy.losses(model, batch, answer_ids, guided=True)
    assert guide == 0 and nll > 0


class Killed(Exception):
    pass


def test_resumed_is_uninterrupted(streams, tmp_path, monkeypatch):
    """Killed in the first evaluation, in the second and in the fourth."""
    evaluate, left = policy.evaluate, []

    def evaluate_or_killed(*args):
        if not left:
            raise Killed
        left.pop()
        return evaluate(*args)

    def choose_stream(step, _):
        return "asr" if step % 3 == 1 else "tts"

    monkeypatch.setattr(policy, "evaluate", evaluate_or_killed)
    monkeypatch.setattr(policy, "WARMUP_STEPS", 5)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder, evaluations in ((whole, [5]), (killed, [0, 1, 2, 5])):
        for number in evaluations:
            left[:] = [None] * number
            model, tokenizer = policy.new_policy(TEXTS, seed=0)
            arguments = (streams, choose_stream, folder, 15, 3, 1e-3)
            try:
                policy.train_policy(model, tokenizer, *arguments, seed=0, eval_steps=3)
            except Killed:
                continue
    a, b = (type(model).from_pretrained(folder).state_dict() for folder in (whole, killed))
    start = policy.new_policy(TEXTS, seed=0)[0].state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.norm.weight"], start["model.norm.weight"])
    curves = []
    for folder in (whole, killed):
        lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
        curves.append([(line["step"], line["loss"], line["heldout_tts"], line["heldout_asr"]) for line in lines])
    assert curves[0] == curves[1] and [step for step, *_ in curves[0]] == [3, 6, 9, 12, 15]


def test_other_settings_do_not_resume(streams, tmp_path):
    model, tokenizer = policy.new_policy(TEXTS, seed=0)
    arguments = (model, tokenizer, {"tts": streams["tts"]}, lambda *_: "tts", tmp_path)
    policy.train_policy(*arguments, 1, 2, 1e-3, seed=0, eval_steps=1)
    with pytest.raises(InputError, match="is of a training with {'steps': 1, .*not {'steps': 2, "):
        policy.train_policy(*arguments, 2, 2, 1e-3, seed=0, eval_steps=1)


@pytest.mark.parametrize("task", ["tts", "asr"])
def test_a_row_that_is_too_long_is_refused(task, made):
    _, tokenizer, tokens = made
    long = datasets.Dataset.from_dict({"id": ["a", "b"], "text": TEXTS, "audio_codes": [[1] * 600, [2] * 9]})
    examples = {"tts": policy.tts_examples, "asr": policy.asr_examples}[task]
    with pytest.raises(InputError, match=f"1 of 2 rows of {task} are longer than 512 tokens"):
        examples(long, TIMES, tokenizer, tokens)


@pytest.mark.parametrize("task", ["tts", "asr"])
def test_it_learns_from_the_prompt(task, streams, tmp_path, monkeypatch):
    """Two answers that have nothing to tell them apart before their first token but the prompt."""
    monkeypatch.setattr(policy, "WARMUP_STEPS", 5)
    (tmp_path / "curve.jsonl").write_text('{"step": 4, "of": "a training that was interrupted"}\n')
    model, tokenizer = policy.new_policy(TEXTS, seed=0)
    only = {task: streams[task]}
    policy.train_policy(model, tokenizer, only, lambda *_: task, tmp_path, 48, 2, 2e-3, seed=0, eval_steps=4)
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    first, last = curve[0], curve[-1]
    assert last[f"heldout_{task}"] < 0.5 < first[f"heldout_{task}"] and last["attention"] < first["attention"]
    assert last[f"mismatched_prompt_{task}"] > 0.1  # behind the other's prompt it gives the other's answer
    kept = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    best = min(line[f"heldout_{task}"] for line in curve)
    stream = streams[task]
    assert math.isclose(policy.heldout_loss(kept, stream.heldout, stream.answer_ids), best, abs_tol=0.02)
