"""Strict loading of weights from safetensors: every tensor is expected, in its shape and in a float dtype."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .configuration import InfiniConfig
from .modeling import InfiniForCausalLM

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_object(file: Path) -> dict[str, Any]:
    """Read a config.json. Raises ValueError if it does not hold a JSON object."""
    try:
        return dict(json.loads(file.read_text()).items())
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not a JSON object: {error}") from error


# Kinds of models that can be imported, with the class of each.
FAMILY = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "infini": "InfiniForCausalLM",
}
# What Infini models lack of kinds that resemble the above.
LACKING = {
    "gemma2": "a bound on attention scores and logits (softcapping), and norms after attention and SwiGLU",
    "gemma3": "images, norms after attention and SwiGLU, and layers that differ in RoPE and window",
    "gemma3_text": "norms after attention and SwiGLU, and layers that differ in RoPE and window",
}


def refusal(raw: dict[str, Any]) -> str | None:
    """Why a model with this config.json cannot be imported; None if nothing speaks against it."""
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or []
    if model_type not in FAMILY:
        reason = f"; {model_type} has {LACKING[model_type]}" if model_type in LACKING else ""
        return f"model_type: found {model_type!r}, expected one of {', '.join(FAMILY)}{reason}"
    if architectures not in ([], [FAMILY[model_type]]):
        return f"architectures: found {architectures}, expected {FAMILY[model_type]}"
    if raw.get("quantization_config"):
        return "quantization_config: found a quantised model, expected plain float weights"
    return None


def read_config(file: Path, advice: str = "") -> InfiniConfig:
    """Read the configuration of an Infini model.

    Args:
        file: its config.json.
        advice: end of the message for another kind of model.

    Raises:
        ValueError: the file is damaged, or belongs to another kind of model.
    """
    raw = read_object(file)
    if (found := raw.get("model_type")) != InfiniConfig.model_type:
        raise ValueError(f"{file}: model_type: found {found!r}, expected {InfiniConfig.model_type!r}{advice}")
    try:
        return InfiniConfig.from_dict(raw)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{file}: {error}") from error


def read_safetensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model directory as stored, in one file or in shards.

    Raises:
        FileNotFoundError: no safetensors there, or a shard that the index names is missing.
        ValueError: a truncated or damaged file.
    """
    files = [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        try:
            shards = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{directory / INDEX}: damaged: {error!r}") from error
        for name in shards:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{directory / INDEX}: found {name!r}, expected the plain name of a file")
        files = [directory / name for name in sorted(shards)]
    elif not files[0].is_file():
        found = ", ".join(sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth")))
        raise FileNotFoundError(
            f"{directory}: expected safetensors, {WEIGHTS} or {INDEX}; found {found or 'no weights'}"
            + (" (a pickle, which may run code: it is not loaded)" if found else "")
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, though {directory / INDEX} names it")
        try:
            with safe_open(file, framework="pt") as tensors:
                weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file}: truncated or damaged: {error}") from error
    return weights


def fitting(weights: dict[str, Tensor], config: InfiniConfig, source: Path) -> dict[str, Tensor]:
    """Check weights against a configuration and return the state dict; tied embeddings may be stored once or twice.

    Raises:
        ValueError: lists the tensors that are missing, unexpected, of another shape or not floats.
    """
    with torch.device("meta"):
        expected = InfiniForCausalLM(config).state_dict()
    head, embeddings = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    faults = []
    if config.tie_word_embeddings and embeddings is not None:
        if head is not None and not torch.equal(head, embeddings):
            faults.append(
                "lm_head.weight: differs from model.embed_tokens.weight, though tie_word_embeddings is true"
            )
        weights = {**weights, "lm_head.weight": embeddings}
    for name, tensor in expected.items():
        if name not in weights:
            faults.append(f"{name}: found nothing, expected {tuple(tensor.shape)}")
        elif weights[name].shape != tensor.shape:
            faults.append(f"{name}: found {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}")
        elif weights[name].dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            faults.append(f"{name}: found {weights[name].dtype}, expected floats (quantised weights are not read)")
    faults += [f"{name}: not expected" for name in weights if name not in expected]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{source}: tensors do not fit the configuration: " + "; ".join(faults[:5]) + more)
    return weights
