"""Decoders without a memory, for comparison: `python -m benchmarks.baselines fit ...`, like `infini-train fit`.

Each is this project's decoder with another attention, trained with the same module, data and checkpoints:

local           attention within the segment only.
sliding-window  attention to the last S tokens.
transformer-xl  attention to the own segment and the whole one before (arXiv 1901.02860), with RoPE.
*-convolved     local or transformer-xl on queries and keys that are convolved as in selective-delta: that rule
                without its memory.
empty           selective-delta that sees the segment before, with memories that stay empty in training, too: what the
                rule's parameters (B, gate, norm) are worth without what it remembers.
empty           the model as configured, whose memories stay empty: what the memory's parameters are worth without it.

The configuration of a checkpoint still names a memory rule, which has no effect: `convert` makes the baseline again.
"""

from dataclasses import replace
from typing import Literal

from infini_train import preemption
from infini_train.cli import TrainingCLI, train
from infini_train.model import InfiniForCausalLM
from infini_train.model.attention import InfiniAttention
from infini_train.training.module import InfiniModule

Baseline = Literal[
    "local", "local-convolved", "sliding-window", "transformer-xl", "transformer-xl-convolved", "empty"
]
# How many tokens local attention sees, in segments; 0: the own segment.
SEEN: dict[Baseline, int] = {"sliding-window": 1, "transformer-xl": 2, "transformer-xl-convolved": 2, "empty": 2}


class LocalAttention(InfiniAttention):
    """Attention without a memory. The rule's convolution, if it is used, and the segment before are state."""

    convolved = False

    def forward(self, x_BTD, memory, window, cached=None):
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        state = {}
        if self.convolved:
            features = {"query_input": q}
            q, k, state = self.rule("local_queries_and_keys", memory, q, k, features, window)
        q, k, v = (window.split(x, self.head_dim) for x in (q, k, v))
        if window.near:
            k, v, near = self._with_segment_before(memory, k, v, window)
            state |= near
        out = self._local_attention(q, k, v, window, None)[0].view_as(q).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.o_proj(out), memory | state, None


class ConvolvedLocalAttention(LocalAttention):
    convolved = True


class EmptyAttention(InfiniAttention):
    """Infini-attention whose reads find the memory empty."""

    def forward(self, x_BTD, memory, window, cached=None):
        return super().forward(x_BTD, memory, replace(window, read=False), cached)


def convert(model: InfiniForCausalLM, baseline: Baseline) -> InfiniForCausalLM:
    """Give a model the attention of a baseline, in place, with the same weights.

    Gates and the memory's parameters have no effect then, except in `empty`, and are frozen.
    """
    model.config.sliding_window = SEEN.get(baseline, 0) * model.config.segment_length or None
    convolved = baseline.endswith("convolved")
    for layer in model.model.layers:
        if baseline == "empty":
            layer.self_attn.__class__ = EmptyAttention
            continue
        layer.self_attn.__class__ = ConvolvedLocalAttention if convolved else LocalAttention
        for name, parameter in (("gate", layer.self_attn.gate), *layer.self_attn.rule.named_parameters()):
            parameter.requires_grad_(convolved and name == "conv")
    return model


class BaselineModule(InfiniModule):
    """Trains a baseline.

    Args:
        baseline: name of the baseline.
        options: as in InfiniModule.

    Raises:
        ValueError: a convolved baseline with a memory rule other than selective-delta, whose convolution it uses.
    """

    def __init__(self, baseline: Baseline = "local", **options):
        super().__init__(**options)
        if baseline.endswith("convolved") and self.config.memory != "selective-delta":
            raise ValueError(
                f"model.memory: found {self.config.memory}, expected selective-delta, whose convolution it has"
            )
        self.baseline = baseline
        self.config.sliding_window = SEEN.get(baseline, 0) * self.config.segment_length or None

    def configure_model(self) -> None:
        super().configure_model()
        convert(self.model, self.baseline)


class BaselineCLI(TrainingCLI):
    def __init__(self, model_class: type[InfiniModule], *args, **options):
        super().__init__(BaselineModule, *args, **options)


def main() -> None:
    preemption.listen()
    train(BaselineCLI)


if __name__ == "__main__":
    main()
