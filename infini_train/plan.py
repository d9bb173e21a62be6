"""`infini-train plan`: what a configuration needs and gives on machines that one does not have yet."""

import json
import warnings
from dataclasses import replace
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from infini_train.cli import TrainingCLI, train
from infini_train.model import InfiniConfig
from infini_train.model.flops import flops_per_token, parameters
from infini_train.model.rules import RULES
from infini_train.training.callbacks.throughput import PEAKS
from infini_train.training.footprint import Setting, bytes_per_rank, setting_of

GIB = {"h100": 80, "h200": 141, "a100": 80, "b200": 180, "l40s": 48, "4090": 24}  # vendors' data sheets
SPARE = 0.9  # of a GPU's memory: the rest is the context, libraries and fragments


class Need(NamedTuple):
    """Of a strategy, GiB by kind and in all; own: as configured."""

    name: str
    own: bool
    parts: dict[str, float]
    all: float


class Planned(TrainingCLI):
    """Reads a configuration; neither its data nor its devices need be here."""

    def before_instantiate_classes(self) -> None:
        self.config.fit.trainer.accelerator = "cpu"

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def wire_bytes(config: InfiniConfig, setting: Setting, micro_batches: int, context_parallel: int) -> dict[str, float]:
    """Bytes that one rank sends in a step, by what for: rings, so (N - 1) / N of what is reduced or gathered."""
    stage, ranks = int(setting.zero.get("stage", 0)), setting.world_size
    value = 2 if setting.half_precision and stage else 4
    whole = parameters(config) * value * (ranks - 1) / ranks
    found = {"gradients": whole * (2 if stage == 0 else 1) * (micro_batches if stage >= 2 else 1)}
    if stage:  # after the step; ZeRO-3: before forward and before backward of each micro-batch
        found["weights"] = whole * (2 * micro_batches if stage == 3 else 1)
    if context_parallel > 1:
        maps = RULES[config.memory].exchanged_elements(config)
        every = setting.rows * config.num_hidden_layers * maps * 4 * micro_batches * (context_parallel - 1)
        found["memories"] = every * (3 if setting.activation_checkpointing else 2)  # forward, (again,) backward
    return found


def plan(
    config: str,
    nodes: int = 1,
    gpus_per_node: int = 8,
    device: str = "h100",
    tokens: float = 1e11,
    mfu: float = 0.4,
    gpu_memory_gib: float | None = None,
) -> None:
    """What a configuration needs and gives on N nodes of G GPUs: memory by kind under each ZeRO stage, with and
    without activation checkpointing, bytes on the wire, tokens a second, days. Prints them, and a line of JSON.

    Args:
        config: a run's configuration, as of `fit`.
        nodes: how many.
        gpus_per_node: of each.
        device: h100, h200, a100, b200, l40s or 4090.
        tokens: to train on.
        mfu: the share of the device's peak that model FLOPs reach; 0.4 is a common one. Layers of 1b's and 8b's
            shapes with selective-delta, not compiled, reached 0.28 and 0.38 on one H200 (docs/performance.md).
        gpu_memory_gib: of one GPU; none: the device's.
    """
    given_counts = {"nodes": nodes, "gpus_per_node": gpus_per_node}
    wrong = [f"{name}: found {n}, expected at least 1" for name, n in given_counts.items() if n < 1]
    if device.lower() not in GIB:
        wrong.append(f"device: found {device}, expected one of {', '.join(GIB)}")
    if not 0 < mfu <= 1:
        wrong.append(f"mfu: found {mfu}, expected a share above 0, at most 1")
    if tokens <= 0:
        wrong.append(f"tokens: found {tokens}, expected more than 0")
    if wrong:
        raise ValueError("\n".join(wrong))
    for message in ("LightningCLI's args parameter", "The `srun` command is available"):
        warnings.filterwarnings("ignore", message)
    ranks = nodes * gpus_per_node
    geometry = ["--trainer.num_nodes", str(nodes), "--trainer.devices", str(gpus_per_node)]
    cli = train(Planned, ["fit", "--data.train", "unknown", "--config", config, *geometry])
    model, data, trainer = cli.model.config, cli.datamodule, cli.trainer
    given = setting_of(trainer, cli.model, data, gpu=True)
    groups = ranks // data.context_parallel
    once = data.micro_batch_size * groups
    if not groups or ranks % data.context_parallel or data.lanes % once:
        raise ValueError(
            f"data.lanes: found {data.lanes}, expected a multiple of micro_batch_size * ranks / context_parallel = "
            f"{data.micro_batch_size} * {ranks} / {data.context_parallel}"
        )
    micro_batches = data.lanes // once
    given = replace(given, lanes=data.lanes // groups)
    room = SPARE * (gpu_memory_gib or GIB[device.lower()])
    needs = []
    for stage in (0, 1, 2, 3):
        for recompute in (False, True):
            zero = {**given.zero, "stage": stage} if stage else {}
            setting = replace(given, zero=zero, activation_checkpointing=recompute)
            parts = {kind: size / 2**30 for kind, size in bytes_per_rank(model, setting).items()}
            own = (stage, recompute) == (int(given.zero.get("stage", 0)), given.activation_checkpointing)
            name = (f"zero{stage}" if stage else "ddp") + " recomputing" * recompute
            needs.append(Need(name, own, parts, sum(parts.values())))
    kinds = list(needs[-1].parts)
    table = Table("strategy", *kinds, "all", f"of {room:.0f}", title="memory of a GPU, GiB")
    for need in needs:
        cells = [f"{need.parts.get(kind, 0):,.2f}" for kind in kinds]
        verdict = "fits" if need.all <= room else "too much"
        table.add_row(need.name + " (configured)" * need.own, *cells, f"{need.all:,.1f}", verdict)
    peak = next(flops for name, flops in PEAKS.items() if name.lower() == device.lower())
    flops, step_tokens = flops_per_token(model), data.lanes * data.window
    rate = mfu * peak * ranks / flops
    wire = wire_bytes(model, given, micro_batches, data.context_parallel)
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{parameters(model):,} parameters, {flops / 1e9:,.2f} GFLOP a token (forward and backward)\n"
        f"{ranks} GPUs x {micro_batches} micro-batches: {data.lanes} lanes, {step_tokens:,} tokens a step\n"
        f"{sum(wire.values()) / 1e9:,.2f} GB sent by each GPU a step "
        f"({', '.join(f'{kind} {size / 1e9:,.2f}' for kind, size in wire.items())})\n"
        f"at {mfu:.0%} of {device}'s peak ({peak / 1e12:,.0f} TFLOP/s): {rate:,.0f} tokens/s, "
        f"{step_tokens / rate:,.2f} s a step, {tokens / rate / 86400:,.2f} days for {tokens:,.0f} tokens"
    )
    configured = next(need for need in needs if need.own)
    if configured.all > room:
        fitting = ", ".join(need.name for need in needs if need.all <= room)
        fitting = fitting or "none of these: more GPUs, a smaller micro_batch_size, data.context_parallel"
        console.print(
            f"{configured.name} does not fit: {configured.all:,.1f} GiB of {room:.0f}; what does: {fitting}"
        )
    figures = {
        "parameters": parameters(model),
        "flops_per_token": flops,
        "tokens_per_step": step_tokens,
        "memory_gib": {need.name: need.parts for need in needs},
        "wire_bytes": wire,
        "tokens_per_s": rate,
        "days": tokens / rate / 86400,
    }
    print(json.dumps(figures))
