"""Parameters and model FLOPs of a configuration.

Model FLOPs count 2 per multiply-add of every matrix product that the maths needs, the causal half of local attention,
and twice the forward pass for backward. Recomputation under activation checkpointing and elementwise work are
not counted, as is usual for MFU (PaLM, arXiv 2204.02311, appendix B).
"""

import torch

from .attention import InfiniAttention
from .configuration import InfiniConfig
from .rules import RULES


def parameters(config: InfiniConfig) -> int:
    """Number of parameters; tied embeddings count once."""
    (heads, kv_heads, d), hidden = config.head_sizes, config.hidden_size
    attention = heads  # gates
    if config.attention_bias:
        attention += d * (heads + 2 * kv_heads) + hidden
    if config.qk_norm:
        attention += 2 * d
    with torch.device("meta"):
        attention += sum(p.numel() for p in RULES[config.memory](config).parameters())
    mlp = 2 * config.intermediate_size + hidden if config.mlp_bias else 0
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    if features := config.output_memory_dim:
        embeddings += features * (hidden + 1) + 1
    layer = layer_projections(config) + attention + mlp + 2 * hidden
    return embeddings + config.num_hidden_layers * layer + hidden


def layer_projections(config: InfiniConfig) -> int:
    """Number of elements in the projections of a layer's attention and SwiGLU, without biases."""
    (heads, kv_heads, d), hidden = config.head_sizes, config.hidden_size
    return hidden * d * (2 * heads + 2 * kv_heads) + 3 * hidden * config.intermediate_size


def flops_per_token(config: InfiniConfig) -> float:
    """Forward and backward model FLOPs of one token in a long document, where the memory is never empty."""
    (heads, _, d), hidden = config.head_sizes, config.hidden_size
    projections = 2 * layer_projections(config)
    seen = (config.segment_length + 1) / 2  # keys that a token attends to, on average
    if config.sliding_window is not None:
        before = torch.arange(config.near_length + 1, config.near_length + config.segment_length + 1)
        seen = before.clamp_max(config.sliding_window).double().mean().item()
    local = 2 * 2 * heads * d * seen  # Q K^T and P V
    memory = RULES[config.memory].flops_per_token(config)
    head = 2 * hidden * config.vocab_size
    if features := config.output_memory_dim:
        # The read has one product in backward, because the memory has no gradient, and the write is the third.
        head += 2 * features * (hidden + config.vocab_size)
    return 3 * (config.num_hidden_layers * (projections + local + memory) + head)


def exchanged_elements(config: InfiniConfig) -> int:
    """How many elements a rank sends per row and layer in each pass under context parallelism: the layer's state."""
    return sum(x.numel() for x in InfiniAttention.init_state(config, 1, device="meta").values())
