"""CTranslate2 folder → .pt of openai-whisper."""

import pytest
import torch
import whisper
from fake_whisper import save_ctranslate2, save_random_whisper

from speech.whisper_checkpoint import load_whisper
from tiny import ctranslate2_to_openai


def convert(*argv) -> None:
    ctranslate2_to_openai.main(ctranslate2_to_openai.parse_args([str(word) for word in argv]))


def test_openai_whisper_loads_the_file(tmp_path):
    model = load_whisper(save_random_whisper(tmp_path / "w.pt"))
    folder = save_ctranslate2(tmp_path / "folder", model, "float32")
    convert(folder, tmp_path / "new" / "converted.pt")
    loaded = whisper.load_model(str(tmp_path / "new" / "converted.pt"), device="cpu")
    assert loaded.dims == model.dims
    expected = model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())


def test_bad_input_exits_2(tmp_path, caplog):
    for argv, message in (
        ((tmp_path, tmp_path / "x.pt"), "holds no model.bin"),
        ((tmp_path, tmp_path / "x"), "not the path of a .pt file"),
    ):
        with pytest.raises(SystemExit) as error:
            convert(*argv)
        assert error.value.code == 2 and message in caplog.records[-1].message
    assert not list(tmp_path.iterdir())
