"""How much memory a rank needs, by kind: closed forms, good to some ten per cent. No GPU has been measured yet."""

from infini_train.model import InfiniConfig
from infini_train.model.flops import parameters

FLOAT32 = 4


def bytes_per_rank(
    config: InfiniConfig,
    *,
    zero_stage: int,
    world_size: int,
    rows: int,
    window: int,
    lanes: int,
    half_precision: bool,
    activation_checkpointing: bool,
) -> dict[str, float]:
    """Bytes by kind.

    Args:
        config: the model.
        zero_stage: 0 for one process or DDP, else DeepSpeed's (ZeRO, arXiv 1910.02054, section 3).
        world_size: ranks.
        rows: of a micro-batch.
        window: tokens of a row.
        lanes: of this rank, all its micro-batches.
        half_precision: bf16-mixed.
        activation_checkpointing: of every layer.
    """
    count = parameters(config)
    # DeepSpeed keeps weights and gradients in bf16 beside float32 masters; autocast keeps float32 and casts.
    value = 2 if half_precision and zero_stage else FLOAT32
    master = FLOAT32 if zero_stage else 0
    shares = {stage: world_size if zero_stage >= stage else 1 for stage in (1, 2, 3)}
    a = 2 if half_precision else FLOAT32
    tokens, layers = rows * window, config.num_hidden_layers
    assert config.head_dim and config.num_key_value_heads
    d, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    state = kv_heads * (d * d + d) * FLOAT32  # of one layer and row
    # Kept for backward: norms' inputs and outputs, residuals (6 x hidden), SwiGLU (4 x), q, k, v with and without
    # rotation, and in float32 the features of q and k and what was read; a state before every segment, and its sums.
    wide = 6 * config.hidden_size + 4 * config.intermediate_size + 2 * (heads + 2 * kv_heads) * d
    layer = tokens * (wide * a + (2 * heads + kv_heads) * d * FLOAT32)
    layer += 3 * rows * window // config.segment_length * state
    kept = layers * tokens * config.hidden_size * a + layer if activation_checkpointing else layers * layer
    return {
        "weights": count * value / shares[3],
        "gradients": count * value / shares[2],
        "optimizer": count * (2 * FLOAT32 + master) / shares[1],
        "activations": kept,
        "logits": tokens * config.vocab_size * (a + 2 * FLOAT32),
        "lane memories": lanes * layers * state,
    }
