"""`infini-train export` and `infini-train import`: checkpoints to Hugging Face model directories, and back."""

import json
from pathlib import Path

import yaml

from infini_train.data.mixture import load_training_data, name_of, parts_of
from infini_train.model.configuration import MemoryRuleName
from infini_train.model.flops import parameters
from infini_train.run_files import CONFIG, CURSOR, METRICS
from infini_train.tokenizer.export import export_tokenizer
from infini_train.training.checkpoint_format import check, latest, read_model

from .card import Training, model_card
from .export import write_model
from .llama import import_model as write_imported


def export(checkpoint: Path, out: Path, dataset: Path | None = None, max_shard_size: str = "5GB") -> None:
    """Write a checkpoint as a Hugging Face model directory.

    Args:
        checkpoint: a checkpoint directory, or a run's `checkpoints` for its latest.
        out: directory to write; must not exist.
        dataset: directory of shards whose tokenizer to include; none: the run's training data.
        max_shard_size: of one safetensors file.
    """
    path = latest(checkpoint) or checkpoint
    check(path)
    config, weights = read_model(path)
    options = yaml.safe_load((path / CONFIG).read_text())
    trained_on = options["data"].get("train") or [{"path": options["data"]["urls"]}]  # of `infini-train stream`
    if not dataset and "train" not in options["data"]:
        raise ValueError(f"{path}: trained on a stream of texts; --dataset must name shards with its tokenizer")
    given = str(dataset) if dataset else trained_on
    index = load_training_data(given)
    index.check_files()
    if index.vocab_size > config.vocab_size:
        raise ValueError(
            f"{index.root}: tokenizer of {index.vocab_size} tokens, expected at most the model's {config.vocab_size}"
        )
    config.bos_token_id, config.eos_token_id = index.bos_id, index.eos_id
    fingerprint = (json.loads((path / CURSOR).read_text()) or {}).get("fingerprint")
    trained_on_it = index.fingerprint == fingerprint
    pretrained = options["model"]["pretrained"]
    training = Training(
        data=", ".join(name_of(part.path) for part in parts_of(trained_on)),
        fingerprint=fingerprint,
        documents=index.documents if trained_on_it else None,
        tokens=index.total_tokens if trained_on_it else None,
        metrics=json.loads((path / METRICS).read_text()),
        pretrained=Path(pretrained).name if pretrained else None,
    )

    def add_files(directory: Path) -> None:
        export_tokenizer(
            index.root / index.tokenizer_file,
            directory,
            bos_id=index.bos_id,
            eos_id=index.eos_id,
            max_length=config.max_position_embeddings,
        )
        (directory / "README.md").write_text(model_card(out.name, config, training))

    write_model(config, weights, out, source=path, add_files=add_files, max_shard_size=max_shard_size)
    print(f"exported {path} to {out}")


def import_model(
    source: Path,
    out: Path,
    segment_length: int | None = None,
    memory: MemoryRuleName | None = None,
    gate_init: float | None = None,
    gguf_file: str | None = None,
) -> None:
    """Write a Llama-family checkpoint as an Infini model directory, for `fit --model.pretrained` and transformers.

    Args:
        source: directory of a Hugging Face model (llama, mistral without a sliding window, infini) in safetensors,
            or a GGUF file, or a directory with one.
        out: directory to write; must not exist.
        segment_length: tokens of a segment, at most the positions the original knows; none: 2048, or the Infini
            model's own.
        memory: the memory rule; none: paper-linear, or the Infini model's own.
        gate_init: beta of every gate, whose sigmoid is the memory's share in each head. None: -4, a share of 0.018:
            with the paper's rules the first segment is the original's at any gate, but from the second on an
            untrained memory takes its share of the original's attention (selective-delta's takes it everywhere).
            Gates learn fast (optimizer.gate_lr). An Infini model keeps its gates.
        gguf_file: name of the file, where the directory holds several.
    """
    config = write_imported(source, out, segment_length, memory, gate_init, gguf_file)
    print(
        f"imported {source} to {out}: {parameters(config):,} parameters, segments of {config.segment_length} tokens"
    )
