"""Decides whether an existing output is complete, may be replaced, or must not be touched."""

import re
from pathlib import Path
from typing import Any

from data_prep.split import split_parts
from data_prep.work import changed_options
from infini_train.data.index import INDEX_JSON, DatasetIndex

OUR_FILES = re.compile(
    r"index\.json|index(-\w+)?\.npz|rejects(-\d+)?\.jsonl|seen\.npz|tokenizer\.model|tokenizer\.json|"
    r"tokenizer_config\.json|shard-\d+\.tar"
)


def parts_of(output: Path) -> dict[str, DatasetIndex]:
    """Load the indexes of the datasets in a directory, by subdirectory: "." alone, or "train" and the others."""
    parts = [part for part in (".", "train", "valid", "test") if (output / part / INDEX_JSON).is_file()]
    return {part: DatasetIndex.load(output / part) for part in parts}


def is_finished(output: Path, options: dict[str, Any], overwrite: bool) -> bool:
    """Tell whether `output` is already what a run with these options would make.

    Args:
        output: the dataset directory, which need not exist.
        options: options of the run, as kept in the index, with `bos_id` and `eos_id`.
        overwrite: accept a dataset of ours that was made with other options or is damaged; it will be replaced.

    Raises:
        ValueError: `output` holds files that are not ours, or needs `overwrite` to be replaced.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    indexes = list(parts_of(output).values())
    foreign = [path for path in output.rglob("*") if path.is_file() and not OUR_FILES.fullmatch(path.name)]
    if foreign or not all(index.options for index in indexes) or not indexes:
        because = f", it holds {foreign[0]}" if foreign else ""
        raise ValueError(
            f"{output} exists and is not a dataset that `infini-train prep` made{because}: "
            "give another --out, or remove it"
        )
    made_with = indexes[0].options | {"bos_id": indexes[0].bos_id, "eos_id": indexes[0].eos_id}
    if other := changed_options(made_with, options):
        state = f"was made with other options ({other})"
    elif len(indexes) != len(split_parts(options)):
        state = f"has lost one of its parts, {' and '.join(split_parts(options))}"
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
