"""The architecture that a run's options describe, of a new model or of a pretrained one."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from infini_train.model import InfiniConfig

# The architecture of a new model where no option says otherwise.
NEW: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "memory": "paper-linear",
    "gate_init": 0.0,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "embedding_range": None,
    "tie_word_embeddings": False,
}
ARCHITECTURE = [*NEW, "head_dim"]


def architecture(config: InfiniConfig) -> dict[str, Any]:
    """The values that the module's options of the architecture have in this configuration."""
    assert config.rope_parameters is not None  # LlamaConfig fills it in
    values = {**config.to_dict(), "rope_theta": config.rope_parameters["rope_theta"]}
    return {name: values[name] for name in ARCHITECTURE}


def config_of(pretrained: Path, given: dict[str, Any], segment_length: int) -> InfiniConfig:
    """A model directory's configuration at this segment length. Raises ValueError if given options contradict it."""
    path = pretrained / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model.pretrained: {path}: no such file; expected the directory of an Infini model")
    try:
        raw = json.loads(path.read_text())
        model_type = raw.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"model.pretrained: {path}: not a JSON object: {error}") from error
    if model_type != InfiniConfig.model_type:
        raise ValueError(
            f"model.pretrained: {path}: model_type: found {model_type!r}, expected {InfiniConfig.model_type!r}: "
            f"`infini-train import {pretrained} OUT` makes one"
        )
    try:
        config = InfiniConfig.from_dict(raw)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"model.pretrained: {path}: {error}") from error
    there = architecture(config)
    wrong = [f"model.{k}: found {v}, expected {there[k]} as in {path}" for k, v in given.items() if v != there[k]]
    if segment_length > config.segment_length:
        wrong.append(
            f"data.segment_length: found {segment_length}, expected at most {config.segment_length}, {path}'s"
        )
    if wrong:
        raise ValueError("\n".join(wrong))
    config.segment_length = segment_length
    config.dtype = torch.float32
    return config
