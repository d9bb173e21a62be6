"""What each head takes from its memory: its share of the mix, and how large the reads are beside local attention."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from infini_train.model import InfiniForCausalLM
from infini_train.model.attention import Mix


class MemoryUse:
    """Sums over the tokens for which the memory rule knows something (the paper's: from a document's second segment
    on; selective-delta: all), by layer and query head.

    Args:
        model: its layers and heads, and its device, on which the sums are kept.

    sums: float64 [4, layers, heads]: tokens; shares of the memory, sigmoid(beta [+ gate(x)]); norms of the reads;
        norms of local attention's outputs.
    """

    def __init__(self, model: InfiniForCausalLM):
        shape = 4, model.config.num_hidden_layers, model.config.num_attention_heads
        self.sums = torch.zeros(shape, dtype=torch.float64, device=model.device)

    @contextmanager
    def counting(self, model: InfiniForCausalLM, real_BT: Tensor) -> Iterator[None]:
        """Inside, what the model reads of windows [B, T] of whole segments counts, where real_BT (bool), except while
        its memory is off."""
        with ExitStack() as hooks:
            for i, mix in enumerate(module for module in model.modules() if isinstance(module, Mix)):
                hooks.enter_context(mix.register_forward_hook(partial(self._count, model, i, real_BT)))
            yield

    def _count(
        self,
        model: InfiniForCausalLM,
        layer: int,
        real_BT: Tensor,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        output: Any,
    ) -> None:
        if not model.model.read_memory:
            return
        local, read, gate, known = inputs  # [b, n, k, g, s, d], the last two may be 1 where they do not differ
        real = real_BT.unflatten(1, (local.shape[1], -1))[:, :, None, None, :, None] & known
        ones = torch.ones_like(local[..., :1])
        for i, x in enumerate((ones, gate, read.norm(dim=-1, keepdim=True), local.norm(dim=-1, keepdim=True))):
            self.sums[i, layer] += torch.where(real, x * ones, 0).sum((0, 1, 4, 5), dtype=torch.float64).flatten()

    def shares_and_norms(self) -> tuple[Tensor, Tensor]:
        """Mean share of the memory, and mean norm of the reads over that of local attention's outputs, each float64
        [layers, heads] on the CPU; all NaN if no token found anything."""
        tokens, share, read, local = self.sums.cpu()
        return share / tokens, read / local

    def table(self) -> dict[str, list[list[float]]] | None:
        """The same as `share` and `read_norm`, for JSON; None if no token found anything."""
        if not self.sums.any():
            return None
        values = zip(("share", "read_norm"), self.shares_and_norms(), strict=True)
        return {name: rows.tolist() for name, rows in values}
