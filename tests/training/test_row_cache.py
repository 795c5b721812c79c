"""Where the rows of a run are kept."""

from types import SimpleNamespace

import datasets
import pytest

from common.cli import InputError
from training.row_cache import cache_folder


def test_a_home_that_cannot_be_written_into_is_an_input_error(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file, as /dev/null is for a user without a home folder")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    with pytest.raises(InputError, match="cannot write into .*home/datasets/llasa-grpo: Not a directory. Set HF_HOME"):
        cache_folder(SimpleNamespace(output_dir=str(tmp_path), local_process_index=0))
