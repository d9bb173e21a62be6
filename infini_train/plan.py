"""`infini-train plan`: estimates memory, traffic and training time of a configuration on given GPUs."""

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from infini_train.cli import USER_ERRORS, TrainingCLI, train
from infini_train.errors import reported
from infini_train.model import InfiniConfig
from infini_train.model.flops import exchanged_elements, flops_per_token, layer_projections, parameters
from infini_train.parsing import Parser, foreign_classes
from infini_train.training.callbacks.throughput import PEAKS
from infini_train.training.footprint import Setting, activations, bytes_per_rank, setting_of, states
from infini_train.training.strategy import ZeroStrategy

GIB = {"h100": 80, "h200": 141, "a100": 80, "b200": 180, "l40s": 48, "4090": 24}  # from the vendors' data sheets
SUGGEST = "Also find the fastest setting that fits, and print it as options of `fit`."
USABLE = 0.9  # share of a GPU's memory; the CUDA context, libraries and fragmentation take the rest


def without_classes(config: str) -> str:
    """Return the text of a configuration file without the options that name classes which an estimate needs not.

    Such classes are not imported: their packages may not be here, and the file may be from anyone.

    Args:
        config: path of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no mapping, or its strategy or another option is a class of another package.
    """
    # By the library itself: jsonargparse knows its loader only once a parser has been made.
    options = OmegaConf.to_container(OmegaConf.create(Path(config).read_text()), resolve=True)
    if not isinstance(options, dict):
        raise ValueError(f"{config}: found {type(options).__name__}, expected the options of a run by name")
    if not isinstance(trainer := options.get("trainer") or {}, dict):
        raise ValueError(f"{config}: trainer: found {trainer!r}, expected its options by name")
    for name in ("callbacks", "logger", "profiler", "plugins"):
        trainer.pop(name, None)
    named = [{"class_path": trainer[name]} for name in ("strategy", "accelerator") if "." in str(trainer.get(name))]
    if found := foreign_classes([options, named]):
        raise ValueError(f"{config}: found {', '.join(sorted(found))}, expected no class of another package")
    return yaml.safe_dump(options)


class MemoryEstimate(NamedTuple):
    """Memory of one GPU under one strategy, in GiB: by kind, and the total."""

    name: str
    configured: bool
    parts: dict[str, float]
    total: float


class Planned(TrainingCLI):
    """Reads a configuration without its data or devices, which this machine may not have."""

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        self.config.fit.trainer.accelerator = "cpu"

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def wire_bytes(config: InfiniConfig, setting: Setting, micro_batches: int, context_parallel: int) -> dict[str, float]:
    """Estimate the bytes that one rank sends in an optimizer step.

    Collectives run in rings, so a rank sends (N - 1) / N of what is reduced or gathered. Ranks that share a
    window send memories to one other rank each, however many they are.

    Args:
        config: the model.
        setting: how it is trained.
        micro_batches: micro-batches of a step.
        context_parallel: ranks that share a window.

    Returns:
        Bytes by purpose: `gradients`, and where they are sent `weights`, `updates` of Muon and `memories`.
    """
    stage, ranks = int(setting.zero.get("stage", 0)), setting.world_size
    value = 2 if setting.half_precision and stage else 4
    whole = parameters(config) * value * (ranks - 1) / ranks
    found = {"gradients": whole * (2 if stage == 0 else 1) * (micro_batches if stage >= 2 else 1)}
    if stage:
        # Gathered after the step. Under ZeRO-3: of each micro-batch before the forward pass of every chunk, its
        # recomputation, which the last chunk does not have, and its backward.
        found["weights"] = whole * ((3 * setting.chunks - 1) * micro_batches if stage == 3 else 1)
    if stage and setting.muon:
        # Under ZeRO-3 ranks put all matrices together, and otherwise only those that the borders of partitions cut.
        whole = 4 * config.num_hidden_layers * layer_projections(config)
        largest = 4 * config.hidden_size * config.intermediate_size
        cut = whole if stage == 3 else min(whole, (ranks - 1) * largest)
        found["updates"] = 2 * cut * (ranks - 1) / ranks
    if context_parallel > 1:
        # The state of each layer in forward and its gradient in backward; recomputed layers exchange nothing.
        elements = 2 * config.num_hidden_layers * exchanged_elements(config)
        if features := config.output_memory_dim:  # has no gradient
            elements += config.vocab_size * features
        found["memories"] = setting.rows * elements * 4 * micro_batches
    return found


def step_seconds(
    config: InfiniConfig, setting: Setting, micro_batches: int, context_parallel: int, flop_rate: float, link: float
) -> float:
    """Estimate the seconds of an optimizer step if no transfer overlaps with computation.

    Args:
        config: the model.
        setting: how it is trained.
        micro_batches: micro-batches of a step.
        context_parallel: ranks that share a window.
        flop_rate: FLOP/s that a rank reaches.
        link: bytes that a rank sends per second.
    """
    forward = flops_per_token(config) / 3
    repeated = (setting.chunks - 1) / setting.chunks + setting.activation_checkpointing
    computing = setting.lanes * setting.window * forward * (3 + repeated) / flop_rate
    return computing + sum(wire_bytes(config, setting, micro_batches, context_parallel).values()) / link


class Candidate(NamedTuple):
    """A way to run a step, the seconds that it is estimated to take, and what is derived from the configuration."""

    seconds: float
    setting: Setting
    micro_batches: int
    context_parallel: int

    def options(self, segment_length: int) -> dict[str, str]:
        """Return the options of `fit`, by name."""
        setting, stage = self.setting, self.setting.zero.get("stage")
        chunk = setting.chunk and setting.chunk // segment_length
        return {
            "data.micro_batch_size": str(setting.rows),
            "data.context_parallel": str(self.context_parallel),
            "trainer.accumulate_grad_batches": str(self.micro_batches),
            "trainer.strategy": f"zero{stage}" if stage else "ddp" if setting.world_size > 1 else "auto",
            "model.activation_checkpointing": str(setting.activation_checkpointing).lower(),
            "model.segments_per_chunk": "null" if chunk is None else str(chunk),
        }


def candidates(
    config: InfiniConfig, data: Any, given: Setting, flop_rate: float, link: float, stages: Sequence[int]
) -> list[Candidate]:
    """Return all ways to run a step of the same lanes and windows on the same ranks, the fastest first.

    Args:
        config: the model.
        data: the data module, whose lanes and windows stay as they are.
        given: the configured setting, whose ranks, precision and device stay as they are.
        flop_rate, link: as in `step_seconds`.
        stages: stages of ZeRO to consider; 0: none.
    """
    found, ranks, segments = list[Candidate](), given.world_size, data.segments_per_window
    pairs = ((n, data.lanes * n // ranks) for n in divisors(ranks) if data.lanes * n % ranks == 0)
    for (parallel, lanes), stage, recompute in product(pairs, stages, (False, True)):
        window = data.window // parallel
        if segments % parallel or (parallel > 1 and window < 3):
            continue
        described = ZeroStrategy(stage=stage).config if stage else None
        zero = described["zero_optimization"] if described else {}
        chunks = [None] if parallel > 1 else [None, *(2**i for i in range((segments - 1).bit_length()))]
        for rows, chunk in product(divisors(lanes), chunks):
            setting = replace(given, zero=zero, rows=rows, window=window, lanes=lanes)
            setting = replace(
                setting, activation_checkpointing=recompute, chunk=chunk and chunk * config.segment_length
            )
            seconds = step_seconds(config, setting, lanes // rows, parallel, flop_rate, link)
            found.append(Candidate(seconds, setting, lanes // rows, parallel))
    # Where the estimate is the same, larger micro-batches keep the device busier.
    return sorted(found, key=lambda one: (one.seconds, -one.setting.rows))


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def cheapest(config: InfiniConfig, ways: Iterable[Candidate], room: float) -> Candidate | None:
    """Return the first of these that fits into `room` bytes; None if none does."""
    too_many = dict[tuple[Any, ...], int]()  # rows whose activations alone do not fit
    for way in ways:
        setting = way.setting
        kind = setting.window, setting.chunk, setting.activation_checkpointing
        rest = room - sum(states(config, setting).values())
        if rest <= 0 or setting.rows >= too_many.get(kind, setting.rows + 1):
            continue
        needed = activations(config, setting)
        if needed <= rest:
            return way
        if needed > room:
            too_many[kind] = setting.rows
    return None


def plan(
    config: str,
    nodes: int = 1,
    gpus_per_node: int = 8,
    device: str = "h100",
    tokens: float = 1e11,
    mfu: float = 0.4,
    gpu_memory_gib: float | None = None,
    link_gb_per_s: float = 50.0,
    suggest: bool = False,
) -> None:
    """Estimate memory, traffic, throughput and training time of a configuration on given GPUs.

    Prints the memory of a GPU by kind under each ZeRO stage, with and without activation checkpointing, the bytes
    that a GPU sends in a step, tokens per second and days, and then a line of JSON with these numbers.

    Args:
        config: Configuration file of a run, as `fit` takes it.
        nodes: Number of nodes.
        gpus_per_node: Number of GPUs of each node.
        device: Kind of GPU: h100, h200, a100, b200, l40s or 4090.
        tokens: Number of tokens to train on.
        mfu: Model FLOPs utilization, the share of the device's peak that the model's FLOPs reach; 0.4 is a common
            one. Layers of the shapes of 1b and 8b with selective-delta, not compiled, reached 0.28 and 0.38 on one
            H200 (docs/performance.md).
        gpu_memory_gib: Memory of one GPU in GiB; by default the device's.
        link_gb_per_s: GB that a GPU sends to others per second, for --suggest; 50 is a link of 400 Gbit/s.
        suggest: Also find the setting (micro-batch, chunk, activation checkpointing, ZeRO stage, context parallelism)
            that fits and takes least time for the same lanes and windows, and print it as options of `fit`.

    Raises:
        ValueError: lists everything that is wrong with the arguments.
    """
    given_counts = {"nodes": nodes, "gpus_per_node": gpus_per_node}
    wrong = [f"{name}: found {n}, expected at least 1" for name, n in given_counts.items() if n < 1]
    if device.lower() not in GIB:
        wrong.append(f"device: found {device}, expected one of {', '.join(GIB)}")
    if not 0 < mfu <= 1:
        wrong.append(f"mfu: found {mfu}, expected a share above 0, at most 1")
    sizes = {"link_gb_per_s": link_gb_per_s, "tokens": tokens, "gpu_memory_gib": gpu_memory_gib}
    wrong += [
        f"{name}: found {n}, expected more than 0"
        for name, n in sizes.items()
        if n is not None and not 0 < n < math.inf
    ]
    if wrong:
        raise ValueError("\n".join(wrong))
    warnings.filterwarnings("ignore", "The `srun` command is available")  # Lightning's advice on a login node
    ranks = nodes * gpus_per_node
    geometry = ["--trainer.num_nodes", str(nodes), "--trainer.devices", str(gpus_per_node)]
    cli = train(Planned, ["fit", "--data.train", "unknown", "--config", without_classes(config), *geometry])
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
    room = USABLE * (GIB[device.lower()] if gpu_memory_gib is None else gpu_memory_gib)
    estimates = []
    for stage in (0, 1, 2, 3):
        for recompute in (False, True):
            zero = {**given.zero, "stage": stage} if stage else {}
            setting = replace(given, zero=zero, activation_checkpointing=recompute)
            parts = {kind: size / 2**30 for kind, size in bytes_per_rank(model, setting).items()}
            configured = (stage, recompute) == (int(given.zero.get("stage", 0)), given.activation_checkpointing)
            name = f"zero{stage}" if stage else "ddp"
            if recompute:
                name += " recomputing"
            estimates.append(MemoryEstimate(name, configured, parts, sum(parts.values())))
    kinds = list(estimates[-1].parts)
    title = "memory of a GPU, GiB"
    if given.chunks > 1:
        title += f", in chunks of {cli.model.segments_per_chunk} segments"
    table = Table("strategy", *kinds, "all", f"of {room:.0f}", title=title)
    for estimate in estimates:
        cells = [f"{estimate.parts.get(kind, 0):,.2f}" for kind in kinds]
        label = f"{estimate.name} (configured)" if estimate.configured else estimate.name
        table.add_row(label, *cells, f"{estimate.total:,.1f}", "fits" if estimate.total <= room else "too much")
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
    own = next(estimate for estimate in estimates if estimate.configured)
    if own.total > room:
        fitting = ", ".join(estimate.name for estimate in estimates if estimate.total <= room)
        fitting = fitting or "none of these; --suggest also tries chunks, micro-batches and context parallelism"
        console.print(f"{own.name} does not fit: {own.total:,.1f} GiB of {room:.0f}; what does: {fitting}")
    figures: dict[str, Any] = {
        "parameters": parameters(model),
        "flops_per_token": flops,
        "tokens_per_step": step_tokens,
        "memory_gib": {estimate.name: estimate.parts for estimate in estimates},
        "wire_bytes": wire,
        "tokens_per_s": rate,
        "days": tokens / rate / 86400,
    }
    if suggest:
        stages = [0] if ranks == 1 else [0, 1, 2] if cli.model.compiled else [0, 1, 2, 3]
        ways = candidates(model, data, given, mfu * peak, link_gb_per_s * 1e9, stages)
        best = cheapest(model, ways, room * 2**30)
        figures["suggested"] = None if best is None else best.options(data.segment_length)
        if best is None:
            console.print("no setting fits: more GPUs, fewer lanes or shorter windows would need less")
        else:
            gib = sum(bytes_per_rank(model, best.setting).values()) / 2**30
            words = " ".join(f"--{name} {value}" for name, value in figures["suggested"].items())
            console.print(f"suggested, {gib:,.1f} GiB a GPU, about {best.seconds:,.2f} s a step without overlap:")
            print(f"--trainer.num_nodes {nodes} --trainer.devices {gpus_per_node} {words}")
    print(json.dumps(figures))


def main(words: list[str]) -> int:
    """`infini-train plan`; returns the exit code."""
    name = "infini-train plan"
    parser = Parser(prog=name, description="Estimate memory, traffic and training time of a configuration.")
    parser.add_function_arguments(plan, skip={"suggest"})
    parser.add_argument("--suggest", action="store_true", help=SUGGEST)
    return reported(name, lambda: plan(**parser.parse_args(words)), expected=USER_ERRORS)
