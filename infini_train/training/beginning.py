"""Which checkpoint `fit` begins from and `validate` reads, and what a run records of its beginning."""

from pathlib import Path

from infini_train.run_files import (
    CHECKPOINTS,
    RECORD,
    best,
    find,
    is_checkpoint_name,
    latest,
    read_record,
    write_record,
)


def checkpoint_to_validate(run: Path, given: str | None) -> Path:
    """Return the checkpoint that the option ckpt_path of `validate` means: by default the newest of the run.

    Raises:
        FileNotFoundError: there is none.
    """
    path = _named(run, given or "last")
    if path is None:
        raise FileNotFoundError(f"{run / CHECKPOINTS}: found no checkpoint to validate")
    return path


def checkpoint_to_begin_from(run: Path, given: str | None, restore: str) -> tuple[Path | None, str]:
    """Return the checkpoint that `fit` begins from, or None, and what it restores: all, weights, optimizer or ema.

    Args:
        run: the run's directory.
        given: the option ckpt_path. `last` is the newest checkpoint of the run, or, if it has none yet, what it has
            recorded that it began from; `best` is the run's best one.
        restore: the option of this name.

    Raises:
        FileExistsError: the run has checkpoints, and would not go on from one of them.
        FileNotFoundError: it has no best checkpoint.
        ValueError: there is nothing to restore, or the run has damaged checkpoints only.
    """
    path = None if given is None else _named(run, given)
    if given == "last" and path is not None:
        return path, "all"
    if given == "last":
        record = read_record(run)
        if restore in ("all", record["restore"]):
            return (Path(record["begun_from"]) if record["begun_from"] else None), record["restore"]
    if path is None and restore != "all":
        raise ValueError(f"restore: found {restore}, expected --ckpt_path with the checkpoint that has the weights")
    own = run / CHECKPOINTS
    goes_back = path is not None and path.resolve().parent == own.resolve() and restore == "all"
    if latest(own) is not None and not goes_back:
        raise FileExistsError(f"{run}: has checkpoints; --ckpt_path last resumes them, --run names another run")
    return path, restore


def _named(run: Path, given: str) -> Path | None:
    """Return the checkpoint that the option ckpt_path means; None if it is `last` and the run has none."""
    own = run / CHECKPOINTS
    if given == "best":
        if (found := best(own)) is None:
            raise FileNotFoundError(
                f"{own}: found no best checkpoint; --checkpoint.best names the metric by which a run keeps one"
            )
        return found
    if given != "last":
        return find(Path(given))
    newest = latest(own)
    unusable = [path.name for path in own.glob("step-*") if is_checkpoint_name(path.name)]
    if newest is None and unusable:
        raise ValueError(
            f"{own}: found {', '.join(sorted(unusable))}, but no complete checkpoint among them; move them "
            "to another place to start the run over"
        )
    saved = read_record(run)["saved"]
    # A kill in the first save may leave a name in the record whose checkpoint was not complete.
    if newest is None and saved and not any((own / f"{name}.tmp").is_dir() for name in saved):
        raise ValueError(
            f"{own}: found no checkpoint, expected {', '.join(sorted(saved))}, which {run / RECORD} lists; bring "
            f"them back, or remove {RECORD} to start the run over"
        )
    return newest


def record_beginning(run: Path, path: Path | None, restored: str) -> None:
    """Record what a run begins from, so that `last` finds it even after a kill before the first save.

    Args:
        run: the run's directory.
        path: the checkpoint, or None.
        restored: what the run takes from it: all, weights, optimizer or ema.
    """
    own = run / CHECKPOINTS
    if path is None or path.resolve().parent != own.resolve():
        record = read_record(run)
        record["begun_from"] = None if path is None else str(path.resolve())
        record["restore"] = restored
        write_record(run, record)
