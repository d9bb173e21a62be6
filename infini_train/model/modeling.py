"""The language model, and by name all models that transformers' Auto classes load.

The model that is trained is the model that is exported: `save_pretrained` writes it, and these files load it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from . import output_memory
from .cache import InfiniCache
from .classification import InfiniForSequenceClassification, InfiniForTokenClassification
from .configuration import InfiniConfig
from .cross_entropy import IGNORED
from .decoder import InfiniModel, InfiniModelOutput, InfiniPreTrainedModel
from .generation import InfiniGenerationMixin
from .head import LanguageHead
from .memory_rule import MemoryState
from .output_memory import OutputWindow
from .rules import RULES
from .window import Placement

if TYPE_CHECKING:
    from .context import ContextGroup


@dataclass
class InfiniCausalLMOutput(ModelOutput):
    """Output of the language model: `loss`, a scalar, the mean over labels; `logits` [B, T or logits_to_keep,
    vocabulary]; `memory`, as `InfiniForCausalLM.forward` takes it; the others as in InfiniModelOutput."""

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


class InfiniForCausalLM(InfiniPreTrainedModel, InfiniGenerationMixin):
    """The language model: the decoder and a head, which may read an output memory."""

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
        return output_memory.init_state(self.config, batch_size, **self._state_factory(device))

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
            options = {"context": context, "reads_memory": not own_segment}
            chunks = OutputWindow.of_call(self.config, input_ids, state, starts, **options)
            total, losses, output = self.lm_head(hidden, labels, chunks)
            state = {output_memory.NAME: output}
        after = None if after is None else [*after, state]
        return TokenLosses(total, losses, hidden, after, out.strengths)

    @contextmanager
    def memory_off(self) -> Iterator[None]:
        """Within this context no memory is read, neither those of the layers nor the output memory. A sliding window
        and what a rule has learned as the same for all documents (`base`) stay. Not for generation with a cache."""
        self.model.read_memory = False
        try:
            yield
        finally:
            self.model.read_memory = True

    def with_memory_of_next_row(self, memory: list[MemoryState]) -> list[MemoryState]:
        """States in which each row has the memory of the next row, and the last row that of the first.

        What is carried of the last tokens (inputs of a convolution, keys and values of local attention) stays with
        its row, so the difference in loss tells what the memory alone is worth.
        """
        names = *RULES[self.config.memory].memory_names, output_memory.NAME
        return [{name: x.roll(-1, 0) if name in names else x for name, x in layer.items()} for layer in memory]

    def _remembered_logits(
        self,
        out: InfiniModelOutput,
        input_ids: Tensor,
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
        hidden, cache, rows = out.last_hidden_state, out.past_key_values, out.rows
        assert hidden is not None
        if cache is not None:
            chunk, cached = self.config.output_chunk, cache.layers[-1]
            filled_B = torch.zeros(len(input_ids), dtype=torch.long) if filled_B is None else filled_B % chunk
            place = Placement(filled_B, out.real, input_ids.shape[1], chunk)
            state = cached.memory or self._empty_output(len(input_ids), input_ids.device)
            window = OutputWindow.of_call(self.config, input_ids, state, None, placement=place, cached=cached)
            return self.lm_head(hidden, window=window, kept=kept)
        state = state or self._empty_output(len(input_ids), input_ids.device)
        if rows is None:
            window = OutputWindow.of_call(self.config, input_ids, state, starts)
            return self.lm_head(hidden, window=window, kept=kept)
        tokens = rows.pack(input_ids[..., None])[..., 0]
        window = OutputWindow.of_call(self.config, tokens, state, rows.starts_BL)
        logits, memory = self.lm_head(rows.pack(hidden), window=window)
        return rows.unpack(logits)[:, kept], memory

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
            attention_mask: [B, T], or with the columns of the cache in front; 0 for padding, which may be
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
            memory: the states before the window, one per layer, and then that of the output memory, if the model has
                one. None: all empty.
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
            logits, output = self._remembered_logits(out, input_ids, filled_B, state, starts, kept)
            if after is not None:
                after = [*after, {output_memory.NAME: output}]
        loss = None
        if labels is not None:
            if out.real is not None:
                after_padding_BT = F.pad(~out.real[:, :-1], (1, 0))  # nothing predicts a row's first token
                labels = labels.masked_fill(after_padding_BT.to(labels.device), IGNORED)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return InfiniCausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, after)


# transformers saves a model with the file of its class and all files that this one imports. These classes count as
# classes of this file, so that every model is saved with the code of all, and can be loaded as any of them.
for _model in (InfiniModel, InfiniForSequenceClassification, InfiniForTokenClassification):
    _model.__module__ = __name__
