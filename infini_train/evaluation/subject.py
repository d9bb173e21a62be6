"""What an evaluation is about: a model in any format on disk, a dataset, and where to write the results."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infini_train import plots
from infini_train.data.index import DatasetIndex
from infini_train.data.remote import load_index
from infini_train.files import atomic_file, sha256_of_file
from infini_train.model import InfiniForCausalLM
from infini_train.model.loading import fitting, read_config, read_safetensors
from infini_train.run_files import COMPLETE, find
from infini_train.training.checkpoint_format import check, read_model, verify


def load(path: Path, index: DatasetIndex, device: str, dtype: torch.dtype) -> InfiniForCausalLM:
    """Load a model in evaluation mode.

    Args:
        path: an export or import, a checkpoint, or a run or its `checkpoints` directory (for the latest checkpoint).
        index: index of the dataset that the model will read.
        device: where to put the model.
        dtype: type of its weights.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: it is another kind of model, its weights do not fit, its vocabulary is smaller than the dataset's,
            or its directory has another tokenizer than the dataset.
    """
    if (path / "config.json").is_file():
        config = read_config(path / "config.json")
        weights = read_safetensors(path)
        tokenizer = path / index.tokenizer_file
        if tokenizer.is_file() and sha256_of_file(tokenizer) != index.tokenizer_sha256:
            raise ValueError(f"{tokenizer}: found another tokenizer than that of the dataset {index.root}")
    else:
        path = find(path)
        if not (path / COMPLETE).is_file():
            raise FileNotFoundError(
                f"{path}: expected an exported model (no config.json in it), a complete checkpoint (no {COMPLETE}), "
                "or a run"
            )
        check(path)
        verify(path)
        config, weights = read_model(path)
    if index.vocab_size > config.vocab_size:
        raise ValueError(
            f"{index.root}: vocabulary: found {index.vocab_size} tokens, "
            f"expected at most the model's {config.vocab_size}"
        )
    model: Any = InfiniForCausalLM(config)  # Any, because transformers types `to` too narrowly
    model.load_state_dict(fitting(weights, config, path))
    return model.to(device, dtype).eval()


@dataclass(frozen=True)
class Subject:
    """Options that all evaluations have in common.

    Args:
        directory: an export, a checkpoint, or a run.
        dataset: directory or URL of the dataset.
        rows: documents read side by side.
        out: JSON file to write; None: none.
        plot: PNG file to write; None: none.
        device: `cpu`, `cuda`, or `auto` for a GPU if there is one.
        dtype: type of the weights, by torch's name.
    """

    directory: Path
    dataset: str | Path
    rows: int
    out: Path | None
    plot: Path | None
    device: str
    dtype: str

    def index(self) -> DatasetIndex:
        """Check the options and load the dataset's index.

        Raises:
            ValueError, FileNotFoundError, FileExistsError: an option cannot be used.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: found cuda, but torch finds no such device")
        for path in (self.out, self.plot):
            if path is not None and path.exists():
                raise FileExistsError(f"{path}: exists; name a file that does not")
            if path is not None and not path.parent.is_dir():
                raise FileNotFoundError(f"{path.parent}: no such directory to write {path.name} to")
        if self.plot is not None:
            plots.check_available()
        index = load_index(self.dataset)
        index.check_files()
        return index

    def load(self, index: DatasetIndex) -> tuple[InfiniForCausalLM, dict[str, Any]]:
        """Load the model, and return it with the fields that describe it and the dataset in the JSON. See `load`."""
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        model = load(self.directory, index, device, getattr(torch, self.dtype))
        about = {
            "model": str(self.directory),
            "dataset": str(self.dataset),
            "fingerprint": index.fingerprint,
            "segment_length": model.config.segment_length,
            "memory": model.config.memory,
            "dtype": self.dtype,
            "rows": self.rows,
        }
        return model, about

    def write(self, result: dict[str, Any]) -> None:
        """Write the results as JSON, if `out` is given."""
        if self.out is not None:
            with atomic_file(self.out) as file:
                file.write(json.dumps(result, indent=1).encode() + b"\n")
