"""`infini-train inspect` says what tensorboard, the checkpoint and SLURM say, of real runs, and survives damage."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from infini_train.inspection import events, report, show, slurm
from infini_train.inspection.__main__ import main
from infini_train.inspection.report import examine
from tests.helpers.datasets import make_dataset
from tests.helpers.runs import fit

LATER = 86400.0  # seconds, by which every process of these tests has long ended


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """A run's curves by tag and step, as tensorboard itself reads them."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: {e.step: e.value for e in board.Scalars(tag)} for tag in board.Tags()["scalars"]}


def median(values: list[float]) -> float:
    middle = sorted(values)
    return (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was killed, the same after it was resumed and killed again, and after it was finished."""
    root = tmp_path_factory.mktemp("inspect")
    make_dataset(root / "shards", [300, 45, 7, 120, 64, 33, 500, 20, 90, 211])
    make_dataset(root / "valid", [60, 45], seed=1)
    options = ["--data.validation", str(root / "valid"), "--trainer.val_check_interval", "10"]
    options += ["--checkpoint.every_n_steps", "8"]
    run = root / "run"
    for name, instant in (("killed", 147), ("again", 12), ("finished", None)):
        ended = fit(run, root / "shards", *options, die_at=instant)
        assert ended.code == (0 if instant is None else -signal.SIGKILL), ended.err
        shutil.copytree(run, root / name)
    return root


def check(run: Path, *, restarts: int) -> report.Report:
    found, curves = examine(run, time.time() + LATER), scalars(run)
    saved = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    metrics = json.loads((saved / "metrics.json").read_text())
    step = max(max(curves["train/loss"]), metrics["step"])
    assert (found.step, found.max_steps, found.restarts) == (step, 20, restarts)
    assert found.loss == pytest.approx(curves["train/loss"].get(step, metrics["loss"]))
    assert found.tokens == (step * 4 * 8 * 4 if step in curves["train/loss"] else metrics["tokens"])
    validated = max(curves["val/loss"])
    assert found.validation_step == validated
    assert found.validation_loss == pytest.approx(curves["val/loss"][validated])
    assert found.memory_benefit == pytest.approx(curves["val/memory_benefit"][validated])
    assert found.checkpoint.name == saved.name
    assert found.checkpoint.bytes == sum(f.stat().st_size for f in saved.iterdir() if f.name != "COMPLETE")
    assert found.checkpoint.time == (saved / "COMPLETE").stat().st_mtime
    assert found.checkpoint.fault is None
    return found


def test_finished_run(runs):
    found = check(runs / "finished", restarts=2)
    assert found.state == "finished"
    assert (found.step, found.validation_step, found.remaining_seconds, found.ends) == (20, 20, None, None)
    newest = sorted((runs / "finished" / "tensorboard").glob("events*"))[-1]
    board = EventAccumulator(str(newest))
    board.Reload()
    rates = [e.value for e in board.Scalars("speed/tokens_per_second")]
    assert found.tokens_per_second == pytest.approx(median(rates[-10:]))


def test_killed_run_goes_back_to_its_checkpoint(runs):
    """The second process did less than the first: steps that the first did beyond that are undone."""
    killed, again = check(runs / "killed", restarts=0), check(runs / "again", restarts=1)
    assert killed.state == again.state == "stopped"
    assert (
        killed.checkpoint.step == 8 <= again.step < killed.validation_step == 10 < killed.step
    )  # else this tests nothing
    assert killed.remaining_seconds == pytest.approx(12 * killed.step_seconds)
    assert killed.ends is None


def test_before_a_resumed_process_writes_a_file(runs, tmp_path):
    """SLURM's history knows of the start: the steps that it will do again are undone already."""
    run = shutil.copytree(runs / "killed", tmp_path / "run")
    before = examine(run, time.time())
    (run / "slurm" / "01").mkdir(parents=True)
    start = datetime.fromtimestamp(time.time() + 10).astimezone().isoformat(timespec="seconds")
    saved = before.checkpoint.name
    (run / "slurm" / "01" / "history").write_text(f"{start} 12 1 started {saved}\n")
    assert examine(run, time.time()).step == before.checkpoint.step < before.step
    (run / "slurm" / "01" / "history").write_text(f"2020-01-01T00:00:00Z 12 0 started {saved}\n")  # it wrote the file
    assert examine(run, time.time()).step == before.step


def write_run(run: Path, steps: int, seconds: float, start: float, done: int = 0) -> float:
    """A run of 1,000 steps that went on at `start` and did so many more; returns when the last one was done."""
    (run / "tensorboard").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("trainer:\n  max_steps: 1000\n")
    os.utime(run / "config.yaml", (start, start))
    with open(run / "tensorboard" / f"events.out.tfevents.{start:.0f}.host.1.0", "wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=start, file_version="brain.Event:2").SerializeToString())
        for step in range(done + 1, done + steps + 1):
            values = {
                "train/loss": 10 - step / 100,
                "train/tokens": step * 1000.0,
                "speed/tokens_per_second": 1000 / seconds,
                "speed/step_seconds": seconds,
            }
            for tag, value in values.items():
                event = Event(wall_time=start + seconds * (step - done), step=step)
                event.summary.value.add(tag=tag, simple_value=value)
                writer.write(event.SerializeToString())
    return start + seconds * steps


@pytest.mark.parametrize(
    ("seconds", "silence", "state"),
    [(5.0, 100, "running"), (5.0, 400, "stopped"), (500.0, 1400, "running"), (500.0, 1600, "stopped")],
)
def test_signs_of_life_and_expected_end(tmp_path, seconds, silence, state):
    """A run is alive as long as its steps explain its silence."""
    run = tmp_path / "run"
    last = write_run(run, 40, seconds, 1.8e9)
    found = examine(run, last + silence)
    assert (found.state, found.step, found.tokens, found.max_steps) == (state, 40, 40_000, 1000)
    assert (found.last_sign_of_life, found.step_seconds) == (last, seconds)
    text = dict(show.rows(found, last + silence))
    assert text["step"] == "40 of 1,000 (4.0%)"
    assert text["state"] == f"{state}: last sign of life {show.ago(silence)} ago"
    if state == "running":
        assert found.ends == last + 960 * seconds
        assert text["ends"].startswith(f"{datetime.fromtimestamp(found.ends):%Y-%m-%d %H:%M}")
    else:  # nothing was saved
        assert (found.ends, found.remaining_seconds) == (None, 1000 * seconds)


def test_speed_is_that_of_the_newest_process(tmp_path):
    """The one before ran on other machines."""
    run = tmp_path / "run"
    write_run(run, 40, 5.0, 1.8e9)
    last = write_run(run, 3, 2.0, 1.9e9, done=40)
    found = examine(run, last)
    assert (found.step, found.restarts, found.step_seconds, found.tokens_per_second) == (43, 1, 2.0, 500.0)
    assert found.ends == last + 957 * 2.0


def test_a_start_goes_on_from_where_the_last_process_was(tmp_path):
    """It takes the time that remains, from its own beginning on."""
    run = tmp_path / "run"
    last = write_run(run, 40, 500.0, 1.8e9)
    (run / "checkpoints" / "step-00000040").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step-00000040")
    os.utime(run / "config.yaml", (last + 900, last + 900))
    assert examine(run, last + 1000).ends == last + 900 + 960 * 500


@pytest.mark.parametrize(
    ("steps", "silence", "state", "detail"),
    [(40, 900, "running", "validating"), (40, 1900, "stopped", ""), (39, 900, "stopped", ""), (39, 9, "running", "")],
)
def test_validation_is_silent(tmp_path, steps, silence, state, detail):
    run = tmp_path / "run"
    last = write_run(run, steps, 5.0, 1.8e9)
    trainer = "max_steps: 1000\n  accumulate_grad_batches: 2\n  val_check_interval: 80"
    (run / "config.yaml").write_text(f"trainer:\n  {trainer}\ndata:\n  validation: v\nhang_timeout: 1800.0\n")
    os.utime(run / "config.yaml", (1.8e9, 1.8e9))
    found = examine(run, last + silence)
    assert (found.state, found.detail) == (state, detail)


def test_odd_numbers_and_names(tmp_path):
    run = tmp_path / "run"
    last = write_run(run, 40, 5.0, 1.8e9)
    (run / "config.yaml").write_text(f"trainer:\n  max_steps: {10**30}\n")
    (run / "checkpoints" / "step-x").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step-x")
    (run / "checkpoints" / "step-x" / "COMPLETE").write_text('{"\\u0000": 3}')
    found = examine(run, last)
    assert (found.step, found.remaining_seconds, found.checkpoint.step) == (40, None, None)
    assert found.checkpoint.fault
    assert "damaged" in dict(show.rows(found, last))["checkpoint"]


def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a program of this name before all others."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "squeue"
    program.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/asked\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


FORGOTTEN = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
BROKEN = "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1"
RUNS = "echo '12|RUNNING|None|n[1-2]'"
WAITS = "echo '12|PENDING|BeginTime|'"
ALIVE, DEAD = 30.0, 10_000.0


@pytest.mark.parametrize(
    ("history", "answer", "silence", "state", "detail"),
    [
        ("", WAITS, DEAD, "queued", "job 12 waits (BeginTime)"),
        ("", RUNS, DEAD, "running", "on n[1-2]"),
        ("", FORGOTTEN, DEAD, "not started", "job 12 is not in the queue"),
        ("", BROKEN, DEAD, "queued", "squeue does not answer"),
        ("0 started none", RUNS, ALIVE, "running", "on n[1-2]"),
        ("0 started none", "echo '12|SUSPENDED|None|n1'", DEAD, "running", "suspended on n1"),
        ("0 started none", WAITS, DEAD, "waiting", "job 12 ended without a word; job 12 waits to run again"),
        ("0 started none", FORGOTTEN, DEAD, "stopped", "job 12 ended without a word; job 12 is not in the queue"),
        ("0 started none", BROKEN, ALIVE, "running", "squeue does not answer"),
        ("0 started none", BROKEN, DEAD, "stopped", "squeue does not answer"),
        ("0 started none", "exec sleep 60", ALIVE, "running", "squeue does not answer"),
        ("0 preempted step-00000020", WAITS, DEAD, "preempted", "job 12 waits to run again (BeginTime)"),
        ("0 preempted step-00000020", RUNS, DEAD, "preempted", "waits to run again"),  # about to be requeued
        ("0 preempted step-00000020", FORGOTTEN, DEAD, "stopped", "job 12 is not in the queue"),
        ("0 preempted step-00000020", BROKEN, DEAD, "preempted", "squeue does not answer"),
        ("0 failed 137", WAITS, DEAD, "failed", "exit code 137; job 12 waits to run again (BeginTime)"),
        ("0 failed 2", FORGOTTEN, DEAD, "failed", "exit code 2; job 12 is not in the queue"),
        ("0 completed step-00001000", FORGOTTEN, DEAD, "finished", ""),
        ("3 gave-up step-00000020", FORGOTTEN, DEAD, "gave up", "step-00000020"),
        ("0 started none\nhalf a li", RUNS, ALIVE, "running", "on n[1-2]"),
    ],
)
def test_state_under_slurm(tmp_path, monkeypatch, history, answer, silence, state, detail):
    monkeypatch.setattr(slurm, "SECONDS", 0.5)
    squeue(tmp_path, monkeypatch, answer)
    run = tmp_path / "run"
    last = write_run(run, 40, 5.0, 1.8e9)
    submission = run / "slurm" / "01"
    submission.mkdir(parents=True)
    (submission / "jobs").write_text("12\n")
    (submission / "12.log").touch()
    if history:
        (submission / "history").write_text(f"2027-01-15T08:00:00Z 12 {history}\n")  # 1.8e9
    found = examine(run, last + silence)
    assert (found.state, found.job, found.log) == (state, "12", str(submission / "12.log"))
    assert detail in found.detail
    assert "-j 12 " in (tmp_path / "asked").read_text()
    if state == "running":
        assert "without time in the queue" in dict(show.rows(found, last + silence))["ends"]


def test_no_squeue(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = tmp_path / "run"
    (run / "slurm" / "01").mkdir(parents=True)
    (run / "slurm" / "01" / "jobs").write_text("12\n")
    assert (examine(run, 1.8e9).state, examine(run, 1.8e9).step) == ("queued", 0)


def test_restarts_and_chains(tmp_path, monkeypatch):
    """A job that was requeued, then a chain of which the second job runs, then a job that waits."""
    squeue(tmp_path, monkeypatch, "echo '31|PENDING|Dependency|'; echo '30|RUNNING|None|n1'; echo '40|PENDING|None|'")
    run = tmp_path / "run"
    write_run(run, 40, 5.0, 1.8e9)
    for number, jobs, history in (
        (
            "01",
            [12],
            ["12 0 started none", "12 0 preempted a", "12 1 started a", "12 1 failed 137", "12 2 started a"],
        ),
        ("02", [29, 30, 31], ["29 0 started a", "29 0 preempted b", "30 0 started b"]),
        ("03", [40], []),
    ):
        (run / "slurm" / number).mkdir(parents=True)
        (run / "slurm" / number / "jobs").write_text("".join(f"{job}\n" for job in jobs))
        lines = [f"2026-01-15T08:{number}:{second:02d}Z {event}\n" for second, event in enumerate(history)]
        (run / "slurm" / number / "history").write_text("".join(lines))
    found = examine(run, 1.8e9 + 200)
    assert (found.state, found.job, found.restarts) == ("running", "30", 4)
    assert found.restart_causes == {"preempted": 2, "exit code 137": 1, "ended without a word": 1}
    assert dict(show.rows(found, 0))["restarts"] == "4: 2 x preempted, 1 x exit code 137, 1 x ended without a word"
    assert "-j 12,29,30,31,40 " in (tmp_path / "asked").read_text()


def test_first_error_is_told(tmp_path):
    run = tmp_path / "run"
    last = write_run(run, 40, 5.0, 1.8e9)
    (run / "first-error.txt").write_text("rank 1 of 2, step 7, lanes [2, 3]: RuntimeError: \x1b[31mno\nmore")
    found = examine(run, last)
    assert found.state == "failed"
    assert found.detail == "rank 1 of 2, step 7, lanes [2, 3]: RuntimeError: [31mno more"


def test_damage_leaves_fields_unknown(runs, tmp_path, capsys):
    """Whatever is torn, flipped or missing: a report, with the fields that other files tell."""
    random.seed(0)
    whole = examine(runs / "finished", time.time())
    for number, name in enumerate(
        ["config.yaml", "checkpoints/latest", "COMPLETE", "metrics.json", "state.ckpt", *["tensorboard"] * 40]
    ):
        run = shutil.copytree(runs / "finished", tmp_path / str(number))
        last = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
        events = sorted((run / "tensorboard").glob("events*"))
        file = next(f for f in (run / name, last / name, random.choice(events)) if f.is_file())
        content = bytearray(file.read_bytes())
        if number % 2:
            content = content[: random.randrange(len(content))]
        else:
            for _ in range(20):
                content[random.randrange(len(content))] = random.randrange(256)
        file.write_bytes(content)
        show.inspect([run])
        found = examine(run, time.time())
        if name in ("COMPLETE", "metrics.json", "state.ckpt"):
            assert found.checkpoint.fault or found.checkpoint.bytes
            assert (found.step, found.loss) == (whole.step, whole.loss)
        if name == "config.yaml":
            assert found.step == 20
        if name == "tensorboard":  # the checkpoint knows where the run is
            assert found.step == 20
            assert found.loss == pytest.approx(whole.loss)
            assert found.validation_loss == pytest.approx(whole.validation_loss)
    assert "unknown" in capsys.readouterr().out


def test_a_damaged_point_is_no_point(tmp_path):
    """Its checksum is wrong: the one before counts. Of a torn file all whole records count."""
    run = tmp_path / "run"
    last = write_run(run, 40, 5.0, 1.8e9)
    file = next((run / "tensorboard").iterdir())
    content = file.read_bytes()
    place = content.rindex(b"train/loss")
    file.write_bytes(content[: place + 13] + b"\x00" + content[place + 14 :])
    assert examine(run, last).step == 39
    file.write_bytes(content[: place - 3])
    assert examine(run, last).step == 39
    file.write_bytes(content)
    assert examine(run, last).step == 40


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: None, FileNotFoundError, "no such directory"),
        (lambda path: path.touch(), NotADirectoryError, "found a file"),
        (lambda path: path.mkdir(), FileNotFoundError, "not a run's directory"),
    ],
)
def test_not_a_run(tmp_path, make, error, message):
    make(tmp_path / "run")
    with pytest.raises(error, match=f"run: .*{message}"):
        main([str(tmp_path / "run")])


def test_a_line_each_and_json(runs, capsys, tmp_path):
    names = ["killed", "again", "finished"]
    main([*(str(runs / name) for name in names), str(tmp_path / "none")])
    out, err = capsys.readouterr()
    heading, *rows = [line.split() for line in out.splitlines()]
    assert heading[:4] == ["run", "state", "step", "done"]
    assert [row[:2] for row in rows] == [
        [str(runs / name), state] for name, state in zip(names, ["running", "running", "finished"], strict=True)
    ]  # they were cut off only just now
    assert rows[2][2:4] == ["20", "100.0%"]
    assert f"{tmp_path / 'none'}: no such directory" in err

    main(["--json", *(str(runs / name) for name in names)])
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [o["state"] for o in objects] == ["running", "running", "finished"]
    assert objects[2]["checkpoint"]["name"] == "step-00000020"
    assert objects[2]["loss"] == examine(runs / "finished", time.time()).loss

    main([str(runs / "finished")])
    text = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert text["step"] == "20 of 20 (100.0%)"
    assert text["restarts"] == "2"
    assert text["loss"] == f"{objects[2]['loss']:.4f}"


def test_nan_is_no_json(capsys):
    assert show.finite({"loss": float("nan"), "checkpoint": {"bytes": 3, "metrics": {}}, "ends": float("inf")}) == {
        "loss": None,
        "checkpoint": {"bytes": 3},
        "ends": None,
    }


def test_imports_nothing_heavy():
    program = "import sys, infini_train.inspection.show; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "lightning", "transformers", "tensorflow"} & set(loaded.split())


def test_checksums_are_those_of_tensorboard():
    for data in (b"", b"123456789", bytes(range(256)) * 3):
        assert events.masked_crc32c(data) == masked_crc32c(data)
