"""`infini-train export` and `infini-train import`: from checkpoints to Hugging Face models, and back."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import jinja2
import jsonargparse
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer
from transformers.utils import logging

from infini_train.commands import PROGRAM
from infini_train.data.mixture import load_training_data, name_of, parts_of
from infini_train.errors import reported
from infini_train.model.configuration import MemoryRuleName
from infini_train.model.flops import parameters
from infini_train.parsing import Parser
from infini_train.run_files import CONFIG, CURSOR, METRICS, find
from infini_train.tokenizer.export import export_tokenizer
from infini_train.tokenizer.loading import load_tokenizer
from infini_train.training.checkpoint_format import check, read_model, verify

from .card import Publication, Training, model_card
from .export import write_model
from .llama import import_model as write_imported


def export(
    checkpoint: Path,
    out: Path,
    dataset: Path | None = None,
    max_shard_size: str = "5GB",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    weights: Literal["trained", "ema"] = "trained",
    chat_template: Path | None = None,
    license: str | None = None,
    language: str | None = None,
    datasets: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write a checkpoint as a Hugging Face model directory.

    Args:
        checkpoint: A checkpoint, or a run or its `checkpoints` directory for the latest one, or the file
            `checkpoints/best` of a run for its best one.
        out: Directory to write; it must not exist.
        dataset: Directory of shards whose tokenizer is included; by default the run's training data.
        max_shard_size: Size limit of one safetensors file.
        dtype: Of the weights; by default as in the checkpoint.
        weights: The weights that were trained, or their moving average, which a run keeps with
            model.optimizer.ema_decay.
        chat_template: File with a Jinja template for conversations, as transformers' tokenizers take it.
        license: For the model card: a licence identifier of the Hugging Face hub, such as apache-2.0.
        language: For the model card: language codes, such as en,de.
        datasets: For the model card: data sets on the hub, separated by commas.
        base_model: For the model card: the model on the hub that training started from.

    Raises:
        ValueError, OSError: for a checkpoint or dataset that is damaged or does not fit the other.
    """
    publication = Publication(
        license=license,
        language=language.split(",") if language else None,
        datasets=datasets.split(",") if datasets else None,
        base_model=base_model,
    )
    path = find(checkpoint)
    check(path)
    verify(path)
    config, tensors = read_model(path, average=weights == "ema")
    if dtype is not None:
        tensors = {name: _cast(name, tensor, getattr(torch, dtype)) for name, tensor in tensors.items()}
    template = None if chat_template is None else chat_template.read_text()
    options = yaml.safe_load((path / CONFIG).read_text())
    trained_on = options["data"].get("train") or [{"path": options["data"]["urls"]}]  # URLs: `infini-train stream`
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
    tokenizer_file = index.root / index.tokenizer_file
    special = {"bos_token_id": index.bos_id, "eos_token_id": index.eos_id}
    special["pad_token_id"] = load_tokenizer(tokenizer_file).pad_id
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
        ema_decay=options["model"]["optimizer"]["ema_decay"] if weights == "ema" else None,
    )

    def add_files(directory: Path) -> None:
        export_tokenizer(
            tokenizer_file,
            directory,
            bos_id=index.bos_id,
            eos_id=index.eos_id,
            max_length=config.max_position_embeddings,
        )
        if template is not None:
            (directory / "chat_template.jinja").write_text(template)
            _check_chat_template(directory, f"{chat_template}")
        (directory / "README.md").write_text(model_card(out.name, config, training, special, publication))

    write_model(
        config, tensors, out, source=path, add_files=add_files, special=special, max_shard_size=max_shard_size
    )
    print(f"exported {path} to {out}")


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another dtype. Raises ValueError if that loses a number to infinity."""
    cast = tensor.to(dtype)
    if cast.isinf().any() and not tensor.isinf().any():
        raise ValueError(f"{name}: found {tensor.abs().max():.3g}, expected at most {torch.finfo(dtype).max}")
    return cast


def _check_chat_template(directory: Path, source: str) -> None:
    """Raise ValueError if the tokenizer in `directory` cannot render a conversation with its template."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except jinja2.TemplateError as error:
        raise ValueError(f"{source}: not a chat template for a conversation of one user message: {error}") from error


def import_model(
    source: Path,
    out: Path,
    segment_length: int | None = None,
    memory: MemoryRuleName | None = None,
    gate_init: float | None = None,
    sliding_window: int | None = None,
    output_memory_dim: int | None = None,
    gguf_file: str | None = None,
) -> None:
    """Convert a Llama-family model to an Infini model directory, for `fit --model.pretrained` and transformers.

    Args:
        source: Directory of a Hugging Face model (llama, mistral, qwen2, qwen3, gemma, infini) in
            safetensors, or a GGUF file, or a directory with one.
        out: Directory to write; it must not exist.
        segment_length: Tokens of a segment, at most the number of positions that the original model knows. By
            default 2048, or the Infini model's own.
        memory: The memory rule. By default paper-linear, or the Infini model's own.
        gate_init: Beta of every gate, whose sigmoid is the memory's share of a head's output. The default is -4, a
            share of 0.018. A document's first segment is computed as by the original at any gate; from the second
            segment on, an untrained memory replaces that share of the original's attention. Gates learn fast
            (optimizer.gate_lr). An Infini model keeps its gates.
        sliding_window: Tokens that local attention sees, across the border of segments: at most segment_length for a
            sliding window, 2 * segment_length for the whole of the segment before. By default the original's own
            sliding window, or the token's own segment only.
        output_memory_dim: Number of features of an output memory, which is empty in a document's first 128 tokens and
            then adapts the output weights to the document; 32 is a good number. By default none, or the Infini
            model's own.
        gguf_file: Name of the GGUF file, where the directory holds several.

    Raises:
        ValueError, OSError: for a model that is damaged or cannot be converted.
    """
    given = segment_length, memory, gate_init, sliding_window, output_memory_dim, gguf_file
    config = write_imported(source, out, *given)
    print(
        f"imported {source} to {out}: {parameters(config):,} parameters, segments of {config.segment_length} tokens"
    )


def _run(command: str, function: Callable[..., None], words: list[str]) -> int:
    """Run a command with its options and return the exit code."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = f"{PROGRAM} {command}"
    call = partial(jsonargparse.auto_cli, function, args=words, prog=name, parser_class=Parser)
    return reported(name, call, expected=(ValueError, OSError, StrictDataclassError))


run_export, run_import = partial(_run, "export", export), partial(_run, "import", import_model)
