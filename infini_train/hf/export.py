"""A training checkpoint as a Hugging Face model directory: no converter, `save_pretrained` of the trained model."""

import os
import shutil
from pathlib import Path

import torch

from infini_train.data.index import DatasetIndex
from infini_train.model import InfiniConfig, InfiniForCausalLM

PREFIX = "model."  # of the model's parameters in the Lightning module


def export(checkpoint: Path, out: Path, dataset: Path | None = None) -> None:
    """Write a checkpoint's weights, configuration, model files and tokenizer to `out`, whole or not at all.

    `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)` loads it.

    Args:
        checkpoint: a checkpoint directory, runs/NAME/checkpoints/step-NNNNNNNN.
        out: must not exist.
        dataset: directory of shards whose tokenizer goes into the export; None leaves the tokenizer out.

    Raises:
        FileNotFoundError: no complete checkpoint there, or no dataset.
        FileExistsError: `out` exists.
        ValueError: weights that do not fit the configuration, or a tokenizer of another vocabulary size.
    """
    if not (checkpoint / "COMPLETE").is_file():
        raise FileNotFoundError(f"{checkpoint}: expected a complete checkpoint directory (no file COMPLETE in it)")
    if out.exists():
        raise FileExistsError(f"{out}: exists; name a directory that does not")
    config = InfiniConfig.from_json_file(checkpoint / "model_config.json")
    tokenizer = None
    if dataset is not None:
        index = DatasetIndex.load(dataset)
        if index.vocab_size != config.vocab_size:
            raise ValueError(
                f"{dataset}: tokenizer of {index.vocab_size} tokens, expected the model's {config.vocab_size}"
            )
        config.bos_token_id, config.eos_token_id = index.bos_id, index.eos_id
        tokenizer = index.root / index.tokenizer_file

    state = torch.load(checkpoint / "state.ckpt", map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    weights = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    with torch.device("meta"):
        model = InfiniForCausalLM(config)
    faults = [
        f"{name}: found {tuple(weights[name].shape) if name in weights else 'nothing'}, expected {tuple(p.shape)}"
        for name, p in model.state_dict().items()
        if name not in weights or weights[name].shape != p.shape
    ]
    if faults:
        raise ValueError(f"{checkpoint}: weights do not fit model_config.json: " + "; ".join(faults[:5]))

    InfiniConfig.register_for_auto_class()
    InfiniForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, state_dict=weights)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / "tokenizer.model")
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors leaves 0600, which others on a cluster could not read
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
