"""What several tests of data preparation share."""

from pathlib import Path

import pytest

from tests.helpers.corpora import trained_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_tokenizer(tmp_path_factory.mktemp("tokenizer"))
