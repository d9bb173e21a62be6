"""The language model head: a linear map to logits, with the output memory if the model has one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .cross_entropy import SummedLosses
from .output_memory import OutputMemory, OutputWindow, RememberedLosses, remembered_logits


class LanguageHead(nn.Linear):
    """nn.Linear without a bias, weight [vocabulary, hidden], and in `memory` the output memory.

    The loss runs in `forward` as well, because ZeRO-3 gathers weights in forward hooks.
    """

    def __init__(self, hidden_size: int, vocab_size: int, output_memory_dim: int | None = None):
        super().__init__(hidden_size, vocab_size, bias=False)
        self.memory = None if output_memory_dim is None else OutputMemory(hidden_size, output_memory_dim)
        self.differentiates = True

    @contextmanager
    def losses_only(self) -> Iterator[None]:
        """A context for a forward pass that backward repeats (`torch.utils.checkpoint`), so that the gradients, which
        are computed in forward, are computed only once. Without the repetition the gradients would be undefined."""
        self.differentiates = False
        try:
            yield
        finally:
            self.differentiates = True

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        window: OutputWindow | None = None,
        kept: slice | Tensor = slice(None),
    ) -> Any:
        """Logits, or losses if there are labels.

        Args:
            hidden: [..., hidden].
            labels: int64 [...]; -100 where there is none. With a window, each is the token that follows.
            window: the layout of the call for the output memory, which is then read and written; hidden and labels
                are [B, T, hidden] and [B, T]. None: logits and losses of the linear map alone.
            kept: with a window, the columns whose logits are returned.

        Returns:
            without labels the logits [..., vocabulary]; with labels the sum of the cross-entropies in nats, a scalar,
            and each of them [...], which has no gradient and is 0 where there is no label. Losses are float32, or
            float64 for float64 inputs. With a window, the output memory after it follows, [B, vocabulary, r].
        """
        if window is not None:
            assert self.memory is not None
            features, scale = self.memory(hidden)
            if labels is None:
                return remembered_logits(hidden, self.weight, features, scale, window, kept)
            queries = features * scale
            if not window.reads_memory:  # zeros with a graph, because DDP expects a gradient of every parameter
                queries = queries * 0
            inputs = hidden, self.weight, queries, features.detach(), labels
            return RememberedLosses.apply(*inputs, window, self.differentiates, self.memory.counted_chunks)
        if labels is None:
            return super().forward(hidden)
        total, losses = SummedLosses.apply(hidden.flatten(0, -2), self.weight, labels.flatten(), self.differentiates)
        return total, losses.view_as(labels)
