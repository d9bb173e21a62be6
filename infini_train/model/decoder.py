"""The decoder: Llama's layers around Infini-attention, without a head. The models with heads call it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention import InfiniAttention
from .cache import InfiniCache, InfiniCacheLayer, check_cache
from .configuration import InfiniConfig
from .fused import RMSNorm
from .memory_rule import MemoryRule, MemoryState
from .output_memory import OutputMemory
from .packing import PackedRows, document_starts, tokens_of_call
from .window import Placement, Window
from .window_builder import WindowBuilder

if TYPE_CHECKING:
    from .context import ContextGroup

logger = logging.get_logger(__name__)


@dataclass
class InfiniModelOutput(ModelOutput):
    """Output of the decoder without its head.

    Attributes:
        last_hidden_state: [B, T, hidden].
        past_key_values: the cache, if one is used.
        attentions: none; transformers' classifiers copy this field.
        memory: one state per layer after the window; None with a cache, and where the window ends inside a segment.
        strengths: mean write strengths of each layer, [layers, 2, B, kv heads] (`memory_rule.RuleOutput`); None
            outside of training, and with rules that do not choose what they write.
        rows: where the tokens lie in a call with padding or packed documents and without a cache.
        real: bool [B, T], false for padding; None without padding.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: InfiniCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    memory: list[MemoryState] | None = None
    strengths: Tensor | None = None
    rows: PackedRows | None = None
    real: Tensor | None = None


class InfiniDecoderLayer(GradientCheckpointingLayer):
    """Infini-attention and SwiGLU, each behind a norm and beside a residual connection, as in Llama."""

    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.self_attn = InfiniAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x_BTD: Tensor, memory: MemoryState, window: Window, cached: InfiniCacheLayer | None = None
    ) -> tuple[Tensor, MemoryState, Tensor | None]:
        attended, memory, strengths = self.self_attn(self.input_layernorm(x_BTD), memory, window, cached)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), memory, strengths


class InfiniPreTrainedModel(PreTrainedModel):
    """What all Infini models share: configuration, initial weights, and what transformers may do with them."""

    config: InfiniConfig
    config_class = InfiniConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InfiniDecoderLayer"]  # noqa: RUF012 (transformers' name and type)
    _supports_sdpa = True
    _is_stateful = True  # writes to the memory cannot be undone, so assisted generation is impossible
    _can_record_outputs = {"hidden_states": InfiniDecoderLayer}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InfiniAttention):
            init.constant_(module.gate, self.config.gate_init)
        elif isinstance(module, MemoryRule | OutputMemory):
            module.init_weights()
        elif isinstance(module, nn.Embedding) and self.config.embedding_range is not None:
            init.normal_(module.weight, std=self.config.embedding_range)

    def _state_factory(self, device: torch.device | None = None) -> dict[str, Any]:
        """Device and dtype of memory states, which have at least float32 whatever the weights have."""
        return {"dtype": torch.promote_types(self.dtype, torch.float32), "device": device or self.device}

    def _resolve_parallel_plans(self, distributed_config):
        """Called before transformers divides a model over processes; it would cut a pipeline without asking for a
        plan."""
        if distributed_config.pp_size > 1:
            raise ValueError(
                f"pp_size: found {distributed_config.pp_size}, expected 1: layers hand on more than hidden states; "
                "tp_size divides the model over processes"
            )
        tp_plan, *others = super()._resolve_parallel_plans(distributed_config)
        if self.config.output_memory_dim is not None:  # its errors need the logits of the whole vocabulary
            tp_plan = {name: style for name, style in tp_plan.items() if ".mlp." in name}
        return tp_plan, *others


class InfiniModel(InfiniPreTrainedModel):
    """The decoder without a head: embeddings, layers and a last norm."""

    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(InfiniDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.read_memory = True
        self.needs_head = False  # set by a language model that has an output memory
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = False,
        starts: Tensor | None = None,
        memory: list[MemoryState] | None = None,
        context: "ContextGroup | None" = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        by_head: bool = False,
        own_segment: bool = False,
        **kwargs,
    ) -> InfiniModelOutput:
        """One window of T tokens per row; see InfiniForCausalLM.forward.

        The decoder of a language model with an output memory is called by that model only (`by_head`): a client that
        multiplies hidden states and output weights itself would leave the output memory out without a word.

        With `context`, the tokens are this rank's segments of a window that the ranks of the group share. `memory`
        then matters on the first rank only: it takes the memory before the window, and returns that after the whole
        window. The other ranks return what they were given.

        With `own_segment`, which is for training, local attention sees its own segment alone, as if there were no
        `sliding_window`, but carries the end of the window all the same.
        """
        self._check_options(input_ids, inputs_embeds, by_head, kwargs)
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if 0 in x_BTD.shape:
            raise ValueError(f"found {x_BTD.shape[0]} rows of {x_BTD.shape[1]} tokens, expected at least one of each")
        shape, cache = (x_BTD.shape[0], x_BTD.shape[1]), past_key_values
        unknown = kwargs.keys() - TransformersKwargs.__annotations__.keys()
        if shape[1] == 1 and cache is None and unknown:
            raise ValueError(
                f"found one token, no past_key_values and the unknown arguments {', '.join(sorted(unknown))}; "
                "expected an InfiniCache: with another cache, the token would have no context"
            )
        if cache is not None:
            check_cache(cache, self.config, shape[0])

        # Which columns are tokens, and where the documents of a packed row begin.
        mask_BT, packed = tokens_of_call(attention_mask, shape, 0 if cache is None else cache.get_seq_length()), None
        if position_ids is not None and position_ids.is_meta:  # shapes alone are computed
            position_ids = None
        if not (position_ids is None and seq_idx is None and cu_seq_lens_q is None):
            if starts is not None or memory is not None:
                raise ValueError("starts and memory cannot be combined with position_ids, seq_idx or cu_seq_lens_q")
            cached_B = None if cache is None else cache.tokens()
            packed = document_starts(shape, mask_BT, cached_B, position_ids, seq_idx, cu_seq_lens_q)

        # Whether a cache is made, and what cannot be combined with one.
        if use_cache is None:
            dense = packed is None and starts is None and memory is None
            use_cache = dense and bool(self.config.use_cache) and not (self.training or torch.compiler.is_compiling())
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise ValueError("past_key_values: found a cache, expected none with gradient checkpointing")
            if use_cache:
                logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing: no cache is made")
                use_cache = False
        if packed is not None and (cache is not None or use_cache):
            raise ValueError("position_ids: found several documents in a row, expected one with a cache")
        if cache is None and use_cache:
            cache = InfiniCache(self.config)
        if (starts is not None or memory is not None) and (cache is not None or mask_BT is not None):
            raise ValueError("starts and memory cannot be combined with a cache or padding")

        # Without a cache, padding is removed and packed documents are moved to segment boundaries. Outputs are moved
        # back below.
        real_BT, rows = mask_BT, None
        if cache is None and (mask_BT is not None or packed is not None):
            rows = PackedRows(mask_BT, packed, shape, self.config, x_BTD.device)
            x_BTD, starts, mask_BT = rows.pack(x_BTD), rows.starts_BL, None
        real_BL = None if rows is None else rows.real_BL
        inputs = x_BTD, mask_BT, cache, starts, memory, context, real_BL, own_segment
        out = self._decode(*inputs, return_dict=True, **kwargs)
        out.real = real_BT
        if rows is not None:
            out.memory, out.rows = None, rows
            out.last_hidden_state = rows.unpack(out.last_hidden_state)
            if out.hidden_states is not None:
                out.hidden_states = tuple(map(rows.unpack, out.hidden_states))
        return out

    def _check_options(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, by_head: bool, options: dict[str, Any]
    ) -> None:
        """Raise ValueError for a call that this model cannot answer whatever its tokens are."""
        if self.needs_head and not by_head:
            raise ValueError(
                "hidden states: found an output memory, which changes logits and losses, so that output weights and "
                "hidden states alone would give others; expected a call of the language model itself (its `labels` "
                "and `output_hidden_states`; with TRL, call infini_train.hf.trl_logits.use_model_logits() before the "
                "trainer is made), or a model loaded with output_memory_dim=None, to do without it"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if options.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError("output_attentions: found True, expected False: fused kernels keep no attention weights")

    @capture_outputs
    def _decode(
        self,
        x_BTD: Tensor,
        mask_BT: Tensor | None,
        cache: InfiniCache | None,
        starts: Tensor | None,
        memory: list[MemoryState] | None,
        context: "ContextGroup | None",
        real_BL: Tensor | None,
        own_segment: bool,
        **kwargs,
    ) -> InfiniModelOutput:
        """The layers, on embeddings; mask_BT, false for padding, is given with a cache only, and real_BL without."""
        batch, length = x_BTD.shape[:2]
        placement = None
        if cache is not None:
            filled_B = (
                torch.zeros(batch, dtype=torch.long, device="cpu") if cache.filled_B is None else cache.filled_B
            )
            before = cache.before if cache.ready and self.read_memory and not torch.is_grad_enabled() else None
            placement = Placement(filled_B, mask_BT, length, self.config.segment_length, before)
        if memory is None and cache is not None:
            memory = cache.memory()
        if memory is None:
            memory = self.init_memory(batch, x_BTD.device)
        memory = memory[: len(self.layers)]
        builder = WindowBuilder(self.config, self.rotary_emb, self.read_memory, own_segment)
        window = builder.window(x_BTD, starts, placement, memory[0].get("near"), context, real_BL)
        after, strengths = [], []
        for i, (layer, state) in enumerate(zip(self.layers, memory, strict=True)):
            x_BTD, state, written = layer(x_BTD, state, window, None if cache is None else cache.layers[i])
            after.append(state)
            if written is not None:
                strengths.append(written)
        mean_strengths = torch.stack(strengths) if strengths else None
        if context is not None:
            after = context.after_window(memory, after)
            mean_strengths = None if mean_strengths is None else context.mean(mean_strengths)
        if cache is not None:
            assert placement is not None
            cache.advance(placement, length)
        whole = placement is None and length % self.config.segment_length == 0
        return InfiniModelOutput(
            self.norm(x_BTD),
            cache,
            memory=after if whole else None,
            strengths=mean_strengths,
        )

    def init_memory(self, batch_size: int, device: torch.device | None = None) -> list[MemoryState]:
        """Empty memories, one state of named float32 tensors (float64 for a float64 model) per layer."""
        factory = self._state_factory(device)
        return [InfiniAttention.init_state(self.config, batch_size, **factory) for _ in self.layers]
