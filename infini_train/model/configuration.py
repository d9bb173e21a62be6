"""The configuration of a model: LlamaConfig plus the segment, the memory rule and the gate."""

import math
from typing import Any, ClassVar, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

MemoryRuleName = Literal["paper-linear", "paper-delta", "selective-delta"]
MEMORY_RULES: tuple[str, ...] = get_args(MemoryRuleName)

OUTPUT_CHUNK = 128  # number of tokens between two writes of the output memory


@strict
class InfiniConfig(LlamaConfig):
    """A Llama configuration whose attention is local to a segment, with a compressive memory of all segments before.

    Args:
        segment_length: tokens of one segment, S. The memory is read and written a segment at a time.
        memory: the memory rule: `paper-linear` or `paper-delta` (arXiv 2404.07143, section 2.1.2), or
            `selective-delta` (selective_delta.py).
        sliding_window: number of tokens that local attention sees, the token itself included, across segment
            boundaries. At most segment_length it is the sliding window of other models; beyond, it ends at the start
            of the segment before, all of which is seen at 2 * segment_length, as in Transformer-XL (arXiv
            1901.02860).
            None: the token's own segment only, as in the Infini-attention paper.
        output_memory_dim: r, number of features of the output memory (output_memory.py), whose state is a matrix
            [vocab_size, r] per row. None: no output memory.
        memory_base: selective-delta reads a learned matrix beside the memory, so that there is something to read in a
            document's first segment, too. Without it an empty memory is not read. The paper's rules have none.
        gate_init: initial value of beta. The memory's share of the mix is sigmoid(beta), per query head.
        qk_norm: normalise queries and keys of each head by an RMSNorm, as in Qwen3.
        embedding_range: standard deviation of the initial input embeddings. None: initializer_range.

    `max_position_embeddings` is the context length that tools may use, not a limit of the model: positions count
    within a segment, so it should be far longer than `segment_length`.

    Raises:
        ValueError: fields that contradict one another; the message lists all of them.
    """

    model_type = "infini"
    # Tensor parallelism of transformers: the SwiGLU layers are divided, and every process has all heads.
    base_model_tp_plan: ClassVar[dict[str, Any]] = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar[dict[str, Any]] = {}
    # Outputs that are no predictions, which the Trainer would hand to `compute_metrics`.
    keys_to_ignore_at_inference = ["past_key_values", "memory"]  # noqa: RUF012 (no field, as in LlamaConfig)

    segment_length: int = 2048
    memory: str = "paper-linear"
    sliding_window: int | None = None
    output_memory_dim: int | None = None
    memory_base: bool = True
    gate_init: float = 0.0
    qk_norm: bool = False
    embedding_range: float | None = None
    max_position_embeddings: int = 1_048_576

    def __post_init__(self, **kwargs):
        # Before LlamaConfig divides by some of them; it fills in those that are None.
        sizes = [
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "segment_length", "output_memory_dim"),
        ]
        scales = ("initializer_range", "embedding_range", "rms_norm_eps")
        given: dict[str, Any] = {name: getattr(self, name) for name in (*sizes, *scales)}
        found = {name: value for name, value in given.items() if value is not None}
        faults = [f"{name}: found {found[name]}, expected at least 1" for name in sizes if found.get(name, 1) < 1]
        faults += [
            f"{name}: found {found[name]}, expected a number from 0 on"
            for name in scales
            if not 0 <= found.get(name, 0) < math.inf
        ]
        if not math.isfinite(self.gate_init):
            faults.append(f"gate_init: found {self.gate_init}, expected a finite number")
        if faults:
            raise ValueError("InfiniConfig: " + "; ".join(faults))
        super().__post_init__(**kwargs)
        assert self.num_key_value_heads and self.head_dim and isinstance(self.rope_parameters, dict)
        theta: Any = self.rope_parameters.get("rope_theta", 1)
        if not 0 < theta < math.inf:
            faults.append(f"rope_theta: found {theta}, expected a number above 0")
        if self.sliding_window is not None and not 1 <= self.sliding_window <= 2 * self.segment_length:
            faults.append(
                f"sliding_window: found {self.sliding_window}, expected 1 to 2 * segment_length = "
                f"{2 * self.segment_length}, or none"
            )
        uneven = self.segment_length > OUTPUT_CHUNK and self.segment_length % OUTPUT_CHUNK
        if self.output_memory_dim is not None and uneven:
            faults.append(
                f"segment_length: found {self.segment_length}, expected at most {OUTPUT_CHUNK} or a multiple of it, "
                "the number of tokens between two writes of the output memory"
            )
        if self.memory not in MEMORY_RULES:
            faults.append(f"memory: found {self.memory!r}, expected one of {', '.join(MEMORY_RULES)}")
        if self.num_attention_heads % self.num_key_value_heads:
            faults.append(
                f"num_key_value_heads: found {self.num_key_value_heads}, "
                f"expected a divisor of num_attention_heads = {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            faults.append(f"head_dim: found {self.head_dim}, expected an even number (RoPE rotates pairs)")
        if self.tie_word_embeddings and self.embedding_range is not None:
            faults.append(f"embedding_range: found {self.embedding_range}, expected none where embeddings are tied")
        if self.attention_dropout:
            faults.append(f"attention_dropout: found {self.attention_dropout}, expected 0 (exact resume)")
        if faults:
            raise ValueError("InfiniConfig: " + "; ".join(faults))

    @property
    def head_sizes(self) -> tuple[int, int, int]:
        """Number of query heads, number of key/value heads, and head dim."""
        assert self.num_key_value_heads and self.head_dim  # LlamaConfig fills them in
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    @property
    def output_chunk(self) -> int:
        """Number of tokens between two writes of the output memory."""
        return min(OUTPUT_CHUNK, self.segment_length)

    @property
    def near_length(self) -> int:
        """Number of tokens of the segment before that local attention may see."""
        return min(self.sliding_window or 0, self.segment_length)
