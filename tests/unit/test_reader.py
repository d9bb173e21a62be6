"""Token slices against the tokens that were written, and damaged shards."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import infini_train.data.reader as reader_module
from infini_train.data.index import DatasetIndex
from infini_train.data.reader import TokenReader
from tests.helpers.datasets import make_dataset

LENGTHS = [2, 3, 700, 40, 5, 1_000, 33, 2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    return root, make_dataset(root, LENGTHS)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_slice(dataset, data):
    root, documents = dataset
    reader = TokenReader(DatasetIndex.load(root))
    for _ in range(20):
        doc = data.draw(st.integers(0, len(documents) - 1))
        offset = data.draw(st.integers(0, LENGTHS[doc] - 1))
        count = data.draw(st.integers(1, LENGTHS[doc] - offset))
        np.testing.assert_array_equal(reader.read(doc, offset, count), documents[doc][offset : offset + count])


def test_survives_pickle_and_fork(dataset):
    root, documents = dataset
    reader = TokenReader(DatasetIndex.load(root))
    reader.read(2, 0, 700)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader)).read(2, 1, 600), documents[2][1:601])
    child = os.fork()
    if child == 0:
        os._exit(0 if all((reader.read(d, 0, n) == documents[d]).all() for d, n in enumerate(LENGTHS)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_uint32(tmp_path):
    documents = make_dataset(tmp_path / "set", LENGTHS, vocab_size=1_000_000)
    reader = TokenReader(DatasetIndex.load(tmp_path / "set"))
    assert max(document.max() for document in documents) > 65_535
    for doc, document in enumerate(documents):
        np.testing.assert_array_equal(reader.read(doc, 0, len(document)), document)


def test_keeps_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "OPEN_SHARDS", 3)
    documents = make_dataset(tmp_path / "set", [5] * 40, per_shard=1)
    reader = TokenReader(DatasetIndex.load(tmp_path / "set"))
    before = len(os.listdir("/proc/self/fd"))
    for doc, document in enumerate(documents):
        np.testing.assert_array_equal(reader.read(doc, 0, 5), document)
    assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "shard-00001.tar: found no file, expected the shard"),
        (lambda path: os.truncate(path, 1_536), ValueError, "shard-00001.tar: found 1,536 bytes, expected 20,480"),
        (
            lambda path: path.open("ab").write(b"0"),
            ValueError,
            "shard-00001.tar: found 20,481 bytes, expected 20,480",
        ),
    ],
)
def test_names_a_damaged_shard(tmp_path, damage, error, message):
    documents = make_dataset(tmp_path / "set", LENGTHS)
    index = DatasetIndex.load(tmp_path / "set")
    damage(tmp_path / "set" / "shard-00001.tar")
    reader = TokenReader(index)
    np.testing.assert_array_equal(reader.read(0, 0, 2), documents[0])
    with pytest.raises(error, match=message):
        reader.read(3, 0, 40)


def test_names_a_token_outside_the_vocabulary(tmp_path):
    documents = make_dataset(tmp_path / "set", LENGTHS)
    where = int(np.argmax(documents[5]))
    index = replace(DatasetIndex.load(tmp_path / "set"), vocab_size=int(documents[5].max()))
    with pytest.raises(ValueError, match=rf"shard-00001.tar: document 5 has token {documents[5].max()} at {where},"):
        TokenReader(index).read(5, 1, 999)
