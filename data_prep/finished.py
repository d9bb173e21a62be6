"""What stands at the place of an output: what this run would make, something of ours, or what must not be touched."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.work import changed_options
from infini_train.data.index import INDEX_JSON, DatasetIndex
from infini_train.files import replace_directory

OUR_FILES = re.compile(
    r"index\.json|index(-\w+)?\.npz|rejects(-\d+)?\.jsonl|seen\.npz|tokenizer\.model|tokenizer\.json|"
    r"tokenizer_config\.json|shard-\d+\.tar"
)


def parts_of(output: Path) -> dict[str, DatasetIndex]:
    """The datasets in a directory, by place below it: itself, or train and valid."""
    places = [place for place in (".", "train", "valid") if (output / place / INDEX_JSON).is_file()]
    return {place: DatasetIndex.load(output / place) for place in places}


def is_finished(output: Path, options: dict[str, Any], overwrite: bool) -> bool:
    """Whether `output` is what this run would make. Raises ValueError if it is something not to be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    indexes = list(parts_of(output).values())
    strange = [path for path in output.rglob("*") if path.is_file() and not OUR_FILES.fullmatch(path.name)]
    if strange or not all(index.options for index in indexes) or not indexes:
        because = f", it holds {strange[0]}" if strange else ""
        raise ValueError(f"{output} exists and is no dataset of ours{because}: give another --out, or remove it")
    made_with = indexes[0].options | {"bos_id": indexes[0].bos_id, "eos_id": indexes[0].eos_id}
    if other := changed_options(made_with, options):
        state = f"was made with other options ({other})"
    elif len(indexes) != (2 if options["validation_fraction"] else 1):
        state = "has lost its train or valid part"
    else:
        try:
            for index in indexes:
                index.check_files()
            return True
        except (OSError, ValueError) as error:
            state = f"is damaged ({error})"
    if overwrite:
        return False
    raise ValueError(f"{output} exists and {state}: give --overwrite to replace it")


@contextmanager
def staging_of(output: Path) -> Iterator[Path]:
    """A directory beside `output` that takes its place, with all it holds, when the block ends well.

    Raises ValueError if another run is writing there.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.partial")
    staging.mkdir(exist_ok=True)
    lock = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {output}") from None
        try:
            for left_over in staging.iterdir():  # of a run that was killed
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            yield staging
            replace_directory(output, staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(lock)
