"""Writes the model card of an export: what the model is, how it was trained, and how to load it."""

import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from infini_train.model import InfiniConfig
from infini_train.model.flops import parameters


@dataclass(frozen=True)
class Training:
    """What a card says of a run."""

    data: str  # name of the dataset
    fingerprint: str | None  # of the dataset; None for streamed data
    documents: int | None  # in the dataset; None if the dataset is not available
    tokens: int | None  # in the dataset; None if the dataset is not available
    metrics: dict[str, Any]  # the checkpoint's metrics.json
    pretrained: str | None  # name of the model that the run started from, if any
    ema_decay: float | None = None  # if the weights are their moving average


@dataclass(frozen=True)
class Publication:
    """What the person who publishes a model says of it, in the terms of the hub; None: nothing.

    Raises:
        ValueError: `datasets` or `base_model` are no names of the hub, which would refuse the card.
    """

    license: str | None = None
    language: list[str] | None = None
    datasets: list[str] | None = None
    base_model: str | None = None

    def __post_init__(self) -> None:
        named = [("datasets", name) for name in self.datasets or []]
        named += [("base_model", self.base_model)] if self.base_model is not None else []
        for field, name in named:
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                raise ValueError(f"{field}: found {name!r}, expected OWNER/NAME as on the hub: {error}") from None


def model_card(
    name: str, config: InfiniConfig, training: Training, special: dict[str, int], publication: Publication
) -> str:
    """Return the README.md of a model directory.

    Args:
        name: the model's name.
        config: its configuration.
        training: what the card says of the run.
        special: `bos_token_id`, `eos_token_id` and `pad_token_id` of the tokenizer.
        publication: what the person who publishes the model says of it.
    """
    about = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["infini-attention", "long-context"],
        **vars(publication),
    )
    metrics, validation = training.metrics, training.metrics["validation"]
    data = [f"dataset `{training.data}`"]
    if training.documents is not None:
        data.append(f"{training.documents:,} documents, {training.tokens:,} tokens")
    if training.fingerprint is not None:
        data.append(f"fingerprint `{training.fingerprint[:16]}`")
    rows = {
        "parameters": f"{parameters(config):,}",
        "layers x width": f"{config.num_hidden_layers} x {config.hidden_size}",
        "query heads, key/value heads": f"{config.num_attention_heads}, {config.num_key_value_heads}",
        "vocabulary": f"{config.vocab_size:,}",
        "segment length": f"{config.segment_length:,} tokens",
        "local attention": _local_attention(config),
        "memory rule": config.memory,
        "started from": f"`{training.pretrained}`" if training.pretrained else "random weights",
        "trained": f"{metrics['step']:,} steps, {metrics['tokens']:,} tokens",
        "data": ", ".join(data),
        "training loss of the last step": f"{metrics['loss']:.4f} nats per token",
    }
    if config.output_memory_dim is not None:
        rows["output memory"] = (
            f"{config.output_memory_dim} features; losses and logits are those of the model's own forward alone "
            "(with TRL, call `infini_train.hf.trl_logits.use_model_logits()` first)"
        )
    if training.ema_decay is not None:
        rows["weights"] = (
            f"exponential moving average (decay {training.ema_decay:g}) of the weights that were trained, of which "
            "the losses here are"
        )
    if validation:
        rows["validation loss"] = f"{validation['val/loss']:.4f} nats per token at step {validation['step']:,}"
        for metric, loss in validation.items():
            if named := re.fullmatch(r"val/([^/]+)/loss", metric):
                rows[f"validation loss of {named[1]}"] = f"{loss:.4f} nats per token"
        rows["memory benefit"] = (
            f"{validation['val/memory_benefit']:.4f} nats per token (loss with the memory off minus loss with it on)"
        )
    padding = (
        "The vocabulary has no pad token, so the tokenizer pads with EOS. Collators that mask padding in labels then "
        "mask EOS too: add a pad token of its own before fine-tuning."
        if special["pad_token_id"] == special["eos_token_id"]
        else "Padding has a token other than EOS, so collators that mask padding in labels keep EOS."
    )
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return str(
        ModelCard(f"""---
{about.to_yaml()}
---

# {name}

A decoder with Infini-attention ([arXiv 2404.07143](https://arxiv.org/abs/2404.07143)): local attention within
segments, and a compressive memory of constant size for everything before. The context length has no fixed limit.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

`trust_remote_code` runs the model files beside this card. With infini-train installed, `import infini_train.hf` makes
it unnecessary.

The tokenizer encodes special tokens in a text, such as EOS in a chat template, as those tokens. In the training
documents such strings were encoded as plain text, as `tokenizer(text, split_special_tokens=True)` does. To have BOS
before and EOS after every text, load it with `add_bos_token=True, add_eos_token=True`: with the second alone,
transformers leaves out BOS. {padding}
""")
    )


def _local_attention(config: InfiniConfig) -> str:
    """Which tokens a token sees without a memory."""
    if config.sliding_window is None:
        return "the token's own segment"
    if config.sliding_window == 2 * config.segment_length:
        return "the token's own segment and the one before"
    return f"{config.sliding_window:,} tokens, at most to the start of the segment before"
