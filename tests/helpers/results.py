"""What a run leaves in its directory, read without the project's code, and comparisons of two runs."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

# Documents shorter and longer than the window of 32, several epochs in 20 steps of 4 lanes.
LENGTHS = [300, 45, 7, 120, 64, 33, 500, 20, 90, 211]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state, 1-D, put together from the pieces of all ranks."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for file in checkpoint.glob("state-*.safetensors"):
        for key, value in load_file(file).items():
            kind, name, *start = key.split("/")
            pieces.setdefault(f"{kind}/{name}", {})[int(*start)] = value
    return {
        key: torch.cat([of[start] for start in sorted(of)]) if of[0].dim() else of[0] for key, of in pieces.items()
    }


def logged_losses(run: Path) -> list[list[tuple[int, float]]]:
    """Steps and losses as each process of the run that trained logged them, steps done again included."""
    files = [list(EventFileLoader(str(file)).Load()) for file in (run / "tensorboard").glob("events.*")]
    files.sort(key=lambda events: events[0].wall_time)  # the names tell whole seconds only
    found = []
    for events in files:
        values = [(event.step, value) for event in events for value in event.summary.value]
        found.append([(step, v.tensor.float_val[0]) for step, v in values if v.tag == "train/loss"])
    return [values for values in found if values]


def results(run: Path) -> dict:
    """All that a run leaves behind, read without the project's code."""
    last = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = ("train/loss", "train/gradient_norm", "train/lr_matrices", "memory/M_norm_max")
    names += ("val/loss", "val/memory_share")
    there = set(names) & set(events.Tags()["scalars"])  # not every run validates
    return {
        "step": last.name,
        "state": torch.load(last / "state.ckpt", weights_only=True),
        "tensors": tensors(last),
        "lanes": {file.name: load_file(file) for file in sorted(last.glob("lanes-*.safetensors"))},
        "cursor": json.loads((last / "cursor.json").read_text()),
        "metrics": json.loads((last / "metrics.json").read_text()),
        # A validation that was cut off after it was logged is logged once more: the same point.
        "curves": {name: sorted({(e.step, e.value) for e in events.Scalars(name)}) for name in there},
    }


def assert_identical(a, b, path="result") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def check_same(found: dict, expected: dict, loss: float = 1e-5, weights: float = 1e-4, steps: int = 20) -> None:
    assert found["cursor"] == expected["cursor"]
    assert found["metrics"]["tokens"] == expected["metrics"]["tokens"]
    for name in ("train/loss", "train/gradient_norm", "train/lr_matrices"):
        assert [s for s, _ in found["curves"][name]] == list(range(1, 21))
        a, b = (torch.tensor([v for _, v in r["curves"][name]][-steps:]) for r in (found, expected))
        torch.testing.assert_close(a, b, rtol=loss, atol=0)
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, value in expected["tensors"].items():
        torch.testing.assert_close(found["tensors"][name], value, rtol=weights, atol=weights, msg=name)
    memories = [torch.cat([lanes["lane_ids"] for lanes in r["lanes"].values()]).sort() for r in (found, expected)]
    for name in next(iter(expected["lanes"].values())):
        a, b = (
            torch.cat([lanes[name] for lanes in r["lanes"].values()])[order.indices]
            for r, order in zip((found, expected), memories, strict=True)
        )
        torch.testing.assert_close(a, b, rtol=weights, atol=weights, msg=name)
