"""The memories of this rank's lanes between windows, keyed by global lane number, whatever the memory rule."""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from infini_train.model.memory_rule import MemoryState

LANES = "lane_ids"


def file_name(rank: int, world_size: int) -> str:
    return f"lanes-{rank:05d}-of-{world_size:05d}.safetensors"


def dropped(share: float, *, seed: int, step: int, lane_ids: Tensor) -> Tensor:
    """Whether each of these lanes drops its memory before this step's window, bool [lanes]: a share of all lanes and
    steps, by a draw that depends on nothing but seed, step and the global number of the lane."""
    # Raw Philox output, whose stream numpy keeps over versions (as for the order of documents).
    bits = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(int(lane_ids.max()) + 1)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53 < share)[lane_ids.cpu()]


def emptied(memory: list[MemoryState], rows_B: Tensor) -> list[MemoryState]:
    """The same memories, but empty in these rows (bool [B]), as before a document's first token."""
    return [
        {name: x.masked_fill(rows_B.to(x.device).view(-1, *[1] * (x.dim() - 1)), 0) for name, x in layer.items()}
        for layer in memory
    ]


class LaneMemory:
    """One memory per lane group (the rows of one micro-batch), handed to the forward pass and put back after it."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, ...], list[MemoryState]] = {}
        self.kept = True  # in checkpoints; false where another rank has the same lanes
        self._saved: dict[int, tuple[Path, int]] = {}  # lane -> its file and row, until the lane is first taken

    def take(self, lane_ids: Tensor, device: torch.device) -> list[MemoryState] | None:
        """Memories of these lanes, one state per layer; None before their first window.

        Raises ValueError for a lane that the loaded checkpoint lacks.
        """
        key = tuple(lane_ids.tolist())
        if key not in self._groups and self._saved:
            self._groups[key] = self._read(key, device)
        return self._groups.get(key)

    def put(self, lane_ids: Tensor, memory: list[MemoryState]) -> None:
        """Keep the memories after a window. They are detached: truncated BPTT ends at the window's start."""
        detached = [{name: x.detach() for name, x in layer.items()} for layer in memory]
        self._groups[tuple(lane_ids.tolist())] = detached

    def empty_non_finite(self) -> list[int]:
        """Empty the memories that hold an infinity or a NaN; returns their lanes."""
        found = []
        for lanes, memory in self._groups.items():
            finite_L = torch.stack([x.isfinite().flatten(1).all(1) for layer in memory for x in layer.values()]).all(
                0
            )  # [lanes]
            if bool(finite_L.all()):
                continue
            found += [lane for lane, finite in zip(lanes, finite_L.tolist(), strict=True) if not finite]
            self._groups[lanes] = emptied(memory, ~finite_L)
        return found

    def snapshot(self) -> dict[str, Tensor]:
        """Copies on the CPU of this rank's memories, `layers.{i}.{name}` [lanes, ...], and `lane_ids` [lanes]; of no
        lanes unless they are `kept`."""
        groups = self._groups if self.kept else {}
        tensors = {LANES: torch.tensor([lane for group in groups for lane in group], dtype=torch.int64)}
        memories = list(groups.values())
        for i, layer in enumerate(memories[0] if memories else []):
            for name in layer:
                tensors[f"layers.{i}.{name}"] = torch.cat([memory[i][name].cpu() for memory in memories]).contiguous()
        return tensors

    def load(self, directory: Path) -> None:
        """Find every lane of a checkpoint written by any number of ranks; rows are read as lanes are taken."""
        self._groups, self._saved = {}, {}
        for path in sorted(directory.glob("lanes-*-of-*.safetensors")):
            with safe_open(path, "pt") as file:
                for row, lane in enumerate(file.get_tensor(LANES).tolist()):
                    self._saved[lane] = (path, row)
        if not self._saved:
            raise ValueError(f"{directory}: found no lane memories (lanes-*-of-*.safetensors)")

    def _read(self, lanes: tuple[int, ...], device: torch.device) -> list[MemoryState]:
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
