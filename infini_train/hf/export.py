"""Writes Hugging Face model directories by `save_pretrained`; weights and names are not converted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from infini_train.files import allow_reading, check_new, new_directory
from infini_train.model import (
    InfiniConfig,
    InfiniForCausalLM,
    InfiniForSequenceClassification,
    InfiniForTokenClassification,
    InfiniModel,
)
from infini_train.model.loading import fitting


def write_model(
    config: InfiniConfig,
    weights: dict[str, Tensor],
    out: Path,
    *,
    source: Path,
    add_files: Callable[[Path], None],
    special: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a model directory, complete or not at all.

    `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)` loads it.

    Args:
        config: the model's configuration.
        weights: the model's state dict; the tensors keep their dtypes.
        out: directory to write, which must not exist.
        source: where the weights come from, for messages.
        add_files: writes further files (tokenizer, card) to the directory that it is given.
        special: `bos_token_id`, `eos_token_id` and `pad_token_id` for generation; None: the configuration's.
        max_shard_size: maximum size of a safetensors file, as in `save_pretrained`.

    Raises:
        FileExistsError: `out` exists.
        ValueError: the weights do not fit the configuration.
    """
    check_new(out)
    weights = fitting(weights, config, source)
    InfiniConfig.register_for_auto_class()
    InfiniForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    # save_pretrained adds the classes of the configuration and of the model that it saves, but not the others.
    others = {
        "AutoModel": InfiniModel,
        "AutoModelForSequenceClassification": InfiniForSequenceClassification,
        "AutoModelForTokenClassification": InfiniForTokenClassification,
    }
    config.auto_map = {auto: f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for auto, c in others.items()}
    with torch.device("meta"):
        model = InfiniForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    special = special or {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    if special.get("pad_token_id") is None:  # any token will do, because padding is masked
        eos = special["eos_token_id"]
        special = {**special, "pad_token_id": eos[0] if isinstance(eos, list) else eos}
    model.generation_config = GenerationConfig(**special, do_sample=False)
    with new_directory(out) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        add_files(partial)
        for file in partial.iterdir():
            allow_reading(file)
