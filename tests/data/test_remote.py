"""Shards on a web server that fails in every way, and on moto's S3, give the tokens and losses of local shards."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from threading import Thread

import boto3
import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from werkzeug.serving import make_server

import infini_train.data.remote as remote
from data_prep.shard import shard_corpus
from data_prep.train_tokenizer import train_tokenizer
from infini_train.data.index import BLOCK_BYTES, INDEX_JSON, DatasetIndex
from infini_train.data.reader import TokenReader
from infini_train.data.remote import LEAST_CACHE, BlockCache, RemoteReader, load_index
from tests.helpers.corpora import CONFIG, text
from tests.helpers.servers import serving

FAULTS = ("500", "truncated", "wrong bytes", "short", "no ranges", "slow")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """12 documents of 0.1 to 1.4 MB of tokens in shards of several blocks."""
    root = tmp_path_factory.mktemp("remote")
    (root / "corpus").mkdir()
    for i in range(12):
        (root / "corpus" / f"{i}.txt").write_text(text(i, 30_000 * (1 + i)))
    train_tokenizer([root / "corpus" / "0.txt"], root / "t.model", vocab_size=290)
    shard_corpus([root / "corpus"], root / "served" / "set", root / "t.model", shard_tokens=1_500_000)
    assert sum(shard.bytes for shard in DatasetIndex.load(root / "served" / "set").shards) > 6 * BLOCK_BYTES
    return root / "served"


@pytest.fixture
def quick(monkeypatch):
    """Requests are given up after seconds instead of minutes."""
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.02)


def faulty(number: int) -> str | None:
    """Two of three requests fail, each time in a different way."""
    return None if number % 3 == 2 else FAULTS[(number - number // 3) % len(FAULTS)]


def slices(index: DatasetIndex, seed: int = 0) -> list[tuple[int, int, int]]:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(60):
        doc = int(draw.integers(index.documents))
        offset = int(draw.integers(index.tokens_D[doc]))
        found.append((doc, offset, int(draw.integers(1, index.tokens_D[doc] - offset + 1))))
    return found


def test_any_slice_despite_faults(dataset, tmp_path, quick):
    with serving(dataset) as server:
        server.fault = faulty
        index = load_index(f"{server.url}/set", tmp_path)
        here, there = TokenReader(DatasetIndex.load(dataset / "set")), RemoteReader(index)
        for place in slices(index):
            np.testing.assert_array_equal(there.read(*place), here.read(*place))
        assert set(server.faults) == {*FAULTS, "none"}
        blocks = len(index.block_digests)
        assert server.faults["none"] <= blocks  # each block was sent once
        before = server.ranges.total()
        for place in slices(index):
            np.testing.assert_array_equal(RemoteReader(index).read(*place), here.read(*place))
        assert server.ranges.total() == before  # everything came from the cache


def test_cache_is_checked(dataset, tmp_path):
    """A block in the cache that is damaged or truncated is fetched again."""
    with serving(dataset) as server:
        index = load_index(f"{server.url}/set", tmp_path)
        expected = RemoteReader(index).read(0, 0, 1000).copy()
        number = server.ranges.total()
        for path in (tmp_path / "blocks").iterdir():
            content = bytearray(path.read_bytes())
            content[2000] ^= 1
            path.write_bytes(content)
        np.testing.assert_array_equal(RemoteReader(index).read(0, 0, 1000), expected)
        for path in (tmp_path / "blocks").iterdir():
            os.truncate(path, 100)
        np.testing.assert_array_equal(RemoteReader(index).read(0, 0, 1000), expected)
        assert server.ranges.total() == number + 2


def test_what_never_comes_is_one_message(dataset, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    with serving(dataset) as server:
        index = load_index(f"{server.url}/set", tmp_path)
        reader = RemoteReader(index)
        for fault, message in (
            ("500", "500"),
            ("wrong bytes", "other bytes than those of the index's digest"),
            ("no ranges", "does the server know ranges"),
            ("slow", "Timeout"),
        ):
            server.fault = lambda number, fault=fault: fault
            with pytest.raises(
                OSError, match=rf"set/shard-00000\.tar, bytes from 0: .*{message}.*given up after \d+ tries"
            ):
                reader.read(0, 0, 10)
        with pytest.raises(FileNotFoundError, match=r"nothing/index\.json"):
            load_index(f"{server.url}/nothing", tmp_path)
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    with pytest.raises(OSError, match="given up"):
        load_index(f"{server.url}/set", tmp_path / "empty")


def test_prefetch_brings_what_read_wants(dataset, tmp_path):
    with serving(dataset) as server:
        reader = RemoteReader(load_index(f"{server.url}/set", tmp_path))
        before = server.ranges.total()
        reader.prefetch(3, 0, int(reader.index.tokens_D[3]))
        end = time.monotonic() + 20
        while (
            len(list((tmp_path / "blocks").glob("[!.]*"))) < server.ranges.total() or server.ranges.total() == before
        ):
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.2)
        before = server.ranges.total()
        reader.read(3, 0, int(reader.index.tokens_D[3]))
        assert server.ranges.total() == before


def test_cache_stays_below_its_limit(tmp_path):
    limit = 40 * BLOCK_BYTES
    cache, draw = BlockCache(tmp_path, limit), np.random.default_rng(0)
    contents = [draw.bytes(BLOCK_BYTES) for _ in range(60)]
    digests = [remote.digest_of(content) for content in contents]
    for number, (digest, content) in enumerate(zip(digests, contents, strict=True)):
        assert cache.get(digest, lambda content=content: content) == content
        cache.get(digests[0], lambda: pytest.fail("the one that is read all the time went"))
        size = sum(path.stat().st_size for path in (tmp_path / "blocks").iterdir())
        assert size <= limit + BLOCK_BYTES
        assert number < 25 or size > limit // 2
    with pytest.raises(ValueError, match="expected at least"):
        load_index("http://localhost:1/set", tmp_path, LEAST_CACHE - 1)


def read_all(index: DatasetIndex, seed: int) -> None:
    reader = RemoteReader(index)
    for place in slices(index, seed):
        reader.read(*place)


def test_processes_share_the_cache(dataset, tmp_path):
    """Four concurrent readers fetch each block once."""
    with serving(dataset) as server:
        index = load_index(f"{server.url}/set", tmp_path)
        fork = multiprocessing.get_context("fork")
        running = [fork.Process(target=read_all, args=(index, seed)) for seed in range(4)]
        for process in running:
            process.start()
        for process in running:
            process.join(60)
        assert [process.exitcode for process in running] == [0] * 4
        assert max(server.ranges.values()) == 1


def losses_of(run: Path, train: object, validation: str, cache: Path, **environment: str) -> list[tuple[int, float]]:
    config = {**CONFIG, "data": {**CONFIG["data"], "train": train, "validation": validation, "cache": str(cache)}}
    config["data"]["limit_validation_tokens_per_document"] = 512
    run.mkdir()
    (run / "given.yaml").write_text(yaml.safe_dump(config))
    words = [sys.executable, "-m", "infini_train", "fit", "--config", run / "given.yaml", "--run", run / "run"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    events = EventAccumulator(str(run / "run" / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def mixture(where: str) -> list[dict[str, object]]:
    return [{"path": where, "weight": 1.0}, {"path": where, "weight": 2.0}]


@pytest.mark.slow
def test_training_gives_the_losses_of_local_disk(dataset, tmp_path):
    with serving(dataset) as server:
        server.fault = lambda number: None if (fault := faulty(number)) == "slow" else fault
        url, here = f"{server.url}/set", str(dataset / "set")
        local = losses_of(tmp_path / "local", here, here, tmp_path / "unused")
        assert losses_of(tmp_path / "http", url, url, tmp_path / "cache") == local
        assert len(local) == 12
        assert len(set(server.faults)) > 3
        mixed = losses_of(tmp_path / "mixed-local", mixture(here), here, tmp_path / "unused")
        assert losses_of(tmp_path / "mixed", mixture(url), here, tmp_path / "cache2") == mixed != local
    assert not (tmp_path / "unused").exists()


class FaultyS3:
    """moto's S3, where two of three range requests fail or return wrong bytes."""

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app

        self.app, self.ranges, self.faults = DomainDispatcherApplication(create_backend_app), 0, Counter()

    def __call__(self, environ, start_response):
        fault = None
        if environ["REQUEST_METHOD"] == "GET" and environ.get("HTTP_RANGE"):
            fault = ("500 Internal Server Error", "wrong bytes", None)[self.ranges % 3]
            self.ranges += 1
            self.faults[fault] += 1
        if fault and fault.startswith("500"):
            start_response(fault, [("Content-Length", "0")])
            return [b""]
        content = b"".join(self.app(environ, start_response))
        return [bytes([content[0] ^ 1]) + content[1:] if fault else content]


@pytest.mark.slow
def test_training_from_s3(dataset, tmp_path, monkeypatch):
    app = FaultyS3()
    server = make_server("127.0.0.1", 0, app, threaded=True)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    keys["FSSPEC_S3_ENDPOINT_URL"] = keys["AWS_ENDPOINT_URL"] = endpoint
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    try:
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="books")
        for path in (dataset / "set").iterdir():
            client.upload_file(str(path), "books", f"set/{path.name}")
        here = str(dataset / "set")
        local = losses_of(tmp_path / "local", here, here, tmp_path / "unused")
        assert losses_of(tmp_path / "s3", "s3://books/set", here, tmp_path / "cache", **keys) == local
        assert len(list((tmp_path / "cache" / "blocks").iterdir())) >= 2
        assert app.faults["wrong bytes"] and len(app.faults) == 3
    finally:
        server.shutdown()


def test_index_without_digests_is_refused(dataset, tmp_path):
    index = DatasetIndex.load(dataset / "set")
    (tmp_path / "old").mkdir()
    for path in (dataset / "set").iterdir():
        if path.name != INDEX_JSON:
            (tmp_path / "old" / path.name).symlink_to(path)
    (tmp_path / "old" / "index.npz").unlink()
    index.root, index.block_digests = tmp_path / "old", None
    index.save()
    with serving(tmp_path) as server, pytest.raises(ValueError, match=r"no digests of blocks.*index --overwrite"):
        load_index(f"{server.url}/old", tmp_path / "cache")
