"""Parameters and FLOPs of a configuration in closed form.

FLOPs are model FLOPs: 2 per multiply-add of every matrix product that the maths needs, the causal half of local
attention, forward + 2 x for backward; recomputation under activation checkpointing and elementwise work count as
nothing, as is usual for MFU (PaLM, arXiv 2204.02311, appendix B).
"""

from .configuration import InfiniConfig


def parameters(config: InfiniConfig) -> int:
    """Number of parameters; tied embeddings count once."""
    d, heads, kv_heads, hidden = _dims(config)
    attention = hidden * d * (2 * heads + 2 * kv_heads) + heads  # projections and gates
    if config.attention_bias:
        attention += d * (heads + 2 * kv_heads) + hidden
    if config.memory == "selective-delta":
        # convolution, write strength with its bias, forgetting, B, the gate's weight, norm of the read
        attention += 4 * d * (heads + kv_heads) + kv_heads * (hidden + 2 + d * d) + heads * hidden + d
    mlp = 3 * hidden * config.intermediate_size
    if config.mlp_bias:
        mlp += 2 * config.intermediate_size + hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * (attention + mlp + 2 * hidden) + hidden


def flops_per_token(config: InfiniConfig) -> float:
    """Forward and backward model FLOPs of one token in a long document (memory never empty)."""
    d, heads, kv_heads, hidden = _dims(config)
    segment = config.segment_length
    projections = 2 * hidden * d * (2 * heads + 2 * kv_heads)
    mlp = 2 * 3 * hidden * config.intermediate_size
    local = 2 * 2 * heads * d * (segment + 1) / 2  # Q K^T and P V over the causal half
    memory: float = (
        2 * heads * (d * d + d) + 2 * kv_heads * d * d
    )  # read sigma(Q) M and sigma(Q) z, write sigma(K)^T V
    if config.memory == "paper-delta":
        memory += 2 * kv_heads * (d + d * d + d**3 / segment)  # sigma(K) z, A, and A M once a segment
    if config.memory == "selective-delta":
        chunk = segment / -(-segment // 64)
        # read q M; K K^T; the triangular system of d columns (half of a product); K M and X^T (V - K M). Those of x
        # with the strength's and the gate's weights come with the projections.
        memory = 2 * heads * d * d + 2 * kv_heads * (chunk * d + chunk * d / 2 + 2 * d * d)
        projections += 2 * hidden * (heads + kv_heads)
    head = 2 * hidden * config.vocab_size
    return 3 * (config.num_hidden_layers * (projections + mlp + local + memory) + head)


def _dims(config: InfiniConfig) -> tuple[int, int, int, int]:
    assert config.head_dim and config.num_key_value_heads  # LlamaConfig fills them in
    return config.head_dim, config.num_attention_heads, config.num_key_value_heads, config.hidden_size
