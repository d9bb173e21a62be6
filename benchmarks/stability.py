"""Can the memory diverge? `python -m benchmarks.stability`, or one part: `--parts constructed` (seconds) or `train`.

constructed: inputs made to break a memory, 10,000 segments in float32, for every rule.
train: our rule (or all --rules) at a learning rate far too high, without warmup, 64 segments per window, for 20,000
steps or --minutes. Finished parts are kept in runs/stability and not repeated; a run that was cut off continues, with
--minutes of its own. The output is tables and a last line of JSON.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import results
from benchmarks.commands import run
from infini_train.files import atomic_file
from infini_train.inspection.events import newest
from infini_train.model import InfiniConfig
from infini_train.model.paper_rules import EPS, sigma
from infini_train.model.rules import RULES
from infini_train.model.selective_delta import SelectiveDelta
from infini_train.model.window import Window

ROOT = Path("runs/stability")
SEGMENTS, S, D = 10_000, 16, 16
STEPS = 20_000
NO_ROPE = torch.empty(0), torch.empty(0)  # rules see queries and keys without RoPE
DOCUMENTS = "--documents", "2000", "--tokens", "4096", "--shortest", "512", "--keys", "32", "--fewest", "4"
# A constant rate, six times that of configs/recall.yaml; segments and lanes are small, so that 30 minutes suffice.
OPTIONS = "--model.optimizer.lr 3e-2 --model.optimizer.gate_lr 3e-2 --model.optimizer.warmup_steps 0"
OPTIONS += " --model.optimizer.schedule wsd --model.optimizer.decay_steps 1 --checkpoint.every_n_steps 1000"
OPTIONS += " --data.segment_length 16 --data.segments_per_window 64 --data.lanes 1 --data.micro_batch_size 1"
LOGGED = {"gradient_norm": "train/gradient_norm", "loss": "train/loss", "memory_norm": "memory/M_norm_max"}


def normal(*shape: int) -> Tensor:
    return torch.randn(1, *shape)


def of_mass(mass_n: Tensor) -> Tensor:
    """Random keys [1, n, 1, S, D] whose features sigma(k) have the given mean; sigma(log m) = m for m below 1."""
    feature = mass_n[:, None, None, None] * torch.rand(SEGMENTS, 1, S, D).mul(2).clamp_min(1e-3)
    return torch.where(feature < 1, feature.log(), feature - 1)[None]


def growing(factor: float) -> Tensor:
    """A mass that grows by a factor per segment, from 1e-8 up to 1e4, where it stays."""
    return (1e-8 * factor ** torch.arange(SEGMENTS, dtype=torch.float64)).clamp_max(1e4).float()


# Keys before the feature map, and values, [1, n, 1, S, D]; all write strengths are 1.
SHAPE = SEGMENTS, 1, S, D
CASES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "random": lambda: (normal(*SHAPE), normal(*SHAPE)),
    "key mass 1.3x a segment": lambda: (of_mass(growing(1.3)), normal(*SHAPE)),
    "key mass 10x a segment": lambda: (of_mass(growing(10.0)), normal(*SHAPE)),
    "key mass jumps, 1e-6 to 1e6": lambda: (of_mass(10 ** (12 * torch.rand(SEGMENTS) - 6)), normal(*SHAPE)),
    "all keys alike": lambda: (torch.ones(1, *SHAPE), normal(*SHAPE)),
    "nearly alike, opposite values": lambda: (
        1 + 1e-2 * normal(*SHAPE),
        torch.where(torch.arange(S) % 2 == 0, 1.0, -1.0)[:, None].expand(1, *SHAPE),
    ),
    "huge keys and values": lambda: (1e4 * normal(*SHAPE), 1e4 * normal(*SHAPE)),
}


def kept(rule: str, memory, k: Tensor, v: Tensor) -> dict[str, float]:
    """The largest factor by which the writes of a segment can enlarge what a memory holds."""
    if isinstance(memory, SelectiveDelta):
        keep, _ = memory.segment_maps(k, v, torch.ones(k.shape[:-1]))
        return {"growth": torch.linalg.matrix_norm(keep, 2).max().item()}
    if rule == "paper-linear":
        return {"growth": 1.0}
    features = sigma(k.double())[0, :, 0]  # [n, S, D]
    after = features.sum(1).cumsum(0)
    radius = {}
    for name, z in (("before", after[:-1]), ("after", after[1:])):  # the first memory is empty
        a = features[1:].mT @ (features[1:] / (features[1:] @ z[..., None]).clamp_min(EPS))
        radius[name] = torch.linalg.eigvalsh(a)[:, -1].max().item()  # A is symmetric, no eigenvalue is negative
    return {"growth": max(1.0, radius["before"] - 1), "radius": radius["before"], "radius_after": radius["after"]}


def constructed(rule: str, case: str) -> dict[str, float | int | None]:
    """Run a case through a rule; returns the largest memory, and the largest read over the largest value."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 11, "hidden_size": D, "intermediate_size": 8, "num_hidden_layers": 1}
    config = InfiniConfig(**sizes, num_attention_heads=1, head_dim=D, memory=rule)
    memory = RULES[rule](config)
    k, v = CASES[case]()
    found = kept(rule, memory, k, v)
    state = memory.init_state(config, 1)
    largest, reads, broken = 0.0, 0.0, None
    for first in range(0, SEGMENTS, 10):
        some = slice(first, first + 10)
        features = {"strength_logit": torch.full((1, 10 * S, 1), 30.0)} if isinstance(memory, SelectiveDelta) else {}
        window = Window(10, NO_ROPE, NO_ROPE)
        read, _, after, _ = memory.read_and_write(
            state, k[:, some, :, None], k[:, some], v[:, some], features, window
        )
        state = {**state, **after}
        if broken is None and not (read.isfinite().all() and state["M"].isfinite().all()):
            broken = first
        largest = max(largest, state["M"].norm().item())
        reads = max(reads, read.norm(dim=-1).max().item())
    value = v.norm(dim=-1).max().item()
    if isinstance(memory, SelectiveDelta):  # its reads are normalised; its docstring bounds |M|
        bound = value * (S + 0.5 / memory.decay_rate().item()) ** 0.5
        found |= {"over_bound": largest / bound}
    else:
        found |= {"read_over_value": reads / value}
    return {**found, "largest": largest, "first_non_finite_segment": broken}


@torch.no_grad()
def constructed_table(rules: list[str]) -> tuple[dict[str, dict], Table]:
    heads = "largest growth", "radius of A", "same, z after", "largest |M|", "|M| / bound", "|read| / |v|", "finite"
    table = Table("rule", "inputs", *heads, title=f"{SEGMENTS:,} segments of {S} tokens, one head of {D}, float32")
    found: dict[str, dict] = {}
    for rule in rules:
        for case in CASES:
            row = found.setdefault(rule, {})[case] = constructed(rule, case)
            names = "growth", "radius", "radius_after", "largest", "over_bound", "read_over_value"
            cells = [f"{row[name]:.4g}" if name in row else "" for name in names]
            broken = row["first_non_finite_segment"]
            table.add_row(rule, case, *cells, "yes" if broken is None else f"until {broken}")
        table.add_section()
    Console(width=150).print(table)
    return found, table


def train(rule: str, minutes: float) -> dict:
    """Train, unless that is done; returns the number of steps, the first non-finite one or None, and the largest
    values of curves."""
    data, directory = ROOT / "data", ROOT / rule
    out = directory / "stability.json"
    if out.exists():
        return json.loads(out.read_text())
    if not data.exists():
        run("data_prep", "synth", "--out", data, *DOCUMENTS)
    if not (broken := sorted(directory.glob("nonfinite-step-*.pt"))):
        limits = (
            "--trainer.max_steps",
            str(STEPS),
            "--trainer.max_time",
            time.strftime("00:%H:%M:%S", time.gmtime(60 * minutes)),
        )
        options = ("--model.memory", rule, "--data.train", data, *OPTIONS.split(), *limits, "--ckpt_path", "last")
        try:
            run("infini_train", "fit", "--config", "configs/recall.yaml", "--run", directory, *options)
        except SystemExit:
            broken = sorted(directory.glob("nonfinite-step-*.pt"))
            if not broken:
                raise
    curves = newest(directory / "tensorboard", dict.fromkeys(LOGGED.values(), STEPS)).points
    result = {
        "steps": max(point.step for point in curves["train/loss"]),
        "first_non_finite_step": int(broken[0].name.split("-")[2]) if broken else None,
        **{f"largest_{name}": max((p.value for p in curves[tag]), default=None) for name, tag in LOGGED.items()},
        "last_loss": curves["train/loss"][0].value,
    }
    with atomic_file(out) as file:
        file.write(json.dumps(result).encode())
    return result


def train_table(rules: list[str], minutes: float) -> tuple[dict[str, dict], Table]:
    found = {rule: train(rule, minutes) for rule in rules}
    names = list(next(iter(found.values())))
    table = Table("rule", *(name.replace("_", " ") for name in names), title=f"lr 3e-2, at most {STEPS:,} steps")
    for rule, row in found.items():
        table.add_row(rule, *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=150).print(table)
    return found, table


def main() -> None:
    parser = results.parser(__doc__)
    parts = ["constructed", "train"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), help="default: all constructed, ours trained")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time for each rule")
    options = parser.parse_args()
    figures: dict[str, dict] = {}
    tables: dict[str, Table] = {}
    if "constructed" in options.parts:
        figures["constructed"], tables["constructed"] = constructed_table(options.rules or list(RULES))
    if "train" in options.parts:
        figures["train"], tables["train"] = train_table(options.rules or ["selective-delta"], options.minutes)
    ROOT.mkdir(parents=True, exist_ok=True)
    with atomic_file(ROOT / "report.json") as file:
        file.write(json.dumps(figures, indent=1).encode())
    print(json.dumps(figures))
    if options.results:
        results.write("stability", tables, figures, {}, options.results)


if __name__ == "__main__":
    main()
