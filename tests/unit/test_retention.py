"""Which checkpoints stay."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from infini_train.files import xxh3_of_file
from infini_train.run_files import (
    COMPLETE,
    LATEST,
    METRICS,
    FileSums,
    changed,
    complete,
    files_of,
    latest,
    point_to,
)
from infini_train.training import checkpoint_directory
from infini_train.training.beginning import checkpoint_to_begin_from
from infini_train.training.callbacks.throughput import Throughput
from infini_train.training.checkpoint import Checkpointer
from infini_train.training.checkpoint_directory import CheckpointDirectory, write_complete


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        ({"keep_last": 2}, [90, 100]),
        ({"keep_last": 1}, [100]),
        ({"keep_last": 1, "keep_every_n_steps": 40}, [40, 80, 100]),
        ({"keep_last": 2, "keep_every_hours": 3.0}, [10, 40, 70, 90, 100]),
        ({"keep_last": 1, "keep_every_hours": 5.0, "keep_every_n_steps": 50}, [10, 50, 60, 100]),
    ],
)
def test_retention(tmp_path, options, stay):
    """Ten checkpoints, one an hour, each of which asks what may go."""
    directory = CheckpointDirectory(tmp_path, **options)
    for hour, step in enumerate(range(10, 101, 10)):
        path = directory.of_step(step)
        path.mkdir()
        (path / COMPLETE).write_text("{}")
        os.utime(path / COMPLETE, (1e9 + 3600 * hour,) * 2)
        directory.retain(path, {"validation": None})
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step-*")) == stay


def test_numbers_that_would_delete_or_never_save_are_refused(tmp_path):
    """A negative keep_last once deleted every checkpoint, the newest included."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        Checkpointer(tmp_path, Throughput(), 0, keep_last=-1, keep_every_n_steps=0, keep_every_hours=-1.0)
    assert str(error.value).splitlines() == [
        "checkpoint.every_n_steps: found 0, expected at least 1",
        "checkpoint.keep_last: found -1, expected at least 1",
        "checkpoint.keep_every_n_steps: found 0, expected at least 1",
        "checkpoint.keep_every_hours: found -1.0, expected more than 0",
    ]


def test_a_name_is_gone_from_the_disk_before_the_first_file_is(tmp_path, monkeypatch):
    """A power cut between the two would otherwise leave a checkpoint that lacks files."""
    directory = CheckpointDirectory(tmp_path, keep_last=1)
    directory.of_step(3).mkdir()
    (directory.of_step(3) / COMPLETE).write_text("{}")
    done: list[tuple[str, str]] = []

    def watch(owner, name):
        act = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda path: (done.append((name, path.name)), act(path)))

    watch(checkpoint_directory, "sync")
    watch(checkpoint_directory.shutil, "rmtree")
    directory.remove(directory.of_step(3))
    assert done == [("sync", tmp_path.name), ("rmtree", "step-00000003.removed.tmp")]
    assert not list(tmp_path.iterdir())


def save(directory: CheckpointDirectory, step: int, weights: str) -> Path:
    """A save of a checkpoint of two files."""
    final = directory.of_step(step)
    partial = final.with_name(final.name + ".tmp")
    partial.mkdir()
    files = {}
    for name, content in (("weights", weights), (METRICS, json.dumps({"step": step, "validation": None}))):
        (partial / name).write_text(content)
        files[name] = FileSums(size=len(content), xxh3=xxh3_of_file(partial / name))
    directory.commit(partial, final, files)
    return final


def opened(run: Path) -> CheckpointDirectory:
    """The directory as the next start of the run finds it."""
    directory = CheckpointDirectory(run / "checkpoints", keep_last=1)
    directory.prepare()
    return directory


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with checkpoints of steps 2 and 4."""
    monkeypatch.setattr(checkpoint_directory, "read_back", lambda path, step: None)  # there is no real state
    (tmp_path / "run").mkdir()
    directory = opened(tmp_path / "run")
    save(directory, 2, "two")
    save(directory, 4, "four")
    return tmp_path / "run"


def killed_everywhere(run: Path, act: Callable[[CheckpointDirectory], object]) -> Iterator[CheckpointDirectory]:
    """Yield the run as it is found after a kill before or after each call by which `act` changes the disk."""
    kept = shutil.copytree(run, run.with_name("kept"))
    for instant in itertools.count(1):
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        child = os.fork()
        if not child:
            count = itertools.count(1)

            def watch(name: str, count: Iterator[int] = count, instant: int = instant) -> None:
                change = getattr(os, name)

                def watched(*arguments: Any, **options: Any) -> Any:
                    if next(count) == instant:
                        os._exit(9)
                    result = change(*arguments, **options)
                    if next(count) == instant:
                        os._exit(9)
                    return result

                setattr(os, name, watched)

            for name in ("rename", "replace", "unlink", "rmdir", "fsync"):
                watch(name)
            act(opened(run))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        checkpoint_to_begin_from(run, "last", "all")
        yield opened(run)
        if code == 0:
            assert instant > 10
            return


def as_written(path: Path) -> bool:
    return all(xxh3_of_file(path / name) == sums["xxh3"] for name, sums in files_of(path).items())


def steps(directory: CheckpointDirectory) -> list[int]:
    return [int(path.name[5:]) for path in complete(directory.path)]


def test_a_kill_while_a_validation_is_added(run):
    """The checkpoint is whole and the run's own; the next start adds the validation."""
    metrics = {"step": 4, "validation": {"step": 4, "val/loss": 1.5}}
    for found in killed_everywhere(run, lambda directory: directory.replace_metrics(directory.of_step(4), metrics)):
        assert not found.foreign
        last = found.of_step(4)
        assert as_written(last)
        assert json.loads((last / METRICS).read_text()) in (metrics, {"step": 4, "validation": None})
        found.replace_metrics(last, metrics)
        assert METRICS in files_of(last) and as_written(last)
        assert json.loads((last / METRICS).read_text()) == metrics
        found.retain(save(found, 6, "six"), {"validation": None})
        assert steps(found) == [6]


def test_a_kill_while_a_checkpoint_replaces_an_older_one_of_its_step(run):
    """The run went back to step 2, and reaches step 4 again: no checkpoint of its own counts as another run's."""
    back = opened(run)
    point_to(back.of_step(2), LATEST)
    for found in killed_everywhere(run, lambda directory: save(directory, 4, "four again")):
        assert not found.foreign
        assert {path.name for path in found.path.iterdir()} <= {"step-00000002", "step-00000004", "latest"}
        newest = latest(found.path)
        assert newest is not None and as_written(newest)
        assert (newest / "weights").read_text() in ("two", "four again")
        assert all(as_written(path) for path in complete(found.path))


def test_a_kill_in_the_first_save(tmp_path, monkeypatch):
    """The run starts over, as often as it is killed, and is not told that checkpoints are lost."""
    monkeypatch.setattr(checkpoint_directory, "read_back", lambda path, step: None)
    run = tmp_path / "run"
    run.mkdir()
    for found in killed_everywhere(run, lambda directory: save(directory, 2, "two")):
        assert not found.foreign
        begun = [checkpoint_to_begin_from(run, "last", "all")[0] for _ in range(2)]
        assert begun in ([None, None], [found.of_step(2)] * 2)


def test_a_checkpoint_of_another_run_is_not_changed_or_taken_over(run):
    """Not even where a validation is due that its run has not done."""
    (run / "run.json").unlink()
    for _ in range(2):
        directory = opened(run)
        assert directory.foreign == {directory.of_step(2), directory.of_step(4)}
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        directory.replace_metrics(directory.of_step(4), {"step": 4, "validation": {"step": 4}})
        directory.retain(directory.of_step(4), {"validation": None})
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_was_moved_and_linked_stays(run, tmp_path):
    directory = opened(run)
    directory.of_step(2).rename(tmp_path / "archive")
    directory.of_step(2).symlink_to(tmp_path / "archive")
    directory = opened(run)
    directory.retain(directory.of_step(4), {"validation": None})
    assert steps(directory) == [2, 4]
    assert save(directory, 2, "two again").is_dir()  # in the place of the link, which gets another name
    assert (tmp_path / "archive" / "weights").read_text() == "two"


def test_every_bit_of_complete_matters(tmp_path):
    """Also where one flipped bit makes the name of one file that of another."""
    for name in ("state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors", METRICS):
        (tmp_path / name).write_text(name)
    names = [path.name for path in tmp_path.iterdir()]
    write_complete(tmp_path, {n: FileSums(size=len(n), xxh3=xxh3_of_file(tmp_path / n)) for n in names})
    whole = (tmp_path / COMPLETE).read_bytes()
    assert changed(tmp_path) is None and as_written(tmp_path)
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / COMPLETE).write_bytes(content)
        with suppress(ValueError):
            assert changed(tmp_path) is not None or not as_written(tmp_path), (bit, bytes(content))
