"""Decoders without this project's memory, for comparison: `python -m benchmarks.baselines fit ...`.

The command takes the options of `infini-train fit`, and `python -m benchmarks.baselines evaluate BASELINE ...` those
of `infini-train evaluate`. Each baseline is this project's decoder with another attention, trained with the same
module, data and checkpoints:

local           attention within the segment only; with segments of a whole window, plain full attention.
sliding-window  attention to the last S tokens.
transformer-xl  attention to the own segment and the whole one before (arXiv 1901.02860), with RoPE.
*-convolved     the same on queries and keys that are convolved as in selective-delta: that rule without its memory.
gated-deltanet  layers of Gated DeltaNet (arXiv 2412.06464), by transformers' implementation of the gated delta rule,
                and of sliding-window attention by turns.
empty           selective-delta that sees the segment before, with memories that stay empty in training, too: what the
                rule's parameters (B, gate, norm) are worth without what it remembers.

The configuration of a checkpoint still names a memory rule, which has no effect: `convert` makes the baseline again.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated, torch_chunk_gated_delta_rule

from infini_train import preemption
from infini_train.cli import TrainingCLI, train
from infini_train.data.index import DatasetIndex
from infini_train.evaluation import __main__ as evaluation
from infini_train.evaluation import subject
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.attention import InfiniAttention
from infini_train.model.fused import convolve
from infini_train.model.selective_delta import WIDTH
from infini_train.run_files import find
from infini_train.training.checkpoint_format import read_model
from infini_train.training.module import InfiniModule

Baseline = Literal[
    "local",
    "local-convolved",
    "sliding-window",
    "sliding-window-convolved",
    "transformer-xl",
    "transformer-xl-convolved",
    "gated-deltanet",
    "empty",
]
# How many tokens local attention sees, in segments; 0: the own segment.
SEEN: dict[Baseline, int] = {
    "sliding-window": 1,
    "sliding-window-convolved": 1,
    "transformer-xl": 2,
    "transformer-xl-convolved": 2,
    "gated-deltanet": 1,
    "empty": 2,
}


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
            before_k, before_v, near = self._before_segments(memory, k, v, window)
            k, v = torch.cat((before_k, k), dim=-2), torch.cat((before_v, v), dim=-2)
            state |= near
        out = self._local_attention(q, k, v, window)[0].view_as(q).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.o_proj(out), memory | state, None


class ConvolvedLocalAttention(LocalAttention):
    convolved = True


class GatedDeltaNet(nn.Module):
    """The parameters of a Gated DeltaNet layer beside its projections and the convolution of queries and keys."""

    def __init__(self, config: InfiniConfig):
        super().__init__()
        assert config.head_dim
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.conv = nn.Parameter(torch.empty(WIDTH, heads * config.head_dim).uniform_(-0.5, 0.5))  # of the values
        self.decay_and_strength = nn.Linear(hidden, 2 * heads, bias=False)
        self.output_gate = nn.Linear(hidden, heads * config.head_dim, bias=False)
        for linear in (self.decay_and_strength, self.output_gate):
            nn.init.normal_(linear.weight, std=config.initializer_range)
        # As in the authors' implementation: decays are spread over heads as in Mamba-2.
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.norm = Qwen3NextRMSNormGated(config.head_dim, eps=config.rms_norm_eps)


class GatedDeltaNetAttention(InfiniAttention):
    """Gated DeltaNet with the projections and the state of selective-delta: M, and the last tokens' queries, keys and
    values for the convolutions."""

    delta: GatedDeltaNet

    def forward(self, x_BTD, memory, window, cached=None):
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        k_split, v_split = (window.split(x, self.head_dim) for x in (k, v))
        near = self._before_segments(memory, k_split, v_split, window)[2]
        q, k, state = self.rule("local_queries_and_keys", memory, q, k, {"query_input": q}, window)
        before = slice(1 - WIDTH, None)
        v_before = memory["near_v"][:, :, before] * memory["near"][:, None, before, None]  # of this document
        v_before = v_before.transpose(1, 2).flatten(2)
        v = convolve(v_before.to(v.dtype), v, self.delta.conv, window.conv_reach_BT)
        decay, strength = self.delta.decay_and_strength(x_BTD).chunk(2, -1)
        log_decay = -self.delta.log_rate.exp() * F.softplus(decay + self.delta.step_bias)
        if window.conv_reach_BT is not None:  # a document's first token forgets what was before it
            first = window.conv_reach_BT[:, : x_BTD.shape[1]] == 0
            log_decay = torch.where(first[..., None], -50.0, log_decay)
        heads = (F.silu(x).unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        out, matrix = torch_chunk_gated_delta_rule(
            *heads,
            g=log_decay,
            beta=strength.sigmoid(),
            initial_state=memory["M"],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        out = self.delta.norm(out, self.delta.output_gate(x_BTD).view_as(out))
        return self.o_proj(out.flatten(2)), memory | state | near | {"M": matrix}, None


class EmptyAttention(InfiniAttention):
    """Infini-attention whose reads find the memory empty."""

    def forward(self, x_BTD, memory, window, cached=None):
        return super().forward(x_BTD, memory, replace(window, reads_memory=False), cached)


def convert(model: InfiniForCausalLM, baseline: Baseline) -> InfiniForCausalLM:
    """Give a model the attention of a baseline, in place, with the same weights.

    Gates and the memory's parameters have no effect then, except in `empty`, and are frozen.
    """
    model.config.sliding_window = SEEN.get(baseline, 0) * model.config.segment_length or None
    convolved = baseline.endswith("convolved")
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        if baseline == "empty":
            attention.__class__ = EmptyAttention
            continue
        delta = baseline == "gated-deltanet" and number % 2 == 0
        attention.__class__ = ConvolvedLocalAttention if convolved else LocalAttention
        if delta:
            attention.__class__, attention.delta = GatedDeltaNetAttention, GatedDeltaNet(model.config)
        for name, parameter in (("gate", attention.gate), *attention.rule.named_parameters()):
            parameter.requires_grad_((convolved or delta) and name == "conv")
    return model


def load(directory: Path, baseline: Baseline | None) -> InfiniForCausalLM:
    """Load the latest checkpoint of a directory in evaluation mode; without a baseline it is the model itself."""
    config, weights = read_model(find(directory))
    model = InfiniForCausalLM(config)
    if baseline:
        convert(model, baseline)
    model.load_state_dict(weights)
    return model.eval()


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
        if (
            baseline.endswith("convolved") or baseline == "gated-deltanet"
        ) and self.config.memory != "selective-delta":
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


def evaluate(words: list[str]) -> int:
    """Run `infini-train evaluate` on checkpoints of the baseline that is named first, and return its exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.baselines evaluate")
    parser.add_argument("baseline", choices=get_args(Baseline))
    baseline: Baseline = parser.parse_args(words[:1]).baseline

    def load_baseline(path: Path, index: DatasetIndex, device: str, dtype: torch.dtype) -> InfiniForCausalLM:
        return load(path, baseline).to(device, dtype)

    with patch.object(subject, "load", load_baseline):
        return evaluation.main(words[1:])


def main() -> int:
    if sys.argv[1:2] == ["evaluate"]:
        return evaluate(sys.argv[2:])
    preemption.listen()
    train(BaselineCLI)
    return 0


if __name__ == "__main__":
    sys.exit(main())
