"""Texts to synthesize: three file formats, and an error that names the line."""

import json

import numpy as np
import pytest

from metrics.texts import Item, num_units, read_items, units_of
from speech.audio import save_audio


def test_reads_txt(tmp_path):
    (tmp_path / "t.txt").write_text("One.\n\n Two. \n", encoding="utf-8")
    items = read_items(str(tmp_path / "t.txt"), "en")
    assert [(item.id, item.text, item.language, item.ref_audio) for item in items] == [
        ("1", "One.", "en", None),
        ("3", "Two.", "en", None),
    ]


def test_reads_jsonl_with_paths_relative_to_the_file(tmp_path):
    save_audio(tmp_path / "a.wav", np.zeros(100))
    rows = [
        {"text": "One.", "id": 7, "ref_audio": "a.wav", "ref_text": "Ref.", "speaker": "unused"},
        {"text": "Eins.", "language": "de", "audio": str(tmp_path / "a.wav")},
        {"text": "Two.", "file_name": "a.wav"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two, three = read_items(str(tmp_path / "t.jsonl"), "en")
    assert three.audio == str(tmp_path / "a.wav")
    assert (one.id, one.ref_audio, one.ref_text, one.language) == ("7", str(tmp_path / "a.wav"), "Ref.", "en")
    assert (two.id, two.audio, two.language, two.ref_audio) == ("2", str(tmp_path / "a.wav"), "de", None)


def test_a_line_separator_within_a_json_string_is_no_line_end(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "one\u2028two"}\n\n{"text": "three"}\n', encoding="utf-8")
    assert [(item.id, item.text) for item in read_items(str(tmp_path / "t.jsonl"), "en")] == [
        ("1", "one\u2028two"), ("3", "three"),
    ]  # fmt: skip


def test_reads_the_meta_lst_of_seed_tts_eval(tmp_path):
    for name in ("prompt-wavs/p.wav", "wavs/n.wav"):
        save_audio(tmp_path / name, np.zeros(100))
    (tmp_path / "meta.lst").write_text(
        "x-1|We asked people.|prompt-wavs/p.wav|Get the trust fund.\n"
        "x-2|We asked people.|prompt-wavs/p.wav|Get it.|wavs/n.wav\n"
    )
    one, two = read_items(str(tmp_path / "meta.lst"), "en")
    assert (one.id, one.ref_text, one.text, one.audio) == ("x-1", "We asked people.", "Get the trust fund.", None)
    assert one.ref_audio == str(tmp_path / "prompt-wavs/p.wav") and two.audio == str(tmp_path / "wavs/n.wav")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "text", "not a file of texts .*Use .txt, .jsonl, .lst"),
        ("t.txt", " \n", "no text in the file"),
        ("t.txt", "ok\n<|s_1|>", "line 2: text holds a control token"),
        ("t.txt", "…!", "line 1: reference text .* is empty"),
        ("t.jsonl", '{"text": "a"}\n{"txt": "b"}', "line 2: no text in this row .got txt."),
        ("t.jsonl", '{"text": ""}', "line 1: text is empty"),
        ("t.jsonl", "[1]", "line 1: expected an object"),
        ("t.jsonl", "{", "line 1: not JSON: Expecting"),
        ("t.jsonl", '{"text": "a \\ud83d"}', r"line 1: not Unicode text: half a character.*got '.ud83d'"),
        ("t.jsonl", '{"text": "a", "language": "xx"}', "line 1: unknown language 'xx'"),
        ("t.jsonl", '{"text": "a", "ref_text": "b"}', "line 1: a voice prompt needs both"),
        (
            "t.jsonl",
            '{"text": "a", "ref_audio": "no.wav", "ref_text": "b"}',
            "line 1: ref_audio .*no.wav: no such file",
        ),
        ("t.jsonl", '{"text": "a", "audio": "no.wav"}', "line 1: audio .*no.wav: no such file"),
        ("meta.lst", "a|b|c", "line 1: expected id"),
    ],
)
def test_bad_texts_name_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_items(str(tmp_path / name), "en")


def test_words_and_characters_do_not_mix():
    assert units_of(["en", "German"]) == "words" and units_of(["zh", "zh-TW"]) == "characters"
    with pytest.raises(ValueError, match=r"--texts: .* mixed .got en, zh.. Evaluate them in separate runs"):
        units_of(["zh-CN", "en"])


def test_units_are_words_as_written_or_characters():
    assert num_units(Item("1", "Twenty five hats.", "en")) == 3  # the normaliser makes "25 hats" of it
    assert num_units(Item("2", "你好。", "zh")) == 2
    assert num_units(Item("3", "Tu viens ? — Oui !", "fr")) == 3
