"""What several tests of speech/ share."""

import pytest
from fake_codec import build_native


@pytest.fixture(scope="session")
def native_folder(tmp_path_factory):
    """A small random codec, saved in transformers' layout."""
    folder = tmp_path_factory.mktemp("native")
    build_native(seed=0).save_pretrained(folder)
    return folder
