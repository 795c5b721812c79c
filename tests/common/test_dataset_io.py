"""Datasets by name: local files and folders, splits, columns, and errors that list what is accepted."""

import json
import time

import datasets
import pytest

from common import dataset_io
from common.cli import InputError
from common.dataset_io import load_any_dataset, open_source


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


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    for text in ("one", "two"):
        file.write_text(json.dumps({"text": text}) + "\n")
        assert load_any_dataset(str(file))["text"][:] == [text]
        time.sleep(0.01)
