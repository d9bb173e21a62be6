"""One flipped bit or a lost file, anywhere in a checkpoint: it is refused in one line that names what is whole."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from infini_train.__main__ import main
from infini_train.inspection.__main__ import main as inspect
from infini_train.run_files import COMPLETE, files_of
from infini_train.training import checkpoint_format
from infini_train.training.checkpoint_format import check, read_back, verify, write_tensors
from tests.helpers.datasets import make_dataset
from tests.helpers.job import run as job
from tests.helpers.runs import fit

OPTIONS = ("--trainer.val_check_interval", "100", "--checkpoint.every_n_steps", "2", "--trainer.max_steps", "4")
LAST, OLDER = "step-00000004", "step-00000002"
FLIPS = 12  # of each file


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("damage")
    make_dataset(root / "shards", [300, 45, 120, 200])
    ended = fit(root / "run", root / "shards", *OPTIONS)
    assert ended.code == 0, ended.err
    return root


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def refusal(checkpoint: Path) -> str:
    """The message with which whoever loads a checkpoint refuses it, after checks that do not trust each other."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:  # noqa: PT012
        check(checkpoint)
        verify(checkpoint)
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    assert "weights_only=False" not in message and "allowlist" not in message
    return message


def every_flip_and_loss_is_refused(run: Path) -> int:
    """Returns the number of faults tried."""
    last = run / "checkpoints" / LAST
    tried = 0
    for file in sorted(last.iterdir()):
        content = file.read_bytes()
        draw = random.Random(file.name)
        for _ in range(FLIPS):
            flip(file, draw.randrange(8 * len(content)))
            message = refusal(last)
            assert str(last) in message
            assert file.name == COMPLETE or str(file) in message
            assert f"{last.parent / OLDER} is whole: --ckpt_path {last.parent / OLDER} goes on" in message
            file.write_bytes(content)
            tried += 1
        file.unlink()
        message = refusal(last)
        assert file.name in message and f"{OLDER} is whole" in message
        file.write_bytes(content)
        tried += 1
    check(last)
    verify(last)
    return tried


def test_every_file(trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    assert {Path(name).suffix for name in files_of(run / "checkpoints" / LAST)} == {
        *(".safetensors", ".ckpt", ".json", ".yaml")
    }
    assert every_flip_and_loss_is_refused(run) == 8 * (FLIPS + 1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_every_file_of_two_ranks(trained, tmp_path, strategy):
    """Each rank reads its share of the files, and all ranks end with the one that is damaged."""
    ended = job(tmp_path / "run", trained / "shards", 2, strategy, *OPTIONS)
    assert ended.code == 0, ended.err
    last = tmp_path / "run/checkpoints" / LAST
    assert every_flip_and_loss_is_refused(tmp_path / "run") == 10 * (FLIPS + 1)
    for file in sorted(last.glob("*.safetensors")):
        content = file.read_bytes()
        flip(file, 8 * (len(content) - 9))
        refused = job(tmp_path / "run", trained / "shards", 2, strategy, *OPTIONS, "--trainer.max_steps", "6")
        assert refused.code != 0
        assert f"{file}: damaged" in refused.err.strip().splitlines()[-1], refused.err
        assert "Traceback" not in refused.err
        file.write_bytes(content)


def test_fit_validate_export_and_inspect_refuse(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    file = next((run / "checkpoints" / LAST).glob("lanes-*"))
    flip(file, 8 * (file.stat().st_size - 3))
    refused = fit(run, trained / "shards", *OPTIONS, "--trainer.max_steps", "6")
    assert refused.code == 2
    (line,) = [line for line in refused.err.splitlines() if "error" in line]
    assert line.startswith(f"infini-train fit: error: {file}: damaged: found contents with digest ")
    older = run / "checkpoints" / OLDER
    assert line.endswith(f"; {older} is whole: --ckpt_path {older} goes on from there")

    def command(*words: str) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:  # noqa: PT012
            patch.setattr("sys.argv", ["infini-train", *words])
            main()
        return ended.value.code, capsys.readouterr().err

    for words in (["export", str(run), str(tmp_path / "out")], ["evaluate", "segments", str(run)]):
        if words[0] == "evaluate":
            words += ["--dataset", str(trained / "shards")]
        code, err = command(*words)
        assert code == 2
        assert f"{file}: damaged" in err and f"{older} is whole" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "flipped"), [(b"\nmodel:", b"\nmodem:"), (b"optimizer:", b"optimizes:")])
def test_a_flipped_bit_in_what_is_read_before_training(trained, tmp_path, key, flipped):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    file = run / "checkpoints" / LAST / "config.yaml"
    content = file.read_bytes()
    assert content.count(key) == 1
    file.write_bytes(content.replace(key, flipped))
    refused = fit(run, trained / "shards", *OPTIONS, "--trainer.max_steps", "6")
    assert refused.code == 2
    (line,) = refused.err.splitlines()
    assert line.startswith(f"infini-train fit: error: {file}: damaged: found ") and f"{OLDER} is whole" in line


def test_latest_does_not_move_to_a_damaged_checkpoint(trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    file = next((run / "checkpoints" / OLDER).glob("state-*.safetensors"))
    flip(file, 8 * (file.stat().st_size - 3))
    options = (*OPTIONS, "--trainer.max_steps", "6")
    refused = fit(run, trained / "shards", *options, "--ckpt_path", str(run / "checkpoints" / OLDER))
    assert refused.code == 2 and f"{file}: damaged" in refused.err
    assert (run / "checkpoints/latest").read_text() == LAST
    assert fit(run, trained / "shards", *options).code == 0


def test_inspect_verifies_every_checkpoint(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    inspect(["--verify", str(run)])
    whole = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(",")[0] for line in whole] == ["whole", "whole"]
    file = run / "checkpoints" / OLDER / "cursor.json"
    text = file.read_text()
    file.write_text(text.replace('"step": 2', '"step": 3'))
    assert len(file.read_text()) == len(text)
    with pytest.raises(SystemExit, match="1"):
        inspect(["--verify", str(run)])
    damaged, whole = capsys.readouterr().out.splitlines()
    assert str(file) in damaged and "damaged" in damaged
    assert LAST in whole and ": whole" in whole


def test_checkpoints_of_earlier_versions_have_sizes_only(trained, tmp_path):
    """They load; where their structure is damaged, the line names the file, and never advises to load unsafely."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    last = run / "checkpoints" / LAST
    (last / COMPLETE).write_text(json.dumps({name: sums["size"] for name, sums in files_of(last).items()}))
    check(last)
    verify(last)
    for file in [last / "state.ckpt", last / "cursor.json", *last.glob("*.safetensors")]:
        content = file.read_bytes()
        for lost in (10, len(content) // 2, len(content)):
            file.write_bytes(b"\x00" * lost + content[lost:])
            assert str(file) in refusal(last)
        file.write_bytes(content)
    sizes = json.loads((last / COMPLETE).read_text())
    for name in ("metrics.json", "cursor.json", "model_config.json", "config.yaml"):
        content = (last / name).read_bytes()
        for other in ("[]", "{}", "3", "model: {}"):
            (last / name).write_text(other)
            (last / COMPLETE).write_text(json.dumps(sizes | {name: len(other)}))
            assert f"{last / name}: damaged: found" in refusal(last)
        (last / name).write_bytes(content)
    (last / COMPLETE).write_text(json.dumps(sizes))
    went_on = fit(run, trained / "shards", *OPTIONS, "--trainer.max_steps", "6")
    assert went_on.code == 0, went_on.err


@pytest.mark.parametrize("place", [3, *range(10, 300, 17), -1])
def test_a_disk_that_changes_what_is_written(tmp_path, monkeypatch, place):
    def lying(tensors, path, save=checkpoint_format.save_file):
        save(tensors, path)
        flip(path, 8 * (place % path.stat().st_size))

    tensors = {"a": torch.arange(100.0), "lane_ids": torch.arange(3), "step": torch.tensor(3.0)}
    tensors["b"] = torch.ones(4, 5, dtype=torch.bfloat16)
    write_tensors({tmp_path / "right.safetensors": tensors, tmp_path / "none.safetensors": {"a": torch.empty(0)}})
    monkeypatch.setattr(checkpoint_format, "save_file", lying)
    with pytest.raises(OSError, match=r"wrong.safetensors: could not be written, .*read back"):
        write_tensors({tmp_path / "wrong.safetensors": tensors})


def test_counters_that_do_not_agree_are_not_kept(trained, tmp_path):
    """As of a save inside a validation whose loops were lost: it would not have loaded."""
    last = shutil.copytree(trained / "run/checkpoints" / LAST, tmp_path / LAST)
    read_back(last, 4)
    with pytest.raises(OSError, match=r"global_step in state.ckpt: found 4, expected 5"):
        read_back(last, 5)
    state = torch.load(last / "state.ckpt", weights_only=True)
    state["loops"]["fit_loop"] = None
    torch.save(state, last / "state.ckpt")
    files = {name: sums["size"] for name, sums in files_of(last).items()}
    (last / COMPLETE).write_text(json.dumps(files | {"state.ckpt": (last / "state.ckpt").stat().st_size}))
    with pytest.raises(OSError, match=r"Lightning.s loops in state.ckpt: found None, expected 4"):
        read_back(last, 4)


def test_files_are_readable_as_the_umask_says(trained):
    expected = 0o666 & ~os.umask(0o022)
    os.umask(0o666 & ~expected)
    files = [path for path in (trained / "run").rglob("*") if path.is_file()]
    assert {f"{path.name} {path.stat().st_mode & 0o777:o}" for path in files} == {
        f"{path.name} {expected:o}" for path in files
    }
