"""Datasets by name: local files and folders, splits, columns, and errors that list what is accepted."""

import json
import re
import time

import datasets
import pytest

from common import dataset_io
from common.cli import InputError
from common.dataset_io import drawn_rows, load_any_dataset, open_source


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No hub, and a fresh cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("wav,sentence,client_id,id\na.wav,one,007,None\nb.wav,two,8,x\n")
    return path


@pytest.mark.parametrize("name", ["nobody/no_such_set", "./no_such_folder", "no_such_file.csv"])
def test_no_such_dataset(name):
    start = time.monotonic()
    with pytest.raises(InputError, match=f"{name}: no such dataset.* Accepted: a hub id"):
        load_any_dataset(name)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("notes.txt", "", r"unknown format \(got .txt\). Accepted"),
        ("empty.jsonl", "", "the file is empty"),
        ("empty.csv", "", "No columns"),
        ("header.csv", "audio,text\n", "no rows"),
        ("bad.json", '{"a": 1,\n oops', "cannot be read as .json"),
        ("bad.parquet", "no", "cannot be read as .parquet"),
    ],
)
def test_unreadable_files(tmp_path, name, content, error):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}.*{error}"):
        load_any_dataset(str(tmp_path / name))


def test_unreadable_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be read as split 'train'.*Accepted"):
        load_any_dataset(str(tmp_path / "empty"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_text_that_is_not_utf8_names_the_file(tmp_path, suffix):
    rows = {".jsonl": '{"text": "café"}\n', ".json": '[{"text": "café"}]', ".csv": "text\ncafé\n"}
    file = tmp_path / f"latin{suffix}"
    file.write_bytes(rows[suffix].encode("latin-1"))
    with pytest.raises(InputError, match=rf"latin{suffix}: .*(UTF|utf)-8"):
        load_any_dataset(str(file))
    (tmp_path / "metadata.jsonl").write_bytes(rows[".jsonl"].encode("latin-1"))
    with pytest.raises(InputError, match=rf"^{tmp_path}: not UTF-8 text. Convert the file to UTF-8"):
        load_any_dataset(str(tmp_path))


def test_joined_files_have_the_columns_of_all_rows(tmp_path):
    """datasets alone takes those of the first 10 MB."""
    first = json.dumps({"text": "one", "codes": [1] * 1_000, "ref_codes": None}) + "\n"
    last = json.dumps({"text": "two", "codes": [2], "ref_codes": [3, 4], "rater": "Anna"}) + "\n"
    (tmp_path / "joined.jsonl").write_text(first * (12_000_000 // len(first)) + last)
    rows = load_any_dataset(str(tmp_path / "joined.jsonl"))
    assert rows[-1] == {"text": "two", "codes": [2], "ref_codes": [3, 4], "rater": "Anna"}
    assert rows[0] == {"text": "one", "codes": [1] * 1_000, "ref_codes": None, "rater": None}


def test_joined_files_whose_columns_differ_in_type_are_refused(tmp_path):
    lines = [json.dumps({"codes": [1] * 300})] * 13_000 + [json.dumps({"codes": "two"})]
    (tmp_path / "joined.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match="joined.jsonl: cannot be read as .jsonl"):
        load_any_dataset(str(tmp_path / "joined.jsonl"))


def test_a_tsv_is_read_as_common_voice_writes_it(tmp_path):
    (tmp_path / "clips.tsv").write_text('path\tsentence\tid\na.mp3\t"Oh, she said.\t007\n')
    rows = load_any_dataset(str(tmp_path / "clips.tsv"))
    assert rows[0] == {"path": "a.mp3", "sentence": '"Oh, she said.', "id": "007"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("clips.csv", "text,audio\nYes, I did it.,a.wav\n"),
        ("clips.csv", "text\nYes, I have it.\n"),
        ("clips.tsv", "path\tsentence\na.mp3\tso\t\n"),
    ],
)
def test_rows_with_more_fields_than_the_header_are_refused(name, content, tmp_path):
    """pandas takes the first field for the row's name, and the text would lose its beginning."""
    (tmp_path / name).write_text(content)
    with pytest.raises(
        InputError, match="rows have more fields than its header. (Put texts that hold commas|Take the surplus tabs)"
    ):
        load_any_dataset(str(tmp_path / name))


def test_a_csv_as_ljspeech_writes_it_is_named(tmp_path):
    (tmp_path / "metadata.csv").write_text("LJ001-0001|Printing, in the only sense|Printing, in the only sense\n")
    with pytest.raises(InputError, match="separated by [|], as LJSpeech's. Save it with commas, and the header"):
        load_any_dataset(str(tmp_path))


def test_a_csv_with_semicolons_is_named(tmp_path):
    (tmp_path / "clips.csv").write_text("audio;text\na.wav;one\n")
    with pytest.raises(InputError, match="clips.csv: its columns are separated by semicolons. Save it with commas$"):
        load_any_dataset(str(tmp_path / "clips.csv"))


def test_a_line_separator_within_a_text_is_kept(tmp_path):
    for suffix, content in (
        (".jsonl", '{"text": "a\u2028b"}\n{"text": "c\x85d"}\n'),
        (".csv", "text\na\u2028b\nc\x85d\n"),
    ):
        (tmp_path / f"a{suffix}").write_text(content, encoding="utf-8")
        assert load_any_dataset(str(tmp_path / f"a{suffix}"))["text"][:] == ["a\u2028b", "c\x85d"]


def test_splits(table, tmp_path):
    assert len(load_any_dataset(str(table), "clips")) == len(load_any_dataset(str(table), "train")) == 2
    with pytest.raises(InputError, match="no split 'test'. Available: train, clips"):
        load_any_dataset(str(table), "test")
    rows = load_any_dataset(str(table))
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    assert len(load_any_dataset(str(tmp_path / "splits"), "test")) == 1
    with pytest.raises(InputError, match="no split 'dev'. Available: train, test"):
        load_any_dataset(str(tmp_path / "splits"), "dev")


def test_only_hub_datasets_have_configurations(table):
    with pytest.raises(InputError, match="--dataset_config: .* is a local path.*got 'en'"):
        load_any_dataset(str(table), config="en")


def test_csv_is_not_typed(table):
    rows = load_any_dataset(str(table))
    assert rows["client_id"][:] == ["007", "8"] and rows["id"][:] == ["None", "x"]


def test_columns_of_a_source(table):
    source = open_source(str(table))
    assert source.columns == {"text": "sentence", "audio": "wav", "speaker": "client_id", "id": "id"}
    assert source.rows.column_names == ["sentence", "wav", "client_id", "id"] and source.folder == table.parent
    assert open_source(str(table), text_column="id").columns["text"] == "id"
    with pytest.raises(InputError, match=r"no column 'txet' \(got wav, sentence, client_id, id\).*--text_column"):
        open_source(str(table), text_column="txet")


def test_fingerprint_depends_on_the_rows_alone(table, tmp_path):
    fingerprint = open_source(str(table)).fingerprint()
    assert fingerprint.startswith("2 rows, sha256 ")
    copy = tmp_path / "copy.csv"
    copy.write_text(table.read_text())
    assert open_source(str(copy)).fingerprint() == fingerprint
    copy.write_text(table.read_text().replace("two", "three"))
    assert open_source(str(copy)).fingerprint() != fingerprint


def test_hub_dataset_of_raw_audio_files(monkeypatch):
    """datasets wants torchcodec even to list them: the error has a way without it."""

    def load(*args, **kwargs):
        raise datasets.exceptions.DatasetGenerationError("failed") from ImportError("install 'torchcodec'")

    monkeypatch.setattr(dataset_io, "load_dataset", load)
    with pytest.raises(InputError, match="torchcodec.*hf download me/wavs --repo-type dataset"):
        load_any_dataset("me/wavs")


def test_a_folder_of_audio_without_metadata(tmp_path):
    """With or without transcripts beside it: datasets would take the .txt files, or ask for torchcodec."""
    (tmp_path / "a.WAV").write_bytes(b"RIFF")
    for name in ("b.wav", "b.txt"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(InputError, match="folder of audio without a metadata file.*file_name,text"):
            load_any_dataset(str(tmp_path))


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    for text in ("one", "two"):
        file.write_text(json.dumps({"text": text}) + "\n")
        assert load_any_dataset(str(file))["text"][:] == [text]
        time.sleep(0.01)


# --- Types of columns -------------------------------------------------------------------------------------


def rows_of(tmp_path, column: str, values: list) -> datasets.Dataset:
    """As a user's .jsonl, which may mix types."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": str(i), column: value}) + "\n" for i, value in enumerate(values)))
    return load_any_dataset(str(file))


@pytest.mark.parametrize(
    ("values", "row", "got"),
    [
        ([["<|s_1|>"]], 0, "'<|s_1|>' among them"),
        ([[1], [2, "a"]], 1, "'a' among them"),
        ([[1.0, 2.0]], 0, "1.0 among them"),
        ([[True, False]], 0, "True among them"),
        ([[1], [1, True]], 1, "True among them"),
        ([[[1, 2]]], 0, "[1, 2] among them"),
        ([[1], [2, None]], 1, "None among them"),
        ([[1], None], 1, "None"),
        ([None], 0, "None"),
        ([[1], []], 1, "[]"),
        ([7], 0, "7"),
        ([[1], 7], 1, "7"),
        (["[1, 2]"], 0, "'[1, 2]'"),
        ([[1, 2], [3], [3, 8]], 2, "8 among them"),
        ([[1], [-1]], 1, "-1 among them"),
        ([[2**40]], 0, "1099511627776 among them"),
        (["1" * 1_000], 0, "'" + "1" * 59),
    ],
)
def test_what_are_no_codes(tmp_path, values, row, got):
    rows = rows_of(tmp_path, "audio_codes", values)
    message = f"name, row {row}: audio_codes must be a list of whole numbers from 0 to 7 (got {got}). Correct the row"
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        dataset_io.check_codes(rows, "audio_codes", 8, "name")


def test_codes_of_every_arrow_type_pass():
    integers, item = datasets.Value("uint16"), datasets.Value("int32")
    for feature in (datasets.List(integers), datasets.LargeList(item), datasets.List(item, length=2)):
        features = datasets.Features({"audio_codes": feature})
        rows = datasets.Dataset.from_dict({"audio_codes": [[0, 7], [3, 3], [7, 1]]}, features)
        dataset_io.check_codes(rows, "audio_codes", 8, "name")
        with pytest.raises(InputError, match=r"row 0: .*got 7 among them"):
            dataset_io.check_codes(rows, "audio_codes", 7, "name")
        # Rows picked in another order are named by their place in it.
        with pytest.raises(InputError, match=r"row 1: .*got 7 among them"):
            dataset_io.check_codes(rows.select([1, 2]), "audio_codes", 7, "name")


def test_a_batch_without_any_code(tmp_path):
    features = datasets.Features({"audio_codes": datasets.List(datasets.Value("int32"))})
    rows = datasets.Dataset.from_dict({"audio_codes": [[None]]}, features)
    with pytest.raises(InputError, match="row 0: .*got None among them"):
        dataset_io.check_codes(rows, "audio_codes", 8, "name")


def test_the_row_is_named_in_a_large_dataset_too():
    rows = datasets.Dataset.from_dict({"audio_codes": [[i % 8] for i in range(25_000)] + [[8]]})
    dataset_io.check_codes(rows.select(range(25_000)), "audio_codes", 8, "name")
    with pytest.raises(InputError, match="row 25000: "):
        dataset_io.check_codes(rows, "audio_codes", 8, "name")


@pytest.mark.parametrize("values", [[None], [[]], [[1], None, []]])
def test_optional_codes_may_be_missing(tmp_path, values):
    rows = rows_of(tmp_path, "ref_codes", values)
    dataset_io.check_codes(rows, "ref_codes", 8, "name", optional=True)
    with pytest.raises(InputError, match="ref_codes must be a list"):
        dataset_io.check_codes(rows, "ref_codes", 8, "name")
    for wrong in (0, "x", False, [None], ["x"]):
        with pytest.raises(InputError, match=r"row 1: ref_codes must be a list"):
            dataset_io.check_codes(rows_of(tmp_path, "ref_codes", [[1], wrong]), "ref_codes", 8, "name", optional=True)


@pytest.mark.parametrize(("values", "row"), [([7], 0), (["a", 7], 1), ([1.5], 0), ([["a"]], 0), (["a", False], 1)])
def test_what_is_no_text(tmp_path, values, row):
    rows = rows_of(tmp_path, "language", values)
    for optional in (False, True):
        with pytest.raises(InputError, match=rf"^name, row {row}: language must be text \(got .*{values[row]}"):
            dataset_io.check_texts(rows, "language", "name", optional)


def test_texts(tmp_path):
    dataset_io.check_texts(rows_of(tmp_path, "text", ["one", ""]), "text", "name")
    for values in (["one", None], [None]):
        rows = rows_of(tmp_path, "text", values)
        dataset_io.check_texts(rows, "text", "name", optional=True)
        with pytest.raises(InputError, match=rf"row {len(values) - 1}: text must be text \(got None\)"):
            dataset_io.check_texts(rows, "text", "name")


@pytest.mark.parametrize("wrong", ["word", 7, [7], ["word", 7], ["word", None], [["word"]], {"word": 1}])
def test_what_are_no_keywords(tmp_path, wrong):
    for values in ([wrong], [["a", "b"], wrong]):
        rows = rows_of(tmp_path, "keywords", values)
        with pytest.raises(InputError, match=f"row {len(values) - 1}: keywords must be a list of strings"):
            dataset_io.check_keywords(rows, "keywords", "name")


def test_keywords(tmp_path):
    for values in ([["a", "b"], [], None], [None], [[]], [["a"]]):
        dataset_io.check_keywords(rows_of(tmp_path, "keywords", values), "keywords", "name")


def test_an_absent_column_is_an_error_unless_it_is_optional(tmp_path):
    rows = rows_of(tmp_path, "text", ["one"])
    dataset_io.check_keywords(rows, "keywords", "name")
    dataset_io.check_texts(rows, "language", "name", optional=True)
    dataset_io.check_codes(rows, "ref_codes", 8, "name", optional=True)
    for check in (
        lambda: dataset_io.check_texts(rows, "language", "name"),
        lambda: dataset_io.check_codes(rows, "language", 8, "name"),
    ):
        with pytest.raises(InputError, match=r"^name: no column 'language' \(got id, text\)"):
            check()


def test_drawn_rows():
    assert drawn_rows(5, None, 0) == drawn_rows(5, 5, 0) == drawn_rows(5, 9, 1) == [0, 1, 2, 3, 4]
    draws = [drawn_rows(20, 6, seed) for seed in range(5)]
    assert drawn_rows(20, 6, 0) == draws[0] and len({tuple(rows) for rows in draws}) == 5
    assert all(rows == sorted(set(rows)) and len(rows) == 6 and 0 <= rows[0] and rows[-1] < 20 for rows in draws)
