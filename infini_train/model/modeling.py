"""The decoder: Llama's layers around Infini-attention, as Hugging Face models (DESIGN section 3).

The model that is trained is the model that is exported: `save_pretrained` writes it, these files load it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding
from transformers.utils import ModelOutput

from .attention import InfiniAttention, Window
from .configuration import InfiniConfig
from .memory import RULES, MemoryState, WindowDocuments


@dataclass
class InfiniModelOutput(ModelOutput):
    """last_hidden_state [B, T, hidden]; memory: one state per layer after the window, None where the window ends
    inside a segment."""

    last_hidden_state: Tensor | None = None
    memory: list[MemoryState] | None = None


@dataclass
class InfiniCausalLMOutput(ModelOutput):
    """loss: scalar, mean over labels; logits [B, T or logits_to_keep, vocabulary]; memory as InfiniModelOutput."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory: list[MemoryState] | None = None


class InfiniDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.self_attn = InfiniAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, memory: MemoryState, window: Window) -> tuple[Tensor, MemoryState]:
        attended, memory = self.self_attn(self.input_layernorm(x_BTD), memory, window)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), memory


class InfiniPreTrainedModel(PreTrainedModel):
    config: InfiniConfig
    config_class = InfiniConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InfiniDecoderLayer"]  # noqa: RUF012 (transformers' name and type)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InfiniAttention):
            init.constant_(module.gate, self.config.gate_init)


class InfiniModel(InfiniPreTrainedModel):
    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(InfiniDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.read_memory = True
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        starts: Tensor | None = None,
        memory: list[MemoryState] | None = None,
    ) -> InfiniModelOutput:
        """One window of T tokens per row; see InfiniForCausalLM.forward."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if memory is None:
            memory = self.init_memory(x_BTD.shape[0], x_BTD.device)
        window = self._window(x_BTD, starts)
        after = []
        for layer, state in zip(self.layers, memory, strict=True):
            x_BTD, state = layer(x_BTD, state, window)
            after.append(state)
        return InfiniModelOutput(self.norm(x_BTD), after if window.padding == 0 else None)

    def init_memory(self, batch_size: int, device: torch.device | None = None) -> list[MemoryState]:
        """Empty memories, one state of named float32 tensors (float64 for a float64 model) per layer."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        heads, dim = self.config.num_key_value_heads, self.config.head_dim
        assert heads and dim  # LlamaConfig fills them in
        return [
            RULES[self.config.memory].init_state(
                batch_size, heads, dim, dim, dtype=dtype, device=device or self.device
            )
            for _ in self.layers
        ]

    def _window(self, x_BTD: Tensor, starts: Tensor | None) -> Window:
        batch, length = x_BTD.shape[:2]
        size = self.config.segment_length
        segments = -(-length // size)
        # A lone short text must not be filled up to a whole segment.
        size = length if segments == 1 else size
        padding = segments * size - length
        documents = local_mask = None
        if starts is not None:
            if starts.shape != (batch, length):
                raise ValueError(f"starts: found shape {tuple(starts.shape)}, expected {(batch, length)}")
            # Decided on `starts` where it lies: on the CPU, as batches bring it, that costs no device sync.
            ids = F.pad(starts.long(), (0, padding)).cumsum(1).unflatten(1, (segments, size))
            inside = bool((ids[:, :, 0] != ids[:, :, -1]).any())
            ids = ids.to(x_BTD.device, non_blocking=True)
            documents = WindowDocuments.from_ids(ids)
            local_mask = Window.local_mask_of(ids) if inside else None
        cos, sin = self.rotary_emb(x_BTD, torch.arange(size, device=x_BTD.device)[None])
        return Window(segments, padding, documents, local_mask, cos, sin, self.read_memory)


class InfiniForCausalLM(InfiniPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        self.model = InfiniModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def init_memory(self, batch_size: int, device: torch.device | None = None) -> list[MemoryState]:
        """Empty memories for `batch_size` rows; see InfiniModel.init_memory."""
        return self.model.init_memory(batch_size, device)

    @contextmanager
    def memory_off(self) -> Iterator[None]:
        """Inside, no layer reads its memory: every output is local attention's alone (writes go on)."""
        self.model.read_memory = False
        try:
            yield
        finally:
            self.model.read_memory = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        starts: Tensor | None = None,
        memory: list[MemoryState] | None = None,
        **kwargs,
    ) -> InfiniCausalLMOutput:
        """One window of T tokens per row, all its segments in parallel.

        Args:
            input_ids: [B, T] int64; segments are cut from its first token. T may be any length.
            attention_mask: [B, T]; padding may stand on the right only, where causality keeps it out.
            inputs_embeds: [B, T, hidden] instead of input_ids.
            labels: [B, T] int64 in transformers' convention (shifted here, -100 where none).
            logits_to_keep: logits of the last so many tokens only; 0 for all.
            starts: [B, T] bool, first tokens of documents; best left on the CPU. None: the window continues the
                document that `memory` describes.
            memory: one state per layer before the window; None: empty.

        Raises:
            ValueError: padding on the left; shapes that do not agree.
        """
        if attention_mask is not None and attention_mask.shape[-1] > 1:
            mask = attention_mask.bool()
            if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                raise ValueError("attention_mask: found padding before text; expected padding on the right")
        out = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, starts=starts, memory=memory)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return InfiniCausalLMOutput(loss, logits, out.memory)
