"""Which checkpoints stay."""

import os

import pytest

from infini_train.run_files import COMPLETE
from infini_train.training import checkpoint_directory
from infini_train.training.checkpoint import Checkpointer
from infini_train.training.checkpoint_directory import CheckpointDirectory


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
        Checkpointer(tmp_path, every_n_steps=0, keep_last=-1, keep_every_n_steps=0, keep_every_hours=-1.0)
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
