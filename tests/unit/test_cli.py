"""What a user can get wrong ends in one message that names it, exit code 2, and nothing lost."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infini_train.__main__ import main
from infini_train.cli import USER_ERRORS
from infini_train.errors import exit_code
from tests.helpers.datasets import make_dataset
from tests.helpers.runs import arguments, fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli")
    make_dataset(directory / "shards", [300, 45, 120, 200])
    run = fit(directory / "run", directory / "shards", "--trainer.max_steps", "3")
    assert run.code == 0, run.err
    return directory


def test_all_files_of_a_run_have_the_permissions_of_the_umask(trained):
    """Also those of libraries that make files which only their owner can read."""
    (trained / "ordinary").touch()
    modes = {file: file.stat().st_mode for file in (trained / "run").rglob("*") if file.is_file()}
    assert modes == dict.fromkeys(modes, (trained / "ordinary").stat().st_mode)


def refused(run: Path, dataset: Path, *extra: str) -> str:
    """The message of a run that ends as a user's mistake."""
    result = fit(run, dataset, *extra)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    return result.err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--data.lanes", "5"],
            "data.lanes: found 5, expected micro_batch_size * world size * accumulate_grad_batches",
        ),
        (["--model.vocab_size", "50"], "model.vocab_size: found 50, expected at least 100"),
        (["--model.num_key_value_heads", "3"], "num_key_value_heads: found 3, expected a divisor"),
        (["--model.optimizer.lr", "-1"], "model.optimizer.lr: found -1"),
        (["--model.memory", "paper"], "model.memory: found paper, expected one of paper-linear, paper-delta,"),
        (["--trainer.max_steps", "six"], "trainer.max_steps: found six, expected int"),
        (["--data.rows", "3"], "unrecognized arguments: --data.rows 3"),
        (
            ["--data.lane", "3", "--data.lanez", "4"],
            "unrecognized arguments: --data.lanez 4; did you mean --data.lanes?",
        ),
        (["--config", "none.yaml"], "config: file does not exist: "),
        (["--ckpt_path", "nowhere"], "nowhere: expected a complete checkpoint directory"),
        (["--data.validation", "nowhere"], "nowhere"),
        (
            ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val_loss"],
            "found val_loss, expected",
        ),
    ],
)
def test_bad_options(trained, tmp_path, extra, message):
    assert message in refused(tmp_path / "run", trained / "shards", *extra)
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_several_faults_are_told_at_once(trained, tmp_path):
    err = refused(tmp_path / "run", tmp_path / "none", "--data.lanes", "5")
    assert "data.lanes: found 5" in err
    assert str(tmp_path / "none") in err


def test_checkpoint_of_another_model(trained):
    err = refused(trained / "run", trained / "shards", "--model.hidden_size", "64", "--trainer.max_steps", "6")
    assert "hidden_size: found 32, expected 64" in err


def test_checkpoint_of_another_dataset(trained, tmp_path):
    make_dataset(tmp_path / "other", [300, 45, 120, 200], seed=1)
    err = refused(trained / "run", tmp_path / "other", "--trainer.max_steps", "6")
    assert "cursor.fingerprint" in err


def test_fit_does_not_overwrite_a_run(trained):
    assert "has checkpoints" in refused(trained / "run", trained / "shards", "--ckpt_path", "null")


def test_a_failed_validation_does_not_mark_the_run_as_failed(trained):
    (trained / "run" / "first-error.txt").write_text("of training")
    result = fit(trained / "run", trained / "shards", "--data.validation", "null", command="validate")
    assert result.code == 2
    assert "data.validation: found no dataset, expected --data.validation DIRECTORY" in result.err
    assert (trained / "run" / "first-error.txt").read_text() == "of training"
    (trained / "run" / "first-error.txt").unlink()
    assert fit(trained / "run", trained / "shards", "--data.validation", "null", command="validate").code == 2
    assert not (trained / "run" / "first-error.txt").exists()


def test_a_misspelt_option_of_a_configuration_file_is_named_with_the_nearest(trained, tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {max_stepz: 3}")
    err = refused(tmp_path / "run", trained / "shards", "--config", str(tmp_path / "config.yaml"))
    assert "unknown option trainer.max_stepz; did you mean trainer.max_steps?" in err


def test_a_run_that_ends_before_its_last_step_says_so(trained, tmp_path):
    ended = fit(tmp_path / "run", trained / "shards", "--trainer.max_time", "00:00:00:00")
    assert ended.code == 0
    assert "ended after 0 of 20 steps, because trainer.max_time is over or a callback stopped" in ended.err


def test_damaged_checkpoint(trained, tmp_path):
    fit(tmp_path / "run", trained / "shards", "--trainer.max_steps", "3")
    lanes = next((tmp_path / "run" / "checkpoints").glob("step-*/lanes-*"))
    size = lanes.stat().st_size
    lanes.write_bytes(lanes.read_bytes()[:-10])
    err = refused(tmp_path / "run", trained / "shards", "--trainer.max_steps", "6")
    assert f"{lanes}: found {size - 10} bytes, expected {size}" in err


def test_pickle_in_a_checkpoint_is_not_run(trained, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    fit(tmp_path / "run", trained / "shards", "--trainer.max_steps", "3")
    last = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    torch.save({"state_dict": Evil()}, last / "state.ckpt")
    sizes = json.loads((last / "COMPLETE").read_text()) | {"state.ckpt": (last / "state.ckpt").stat().st_size}
    (last / "COMPLETE").write_text(json.dumps(sizes))
    assert fit(tmp_path / "run", trained / "shards", "--trainer.max_steps", "6").code != 0
    assert not (tmp_path / "pwned").exists()


def test_full_disk(trained, tmp_path):
    """The disk fills up during a save: one message, the older checkpoint is intact, and the run resumes from it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        assert fit(disk / "run", trained / "shards", "--trainer.max_steps", "3").code == 0
        filler = disk / "filler"
        used = sum(f.stat().st_size for f in disk.rglob("*") if f.is_file())
        filler.write_bytes(bytes(2 * 2**20 - used - 200_000))
        err = refused(disk / "run", trained / "shards", "--trainer.max_steps", "6")
        assert "could not be written" in err or "No space left" in err, err
        filler.unlink()
        assert not list((disk / "run" / "checkpoints").glob("*.tmp"))
        assert fit(disk / "run", trained / "shards", "--trainer.max_steps", "6").code == 0
        assert (disk / "run" / "checkpoints" / "latest").read_text() == "step-00000006"
    finally:
        subprocess.run(["umount", disk], check=True)


TRAINER = """
import os, sys, time
from pathlib import Path
from infini_train.training.run_lock import lock

file = lock(Path(sys.argv[1]))
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(100)
"""


def test_one_training_at_a_time_in_a_run(trained, tmp_path):
    """A second is told who is there, and ends so that a batch script starts it again; a killed one leaves no lock,
    even if a worker of its loader lives on."""
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-c", TRAINER, tmp_path / "run"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as first:
        worker = int(first.stdout.readline())
        second = fit(tmp_path / "run", trained / "shards", "--trainer.max_steps", "3")
        first.kill()
        first.wait()
        third = fit(tmp_path / "run", trained / "shards", "--trainer.max_steps", "3")
        os.kill(worker, signal.SIGKILL)
    assert second.code == 1
    assert f"run: process {first.pid} on {socket.gethostname()} is training there" in second.err
    assert "Traceback" not in second.err
    assert third.code == 0, third.err


def test_non_finite_step_stops_before_the_optimizer(trained, tmp_path):
    err = refused(tmp_path / "run", trained / "shards", "--model.optimizer.lr", "1e30")
    assert "step 1, rank 0: found loss" in err
    assert "lanes [0, 1, 2, 3]" in err
    batches = torch.load(tmp_path / "run" / "nonfinite-step-00000001-rank-00000.pt", weights_only=True)
    assert [b["lane_ids"].tolist() for b in batches] == [[0, 1], [2, 3]]


def test_arguments_name_every_option_once():
    words = arguments(Path("r"), Path("d"))[1::2]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["segments", "nowhere", "--dataset", "none"], "none"),
        (["recall", "nowhere", "--dataset", "{shards}"], "expected a dataset that `infini-train prep synth` drew"),
        (["segments", "nowhere", "--dataset", "{shards}"], "nowhere: expected an exported model"),
        (["segments", "nowhere", "--dataset", "{shards}", "--rows", "many"], "invalid int value: 'many'"),
    ],
)
def test_evaluate(trained, monkeypatch, capsys, words, message):
    words = [word.format(shards=trained / "shards") for word in words]
    monkeypatch.setattr("sys.argv", ["infini-train", "evaluate", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"infini-train evaluate {words[0]}: error: ")
    assert message in error


def test_exit_codes():
    """A batch script starts a run again after 1, and never after 2."""
    for error in (ValueError("lanes"), FileNotFoundError(2, "gone"), OSError(28, "No space left on device")):
        assert exit_code(error, USER_ERRORS) == 2
    passing = (OSError(5, "Input/output error"), OSError(116, "Stale file handle"), BlockingIOError("is training"))
    for error in (RuntimeError("a bug"), *passing):
        assert exit_code(error, USER_ERRORS) == 1
