"""Weights and optimizer state on disk, the same whatever strategy, ZeRO stage and world size wrote or will read them.

Every rank writes what it owns, without communication: pieces of flattened parameters, named by parameter and place.
Whoever loads finds the pieces that overlap its own. (DeepSpeed's checkpoints are pickles, tied to their world size
until converted, and its conversion gives every parameter group the first one's options: stage3.py of 0.19.8.)

state-RRRRR-of-WWWWW.safetensors: 1-D tensors `KIND/NAME/START`, where KIND is `weight` (float32 master weights under
mixed precision) or a key of the optimizer's state; `KIND/NAME` without START is what has no elements (`step`).
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
STATE = "state.ckpt"  # all of a checkpoint that is neither weights nor optimizer state


def file_name(rank: int, world_size: int) -> str:
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def read_state(directory: Path) -> dict[str, Any]:
    """What STATE holds. Never runs code."""
    return torch.load(directory / STATE, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class Fragment:
    """`numel` elements of the flattened parameter `name`, from `start` on, at `offset` of `flat`.

    `flat` is what the optimizer steps: the parameter itself, or with ZeRO this rank's partition of many.
    """

    name: str
    start: int
    flat: Tensor
    offset: int
    numel: int

    def of(self, like_flat: Tensor) -> Tensor:
        """This fragment of a tensor laid out as `flat`: a 1-D view."""
        return like_flat.detach().view(-1)[self.offset : self.offset + self.numel]


def owned(model: nn.Module, zero: Any, rank: int, world_size: int) -> list[Fragment]:
    """What this rank writes: all ranks together have each element once. Arguments as for `held`."""
    fragments = held(model, zero, rank)
    return fragments if zero is not None else fragments[rank::world_size]


def held(model: nn.Module, zero: Any, rank: int) -> list[Fragment]:
    """What this rank holds and steps.

    Args:
        zero: DeepSpeed's ZeRO optimizer (stage 1 to 3); None where every rank holds everything.
    """
    fragments = []
    parameters: Iterator[tuple[str, Any]] = model.named_parameters()
    for name, p in parameters:
        if zero is None:
            fragments.append(Fragment(name, 0, p, 0, p.numel()))
        elif hasattr(p, "ds_id"):  # ZeRO-3: equal slices of every parameter, the last ones padded
            group, offset, size = zero.grad_position[zero.get_param_id(p)]
            start = rank * size
            numel = min(size, p.ds_numel - start)
            if numel > 0:
                fragments.append(Fragment(name, start, zero.fp32_partitioned_groups_flat[group], offset, numel))
        elif (at := p._hp_mapping) is not None:  # ZeRO-1 and 2: an equal slice of all parameters of a group
            flat = zero.single_partition_of_fp32_groups[at.param_group_index]
            place, here = at.lp_fragment_address, at.hp_fragment_address
            fragments.append(Fragment(name, place.start, flat, here.start, here.numel))
    return fragments


def tensors_of(fragments: list[Fragment], optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Key and value of all that `fragments` have: weights, and the optimizer's state if it has made a step."""
    for f in fragments:
        yield f"{WEIGHT}/{f.name}/{f.start}", f.of(f.flat)
        for key, value in optimizer.state.get(f.flat, {}).items():
            if torch.is_tensor(value) and value.shape == f.flat.shape:
                yield f"{key}/{f.name}/{f.start}", f.of(value)
            elif f.start == 0:
                yield f"{key}/{f.name}", torch.as_tensor(value)


class Fragments:
    """The pieces in a checkpoint's files. Use as a context manager.

    Raises:
        ValueError: no such files, or some of them missing.
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
        # kind and name -> start, end, file and key of each piece; start None: a value that has no pieces
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
        return [kind for kind, of in self.pieces if of == name and kind != WEIGHT]

    def whole(self, kind: str, name: str, shape: list[int]) -> Tensor:
        """A parameter of this shape or its optimizer state, put together; a value that has no pieces as it is."""
        value = self.read(kind, name, 0, math.prod(shape))
        return value.view(shape) if value.dim() else value

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements of a flattened parameter or of its optimizer state, [numel]; a value that has no pieces, whole.

        Raises ValueError where the files lack some of them.
        """
        parts, end = [], start
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
    """Copies on the CPU of what `fragments` have, under the names of the file."""
    return {key: value.to("cpu", copy=True).contiguous() for key, value in tensors_of(fragments, optimizer)}


def load(directory: Path, fragments: list[Fragment], optimizer: Optimizer) -> None:
    """Fill `fragments` and the optimizer's state, made where there is none yet.

    Raises ValueError for a parameter that the checkpoint lacks or has in another size.
    """
    with Fragments(directory) as saved:
        for f in fragments:
            f.of(f.flat).copy_(saved.read(WEIGHT, f.name, f.start, f.numel))
            for kind in saved.optimizer_kinds(f.name):
                state = optimizer.state[f.flat]
                value = saved.read(kind, f.name, f.start, f.numel)
                if value.dim() == 0:
                    state[kind] = value.to(f.flat.device)  # where a fused optimizer wants its step
                else:
                    if kind not in state:
                        state[kind] = torch.zeros_like(f.flat)
                    f.of(state[kind]).copy_(value)
