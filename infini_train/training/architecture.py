"""The architecture options of a run: those of a new model, or those of a pretrained one."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from infini_train.model import InfiniConfig
from infini_train.model.configuration import MemoryRuleName
from infini_train.model.loading import read_config, read_object, refusal


def _option(new: Any) -> Any:
    """A field that is None unless given; `new` is its value in a new model, where it is not given."""
    return field(default=None, metadata={"new": new})


@dataclass
class Architecture:
    """Options that describe the decoder. None: the value of `pretrained`, or else the default of a new model.

    Args:
        vocab_size: number of tokens in the tokenizer's vocabulary; none, here and for all other options of the
            architecture: the value of `pretrained`, or of a new model with 12 layers of width 768 and a vocabulary of
            32,000.
        hidden_size: width of the decoder.
        intermediate_size: width of the SwiGLU layer.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key/value heads, each of which has a memory of its own.
        head_dim: width of a head; none: hidden_size / num_attention_heads in a new model.
        attention_bias: add biases to the projections of attention.
        qk_norm: normalise queries and keys of each head by an RMSNorm, as in Qwen3.
        memory: the memory rule.
        sliding_window: number of tokens that local attention sees, across the border of segments; at most
            2 * segment_length, which is all of the segment before. None: the token's own segment only.
        output_memory_dim: number of features of the output memory, a matrix [vocab_size, output_memory_dim] per lane
            that adapts the output weights to the document; none: no output memory.
        memory_base: selective-delta reads a learned matrix beside the memory, also where the memory is empty.
        gate_init: initial gate logit beta; the memory's share of the output is sigmoid(beta).
        rope_theta: base of the rotary position embedding.
        rms_norm_eps: epsilon of all RMSNorm layers.
        initializer_range: standard deviation of initial weights.
        embedding_range: standard deviation of initial input embeddings; none: initializer_range.
        tie_word_embeddings: share one matrix between input and output embeddings.
    """

    vocab_size: int | None = _option(32000)
    hidden_size: int | None = _option(768)
    intermediate_size: int | None = _option(2048)
    num_hidden_layers: int | None = _option(12)
    num_attention_heads: int | None = _option(12)
    num_key_value_heads: int | None = _option(4)
    head_dim: int | None = _option(None)
    attention_bias: bool | None = _option(False)
    qk_norm: bool | None = _option(False)
    memory: MemoryRuleName | None = _option("paper-linear")  # noqa: RUF009 (`_option` is `field`)
    sliding_window: int | None = _option(None)
    output_memory_dim: int | None = _option(None)
    memory_base: bool | None = _option(True)
    gate_init: float | None = _option(0.0)
    rope_theta: float | None = _option(10000.0)
    rms_norm_eps: float | None = _option(1e-5)
    initializer_range: float | None = _option(0.02)
    embedding_range: float | None = _option(None)
    tie_word_embeddings: bool | None = _option(False)

    def given(self) -> dict[str, Any]:
        """Return the options that are given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def new_config(self, segment_length: int) -> InfiniConfig:
        """Return the configuration of a new model with these options."""
        values = {f.name: f.metadata["new"] for f in fields(self)} | self.given()
        rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        return InfiniConfig(**values, segment_length=segment_length, rope_parameters=rope)


def architecture(config: InfiniConfig) -> dict[str, Any]:
    """Return the values that the fields of Architecture have in this configuration."""
    assert config.rope_parameters is not None  # LlamaConfig fills it in
    values = {**config.to_dict(), "rope_theta": config.rope_parameters["rope_theta"]}
    return {f.name: values[f.name] for f in fields(Architecture)}


def config_of(pretrained: Path, given: dict[str, Any], segment_length: int) -> InfiniConfig:
    """Return the configuration of a pretrained model at this segment length.

    Args:
        pretrained: directory of an Infini model.
        given: architecture options that the user has set; they must agree with the model's.
        segment_length: tokens of a segment, at most as many as the model was trained with.

    Raises:
        FileNotFoundError: the directory holds no model.
        ValueError: it holds another kind of model, one that the options contradict, or one that cannot have segments
            of this length.
    """
    path = pretrained / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model.pretrained: {path}: no such file; expected the directory of an Infini model")
    try:
        content = read_object(path)
        refused = refusal(content)
        advice = f"refuses it: {refused}" if refused else "converts it"
        config = read_config(path, f": `infini-train import {pretrained} OUT` {advice}")
    except ValueError as error:
        raise ValueError(f"model.pretrained: {error}") from error
    own = architecture(config)
    wrong = [f"model.{k}: found {v}, expected {own[k]} as in {path}" for k, v in given.items() if v != own[k]]
    if segment_length > config.segment_length:
        wrong.append(
            f"data.segment_length: found {segment_length}, expected at most {config.segment_length}, {path}'s"
        )
    if wrong:
        raise ValueError("\n".join(wrong))
    try:  # made anew, because a sliding window or an output memory may need longer segments
        config = InfiniConfig.from_dict({**content, "segment_length": segment_length})
    except ValueError as error:
        message = f"data.segment_length: found {segment_length}, which {path} does not allow: {error}"
        raise ValueError(message) from error
    config.dtype = torch.float32
    return config
