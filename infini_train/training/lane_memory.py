"""Holds the memories of this rank's lanes between windows, by global lane number, for any memory rule."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from infini_train.model.memory_rule import MemoryState

LANES = "lane_ids"


def file_name(rank: int, world_size: int) -> str:
    return f"lanes-{rank:05d}-of-{world_size:05d}.safetensors"


def emptied(memory: list[MemoryState], rows_B: Tensor) -> list[MemoryState]:
    """Return these memories, with the rows where `rows_B` (bool [B]) is true as empty as at a document's start."""
    return [
        {name: x.masked_fill(rows_B.to(x.device).view(-1, *[1] * (x.dim() - 1)), 0) for name, x in layer.items()}
        for layer in memory
    ]


class LaneMemory:
    """Stores one list of memory states for each lane group, that is, for the lanes of one micro-batch.

    `take` returns the states for a forward pass, and `put` stores the states after it. The states of a group are kept
    as one batch, because a rank's micro-batches consist of the same lanes in every step. Only the memories of a
    loaded checkpoint are looked up lane by lane, since it may have been written with other groups.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[int, ...], list[MemoryState]] = {}
        self.saves = True  # False if another rank has the memories of these lanes and writes them to checkpoints
        # The file and row of each lane of a loaded checkpoint, until the lane is first taken.
        self._saved: dict[int, tuple[Path, int]] = {}

    def take(self, lane_ids: Tensor, device: torch.device) -> list[MemoryState] | None:
        """Return the memories of these lanes, or None before their first window.

        Args:
            lane_ids: int64 [B], global lane numbers.
            device: device for states that are read from a checkpoint.

        Returns:
            the state of each layer, tensors [B, ...].

        Raises:
            ValueError: the loaded checkpoint lacks one of the lanes.
        """
        key = tuple(lane_ids.tolist())
        if key not in self._groups and self._saved:
            self._groups[key] = self._read(key, device)
        return self._groups.get(key)

    def put(self, lane_ids: Tensor, memory: list[MemoryState]) -> None:
        """Store the memories after a window. They are detached: gradients do not pass the start of a window."""
        detached = [{name: x.detach() for name, x in layer.items()} for layer in memory]
        self._groups[tuple(lane_ids.tolist())] = detached

    def empty_non_finite(self) -> list[int]:
        """Empty the memories that hold an infinity or a NaN, and return the numbers of their lanes."""
        found = []
        for lanes, memory in self._groups.items():
            finite_of_tensors = [x.isfinite().flatten(1).all(1) for layer in memory for x in layer.values()]
            finite_L = torch.stack(finite_of_tensors).all(0)
            if bool(finite_L.all()):
                continue
            found += [lane for lane, finite in zip(lanes, finite_L.tolist(), strict=True) if not finite]
            self._groups[lanes] = emptied(memory, ~finite_L)
        return found

    def groups(self) -> dict[tuple[int, ...], list[MemoryState]]:
        """Return the memories as they are now. What is put later does not change them."""
        return dict(self._groups)

    def snapshot(self, groups: dict[tuple[int, ...], list[MemoryState]] | None = None) -> dict[str, Tensor]:
        """Return copies on the CPU of this rank's memories, as a checkpoint stores them.

        Args:
            groups: what `groups` returned earlier; None: the memories as they are now.

        Returns:
            `layers.{i}.{name}`, [lanes, ...] in float32, for every layer i and tensor of its state; and `lane_ids`,
            int64 [lanes]. If another rank saves the same lanes (`saves` is False), there are none.
        """
        if groups is None:
            groups = self._groups
        if not self.saves:
            groups = {}
        tensors = {LANES: torch.tensor([lane for group in groups for lane in group], dtype=torch.int64)}
        memories = list(groups.values())
        for i, layer in enumerate(memories[0] if memories else []):
            for name in layer:
                tensors[f"layers.{i}.{name}"] = torch.cat([memory[i][name].cpu() for memory in memories]).contiguous()
        return tensors

    def load(self, directory: Path) -> None:
        """Locate every lane in a checkpoint, which any number of ranks may have written.

        A lane's memory is read when it is first taken, so that each rank reads only its own lanes.
        """
        self._groups, self._saved = {}, {}
        for path in sorted(directory.glob("lanes-*-of-*.safetensors")):
            with safe_open(path, "pt") as file:
                for row, lane in enumerate(file.get_tensor(LANES).tolist()):
                    self._saved[lane] = (path, row)
        if not self._saved:
            raise ValueError(f"{directory}: found no lane memories (lanes-*-of-*.safetensors)")

    def _read(self, lanes: tuple[int, ...], device: torch.device) -> list[MemoryState]:
        """Read the memories of these lanes from the loaded checkpoint, and put them together as one group."""
        rows: list[dict[str, Tensor]] = []
        for lane in lanes:
            if lane not in self._saved:
                raise ValueError(
                    f"lane {lane}: found no memory in the checkpoint, which has {len(self._saved)} lanes"
                )
            path, row = self._saved.pop(lane)
            with safe_open(path, "pt") as file:
                names = [key for key in file.keys() if key != LANES]  # noqa: SIM118 (not a mapping)
                rows.append({name: file.get_slice(name)[row : row + 1] for name in names})
        layers: dict[int, MemoryState] = {}
        for name in rows[0]:
            _, layer, part = name.split(".", 2)
            layers.setdefault(int(layer), {})[part] = torch.cat([row[name] for row in rows]).to(device)
        return [layers[i] for i in sorted(layers)]
