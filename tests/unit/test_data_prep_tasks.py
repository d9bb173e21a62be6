"""Shards by independent tasks: always the bytes of a single run, whatever the order, and whoever is killed."""

import errno
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
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
from data_prep.documents import Document, DocumentReader, find_inputs
from data_prep.shard import shard_corpus
from data_prep.tasks import Parts
from data_prep.train_tokenizer import train_tokenizer
from data_prep.writing import replace_directory
from tests.unit.test_data_prep_shard import REPOSITORY, all_bytes, read_with_tarfile, text

OPTIONS: dict[str, Any] = {"validation_fraction": 0.2, "shard_tokens": 2000}
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/ of every format, with files large enough to be dealt out; t.model; what a single run makes, single/."""
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
            f.write("\n".join(json.dumps({"text": text(ord(name[0]) + i, 60)}) for i in range(30)).encode())
        os.truncate(corpus / name, (corpus / name).stat().st_size - cut)
    pq.write_table(pa.table({"text": [text(i, 80) for i in range(70, 95)]}), corpus / "e.parquet")
    (corpus / "z.txt").write_text("")  # an empty file, and the last
    train_tokenizer([corpus / "b4.txt"], root / "t.model", vocab_size=290)
    shard_corpus([corpus], root / "single", root / "t.model", **OPTIONS)
    return root


def prepare(made: Path, out: Path, task: int, tasks: int, **changes: Any) -> None:
    shard_corpus([made / "corpus"], out, made / "t.model", task=(task, tasks), **(OPTIONS | changes))


def in_processes(*calls: Callable[[], None]) -> list[Any]:
    """Start all at once; the caller waits for them or kills them."""
    processes = [fork.Process(target=call) for call in calls]
    for process in processes:
        process.start()
    return processes


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
    whole = list(DocumentReader(files, "text", "id").placed())
    shares = [list(DocumentReader(files, "text", "id", task, tasks).placed()) for task in range(tasks)]
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
    assert sum(reader.bytes_total for reader in readers) == files[0].path.stat().st_size  # a text is not dealt out

    for file in files:
        file.path.unlink()
    big = tmp_path / "big.jsonl"
    big.write_text("".join(json.dumps({"text": "m" * draw.randrange(1, 2000)}) + "\n" for _ in range(1000)))
    files = find_inputs([tmp_path], Path("elsewhere"))
    counts = [len(list(DocumentReader(files, "text", "id", task, 7))) for task in range(7)]
    assert sum(counts) == 1000
    assert max(counts) - min(counts) <= 3


@pytest.mark.parametrize("tasks", [1, 4, 12])
def test_any_order_makes_what_a_single_run_makes(
    made: Path, tmp_path: Path, tasks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    order = list(range(tasks))
    random.Random(1).shuffle(order)
    out = tmp_path / "out"
    for done, task in enumerate(order):
        assert not out.exists()
        for _ in range(2):  # the second time it does nothing, while others are missing
            parts = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".out.parts-*/*")}
            prepare(made, out, task, tasks, workers=1 + task % 2)
            if out.exists():
                break
            assert f"task {task} of {tasks} is done" in capsys.readouterr().out
        else:
            assert {path: path.stat().st_mtime_ns for path in parts} == parts
            assert len(parts) == done + 2  # the options, too
    assert all_bytes(out) == all_bytes(made / "single")
    for part in ("train", "valid"):
        assert read_with_tarfile(out / part) == read_with_tarfile(made / "single" / part)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")}
    capsys.readouterr()
    for n in (tasks, tasks + 1):
        prepare(made, out, 0, n)
        assert "nothing to do" in capsys.readouterr().out
    shard_corpus([made / "corpus"], out, made / "t.model", **OPTIONS)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_at_random_instants(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tasks at once, again and again, those killed by SIGKILL that are not quick enough, until it is done."""
    monkeypatch.setattr("data_prep.shard.BATCH_CHARACTERS", 500)
    draw = random.Random(2)
    for run in range(2):
        out = tmp_path / f"out{run}"
        kills = 0
        while not out.exists():
            patience = 0.005 * 1.2**kills  # seconds: none gets through at first, all at last
            running = in_processes(*(partial(prepare, made, out, task, 4) for task in range(4)))
            for process in running:
                process.join(draw.uniform(0, patience))
                if process.exitcode is None:
                    process.kill()
                    process.join()
                    kills += 1
                else:
                    assert process.exitcode == 0
        assert kills >= 4
        prepare(made, out, 0, 4)  # whatever a kill left behind once the output was there
        assert all_bytes(out) == all_bytes(made / "single")
        assert [path.name for path in tmp_path.iterdir()] == [f"out{run}"]
        shutil.rmtree(out)


def test_killed_at_every_step(made: Path, tmp_path: Path) -> None:
    """SIGKILL just before the n-th rename or removal of the last task, for every n; the next run mends it."""
    corpus = made / "corpus" / "e.parquet"
    shard_corpus([corpus], tmp_path / "single", made / "t.model", shard_tokens=3000)
    first, out = tmp_path / "first", tmp_path / "out"
    shard_corpus([corpus], first, made / "t.model", shard_tokens=3000, task=(0, 2))
    (parts,) = tmp_path.glob(".first.parts-*")

    def run(kill_at: int | None = None) -> None:
        steps = 0

        def count(step: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*arguments, **options)

            return counted

        for name in ("replace", "rename", "mkdir", "rmdir"):
            setattr(os, name, count(getattr(os, name)))
        shard_corpus([corpus], out, made / "t.model", shard_tokens=3000, task=(1, 2))

    kills = 0
    for kill_at in range(1, 200):
        shutil.copytree(parts, tmp_path / parts.name.replace("first", "out"))
        (process,) = in_processes(partial(run, kill_at))
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
        if out.exists():
            assert all_bytes(out) == all_bytes(tmp_path / "single")
        (again,) = in_processes(run)
        again.join()
        assert again.exitcode == 0
        assert all_bytes(out) == all_bytes(tmp_path / "single")
        assert not list(tmp_path.glob(".out.*"))
        shutil.rmtree(out)
        if process.exitcode == 0:
            break
    assert kills > 10


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def locks_of_this_node_only(*_: object) -> None: ...


@pytest.mark.parametrize("flock", [fcntl.flock, no_locks, locks_of_this_node_only])
def test_all_find_all_parts_done_at_once(
    made: Path, tmp_path: Path, flock: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when all elements are submitted again after the one that joined was killed; locks only spare work."""
    with_locks = flock is fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    items, joins = Parts.items, tmp_path / "joins"

    def counted(self: Parts) -> Any:
        with open(joins, "a") as f:
            f.write(".")
        return items(self)

    monkeypatch.setattr(Parts, "items", counted)
    for run in range(2):
        out = tmp_path / f"out{run}"
        with monkeypatch.context() as patch:
            patch.setattr(Parts, "joining", contextmanager(lambda self: iter([None])))
            for task in range(4):
                prepare(made, out, task, 4)
        assert not out.exists()
        running = in_processes(*(partial(prepare, made, out, task, 4) for task in range(4)))
        for process in running:
            process.join()
        exits = [process.exitcode for process in running]
        assert exits.count(0) == 4 if with_locks else 0 in exits
        assert joins.read_text() == "." or not with_locks
        joins.unlink()
        assert all_bytes(out) == all_bytes(made / "single")
        prepare(made, out, 0, 4)
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("moment", ["open", "missing", "joining", "items"])
def test_others_join_at_an_awkward_moment(
    made: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parts are done; just before one task takes a step, another one joins and removes them."""
    out, step = tmp_path / "out", getattr(Parts, moment)
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "joining", contextmanager(lambda self: iter([None])))
        for task in range(2):
            prepare(made, out, task, 2)

    def overtaken(self: Parts, *arguments: Any) -> Any:
        monkeypatch.setattr(Parts, moment, step)
        prepare(made, out, 1, 2)
        return step(self, *arguments)

    monkeypatch.setattr(fcntl, "flock", locks_of_this_node_only)
    monkeypatch.setattr(Parts, moment, overtaken)
    prepare(made, out, 0, 2)
    assert f"another task has made {out}" in capsys.readouterr().out
    assert all_bytes(out) == all_bytes(made / "single")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_replaced_directory_is_put_back_if_its_successor_is_gone(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("a")
    with pytest.raises(FileNotFoundError):
        replace_directory(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "old" / "a").read_text() == "a"


def test_other_options_while_tasks_are_unfinished(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    shutil.copytree(made / "corpus", corpus)

    def run(task: tuple[int, int], **changes: Any) -> None:
        shard_corpus([corpus], out, made / "t.model", task=task, **(OPTIONS | changes))

    run((0, 3))
    for task, changes, name in (((1, 3), {"shard_tokens": 9}, "shard_tokens"), ((1, 2), {}, "tasks")):
        with pytest.raises(ValueError, match=rf"unfinished work, made with other options \({name}\).*--overwrite"):
            run(task, **changes)
    run((1, 3))
    (corpus / "b0.txt").write_text("memory")
    with pytest.raises(ValueError, match=r"other options \(inputs\)"):
        run((2, 3))
    for task in range(3):
        run((task, 3), overwrite=True)
    shard_corpus([corpus], tmp_path / "single", made / "t.model", **OPTIONS)
    assert all_bytes(out) == all_bytes(tmp_path / "single")

    # a finished output stays until its successor is whole
    before = all_bytes(out)
    with pytest.raises(ValueError, match=r"exists and was made with other options \(shard_tokens\)"):
        run((0, 2), shard_tokens=500)
    assert not list(tmp_path.glob(".out.*"))
    run((0, 2), shard_tokens=500, overwrite=True)
    assert all_bytes(out) == before
    run((1, 2), shard_tokens=500, overwrite=True)
    shard_corpus([corpus], tmp_path / "single", made / "t.model", **OPTIONS | {"shard_tokens": 500}, overwrite=True)
    assert all_bytes(out) == all_bytes(tmp_path / "single") != before
    assert not list(tmp_path.glob(".out.*"))


def test_work_thrown_away_by_others_is_no_success(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--overwrite with other options, while a task of the old ones is at work: that one fails."""

    def overtaken(self: Parts, task: int, items: object) -> None:
        monkeypatch.undo()
        prepare(made, tmp_path / "out", 0, 2, shard_tokens=500, overwrite=True)
        self.write(task, [])

    monkeypatch.setattr(Parts, "write", overtaken)
    with pytest.raises(FileNotFoundError, match="part-00001"):
        prepare(made, tmp_path / "out", 1, 2)


def test_damaged_part_is_named(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(made, out, 0, 2)
    (part,) = tmp_path.glob(".out.parts-*/part-00000")
    for size in (part.stat().st_size - 5, 20_000, 15):  # without its end, within tokens, within a line
        os.truncate(part, size)
        with pytest.raises(ValueError, match="part-00000 is truncated"):
            prepare(made, out, 1, 2)
        assert not out.exists()
    part.unlink()
    prepare(made, out, 0, 2)
    assert all_bytes(out) == all_bytes(made / "single")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "4"], "--task and --tasks go together"),
        (["--task", "0"], "--task and --tasks go together"),
        (["--tasks", "4", "--task", "4"], "task must be at least 0 and below tasks, not 4 of 4"),
        (["--tasks", "4", "--task", "-1"], "task must be at least 0 and below tasks, not -1 of 4"),
        (["--tasks", "0", "--task", "0"], "task must be at least 0 and below tasks, not 0 of 0"),
    ],
)
def test_wrong_tasks(
    made: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shard", str(made / "corpus"), "--tokenizer", str(made / "t.model"), "--out", str(tmp_path / "out")]
    assert main([*command, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_too_few_documents_is_said_by_the_last_task(tmp_path: Path, made: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(" ")
    for task in (0, 1):
        shard_corpus([tmp_path / "corpus"], tmp_path / "out", made / "t.model", task=(task, 3))
    with pytest.raises(ValueError, match=r"no document in .*corpus \(1 empty left out\)"):
        shard_corpus([tmp_path / "corpus"], tmp_path / "out", made / "t.model", task=(2, 3))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.*/joined-*"))


@pytest.mark.parametrize(
    ("array", "options", "expected"),
    [
        ("2 3 4", [], "--workers 1 in --out o --tasks 4 --task 2"),
        ("2 2 1", ["--tasks", "4"], "--workers 1 in --out o --tasks 4 --task 2"),
        ("2 2 1", [], "give --tasks N"),
        ("2 4 4", [], "give --tasks N"),
        ("0 6 4", [], "give --tasks N"),
        ("2 3 4", ["--task", "1"], "leave it out"),
        ("", [], "submit it as an array job"),
    ],
)
def test_batch_script(tmp_path: Path, array: str, options: list[str], expected: str) -> None:
    """Which task it runs, by element, highest and number of the array's elements."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "ran $*"\n')
    (tmp_path / "python").chmod(0o755)
    names = (f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MAX", "COUNT"))
    slurm = dict(zip(names, array.split(), strict=False)) | {"SLURM_ARRAY_JOB_ID": "1"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "INFINI_"))}
    done = subprocess.run(
        ["bash", REPOSITORY / "slurm" / "prep.sbatch", "in", "--out", "o", *options],
        env=clean | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
    )
    if expected.startswith("--workers"):
        assert done.stdout.splitlines()[-1] == f"ran -m data_prep shard {expected}"
        assert done.returncode == 0
    else:
        assert expected in done.stderr
        assert done.returncode != 0
        assert "ran" not in done.stdout
