"""The optimizer, its parameter groups (matrices, vectors, gates, hidden) and the learning-rate schedules."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from infini_train.model.attention import InfiniAttention
from infini_train.model.decoder import InfiniDecoderLayer
from infini_train.model.memory_rule import MemoryRule
from infini_train.model.output_memory import OutputMemory

from .fragments import EMA
from .muon import HIDDEN, MuonWithAdamW

# Version of the parameter groups and the schedule. Checkpoints record it, so that an older run goes on as it began.
# 0: every matrix decays, and the schedule reaches `final_lr` one step after the last.
# 1: input embeddings and the memory's `base` do not decay, and the last step has `final_lr`.
VERSION = 1


@dataclass
class OptimizerOptions:
    """Options of the optimizer, `model.optimizer` in a config.

    Args:
        name: `adamw`; `muon`, which is Muon for the projections inside the layers and AdamW for everything else; or
            `sgd` without momentum. The last is for tests: unlike AdamW's, its updates show a wrong scale of the
            gradients.
        lr: peak learning rate of matrices, norms and biases.
        muon_lr: peak learning rate of the matrices that Muon updates; none: lr. Muon's updates are scaled to the size
            of AdamW's.
        gate_lr: peak learning rate of the memory gates. It is larger, because gates need to move by 4 or more.
        weight_decay: weight decay of matrices; norms, biases, gates, input embeddings that are not tied to the output
            and the memory's learned start (`base`) have none.
        betas: betas of AdamW.
        eps: epsilon of AdamW.
        schedule: `cosine` decays to `final_lr`; `wsd` (warmup, stable, decay) stays constant and then decays linearly
            over the last `decay_steps`.
        warmup_steps: optimizer steps of linear warm-up.
        decay_steps: optimizer steps of `wsd`'s decay, 0 for none; `cosine` decays over all steps after the warm-up.
        final_lr: learning rate of the last step, as a share of the peak.
        ema_decay: keep an exponential moving average of the weights, of which this share stays in every step, such as
            0.999; none: keep no average. Training does not use it. Checkpoints hold it, `validate --weights ema`
            measures it, and `export --weights ema` writes it.
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: float = 3e-4
    muon_lr: float | None = None
    gate_lr: float = 1e-2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 1000
    final_lr: float = 0.1
    ema_decay: float | None = None
    # Not an option: a run keeps the version that it began with. See VERSION.
    version: int = field(default=VERSION, init=False)

    def wrong(self) -> list[str]:
        """Return a message for each value that is out of range."""
        not_negative = ("lr", "gate_lr", "weight_decay", "eps", "warmup_steps", "decay_steps", "final_lr")
        found = {name: getattr(self, name) for name in not_negative}
        wrong = [
            f"model.optimizer.{k}: found {v}, expected at least 0" for k, v in found.items() if not 0 <= v < math.inf
        ]
        if self.muon_lr is not None and not 0 <= self.muon_lr < math.inf:
            wrong.append(f"model.optimizer.muon_lr: found {self.muon_lr}, expected at least 0, or none")
        if self.muon_lr is not None and self.name != "muon":
            wrong.append(f"model.optimizer.muon_lr: found {self.muon_lr}, expected none with name: {self.name}")
        if not all(0 <= beta < 1 for beta in self.betas):
            wrong.append(f"model.optimizer.betas: found {self.betas}, expected two numbers at least 0 and below 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            wrong.append(f"model.optimizer.ema_decay: found {self.ema_decay}, expected between 0 and 1, or none")
        return wrong


def changes(options: OptimizerOptions, earlier: dict[str, Any]) -> list[str]:
    """Return a sentence for each option that a resumed run changes.

    Args:
        options: those of this run.
        earlier: the options of the checkpoint, from its configuration, by name; one that is absent has its default.

    Raises:
        ValueError: the optimizer itself has changed.
    """
    before, now = (json.loads(json.dumps(asdict(o))) for o in (OptimizerOptions(), options))  # lists for tuples
    before |= {**earlier, "version": options.version}
    if before["name"] != now["name"]:
        raise ValueError(
            f"model.optimizer.name: found {now['name']}, expected {before['name']} as in the checkpoint, whose "
            "optimizer state another optimizer cannot use"
        )
    return [
        f"model.optimizer.{name} is {now.get(name)} from here on, and was {value} in the checkpoint"
        for name, value in before.items()
        if now.get(name) != value
    ]


def parameter_groups(model: nn.Module, options: OptimizerOptions) -> list[dict]:
    """Split the parameters into matrices, vectors (norms, biases, embeddings) and gates.

    Only matrices have weight decay, and gates have a learning rate of their own. Each group has a `name`. Under Muon,
    the matrices that it updates are a fourth group: the projections inside the layers. The output matrix and
    embeddings stay AdamW's, because their rows belong to single tokens.

    An embedding does not decay, because weight decay also shrinks the rows of tokens that a batch lacks, and the
    gradient through the norm that follows grows as a row shrinks (2312.16903). An embedding that is also the output
    matrix does decay: the softmax moves all of its rows in every step, and decay bounds the logits.
    """
    gate_ids, vector_ids, hidden_ids = set[int](), set[int](), set[int]()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))  # a tied parameter has two
    for module in model.modules():
        if isinstance(module, InfiniDecoderLayer) and options.name == "muon":
            hidden_ids |= {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
        elif isinstance(module, InfiniAttention):
            gate_ids.add(id(module.gate))
        elif isinstance(module, OutputMemory):
            gate_ids.add(id(module.scale))
        elif isinstance(module, MemoryRule):
            gate_ids |= {id(getattr(module, name)) for name in module.gate_parameters}
            vector_ids |= {id(getattr(module, name)) for name in module.vector_parameters}
            if options.version >= 1:
                vector_ids |= {id(getattr(module, name)) for name in module.undecayed_parameters}
        elif isinstance(module, nn.Embedding) and uses[id(module.weight)] == 1 and options.version >= 1:
            vector_ids.add(id(module.weight))
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    gates: list[nn.Parameter] = []
    hidden: list[nn.Parameter] = []
    for parameter in model.parameters():
        # Under ZeRO-3 the parameter itself is a 1-D slice, whose `ds_shape` is the whole shape.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        matrix = dimensions > 1 and id(parameter) not in vector_ids
        group = gates if id(parameter) in gate_ids else matrices if matrix else vectors
        (hidden if group is matrices and id(parameter) in hidden_ids else group).append(parameter)
    muon_lr = options.lr if options.muon_lr is None else options.muon_lr
    groups = [
        {"name": "matrices", "params": matrices, "lr": options.lr, "weight_decay": options.weight_decay},
        {"name": "vectors", "params": vectors, "lr": options.lr, "weight_decay": 0.0},
        {"name": "gates", "params": gates, "lr": options.gate_lr, "weight_decay": 0.0},
        {"name": HIDDEN, "params": hidden, "lr": muon_lr, "weight_decay": options.weight_decay},
    ]
    return groups if options.name == "muon" else groups[:-1]


def schedule(options: OptimizerOptions, max_steps: int) -> Callable[[int], float]:
    """Return the function from an optimizer step (from 0) to its learning rate, as a share of the peak.

    The last step, max_steps - 1, has the share `final_lr`.
    """
    last = max_steps - 1 if options.version >= 1 else max_steps

    def share(step: int) -> float:
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        if options.schedule == "cosine":
            after = last - options.warmup_steps
            done = min(1.0, (step - options.warmup_steps) / after) if after > 0 else 1.0
            falling = (1 + math.cos(math.pi * done)) / 2
        else:
            falling = min(1.0, (last - step) / options.decay_steps) if options.decay_steps else 1.0
        return options.final_lr + (1 - options.final_lr) * max(0.0, falling)

    return share


def build(model: nn.Module, options: OptimizerOptions, max_steps: int) -> tuple[Optimizer, LambdaLR]:
    """Return the optimizer of `model`'s parameters, and its schedule, to be advanced after every optimizer step."""
    groups = parameter_groups(model, options)
    optimizer: Optimizer
    if options.name == "sgd":
        optimizer = SGD(groups)
    elif options.name == "muon":
        optimizer = MuonWithAdamW(groups, options.betas, options.eps)
    else:
        optimizer = AdamW(groups, betas=options.betas, eps=options.eps, fused=True)
        # A fused optimizer can undo the scaling of the loss itself, and Lightning therefore refuses to clip gradients
        # for it, even if the loss is not scaled (bf16-mixed). Without this flag Lightning unscales and then clips.
        optimizer._step_supports_amp_scaling = False
    if options.ema_decay is not None:
        keep_average(optimizer, options.ema_decay)
    return optimizer, LambdaLR(optimizer, schedule(options, max_steps))


def keep_average(optimizer: Optimizer, decay: float) -> None:
    """Make an optimizer keep an exponential moving average of the weights, from their values after the first step on.

    The average is the state EMA of each parameter, beside AdamW's moments. It is saved, restored and split over ranks
    with them, and under ZeRO it is an average of the float32 master weights in each rank's partition.

    Args:
        optimizer: the optimizer.
        decay: the share of the average that stays in every step.
    """
    average = get_ema_multi_avg_fn(decay)

    # DeepSpeed calls `step` for some of the parameters at a time, and only these are in the groups then.
    def update(optimizer: Optimizer, *arguments: Any) -> None:
        averages: list[Tensor] = []
        weights: list[Tensor] = []
        for p in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
            if p.grad is None:  # the step was left out
                continue
            state = optimizer.state[p]
            if EMA in state:
                averages.append(state[EMA])
                weights.append(p.detach())
            else:
                state[EMA] = p.detach().clone()
        if averages:
            average(averages, weights, 0)

    optimizer.register_step_post_hook(update)


def forget_average(optimizer: Optimizer) -> None:
    """Drop the average that an earlier run has left in the optimizer's state, and that this one does not keep."""
    for state in optimizer.state.values():
        state.pop(EMA, None)
