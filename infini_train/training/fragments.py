"""Weights and optimizer state on disk, in one format for every strategy, ZeRO stage and world size.

Each rank writes the fragments that it owns, without communication. A fragment is a range of elements of a flattened
parameter. A rank that loads a checkpoint looks for the fragments that overlap its own, so the number of ranks and the
ZeRO stage may change between writing and reading. (DeepSpeed's own checkpoints are pickles and tied to their world
size until they are converted, and the conversion gives every parameter group the options of the first one: stage3.py
of 0.19.8.)

Format of state-RRRRR-of-WWWWW.safetensors: 1-D tensors `KIND/NAME/START`, where KIND is `weight` (the float32 master
weights under mixed precision) or a key of the optimizer's state, NAME is the parameter and START the first element.
A state that is not elementwise, such as the `step` of AdamW, is stored whole as `KIND/NAME`.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

WEIGHT = "weight"
EMA = "ema"  # key of the optimizer's state with the moving average of the weights, if it keeps one
STATE = "state.ckpt"  # everything in a checkpoint that is neither weights nor optimizer state


def file_name(rank: int, world_size: int) -> str:
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def read_state(directory: Path) -> dict[str, Any]:
    """Read STATE from a checkpoint directory, without running any code from it.

    Raises:
        ValueError: the file is damaged, or holds objects that only code could restore.
    """
    path = directory / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # Which error torch raises depends on the place of the damage. Its text advises to load without `weights_only`.
    except Exception as error:
        raise ValueError(
            f"{path}: damaged, or not written by infini-train: found nothing that torch.load restores with "
            f"weights_only ({type(error).__name__})"
        ) from None
    names = {"parameters", "tied", "groups", "accumulate_grad_batches", "loops", "global_step"}
    if not isinstance(state, dict) or (lost := names - state.keys()):
        found = "no dictionary" if not isinstance(state, dict) else f"no {', '.join(sorted(lost))}"
        raise ValueError(f"{path}: damaged: found {found} in it")
    return state


@dataclass(frozen=True)
class Fragment:
    """A range of elements of a flattened parameter, and where this rank keeps them.

    Attributes:
        name: name of the parameter.
        start: first element of the range in the flattened parameter.
        flat: the tensor that the optimizer updates: the parameter itself, or under ZeRO this rank's partition, which
            holds fragments of many parameters.
        offset: where the range begins in `flat`.
        numel: number of elements.
    """

    name: str
    start: int
    flat: Tensor
    offset: int
    numel: int

    def of(self, like_flat: Tensor) -> Tensor:
        """Return this fragment of a tensor with the layout of `flat` (an optimizer state, say), as a view [numel]."""
        return like_flat.detach().view(-1)[self.offset : self.offset + self.numel]


def owned(model: nn.Module, zero: Any, rank: int, world_size: int) -> list[Fragment]:
    """Return the fragments that this rank writes: all ranks together write each element once. See `held`."""
    fragments = held(model, zero, rank)
    return fragments if zero is not None else fragments[rank::world_size]


def held(model: nn.Module, zero: Any, rank: int) -> list[Fragment]:
    """Return the fragments that this rank holds and updates.

    Args:
        model: the module whose parameters are stored.
        zero: DeepSpeed's ZeRO optimizer (stage 1 to 3); None if every rank holds everything.
        rank: this rank.
    """
    fragments = []
    parameters: Iterator[tuple[str, Any]] = model.named_parameters()
    for name, p in parameters:
        if zero is None:
            fragments.append(Fragment(name, 0, p, 0, p.numel()))
        elif hasattr(p, "ds_id"):  # ZeRO-3: each rank has an equal slice of every parameter, padded at the end
            group, offset, size = zero.grad_position[zero.get_param_id(p)]
            start = rank * size
            numel = min(size, p.ds_numel - start)
            if numel > 0:
                fragments.append(Fragment(name, start, zero.fp32_partitioned_groups_flat[group], offset, numel))
        elif (at := p._hp_mapping) is not None:  # ZeRO-1 and 2: each rank has an equal slice of a whole group
            flat = zero.single_partition_of_fp32_groups[at.param_group_index]
            in_parameter, in_flat = at.lp_fragment_address, at.hp_fragment_address
            fragments.append(Fragment(name, in_parameter.start, flat, in_flat.start, in_flat.numel))
    return fragments


def tensors_of(fragments: list[Fragment], optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield key and value of the weights in these fragments, and of the optimizer's state if it has made a step."""
    for f in fragments:
        yield f"{WEIGHT}/{f.name}/{f.start}", f.of(f.flat)
        for key, value in optimizer.state.get(f.flat, {}).items():
            if torch.is_tensor(value) and value.shape == f.flat.shape:
                yield f"{key}/{f.name}/{f.start}", f.of(value)
            elif f.start == 0:
                yield f"{key}/{f.name}", torch.as_tensor(value)


class Fragments:
    """The fragments in a checkpoint's files, of all ranks that wrote it. Use as a context manager.

    Raises:
        ValueError: there are no such files, or some of them are missing or damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.paths = sorted(directory.glob("state-*-of-*.safetensors"))
        written = {path.name for path in self.paths}
        world_size = int(self.paths[0].stem.rsplit("-", 1)[1]) if self.paths else 1
        if missing := {file_name(rank, world_size) for rank in range(world_size)} - written:
            raise ValueError(f"{directory}: expected {', '.join(sorted(missing))}")

    def __enter__(self) -> "Fragments":
        self._stack = ExitStack()
        # (kind, name) -> start, end, file and key of each fragment; start is None for a state that is stored whole.
        self.pieces: dict[tuple[str, str], list[tuple[int | None, int, Any, str]]] = defaultdict(list)
        for path in self.paths:
            file = self._stack.enter_context(safe_open(path, "pt"))
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                kind, name, *start = key.split("/")
                if start:
                    numel = file.get_slice(key).get_shape()[0]
                    self.pieces[kind, name].append((int(start[0]), int(start[0]) + numel, file, key))
                else:
                    self.pieces[kind, name].append((None, 0, file, key))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def optimizer_kinds(self, name: str) -> list[str]:
        """Return the keys of the optimizer's state that the checkpoint has for this parameter."""
        return [kind for kind, of in self.pieces if of == name and kind != WEIGHT]

    def whole(self, kind: str, name: str, shape: list[int]) -> Tensor:
        """Return a whole parameter of this shape, or a whole tensor of its optimizer state.

        Raises:
            ValueError: the files lack some of its elements.
        """
        value = self.read(kind, name, 0, math.prod(shape))
        return value.view(shape) if value.dim() else value

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Read a range of elements, put together from all fragments that overlap it.

        Args:
            kind: WEIGHT or a key of the optimizer's state.
            name: name of the parameter.
            start: first element of the range in the flattened parameter.
            numel: number of elements.

        Returns:
            the elements, [numel]; or a 0-d tensor if the state is not elementwise.

        Raises:
            ValueError: the files lack some of the elements.
        """
        parts, end = [], start  # `end` is where the next fragment has to continue
        for first, last, file, key in sorted(self.pieces.get((kind, name), []), key=lambda piece: piece[0] or 0):
            if first is None:
                return file.get_tensor(key)
            if first <= end < min(last, start + numel):
                stop = min(last, start + numel)
                parts.append(file.get_slice(key)[end - first : stop - first])
                end = stop
        if end != start + numel:
            raise ValueError(f"{self.directory}: found {end} elements of {kind} of {name}, expected {start + numel}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def snapshot(fragments: list[Fragment], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return copies on the CPU of the weights and states in these fragments, by their keys in the file."""
    return {key: value.to("cpu", copy=True).contiguous() for key, value in tensors_of(fragments, optimizer)}


def load(directory: Path, fragments: list[Fragment], optimizer: Optimizer) -> None:
    """Load these fragments' weights and optimizer state from a checkpoint; a state that does not exist is created.

    Raises:
        ValueError: the checkpoint lacks a parameter, or has it in another size.
    """
    with Fragments(directory) as saved:
        for f in fragments:
            f.of(f.flat).copy_(saved.read(WEIGHT, f.name, f.start, f.numel))
            for kind in saved.optimizer_kinds(f.name):
                state = optimizer.state[f.flat]
                value = saved.read(kind, f.name, f.start, f.numel)
                if value.dim() == 0:
                    state[kind] = value.to(f.flat.device)  # a fused optimizer needs its `step` on the device
                else:
                    if kind not in state:
                        state[kind] = torch.zeros_like(f.flat)
                    f.of(state[kind]).copy_(value)
