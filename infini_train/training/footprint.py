"""How much memory a rank needs, by kind. Activations are counted, not estimated: the real model runs a window on fake
tensors, which have shapes and no data, under torch's memory tracker."""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from lightning import Trainer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers.initialization import no_init_weights

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.attention import InfiniAttention
from infini_train.model.flops import parameters

from .module import InfiniModule
from .strategy import ZeroStrategy

FLOAT32 = 4


@dataclass(frozen=True)
class Setting:
    """What a rank's memory depends on beside the model.

    Args:
        zero: DeepSpeed's `zero_optimization`; empty for one process or DDP.
        world_size: ranks.
        rows: of a micro-batch.
        window: tokens of a row that this rank has.
        lanes: of this rank, all its micro-batches.
        half_precision: bf16-mixed.
        activation_checkpointing: of every layer.
        gpu: the rank's device is one.
    """

    zero: dict[str, Any]
    world_size: int
    rows: int
    window: int
    lanes: int
    half_precision: bool
    activation_checkpointing: bool
    gpu: bool


def setting_of(trainer: Trainer, module: InfiniModule, data: Any, gpu: bool) -> Setting:
    """Of a run; gpu: of its ranks, whatever the trainer here has."""
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
    )


def bytes_per_rank(config: InfiniConfig, setting: Setting) -> dict[str, float]:
    """Bytes by kind, all of which are there at once: the gradients of a step live until the next one's forward pass
    has ended. ZeRO as in arXiv 1910.02054, section 3, with DeepSpeed's float32 copies and buffers; what is offloaded
    counts all the same."""
    count, zero = parameters(config), setting.zero
    stage = int(zero.get("stage", 0))
    share = {s: setting.world_size if stage >= s else 1 for s in (1, 2, 3)}
    # DeepSpeed keeps weights and gradients in bf16 beside float32 masters; autocast keeps float32 and casts.
    value = 2 if setting.half_precision and stage else FLOAT32
    found = {
        "weights": count * value / share[3],
        "gradients": count * value / share[2],
        "optimizer": 2 * count * FLOAT32 / share[1],
        "activations": activations(config, setting),
        "lane memories": setting.lanes * lane_bytes(config),
    }
    if stage:
        found["optimizer"] += count * FLOAT32 / share[1]  # float32 masters
        found["gradients"] += count * FLOAT32 / share[1]  # as float32, while the optimizer steps
        found["buffers"] = value * buffered(config, zero, stage)
    return found


def buffered(config: InfiniConfig, zero: dict[str, Any], stage: int) -> float:
    """Elements of DeepSpeed's buckets (by default 5e8), and under ZeRO-3 of the weights that are whole at a time."""
    count = parameters(config)
    buckets = min(count, float(zero.get("reduce_bucket_size", 5e8))) * (2 if zero.get("overlap_comm") else 1)
    if stage < 3:
        return buckets + min(count, float(zero.get("allgather_bucket_size", 5e8)))
    return buckets + min(count, float(zero.get("stage3_max_live_parameters", 1e9)))


def activations(config: InfiniConfig, setting: Setting) -> float:
    """Peak of everything but weights and gradients while one window goes forward and back, bytes."""
    few = [_peak(config.to_json_string(use_diff=False), layers, _without_ranks(setting)) for layers in (2, 3)]
    return few[0] + (config.num_hidden_layers - 2) * (few[1] - few[0])  # linear from the second layer on


def _without_ranks(setting: Setting) -> tuple[int, int, bool, bool, bool]:
    return setting.rows, setting.window, setting.half_precision, setting.activation_checkpointing, setting.gpu


@cache
def _peak(config_json: str, layers: int, shape: tuple[int, int, bool, bool, bool]) -> int:
    rows, window, half_precision, recompute, gpu = shape
    config = InfiniConfig(**{**json.loads(config_json), "num_hidden_layers": layers})
    with FakeTensorMode():
        with no_init_weights():
            model = InfiniForCausalLM(config).train()
        for layer in model.model.layers:
            layer.self_attn.rule.as_on_gpu = gpu
        if recompute:
            model.activation_checkpointing_enable()
        ids = torch.zeros(rows, window, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half_precision):
                loss, _ = model.lm_head(model.model(ids).last_hidden_state, ids)
            loss.backward()
    peak = {str(kind): size for kind, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    return sum(size for kind, size in peak.items() if kind.endswith(("ACT", "TEMP", "OTH")))


def lane_bytes(config: InfiniConfig) -> int:
    """Of one lane's memories, all layers."""
    state = InfiniAttention.init_state(config, 1, dtype=torch.float32, device="meta")
    return config.num_hidden_layers * sum(x.nbytes for x in state.values())
