"""The decoder: Llama's layers around Infini-attention, as Hugging Face models.

The model that is trained is the model that is exported: `save_pretrained` writes it, and these files load it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from . import output_memory
from .attention import InfiniAttention
from .cache import InfiniCache, InfiniCacheLayer
from .configuration import InfiniConfig
from .cross_entropy import IGNORED
from .fused import RMSNorm
from .head import LanguageHead
from .layout import Layout
from .memory_rule import MemoryRule, MemoryState, density
from .output_memory import OutputMemory, OutputWindow
from .packing import Frames, document_starts
from .rules import RULES
from .window import Placement, Window

if TYPE_CHECKING:
    from .context import ContextGroup

logger = logging.get_logger(__name__)

PREFILL = 8192  # number of tokens of a prompt that `generate` reads at once; at least one segment


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
        frames: where the tokens lie in a call with padding or packed documents and without a cache.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: InfiniCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
    memory: list[MemoryState] | None = None
    strengths: Tensor | None = None
    frames: Frames | None = None

    @property
    def density(self) -> Tensor | None:
        """The mean density of the writes over layers, rows and heads (`memory_rule.density`), a scalar."""
        return None if self.strengths is None else density(self.strengths)


@dataclass
class InfiniCausalLMOutput(ModelOutput):
    """Output of the language model: `loss`, a scalar, the mean over labels; `logits` [B, T or logits_to_keep,
    vocabulary]; the others as in InfiniModelOutput."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: InfiniCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    memory: list[MemoryState] | None = None


class TokenLosses(NamedTuple):
    """What `InfiniForCausalLM.token_losses` returns.

    total: the sum of all cross-entropies in nats, a float32 scalar (float64 for a float64 model).
    losses: each of them without a gradient, [B, T], 0 where there is no label.
    last_hidden_state: [B, T, hidden].
    memory: one state per layer after the window, and then that of the output memory, if the model has one; None where
        the window ends inside a segment.
    strengths: as in InfiniModelOutput.
    """

    total: Tensor
    losses: Tensor
    last_hidden_state: Tensor
    memory: list[MemoryState] | None
    strengths: Tensor | None


class InfiniDecoderLayer(GradientCheckpointingLayer):
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
        if self.needs_head and not by_head:
            raise ValueError(
                "hidden states: found an output memory, which changes logits and losses, so that output weights and "
                "hidden states alone would give others; expected a call of the language model itself (its `labels` "
                "and `output_hidden_states`; with TRL, call infini_train.hf.trl_logits.use_model_logits() before the "
                "trainer is made), or a model loaded with output_memory_dim=None, to do without it"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError("output_attentions: found True, expected False: fused kernels keep no attention weights")
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
            self._check_cache(cache, shape[0])
        mask_BT, packed = self.padding(attention_mask, shape), None
        if position_ids is not None and position_ids.is_meta:  # shapes alone are computed
            position_ids = None
        if not (position_ids is None and seq_idx is None and cu_seq_lens_q is None):
            if starts is not None or memory is not None:
                raise ValueError("starts and memory cannot be combined with position_ids, seq_idx or cu_seq_lens_q")
            cached_B = None if cache is None else cache.tokens()
            packed = document_starts(shape, mask_BT, cached_B, position_ids, seq_idx, cu_seq_lens_q)
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
        frames = None
        if cache is None and (mask_BT is not None or packed is not None):
            frames = Frames(mask_BT, packed, shape, self.config, x_BTD.device)
            x_BTD, starts, mask_BT = frames.enframe(x_BTD), frames.starts_BL, None
        real_BL = None if frames is None else frames.real_BL
        inputs = x_BTD, mask_BT, cache, starts, memory, context, real_BL, own_segment
        out = self._decode(*inputs, return_dict=True, **kwargs)
        if frames is not None:
            out.memory, out.frames = None, frames
            out.last_hidden_state = frames.pick(out.last_hidden_state)
            if out.hidden_states is not None:
                out.hidden_states = tuple(map(frames.pick, out.hidden_states))
        return out

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
        layout = Layout(self.config, self.rotary_emb, self.read_memory, own_segment)
        window = layout.window(x_BTD, starts, placement, memory[0].get("near"), context, real_BL)
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
        factory = {"dtype": torch.promote_types(self.dtype, torch.float32), "device": device or self.device}
        return [InfiniAttention.init_state(self.config, batch_size, **factory) for _ in self.layers]

    def _check_cache(self, cache: InfiniCache, batch: int) -> None:
        if not isinstance(cache, InfiniCache):
            raise ValueError(f"past_key_values: found {type(cache).__name__}, expected InfiniCache")
        if cache.sizes != (sizes := InfiniCache.sizes_of(self.config)):
            raise ValueError(
                f"past_key_values: found a cache whose layers are written after {cache.sizes} tokens, as of another "
                f"model, expected {sizes}"
            )
        if cache.filled_B is not None and len(cache.filled_B) != batch:
            raise ValueError(f"past_key_values: found a cache of {len(cache.filled_B)} rows, expected {batch}")

    @staticmethod
    def padding(attention_mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
        """The mask of this call's columns, bool [B, T], false for padding; None without padding."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or len(attention_mask) != shape[0] or attention_mask.shape[1] < shape[1]:
            raise ValueError(
                f"attention_mask: found shape {tuple(attention_mask.shape)}, expected {tuple(shape)}, "
                "or more columns for what the cache has seen"
            )
        mask_BT = attention_mask[:, attention_mask.shape[1] - shape[1] :].bool()
        if torch.compiler.is_compiling():  # a graph must not depend on values
            return mask_BT
        return None if mask_BT.is_meta or mask_BT.all() else mask_BT


class InfiniForCausalLM(InfiniPreTrainedModel, GenerationMixin):
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        self.model = InfiniModel(config)
        # Whether there is an output memory; not asked of lm_head, which PEFT wraps.
        self.has_output_memory = self.model.needs_head = config.output_memory_dim is not None
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size, config.output_memory_dim)
        self.post_init()

    def init_memory(self, batch_size: int, device: torch.device | None = None) -> list[MemoryState]:
        """Empty memories for `batch_size` rows; see InfiniModel.init_memory. The last is the output memory's, if the
        model has one."""
        memory = self.model.init_memory(batch_size, device)
        return [*memory, self._empty_output(batch_size, device)] if self.has_output_memory else memory

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Called by `resize_token_embeddings` with a plain linear layer, whose weight the head takes over."""
        self.lm_head.weight = new_embeddings.weight
        self.lm_head.out_features = new_embeddings.out_features

    def _empty_output(self, batch_size: int, device: torch.device | None = None) -> MemoryState:
        """The empty state of the output memory."""
        factory = {"dtype": torch.promote_types(self.dtype, torch.float32), "device": device or self.device}
        return output_memory.init_state(self.config, batch_size, **factory)

    def token_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        starts: Tensor | None = None,
        memory: list[MemoryState] | None = None,
        context: "ContextGroup | None" = None,
        own_segment: bool = False,
    ) -> TokenLosses:
        """Losses of one window, without holding its logits.

        Args:
            input_ids, starts, memory, context: as in `forward` and InfiniModel.forward.
            labels: int64 [B, T], the token that follows each token; -100 where there is none.
            own_segment: as in InfiniModel.forward. The output memory, too, is only written then.
        """
        window = {"starts": starts, "memory": memory, "context": context, "own_segment": own_segment}
        out = self.model(input_ids, by_head=True, **window)
        hidden, after = out.last_hidden_state, out.memory
        if not self.has_output_memory:
            total, losses = self.lm_head(hidden, labels)
            return TokenLosses(total, losses, hidden, after, out.strengths)
        state = memory[-1] if memory else self._empty_output(len(input_ids), input_ids.device)
        if not self.model.read_memory:
            total, losses = self.lm_head(hidden, labels)
        elif input_ids.shape[1] % self.config.output_chunk:
            raise ValueError(
                f"input_ids: found {input_ids.shape[1]} tokens, expected a multiple of {self.config.output_chunk}"
            )
        else:
            options = {"context": context, "read": not own_segment}
            chunks = OutputWindow.of_call(self.config, input_ids, state, starts, **options)
            total, losses, output = self.lm_head(hidden, labels, chunks)
            state = {output_memory.NAME: output}
        after = None if after is None else [*after, state]
        return TokenLosses(total, losses, hidden, after, out.strengths)

    @contextmanager
    def memory_off(self) -> Iterator[None]:
        """Within this context every segment is read as if its document began there. Not for generation with a
        cache."""
        self.model.read_memory = False
        try:
            yield
        finally:
            self.model.read_memory = True

    def exchanged(self, memory: list[MemoryState]) -> list[MemoryState]:
        """States in which each row has the memory of the next row, and the last row that of the first.

        What is carried of the last tokens (inputs of a convolution, keys and values of local attention) stays with
        its row, so the difference in loss tells what the memory alone is worth.
        """
        names = *RULES[self.config.memory].memory_names, output_memory.NAME
        return [{name: x.roll(-1, 0) if name in names else x for name, x in layer.items()} for layer in memory]

    def _prepare_generation_config(self, generation_config, **kwargs):
        """Called by `generate`: refuse other caches, also "hybrid", which transformers would drop without a word."""
        for source in (kwargs, vars(generation_config or self.generation_config)):
            if (kind := source.get("cache_implementation")) is not None:
                raise ValueError(f"cache_implementation: found {kind!r}, expected none: the cache is InfiniCache")
        return super()._prepare_generation_config(generation_config, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args, **kwargs):
        """Called by `generate_batch`, whose cache of pages holds keys and values alone."""
        raise ValueError("continuous batching: found an Infini model, expected one without a memory; use `generate`")

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:  # type: ignore[override]
        """Called by `generate`, whose default caches would hold every key. It adds tokens after the last column of
        `attention_mask`, which has the columns of the cache and those that follow."""
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        if mask is not None and mask.dim() == 2 and not mask[:, -1].all():
            raise ValueError(
                "attention_mask: found padding at the end of a row, expected it at the start (without a mask, tokens "
                "that are pad_token_id count as padding)"
            )
        # `generate` drops a mask without padding, but keeps its length.
        columns = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        if isinstance(cache, InfiniCache) and columns is not None and cache.get_seq_length() >= columns:
            raise ValueError(
                f"past_key_values: found a cache of {cache.get_seq_length()} tokens and a sequence of {columns}, "
                "expected all that is in the cache and at least one token more: a cache cannot forget any, but a "
                "copy of an earlier one serves"
            )
        if generation_config.use_cache is False:
            return
        if cache is None:
            model_kwargs["past_key_values"] = InfiniCache(self.config)
        # Read a long prompt in pieces, so that it takes no more memory than PREFILL tokens.
        if generation_config.prefill_chunk_size is None and model_kwargs.get("inputs_embeds") is None:
            size = self.config.segment_length
            generation_config.prefill_chunk_size = max(PREFILL // size, 1) * size

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs) -> None:  # type: ignore[override]
        """Called by `generate`: positions are counted from the mask and the cache, so it need not pass any."""

    def _remembered_logits(
        self,
        out: InfiniModelOutput,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        filled_B: Tensor | None,
        state: MemoryState | None,
        starts: Tensor | None,
        kept: slice | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits with the output memory, and the memory after the call; filled_B: of the cache before the call."""
        if hasattr(self.lm_head, "base_layer"):  # PEFT adds the adapter's output to what it takes for logits
            raise ValueError("lm_head: found an adapter on output weights, expected none beside an output memory")
        if torch.compiler.is_exporting():
            raise ValueError(
                "torch.export: found an output memory, whose chunks follow one another in Python; expected none: "
                "output_memory_dim=None when the model is loaded"
            )
        hidden, cache, frames = out.last_hidden_state, out.past_key_values, out.frames
        assert hidden is not None
        if cache is not None:
            chunk, cached = self.config.output_chunk, cache.layers[-1]
            filled_B = torch.zeros(len(input_ids), dtype=torch.long) if filled_B is None else filled_B % chunk
            padding_BT = self.model.padding(attention_mask, (input_ids.shape[0], input_ids.shape[1]))
            place = Placement(filled_B, padding_BT, input_ids.shape[1], chunk)
            state = cached.memory or self._empty_output(len(input_ids), input_ids.device)
            window = OutputWindow.of_call(self.config, input_ids, state, None, placement=place, cached=cached)
            return self.lm_head(hidden, window=window, kept=kept)
        state = state or self._empty_output(len(input_ids), input_ids.device)
        if frames is None:
            window = OutputWindow.of_call(self.config, input_ids, state, starts)
            return self.lm_head(hidden, window=window, kept=kept)
        tokens = frames.enframe(input_ids[..., None])[..., 0]
        window = OutputWindow.of_call(self.config, tokens, state, frames.starts_BL)
        logits, memory = self.lm_head(frames.enframe(hidden), window=window)
        return frames.pick(logits)[:, kept], memory

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        starts: Tensor | None = None,
        memory: list[MemoryState] | None = None,
        **kwargs,
    ) -> InfiniCausalLMOutput:
        """One window of T tokens per row, with all its segments in parallel.

        Args:
            input_ids: int64 [B, T], any length. Segments are counted from a row's first token, or from the first
                token of the cache if there is one.
            attention_mask: [B, T], or with more columns for the tokens in the cache; 0 for padding, which may be
                anywhere. A row's output is that of its tokens alone.
            position_ids: int64 [B, T] or [1, T]; None: every row is one document. A position of 0 inside a row begins
                another document, and each document's outputs are those of it alone. All other positions have to
                continue those before, from 0 or from the tokens in the cache.
            past_key_values: the cache from earlier calls; it is changed in place.
            inputs_embeds: [B, T, hidden], instead of input_ids.
            labels: int64 [B, T] in transformers' convention: not shifted, -100 where there is none. A label right
                after padding, which nothing predicts, is ignored.
            use_cache: return a cache even if none is given. None: as the configuration says, but never in training
                mode, for packed documents, and while compiling or exporting.
            logits_to_keep: compute logits of so many last tokens, or of those that a tensor indexes; 0: of all.
            starts: bool [B, T], first tokens of documents, preferably on the CPU. None: the window continues the
                document that `memory` describes.
            memory: one state per layer before the window. None: empty.
            kwargs: further arguments of the decoder and of the loss. Some collators pass `seq_idx` or
                `cu_seq_lens_q`, which tell the same as position_ids (packing.py).

        Raises:
            ValueError: shapes that do not agree, starts or memory together with a cache or padding, and position_ids
                that mean something else.
        """
        filled_B = getattr(past_key_values, "filled_B", None)  # another cache is refused below
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            starts=starts,
            memory=memory,
            by_head=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        after = out.memory
        if not (self.has_output_memory and self.model.read_memory):
            logits = self.lm_head(out.last_hidden_state[:, kept])
        else:
            if input_ids is None:
                raise ValueError("inputs_embeds: an output memory is written with the tokens, so it needs input_ids")
            state = memory[-1] if memory else None
            logits, output = self._remembered_logits(out, input_ids, attention_mask, filled_B, state, starts, kept)
            if after is not None:
                after = [*after, {output_memory.NAME: output}]
        loss = None
        if labels is not None:
            if (mask_BT := self.model.padding(attention_mask, (labels.shape[0], labels.shape[1]))) is not None:
                after_padding_BT = F.pad(~mask_BT[:, :-1], (1, 0))  # nothing predicts a row's first token
                labels = labels.masked_fill(after_padding_BT.to(labels.device), IGNORED)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return InfiniCausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, after)


class InfiniForSequenceClassification(GenericForSequenceClassification, InfiniPreTrainedModel):
    """A score of each row, from its last token, as of a reward model; `config.num_labels` outputs.

    Rows of a batch are padded with `config.pad_token_id`, as in transformers' other models of this kind.
    """

    def __init__(self, config: InfiniConfig):
        # That of the generic class finds the decoder by AutoModel, which does not know remote code.
        InfiniPreTrainedModel.__init__(self, config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.model = InfiniModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class InfiniForTokenClassification(GenericForTokenClassification, InfiniPreTrainedModel):
    """Scores of every token; `config.num_labels` outputs."""

    def __init__(self, config: InfiniConfig):
        InfiniPreTrainedModel.__init__(self, config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.model = InfiniModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
