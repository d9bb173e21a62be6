"""Decoders without a memory, for comparison: `python -m benchmarks.baselines fit ...`, like `infini-train fit`.

Each is this project's decoder with another attention, trained with the same module, data and checkpoints:

local           attention within the segment only.
local-convolved the same on queries and keys that are convolved as in selective-delta: that rule without its memory.
transformer-xl  a token attends to its own segment and the whole one before (arXiv 1901.02860), with RoPE for relative
                distances. Keys and values of a window's last segment are carried to the next window, detached.

The configuration of a checkpoint still names a memory rule, which has no effect: `convert` makes the baseline again.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from infini_train import preemption
from infini_train.cli import TrainingCLI, train
from infini_train.model import InfiniForCausalLM
from infini_train.model.attention import InfiniAttention
from infini_train.model.memory_rule import MemoryState
from infini_train.model.modeling import InfiniModel
from infini_train.model.selective_delta import SelectiveDelta
from infini_train.model.window import Window
from infini_train.training.module import InfiniModule

Baseline = Literal["local", "local-convolved", "transformer-xl"]


class LocalAttention(InfiniAttention):
    """Attention within the segment only."""

    def forward(self, x_BTD, memory, window, cached=None):
        q, k, v = self._projected(x_BTD, window)
        return self._joined(self._local_attention(q, k, v, window)), memory, None

    def _projected(self, x_BTD: Tensor, window: Window) -> list[Tensor]:
        return [window.split(project(x_BTD), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)]

    def _joined(self, out_bnhsd: Tensor) -> Tensor:
        return self.o_proj(out_bnhsd.transpose(2, 3).flatten(3).flatten(1, 2))


class ConvolvedLocalAttention(LocalAttention):
    """Local attention on convolved queries and keys.

    State: conv, as in selective-delta. The convolution sees its inputs before the segment also under `memory_off`.
    """

    rule: SelectiveDelta

    def forward(self, x_BTD, memory, window, cached=None):
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        q, k, left = self.rule.local_queries_and_keys(memory, q, k, {"query_input": q}, window)
        q, k, v = (window.split(x, self.head_dim) for x in (q, k, v))
        return self._joined(self._local_attention(q, k, v, window)), memory | left, None


class TransformerXLAttention(LocalAttention):
    """Attention to the own segment and the one before, which `memory_off` hides.

    State: k, v [b, kv heads, S, d] of the last segment, without RoPE; known [b, S], 1 for those of its tokens that
    belong to the document in progress.
    """

    def forward(self, x_BTD, memory, window, cached=None):
        q, k, v = self._projected(x_BTD, window)
        b, n, _, s, _ = q.shape
        assert s == memory["k"].shape[2] and not window.padding, "whole segments only"
        k, v = (
            torch.cat((torch.cat((memory[name][:, None].to(x), x[:, :-1]), dim=1), x), dim=-2)
            for name, x in (("k", k), ("v", v))
        )  # [b, n, kv heads, 2 s, d]: the segment before, then the own one
        # A token of the segment before is visible if both tokens belong to that segment's last document.
        seen = last = torch.ones(b, n, s, dtype=torch.bool, device=q.device)
        if window.access is not None:
            seen, last = window.access.read_bns, window.access.write_bns
        known = torch.cat((memory["known"][:, None] > 0, last[:, :-1]), dim=1)
        earlier = seen[..., None] & known[:, :, None] & window.read
        earlier = earlier.flatten(0, 1)[:, None]  # [b*n, 1, queries, keys]
        own, rows = window.local_mask, window.masked_R
        if own is None:
            own = torch.ones_like(earlier).tril()
        elif rows is not None:
            own = torch.ones_like(earlier).tril().index_copy(0, rows, own)
        window = replace(window, local_mask=torch.cat((earlier, own), dim=-1), masked_R=None)
        out = self._local_attention(q, k, v, window)
        after = {"k": k[:, -1, :, s:], "v": v[:, -1, :, s:], "known": last[:, -1]}
        return self._joined(out), {name: x.to(memory[name].dtype) for name, x in after.items()}, None


class TransformerXLModel(InfiniModel):
    """Positions run over two segments: keys 0 ... 2 S - 1, queries S ... 2 S - 1."""

    def _window(self, x_BTD: Tensor, starts: Tensor | None, placement) -> Window:
        assert placement is None, "no cache and no padding"
        size = self.config.segment_length
        cos, sin = self._rope(x_BTD, 2 * size)
        window = super()._window(x_BTD, starts, placement)
        return replace(window, rope_k=(cos, sin), rope_q=(cos[:, :, size:], sin[:, :, size:]))

    def init_memory(self, batch_size: int, device: torch.device | None = None) -> list[MemoryState]:
        heads, dim, size = self.config.num_key_value_heads, self.config.head_dim, self.config.segment_length
        assert heads and dim  # LlamaConfig fills them in
        dtype = torch.promote_types(self.dtype, torch.float32)
        shapes = {"k": (heads, size, dim), "v": (heads, size, dim), "known": (size,)}
        return [
            {
                name: torch.zeros(batch_size, *shape, dtype=dtype, device=device or self.device)
                for name, shape in shapes.items()
            }
            for _ in self.layers
        ]


ATTENTION: dict[Baseline, type[LocalAttention]] = {
    "local": LocalAttention,
    "local-convolved": ConvolvedLocalAttention,
    "transformer-xl": TransformerXLAttention,
}


def convert(model: InfiniForCausalLM, baseline: Baseline) -> InfiniForCausalLM:
    """Give a model the attention of a baseline, in place, with the same weights.

    Gates and the memory's parameters have no effect then, and are frozen.
    """
    if baseline == "transformer-xl":
        model.model.__class__ = TransformerXLModel
    for layer in model.model.layers:
        layer.self_attn.__class__ = ATTENTION[baseline]
        for name, parameter in (("gate", layer.self_attn.gate), *layer.self_attn.rule.named_parameters()):
            parameter.requires_grad_(baseline == "local-convolved" and name == "conv")
    return model


class BaselineModule(InfiniModule):
    """Trains a baseline.

    Args:
        baseline: name of the baseline.
        options: as in InfiniModule.

    Raises:
        ValueError: local-convolved with a memory rule other than selective-delta, whose convolution it uses.
    """

    def __init__(self, baseline: Baseline = "local", **options):
        super().__init__(**options)
        if baseline == "local-convolved" and self.config.memory != "selective-delta":
            raise ValueError(
                f"model.memory: found {self.config.memory}, expected selective-delta, whose convolution it has"
            )
        self.baseline = baseline

    def configure_model(self) -> None:
        super().configure_model()
        assert self.model is not None
        convert(self.model, self.baseline)


class BaselineCLI(TrainingCLI):
    def __init__(self, model_class: type[InfiniModule], *args, **options):
        super().__init__(BaselineModule, *args, **options)


def main() -> None:
    preemption.listen()
    train(BaselineCLI)


if __name__ == "__main__":
    main()
