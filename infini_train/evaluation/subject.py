"""What is evaluated: a model in any of the forms in which it may lie, a dataset, and where the results go."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from infini_train import plots
from infini_train.data.index import DatasetIndex
from infini_train.data.remote import load_index
from infini_train.files import atomic_file, sha256_of_file
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.loading import fitting, read_safetensors
from infini_train.run_files import COMPLETE
from infini_train.training.checkpoint_format import check, latest, read_model


def load(path: Path, index: DatasetIndex, device: str, dtype: torch.dtype) -> InfiniForCausalLM:
    """The model of an export or import, a checkpoint, or the latest of a run's `checkpoints`, in evaluation mode.

    Raises FileNotFoundError for no model, ValueError for another kind of model, weights that do not fit, a smaller
    vocabulary than that of the dataset which it shall read, or another tokenizer beside it.
    """
    if (path / "config.json").is_file():
        config = _config(path / "config.json")
        weights = read_safetensors(path)
        tokenizer = path / index.tokenizer_file
        if tokenizer.is_file() and sha256_of_file(tokenizer) != index.tokenizer_sha256:
            raise ValueError(f"{tokenizer}: found another tokenizer than that of the dataset {index.root}")
    else:
        path = latest(path) or path
        if not (path / COMPLETE).is_file():
            raise FileNotFoundError(
                f"{path}: expected an exported model (no config.json in it), a complete checkpoint (no {COMPLETE}), "
                "or a run's `checkpoints`"
            )
        check(path)
        config, weights = read_model(path)
    if index.vocab_size > config.vocab_size:
        raise ValueError(
            f"{index.root}: vocabulary: found {index.vocab_size} tokens, "
            f"expected at most the model's {config.vocab_size}"
        )
    model: Any = InfiniForCausalLM(config)  # its `to` is typed too narrowly
    model.load_state_dict(fitting(weights, config, path))
    return model.to(device, dtype).eval()


def _config(file: Path) -> InfiniConfig:
    try:
        options = json.loads(file.read_bytes())
        if (kind := options.get("model_type")) != InfiniConfig.model_type:
            raise ValueError(f"model_type: found {kind!r}, expected {InfiniConfig.model_type!r}")
        return InfiniConfig.from_dict(options)
    except (ValueError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{file}: {error}") from error


@dataclass(frozen=True)
class Subject:
    """Options that all evaluations share.

    Args:
        directory: an export, a checkpoint, or a run's `checkpoints`.
        dataset: directory or URL of shards.
        rows: documents read side by side.
        out, plot: JSON and PNG to write; None: neither.
        device: cpu or cuda.
        dtype: of the weights, a name that torch knows.
    """

    directory: Path
    dataset: str | Path
    rows: int
    out: Path | None
    plot: Path | None
    device: str
    dtype: str

    def index(self) -> DatasetIndex:
        """Of the dataset. Raises ValueError, FileNotFoundError, FileExistsError for options that cannot be used."""
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
        """The model, and what the JSON says of it and the dataset; raises as `load`."""
        model = load(self.directory, index, self.device, getattr(torch, self.dtype))
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
        if self.out is not None:
            with atomic_file(self.out) as file:
                file.write(json.dumps(result, indent=1).encode() + b"\n")
