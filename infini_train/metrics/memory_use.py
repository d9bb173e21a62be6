"""Measures how much each head uses its memory: the memory's share of the mix, and the norm of the reads."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from infini_train.model import InfiniForCausalLM
from infini_train.model.attention import Mix


class MemoryUse:
    """Sums, by layer and query head, over the tokens whose read from the memory means anything.

    With the paper's rules these are the tokens from a document's second segment on; with selective-delta, all tokens.

    Args:
        model: gives the number of layers and heads, and the device on which the sums are kept.

    Attributes:
        sums: float64 [4, layers, heads], sums of: tokens; shares of the memory, sigmoid(beta [+ gate(x)]); norms of
            the reads; norms of local attention's outputs.
    """

    def __init__(self, model: InfiniForCausalLM):
        shape = 4, model.config.num_hidden_layers, model.config.num_attention_heads
        self.sums = torch.zeros(shape, dtype=torch.float64, device=model.device)

    @contextmanager
    def counting(self, model: InfiniForCausalLM, real_BT: Tensor) -> Iterator[None]:
        """Return a context in which forward passes of the model are counted, except while its memory is off.

        Args:
            model: the model, which reads windows of B rows of T tokens, whole segments, in one call or in several.
            real_BT: bool [B, T], the tokens to count; false at padding.
        """
        with ExitStack() as hooks:
            for i, mix in enumerate(module for module in model.modules() if isinstance(module, Mix)):
                real = iter(real_BT.split(model.config.segment_length, dim=1))
                hooks.enter_context(mix.register_forward_hook(partial(self._count, model, i, real)))
            yield

    def _count(
        self,
        model: InfiniForCausalLM,
        layer: int,
        real: Iterator[Tensor],
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        output: Any,
    ) -> None:
        if not model.model.read_memory:
            return
        local, read, gate, known = inputs  # [b, n, k, g, s, d]; s and d are 1 where values are the same for all
        real_bns = torch.stack(list(islice(real, local.shape[1])), dim=1)
        counted = real_bns[:, :, None, None, :, None] & known
        ones = torch.ones_like(local[..., :1])
        for i, x in enumerate((ones, gate, read.norm(dim=-1, keepdim=True), local.norm(dim=-1, keepdim=True))):
            self.sums[i, layer] += torch.where(counted, x * ones, 0).sum((0, 1, 4, 5), dtype=torch.float64).flatten()

    def shares_and_norms(self) -> tuple[Tensor, Tensor]:
        """Return the mean share of the memory, and the norm of the reads over that of local attention's outputs.

        Each is float64 [layers, heads] on the CPU, and all NaN if no token's read meant anything.
        """
        tokens, share, read, local = self.sums.cpu()
        return share / tokens, read / local

    def table(self) -> dict[str, list[list[float]]] | None:
        """Return the same as lists `share` and `read_norm`, for JSON; None if no token's read meant anything."""
        if not self.sums.any():
            return None
        values = zip(("share", "read_norm"), self.shares_and_norms(), strict=True)
        return {name: rows.tolist() for name, rows in values}
