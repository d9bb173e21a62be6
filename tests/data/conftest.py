"""What several tests of data preparation share."""

from pathlib import Path

import pytest

from data_prep.train_tokenizer import train_tokenizer
from tests.helpers.corpora import text


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    (root / "a.txt").write_text(text(0, 2000))
    train_tokenizer([root / "a.txt"], root / "t.model", vocab_size=290)
    return root / "t.model"
