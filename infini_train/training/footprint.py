"""Computes how much memory a rank needs, by kind.

Activations are counted rather than estimated: the real model runs over a window with fake tensors, which have shapes
but no data, under torch's memory tracker.
"""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers.initialization import no_init_weights

from infini_train.model import InfiniConfig, InfiniForCausalLM, output_memory
from infini_train.model.attention import InfiniAttention
from infini_train.model.flops import layer_projections, parameters

from .chunks import window_losses
from .module import InfiniModule
from .strategy import ZeroStrategy

FLOAT32 = 4
CHUNKS = 3  # of the output memory, that stand for all of a window, whose hundreds would take minutes


@dataclass(frozen=True)
class Setting:
    """Everything beside the model that a rank's memory depends on.

    Args:
        zero: DeepSpeed's `zero_optimization` options; empty for a single process and for DDP.
        world_size: number of ranks.
        rows: rows of a micro-batch.
        window: tokens of a row on this rank.
        lanes: lanes of this rank, in all its micro-batches of a step.
        half_precision: whether the precision is bf16-mixed.
        activation_checkpointing: whether every layer is recomputed in the backward pass.
        gpu: whether the rank's device is a GPU.
        chunk: tokens of a row over which the network runs at a time; None: the whole window.
        average: whether a moving average of the weights is kept.
        muon: whether the optimizer is Muon, which keeps one value for each element of the projections, and not two.
    """

    zero: dict[str, Any]
    world_size: int
    rows: int
    window: int
    lanes: int
    half_precision: bool
    activation_checkpointing: bool
    gpu: bool
    chunk: int | None = None
    average: bool = False
    muon: bool = False

    @property
    def chunks(self) -> int:
        """Number of chunks of a window."""
        return 1 if self.chunk is None else -(-self.window // self.chunk)


def setting_of(trainer: Trainer, module: InfiniModule, data: Any, gpu: bool) -> Setting:
    """Return the setting of a configured run. `gpu` tells whether its ranks will have GPUs; this process may not."""
    config = trainer.strategy.config if isinstance(trainer.strategy, ZeroStrategy) else None
    assert config is None or isinstance(config, dict)
    return Setting(
        zero=config["zero_optimization"] if config else {},
        world_size=trainer.world_size,
        rows=data.micro_batch_size,
        window=data.window // data.context_parallel,
        lanes=data.lanes * data.context_parallel // trainer.world_size,
        half_precision=str(trainer.precision).startswith("bf16"),
        activation_checkpointing=module.activation_checkpointing,
        gpu=gpu,
        chunk=module.segments_per_chunk and module.segments_per_chunk * data.segment_length,
        average=module.options.ema_decay is not None,
        muon=module.options.name == "muon",
    )


def bytes_per_rank(config: InfiniConfig, setting: Setting) -> dict[str, float]:
    """Return a rank's memory in bytes, by kind.

    The kinds exist at the same time, so they add up: the gradients of a step live until the end of the next step's
    forward pass. ZeRO is counted as in arXiv 1910.02054, section 3, with DeepSpeed's float32 copies and buffers.
    Offloaded tensors are counted as if they were not.
    """
    return states(config, setting) | {"activations": activations(config, setting)}


def states(config: InfiniConfig, setting: Setting) -> dict[str, float]:
    """Return all kinds of `bytes_per_rank` but the activations, which take seconds to count."""
    count, zero = parameters(config), setting.zero
    by_muon = config.num_hidden_layers * layer_projections(config) if setting.muon else 0
    stage = int(zero.get("stage", 0))
    share = {s: setting.world_size if stage >= s else 1 for s in (1, 2, 3)}
    # DeepSpeed keeps weights and gradients in bf16 beside float32 master weights; autocast keeps them in float32.
    value = 2 if setting.half_precision and stage else FLOAT32
    found = {
        "weights": count * value / share[3],
        "gradients": count * value / share[2],
        "optimizer": ((3 if setting.average else 2) * count - by_muon) * FLOAT32 / share[1],
        "lane memories": setting.lanes * lane_bytes(config),
    }
    if stage:
        found["optimizer"] += count * FLOAT32 / share[1]  # float32 master weights
        found["gradients"] += count * FLOAT32 / share[1]  # a float32 copy during the optimizer's step
        found["buffers"] = value * buffered(config, zero, stage)
    if setting.chunks > 1:
        # autograd sums the gradients of chunks before they are reduced or added to those of earlier micro-batches.
        if stage >= 2 or setting.lanes > setting.rows:
            found["gradients"] += count * value
        # A recomputed chunk keeps the weights that its backward needs, if its layers are not recomputed in turn.
        if stage == 3 and not setting.activation_checkpointing:
            found["buffers"] += count * value
    return found


def buffered(config: InfiniConfig, zero: dict[str, Any], stage: int) -> float:
    """Return the elements in DeepSpeed's buckets (by default 5e8), and under ZeRO-3 in weights gathered at a time."""
    count = parameters(config)
    buckets = min(count, float(zero.get("reduce_bucket_size", 5e8))) * (2 if zero.get("overlap_comm") else 1)
    if stage < 3:
        return buckets + min(count, float(zero.get("allgather_bucket_size", 5e8)))
    return buckets + min(count, float(zero.get("stage3_max_live_parameters", 1e9)))


def activations(config: InfiniConfig, setting: Setting) -> float:
    """Return the peak of everything but weights and gradients during forward and backward of a window, in bytes."""
    how = setting.rows, setting.half_precision, setting.activation_checkpointing, setting.gpu
    described = config.to_json_string(use_diff=False)

    def of_window(window: int, chunk: int | None) -> float:
        two, three = (_peak(described, layers, window, chunk, *how) for layers in (2, 3))
        return two + (config.num_hidden_layers - 2) * (three - two)  # linear from the second layer on

    if setting.chunks == 1:
        return of_window(setting.window, None)
    assert setting.chunk is not None
    two, three = (of_window(n * setting.chunk, setting.chunk) for n in (2, 3))
    # From the second chunk on, each adds the memories before it. At the peak autograd holds the sums of the gradients
    # of the chunks so far, which are counted as gradients.
    return two + (setting.chunks - 2) * (three - two) - FLOAT32 * parameters(config)


class _Step(nn.Module):
    """The forward pass as one module: the tracker takes several calls of the outermost one for several steps."""

    def __init__(self, model: InfiniForCausalLM, chunk: int | None):
        super().__init__()
        self.model, self.segments = model, chunk and chunk // model.config.segment_length

    def forward(self, ids: Tensor) -> Tensor:
        return window_losses(self.model, ids, ids, segments_per_chunk=self.segments).total


@cache
def _peak(
    config_json: str,
    layers: int,
    window: int,
    chunk: int | None,
    rows: int,
    half_precision: bool,
    recompute: bool,
    gpu: bool,
) -> int:
    config = InfiniConfig(**{**json.loads(config_json), "num_hidden_layers": layers})
    with FakeTensorMode():
        with no_init_weights():
            model = InfiniForCausalLM(config).train()
        for layer in model.model.layers:
            layer.self_attn.rule.as_on_gpu = gpu
        if model.lm_head.memory is not None:
            model.lm_head.memory.counted_chunks = CHUNKS
        if recompute:
            model.activation_checkpointing_enable()
        ids = torch.zeros(rows, window, dtype=torch.long)
        step, tracker = _Step(model, chunk), MemTracker()
        tracker.track_external(step)
        with tracker:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half_precision):
                total = step(ids)
            total.backward()
    peak = {str(kind): size for kind, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    return sum(size for kind, size in peak.items() if kind.endswith(("ACT", "TEMP", "OTH")))


def lane_bytes(config: InfiniConfig) -> int:
    """Return the size of what one lane carries in all layers and at the output, in bytes."""
    factory = {"dtype": torch.float32, "device": "meta"}
    states = [InfiniAttention.init_state(config, 1, **factory)] * config.num_hidden_layers
    if config.output_memory_dim is not None:
        states.append(output_memory.init_state(config, 1, **factory))
    return sum(x.nbytes for state in states for x in state.values())
