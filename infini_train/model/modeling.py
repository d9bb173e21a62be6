"""The decoder: Llama's layers around Infini-attention, as Hugging Face models.

The model that is trained is the model that is exported: `save_pretrained` writes it, and these files load it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention import InfiniAttention
from .cache import InfiniCache, InfiniCacheLayer
from .configuration import InfiniConfig
from .fused import rms_norm
from .head import LanguageHead
from .memory_rule import MemoryRule, MemoryState
from .rules import RULES
from .window import CAUSAL, Access, LocalMask, Placement, Reach, Window

if TYPE_CHECKING:
    from .context import ContextGroup

PREFILL = 8192  # number of tokens of a prompt that `generate` reads at once; at least one segment


@dataclass
class InfiniModelOutput(ModelOutput):
    """Output of the decoder without its head.

    Attributes:
        last_hidden_state: [B, T, hidden].
        past_key_values: the cache, if one is used.
        memory: one state per layer after the window; None with a cache, and where the window ends inside a segment.
        density: scalar, the mean density of the writes over layers, rows and heads (`memory_rule.RuleOutput`); None
            outside of training, and with rules that do not choose what they write.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: InfiniCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    memory: list[MemoryState] | None = None
    density: Tensor | None = None


@dataclass
class InfiniCausalLMOutput(ModelOutput):
    """Output of the language model: `loss`, a scalar, the mean over labels; `logits` [B, T or logits_to_keep,
    vocabulary]; the others as in InfiniModelOutput."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: InfiniCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    memory: list[MemoryState] | None = None


class RMSNorm(nn.RMSNorm):
    """RMS norm with our fused form on a CPU, where torch's makes many passes, except over a single token."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype.itemsize < 4 or x.shape[-2] == 1:  # torch widens half precision itself
            return super().forward(x)
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


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
        attended, memory, density_BK = self.self_attn(self.input_layernorm(x_BTD), memory, window, cached)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), memory, density_BK


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
        elif isinstance(module, MemoryRule):
            module.init_weights()
        elif isinstance(module, nn.Embedding) and self.config.embedding_range is not None:
            init.normal_(module.weight, std=self.config.embedding_range)


class InfiniModel(InfiniPreTrainedModel):
    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(InfiniDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.read_memory = True
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        starts: Tensor | None = None,
        memory: list[MemoryState] | None = None,
        context: "ContextGroup | None" = None,
        **kwargs,
    ) -> InfiniModelOutput:
        """One window of T tokens per row; see InfiniForCausalLM.forward.

        With `context`, the tokens are this rank's segments of a window that the ranks of the group share, and
        `memory` is the memory before and after the whole window, the same on all ranks.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x_BTD.shape[:2]
        if past_key_values is None and use_cache:
            past_key_values = InfiniCache(self.config)
        cache = past_key_values
        placement = self._placement(batch, length, attention_mask, cache)
        if placement is not None and (starts is not None or memory is not None):
            raise ValueError("starts and memory cannot be combined with a cache or padding")
        if memory is None and cache is not None:
            memory = cache.memory()
        if memory is None:
            memory = self.init_memory(batch, x_BTD.device)
        window = self._window(x_BTD, starts, placement, memory[0].get("near"), context)
        after, densities = [], []
        for i, (layer, state) in enumerate(zip(self.layers, memory, strict=True)):
            x_BTD, state, density = layer(x_BTD, state, window, None if cache is None else cache.layers[i])
            after.append(state)
            if density is not None:
                densities.append(density)
        if cache is not None:
            assert placement is not None
            cache.advance(placement, length)
        whole = placement is None and length % self.config.segment_length == 0
        return InfiniModelOutput(
            self.norm(x_BTD),
            cache,
            memory=after if whole else None,
            density=torch.stack(densities).mean() if densities else None,
        )

    def init_memory(self, batch_size: int, device: torch.device | None = None) -> list[MemoryState]:
        """Empty memories, one state of named float32 tensors (float64 for a float64 model) per layer."""
        factory = {"dtype": torch.promote_types(self.dtype, torch.float32), "device": device or self.device}
        return [InfiniAttention.init_state(self.config, batch_size, **factory) for _ in self.layers]

    def _placement(
        self, batch: int, length: int, attention_mask: Tensor | None, cache: InfiniCache | None
    ) -> Placement | None:
        """The layout of a call with a cache or padding; None for dense batches."""
        mask_BT = None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] < length:
                raise ValueError(
                    f"attention_mask: found shape {tuple(attention_mask.shape)}, expected {(batch, length)}, "
                    "or more columns for what the cache has seen"
                )
            mask_BT = attention_mask[:, -length:].bool()
            if bool(mask_BT.all()):
                mask_BT = None
        if cache is None and mask_BT is None:
            return None
        filled_B, ready = torch.zeros(batch, dtype=torch.long, device="cpu"), False
        if cache is not None:
            if not isinstance(cache, InfiniCache):
                raise ValueError(f"past_key_values: found {type(cache).__name__}, expected InfiniCache")
            if cache.filled_B is not None:
                filled_B = cache.filled_B
            ready = cache.ready and not torch.is_grad_enabled()
            if len(filled_B) != batch:
                raise ValueError(f"past_key_values: found a cache of {len(filled_B)} rows, expected {batch}")
        return Placement(filled_B, mask_BT, length, self.config.segment_length, ready)

    def _window(
        self,
        x_BTD: Tensor,
        starts: Tensor | None,
        placement: Placement | None,
        near_BP: Tensor | None,
        context: "ContextGroup | None",
    ) -> Window:
        """The layout of a call; near_BP: `near` of the state before it."""
        reach = None
        if self.config.sliding_window is not None:
            assert near_BP is not None
            reach = Reach(self.config.sliding_window, self.config.near_length, near_BP)
        if placement is not None:
            return self._placed_window(x_BTD, placement, reach)
        return self._dense_window(x_BTD, starts, reach, context)

    def _placed_window(self, x_BTD: Tensor, placement: Placement, reach: Reach | None) -> Window:
        """The layout of a call with a cache or padding: one document a row."""
        place, size, near = placement.to(x_BTD.device), self.config.segment_length, self.config.near_length
        if place.within:
            size = place.frame
        if place.step:
            rope_q = rope_k = self._rope(x_BTD, near + place.cached, 1)
        else:
            rope_k = self._rope(x_BTD, 0, near + size)
            rope_q = rope_k[0][:, :, near:], rope_k[1][:, :, near:]
            if place.within:
                rope_q = rope_q[0][0, 0, place.position_BT][:, None], rope_q[1][0, 0, place.position_BT][:, None]
        if place.within:
            local = place.local_mask(reach)
        elif reach is None:
            local = CAUSAL
        else:
            documents = torch.zeros(len(x_BTD), place.segments, size, dtype=torch.long)
            local = LocalMask.of_documents(documents, documents.to(x_BTD.device), reach)
        return Window(
            place.segments,
            rope_q,
            rope_k,
            padding=place.segments * size - place.frame,
            access=place.access(x_BTD.device),
            local=local,
            read=self.read_memory,
            placement=place,
            near=near,
            near_after_BP=None if reach is None else place.near_after(reach),
        )

    def _dense_window(
        self, x_BTD: Tensor, starts: Tensor | None, reach: Reach | None, context: "ContextGroup | None"
    ) -> Window:
        """The layout of a window without cache and padding, in which documents may begin anywhere."""
        (batch, length), size, near = x_BTD.shape[:2], self.config.segment_length, self.config.near_length
        segments = -(-length // size)
        size = length if segments == 1 else size  # a short text is not padded to a whole segment
        padding = segments * size - length
        if context is not None:
            assert not padding and length >= 3, "whole segments"
        if starts is not None and starts.shape != (batch, length):
            raise ValueError(f"starts: found shape {tuple(starts.shape)}, expected {(batch, length)}")

        # Number the documents of each row; 0 is the one that the carried memory describes. `starts` is examined on
        # its own device. Batches keep it on the CPU, so this needs no device sync.
        access, local, documents, reach_BT, after_BP = None, CAUSAL, None, None, None
        begins = starts is not None and bool(starts.any())
        if begins:
            assert starts is not None
            documents = F.pad(starts.long(), (0, padding)).cumsum(1).unflatten(1, (segments, size))
        elif reach is not None:
            documents = torch.zeros(batch, segments, size, dtype=torch.long)
        if documents is not None:
            on_host, documents = documents, documents.to(x_BTD.device, non_blocking=True)
            if reach is not None:
                after_BP = (documents[:, -1, -near:] == documents[:, -1, -1:]).to(reach.before_BP.dtype)
                if context is not None:
                    replaced = torch.zeros(batch, dtype=torch.bool, device=x_BTD.device)
                    before_BP, after_BP = context.carried(reach.before_BP, after_BP, replaced)
                    reach = replace(reach, before_BP=before_BP)
            local = LocalMask.of_documents(on_host, documents, reach)
        if begins:
            assert documents is not None
            access = Access.of_documents(documents)
            before = F.pad(documents.flatten(1), (3, 0))
            reach_BT = torch.stack([before[:, 3 - j : -j] == before[:, 3:] for j in (1, 2, 3)]).sum(0)
        if not self.read_memory and not near:  # inputs of a convolution in earlier segments count as memory, too
            within = torch.arange(size, device=x_BTD.device).clamp_max(3).repeat(segments).expand(batch, -1)
            reach_BT = within if reach_BT is None else torch.minimum(reach_BT, within)
        cos, sin = self._rope(x_BTD, 0, near + size)
        return Window(
            segments,
            (cos[:, :, near:], sin[:, :, near:]),
            (cos, sin),
            padding,
            access,
            local,
            self.read_memory,
            reach_BT=reach_BT,
            context=context,
            near=near,
            near_after_BP=after_BP,
        )

    def _rope(self, x_BTD: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `count` positions, each [1, 1, count, d]. The first token of a segment has position
        `near`, because that many keys of the segment before come first."""
        cos, sin = self.rotary_emb(x_BTD, torch.arange(first, first + count, device=x_BTD.device)[None])
        return cos[:, None], sin[:, None]


class InfiniForCausalLM(InfiniPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        self.model = InfiniModel(config)
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def init_memory(self, batch_size: int, device: torch.device | None = None) -> list[MemoryState]:
        """Empty memories for `batch_size` rows; see InfiniModel.init_memory."""
        return self.model.init_memory(batch_size, device)

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
        names = RULES[self.config.memory].memory_names
        return [{name: x.roll(-1, 0) if name in names else x for name, x in layer.items()} for layer in memory]

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:  # type: ignore[override]
        """Called by `generate`, whose default caches would hold every key."""
        if (kind := generation_config.cache_implementation) is not None:
            raise ValueError(f"cache_implementation: found {kind!r}, expected none: the cache is InfiniCache")
        if generation_config.use_cache is False:
            return
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = InfiniCache(self.config)
        # Read a long prompt in pieces, so that it takes no more memory than PREFILL tokens.
        if generation_config.prefill_chunk_size is None and model_kwargs.get("inputs_embeds") is None:
            size = self.config.segment_length
            generation_config.prefill_chunk_size = max(PREFILL // size, 1) * size

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
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
            past_key_values: the cache from earlier calls; it is changed in place.
            inputs_embeds: [B, T, hidden], instead of input_ids.
            labels: int64 [B, T] in transformers' convention: not shifted, -100 where there is none.
            use_cache: return a cache even if none is given. None: as the configuration says, never in training mode.
            logits_to_keep: compute logits of so many last tokens, or of those that a tensor indexes; 0: of all.
            starts: bool [B, T], first tokens of documents, preferably on the CPU. None: the window continues the
                document that `memory` describes.
            memory: one state per layer before the window. None: empty.

        Raises:
            ValueError: shapes that do not agree, and starts or memory together with a cache or padding.
        """
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training and starts is None and memory is None
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            starts=starts,
            memory=memory,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return InfiniCausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, out.memory)
