"""Independent tasks make the same bytes as a single task, for any number of tasks and whichever process is killed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import webdataset

from data_prep.__main__ import main
from data_prep.documents import Document, DocumentReader
from data_prep.shard import append_corpus, shard_corpus
from data_prep.sources import find_inputs
from data_prep.steps import Finish, WriteShards
from data_prep.train_tokenizer import train_tokenizer
from data_prep.work import Work
from infini_train.files import replace_directory
from tests.helpers.corpora import REPOSITORY, all_bytes, text

OPTIONS: dict[str, Any] = {"validation_fraction": 0.2, "shard_tokens": 2000}
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/ with every format and files large enough to be split; t.model; single/, made by one task."""
    root = tmp_path_factory.mktemp("made")
    corpus = root / "corpus"
    corpus.mkdir()
    for i in range(5):
        (corpus / f"b{i}.txt").write_text(text(i, 60 * (i + 1)))
    lines = [json.dumps({"id": f"doc{i}", "text": text(i, 40 + i)}) for i in range(5, 45)]
    lines[7:7] = ["half a rec", "", '{"text": ""}', '{"text": "memory", "id": "\\ud800"}']
    (corpus / "a.jsonl").write_text("\n".join(lines))
    for name, cut in (("c.jsonl.gz", 0), ("d.jsonl.gz", 20)):  # d is truncated
        with pa.output_stream(str(corpus / name), compression="gzip") as f:
            f.write("\n".join(json.dumps({"text": text(100 * ord(name[0]) + i, 60)}) for i in range(30)).encode())
        os.truncate(corpus / name, (corpus / name).stat().st_size - cut)
    pq.write_table(pa.table({"text": [text(i, 80) for i in range(70, 95)]}), corpus / "e.parquet")
    (corpus / "z.txt").write_text("")  # an empty file, and the last
    train_tokenizer([corpus / "b4.txt"], root / "t.model", vocab_size=290)
    shard_corpus([corpus], root / "single", root / "t.model", tasks=1, **OPTIONS)
    return root


def prepare(made: Path, out: Path, **changes: Any) -> None:
    shard_corpus([made / "corpus"], out, made / "t.model", **(OPTIONS | changes))


def command(made: Path, out: Path, *options: str) -> list[str]:
    words = ["shard", made / "corpus", "--tokenizer", made / "t.model", "--out", out]
    words += ["--validation-fraction", "0.2", "--shard-tokens", "2000", *options]
    return [sys.executable, "-m", "data_prep", *map(str, words)]


def test_single_run_is_what_sentencepiece_and_webdataset_say(made: Path) -> None:
    """The reference of the tests below: documents of all formats, in the order of the files."""
    peer = sentencepiece.SentencePieceProcessor(model_file=str(made / "t.model"))
    shards = sorted(map(str, (made / "single").glob("*/*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    found = {json.loads(s["json"])["id"]: np.frombuffer(s["tokens.bin"], "<u2").tolist() for s in samples}
    expected = {f"corpus/b{i}.txt": text(i, 60 * (i + 1)) for i in range(5)}
    expected |= {f"doc{i}": text(i, 40 + i) for i in range(5, 45)}
    expected |= {f"corpus/e.parquet:{i - 69}": text(i, 80) for i in range(70, 95)}
    assert {id: found[id] for id in expected} == {id: [1, *peer.encode(t), 2] for id, t in expected.items()}
    assert len(shards) > 8
    rejects = [json.loads(line)["id"] for line in (made / "single" / "rejects.jsonl").read_text().splitlines()]
    assert rejects == ["corpus/a.jsonl:8", "corpus/a.jsonl:10", "corpus/d.jsonl.gz", "corpus/z.txt"]


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 40])
def test_shares_are_all_of_it_once(made: Path, tasks: int) -> None:
    files = find_inputs([made / "corpus"], Path("elsewhere"))
    whole = list(DocumentReader(files, "text", "id").with_positions())
    shares = [list(DocumentReader(files, "text", "id", task, tasks).with_positions()) for task in range(tasks)]
    assert all(share == sorted(share, key=lambda item: item[0]) for share in shares)
    assert sorted((item for share in shares for item in share), key=lambda item: item[0]) == whole
    assert [place for place, _ in whole] == sorted({place for place, _ in whole})
    dealt_out = {n for n in range(len(files)) if sum(any(place[0] == n for place, _ in s) for s in shares) > 1}
    assert not any(files[n].name.endswith(".txt") for n in dealt_out)
    assert bool(dealt_out) == (tasks > 2)


def test_shares_are_balanced_and_read_little(tmp_path: Path) -> None:
    draw = random.Random(0)
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text("m" * draw.randrange(1, 2000))
    files = find_inputs([tmp_path], Path("elsewhere"))
    readers = [DocumentReader(files, "text", "id", task, 7) for task in range(7)]
    loads = [sum(len(item.text) for item in reader if isinstance(item, Document)) for reader in readers]
    assert [reader.bytes_read for reader in readers] == [reader.bytes_total for reader in readers] == loads
    assert sum(loads) == sum(file.path.stat().st_size for file in files)
    assert max(loads) - min(loads) < 4000  # a file at either end

    readers = [DocumentReader(files[:1], "text", "id", task, 7) for task in range(7)]
    assert sum(reader.bytes_total for reader in readers) == files[0].path.stat().st_size  # a text file is not split

    for file in files:
        file.path.unlink()
    big = tmp_path / "big.jsonl"
    big.write_text("".join(json.dumps({"text": "m" * draw.randrange(1, 2000)}) + "\n" for _ in range(1000)))
    files = find_inputs([tmp_path], Path("elsewhere"))
    counts = [len(list(DocumentReader(files, "text", "id", task, 7))) for task in range(7)]
    assert sum(counts) == 1000
    assert max(counts) - min(counts) <= 3


def test_replaced_directory_is_put_back_if_its_successor_is_gone(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("a")
    with pytest.raises(FileNotFoundError):
        replace_directory(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "old" / "a").read_text() == "a"


@pytest.mark.parametrize(("tasks", "workers"), [(1, 1), (3, 2), (7, 3), (40, 1)])
def test_bytes_do_not_depend_on_tasks_or_workers(made: Path, tmp_path: Path, tasks: int, workers: int) -> None:
    out = tmp_path / "out"
    prepare(made, out, tasks=tasks, workers=workers)
    assert all_bytes(out) == all_bytes(made / "single")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")}
    prepare(made, out, tasks=tasks + 1)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")} == before


def test_bytes_do_not_depend_on_where_inputs_lie(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made / "corpus")
    shard_corpus([Path()], tmp_path / "out", made / "t.model", **OPTIONS)
    assert all_bytes(tmp_path / "out") == all_bytes(made / "single")


def finished_files(directory: Path) -> dict[str, tuple[int, int]]:
    """Finished parts, shards and plan of unfinished work, which must not be made again."""
    found = {}
    for pattern in ("parts/*.jsonl", "plan/shards.json", "indexes/**/index.json"):
        for path in directory.glob(f".out.work-*/{pattern}"):
            with suppress(FileNotFoundError):
                found[str(path)] = path.stat().st_ino, path.stat().st_mtime_ns
    return found


@pytest.mark.slow
def test_killed_at_ten_random_instants(made: Path, tmp_path: Path) -> None:
    """The main process is killed repeatedly; its workers exit with it, and finished tasks are not repeated."""
    draw, out, kills = random.Random(2), tmp_path / "out", 0
    patience = 1.0
    known: dict[str, tuple[int, int]] = {}
    while not out.exists() or kills < 10:
        assert kills < 40
        process = subprocess.Popen(
            command(made, out, "--tasks", "9", "--workers", "2"), cwd=REPOSITORY, stdout=subprocess.DEVNULL
        )
        try:
            assert process.wait(draw.uniform(0.8, patience)) == 0
            if kills < 10:  # the run was too fast
                shutil.rmtree(out)
                known, patience = {}, 1.0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills, patience = kills + 1, patience * 1.05
        time.sleep(0.2)  # for the workers to notice
        again = finished_files(tmp_path)
        assert out.exists() or not known or known.items() <= again.items()
        known = again
    assert all_bytes(out) == all_bytes(made / "single")
    prepare(made, out, tasks=9)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_worker_is_an_error_at_once(made: Path, tmp_path: Path) -> None:
    """As when memory runs out; datatrove's own executor would wait for ever."""
    code = (
        "import os, signal, sys\n"
        "import data_prep.steps as steps\n"
        "from data_prep.__main__ import main\n"
        "steps.WritePart.run = lambda self, data, rank, n: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = command(made, tmp_path / "out", "--tasks", "4")[3:]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "a worker process was killed, most likely because memory ran out" in line
    prepare(made, tmp_path / "out", tasks=4)
    assert all_bytes(tmp_path / "out") == all_bytes(made / "single")


def run_and_kill(finish: Callable[[], None], kill_at: int) -> int:
    """Exit code of a process that runs `finish` and dies just before its n-th rename or removal."""

    def run() -> None:
        steps = 0

        def count(step: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*arguments, **options)

            return counted

        for name in ("replace", "rename", "mkdir", "rmdir", "unlink"):
            setattr(os, name, count(getattr(os, name)))
        finish()

    process = fork.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("append", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_every_step_of_the_end(
    made: Path, tmp_path: Path, append: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage is killed before each of its steps in turn; running the same command again completes it."""
    first, second = tmp_path / "first.txt", made / "corpus" / "e.parquet"
    first.write_text(text(1000, 300))
    in_this_process = lambda function, items, _: map(function, items)  # noqa: E731
    monkeypatch.setattr("data_prep.engine.ordered_map", in_this_process)

    def start(root: Path) -> None:
        root.mkdir()
        if append:
            shard_corpus([first, made / "corpus" / "b1.txt"], root / "out", made / "t.model", **OPTIONS)

    def finish(root: Path) -> None:
        if append:
            append_corpus([second], root / "out", tasks=2)
        else:
            shard_corpus([second], root / "out", made / "t.model", tasks=2, **OPTIONS)

    start(tmp_path / "unbroken")
    finish(tmp_path / "unbroken")
    expected = all_bytes(tmp_path / "unbroken" / "out")
    start(tmp_path / "begun")
    with monkeypatch.context() as patch:
        patch.setattr(Finish, "run", lambda *_: (_ for _ in ()).throw(OSError("not yet")))
        with pytest.raises(OSError, match="not yet"):
            finish(tmp_path / "begun")
    kills = 0
    for kill_at in range(1, 200):
        root = tmp_path / f"kill{kill_at}"
        shutil.copytree(tmp_path / "begun", root)
        (work,) = root.glob(".out.work-*")
        named = next((tmp_path / "begun").glob(".out.work-*")).name
        assert work.name == named  # the name does not depend on the location
        code = run_and_kill(partial(finish, root), kill_at)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        finish(root)
        assert all_bytes(root / "out") == expected, kill_at
        assert [path.name for path in root.iterdir()] == ["out"], kill_at
        shutil.rmtree(root)
        if code == 0:
            break
    assert kills > 8


def test_other_options_while_work_is_unfinished(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(WriteShards, "run", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(OSError, match="no room"):
            prepare(made, out, tasks=3)
    for changes, name in (({"shard_tokens": 9, "tasks": 3}, "shard_tokens"), ({"tasks": 2}, "tasks")):
        with pytest.raises(ValueError, match=rf"unfinished work, made with other options \({name}\).*--overwrite"):
            prepare(made, out, **changes)
    assert len(finished_files(tmp_path)) == 4  # three parts and the plan
    prepare(made, out, tasks=3)
    assert all_bytes(out) == all_bytes(made / "single")
    prepare(made, out, tasks=2, overwrite=True, shard_tokens=9000)
    assert len(all_bytes(out)) < len(all_bytes(made / "single"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_input_that_changes_meanwhile_is_refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made / "corpus", tmp_path / "corpus")
    read = Work.inputs

    def changed(self: Work) -> Any:
        (tmp_path / "corpus" / "b0.txt").write_text("memory")
        return read(self)

    monkeypatch.setattr(Work, "inputs", changed)
    with pytest.raises(RuntimeError, match=r"b0\.txt has changed: found 6 bytes"):
        shard_corpus([tmp_path / "corpus"], tmp_path / "out", made / "t.model")


def test_damaged_part_is_named(tmp_path: Path) -> None:
    work = Work(tmp_path / "out", {}, 1)
    work.part(0, "jsonl").parent.mkdir(parents=True)
    work.part(0, "jsonl").write_text('[[[0, 0], {"id": "a", "source": "b", "reason": "empty", "detail": ""}]]\n[[0')
    with pytest.raises(ValueError, match=r"part-00000\.jsonl is truncated"):
        list(work.headers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "0"], "tasks: found 0, expected at least 1"),
        (["--executor", "slurm"], "--executor slurm and --cluster FILE go together"),
        (["--cluster", "x.yaml"], "--executor slurm and --cluster FILE go together"),
        (["--join", "directory:x"], "join: found directory:x, expected directory, directory:N or a field"),
        (["--min-tokens", "-1"], "min_tokens: found -1, expected at least 0"),
    ],
)
def test_wrong_options(
    made: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(made, tmp_path / "out")[3:], *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())
