"""Lightning's side of a checkpoint: it saves and loads one dictionary, whose tensors are in fragments on the disk."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO

from . import fragments
from .checkpoint_format import state_dict, verify
from .module import InfiniModule
from .optim import parameter_groups


def parameter_table(trainer: Trainer, module: InfiniModule) -> dict[str, Any]:
    """Return what a checkpoint has to say about the parameters whose fragments it holds (fragments.py).

    Returns:
        `parameters`: shape of each parameter by name; `tied`: for each name that shares its tensor with another
        parameter, the name of the other; `groups`: options of the parameter groups and the names in each;
        `accumulate_grad_batches`.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    everything = module.named_parameters(remove_duplicate=False)
    groups = zip(trainer.optimizers[0].param_groups, parameter_groups(module, module.options), strict=True)
    return {
        "parameters": {n: list(getattr(p, "ds_shape", p.shape)) for n, p in module.named_parameters()},
        "tied": {name: names[id(p)] for name, p in everything if name != names[id(p)]},
        "groups": [
            {**{k: v for k, v in now.items() if k != "params"}, "params": [names[id(p)] for p in made["params"]]}
            for now, made in groups
        ],
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
    }


class DirectoryIO(CheckpointIO):
    """Reads and writes checkpoint directories under strategies in which every rank holds the whole state.

    Lightning passes the checkpoint as one dictionary. Weights and optimizer state are in the fragments instead, which
    `Checkpointer` writes, and `load_checkpoint` puts them back into the dictionary.

    Attributes:
        content: what `save_checkpoint` was given last, as the bytes of the file STATE, which the writing thread
            writes.
    """

    content: bytes

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.content = buffer.getvalue()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        state = fragments.read_state(Path(path))
        # torch's optimizer state numbers the parameters across all groups, while the checkpoint names them.
        groups: list[dict[str, Any]] = []
        numbers: dict[str, int] = {}
        for group in state["groups"]:
            first = len(numbers)
            numbers |= {name: first + i for i, name in enumerate(group["params"])}
            groups.append({**group, "params": [numbers[name] for name in group["params"]]})
        with fragments.Fragments(Path(path)) as saved:
            state["state_dict"] = state_dict(saved, state)
            states = {
                number: {
                    kind: saved.whole(kind, name, state["parameters"][name]) for kind in saved.optimizer_kinds(name)
                }
                for name, number in numbers.items()
            }
        state["optimizer_states"] = [{"state": {i: x for i, x in states.items() if x}, "param_groups": groups}]
        return state

    def remove_checkpoint(self, path: Any) -> None:
        raise AssertionError("checkpoints are removed by Checkpointer")


class Verifier(Callback):
    """Compares all files of the checkpoint that is loaded with their digests; every rank reads its share of them.

    Args:
        path: the checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        verify(self.path, trainer.global_rank, trainer.world_size)
        trainer.strategy.barrier()
