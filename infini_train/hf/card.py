"""The model card of an export: what it is, what it was trained on, how well, and how to load it."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from infini_train.model import InfiniConfig
from infini_train.model.flops import parameters


@dataclass(frozen=True)
class Training:
    """What a card tells of a run.

    data: name of the dataset; fingerprint: its, none for streamed data; documents, tokens: in it, none if it is gone.
    metrics: a checkpoint's metrics.json.
    pretrained: name of the model that the run started from, if any.
    """

    data: str
    fingerprint: str | None
    documents: int | None
    tokens: int | None
    metrics: dict[str, Any]
    pretrained: str | None


def model_card(name: str, config: InfiniConfig, training: Training) -> str:
    """README.md of a model directory. The license is left to whoever publishes it."""
    about = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["infini-attention", "long-context"]
    )
    done, last = training.metrics, training.metrics["validation"]
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
        "memory rule": config.memory,
        "started from": f"`{training.pretrained}`" if training.pretrained else "random weights",
        "trained": f"{done['step']:,} steps, {done['tokens']:,} tokens",
        "data": ", ".join(data),
        "training loss of the last step": f"{done['loss']:.4f} nats per token",
    }
    if last:
        rows["validation loss"] = f"{last['val/loss']:.4f} nats per token at step {last['step']:,}"
        rows["memory benefit"] = (
            f"{last['val/memory_benefit']:.4f} nats per token (the loss with the memory off, less)"
        )
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return str(
        ModelCard(f"""---
{about.to_yaml()}
---

# {name}

A decoder with Infini-attention ([arXiv 2404.07143](https://arxiv.org/abs/2404.07143)): attention within segments, and
a compressive memory of constant size for all that lies before. Its context has no end of its own.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

`trust_remote_code` runs the model files beside this card; with infini-train installed, `import infini_train.hf` does
without.
""")
    )
