"""Memories go to disk and come back by global lane number, whatever ranks and groups held them."""

import pytest
import torch
from safetensors.torch import save_file

from infini_train.training.draws import dropped
from infini_train.training.lane_memory import LaneMemory, emptied, file_name

CPU = torch.device("cpu")


def memory(lanes: list[int]) -> list[dict[str, torch.Tensor]]:
    """Two layers whose values tell the lane and the layer."""
    lane = torch.tensor(lanes, dtype=torch.float32)
    return [
        {"M": (lane + 100 * layer)[:, None, None].expand(-1, 2, 3).clone(), "z": lane[:, None] - layer}
        for layer in (0, 1)
    ]


def filled(groups: list[list[int]]) -> LaneMemory:
    lanes = LaneMemory()
    for group in groups:
        lanes.put(torch.tensor(group), memory(group))
    return lanes


def test_another_number_of_ranks_and_rows(tmp_path):
    save_file(filled([[0, 1], [2, 3]]).snapshot(), tmp_path / file_name(0, 2))
    save_file(filled([[4, 5], [6, 7]]).snapshot(), tmp_path / file_name(1, 2))
    assert {p.name for p in tmp_path.iterdir()} == {file_name(0, 2), file_name(1, 2)}
    for groups in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[3], [5]], [[6, 1, 4]]):
        loaded = LaneMemory()
        loaded.load(tmp_path)
        for group in groups:
            for mine, expected in zip(loaded.take(torch.tensor(group), CPU), memory(group), strict=True):
                assert mine.keys() == expected.keys()
                assert all(torch.equal(mine[k], expected[k]) for k in mine)


def test_put_detaches_and_take_gives_none_at_first():
    lanes = LaneMemory()
    assert lanes.take(torch.tensor([0]), CPU) is None
    lanes.put(torch.tensor([0]), [{"M": torch.ones(1, requires_grad=True) * 2}])
    assert not lanes.take(torch.tensor([0]), CPU)[0]["M"].requires_grad


def test_missing_lane_is_named(tmp_path):
    with pytest.raises(ValueError, match="found no lane memories"):
        LaneMemory().load(tmp_path)
    save_file(filled([[0, 1]]).snapshot(), tmp_path / file_name(0, 1))
    lanes = LaneMemory()
    lanes.load(tmp_path)
    with pytest.raises(ValueError, match="lane 2: found no memory"):
        lanes.take(torch.tensor([1, 2]), CPU)


def test_memories_that_are_not_finite_are_emptied():
    lanes = filled([[0, 1], [2, 3]])
    memory = lanes.take(torch.tensor([2, 3]), torch.device("cpu"))
    name = next(iter(memory[-1]))
    memory[-1][name][1].view(-1)[0] = float("nan")
    before = lanes.snapshot()
    assert lanes.empty_non_finite() == [3]
    after = lanes.snapshot()
    for key, value in after.items():
        torch.testing.assert_close(value[:3], before[key][:3])
        assert key == "lane_ids" or not value[3].any()
    assert lanes.empty_non_finite() == []


def test_dropped_lanes():
    """Any cut of the lanes into groups drops the same ones, each as often as asked for, and each by itself."""
    lanes, share, steps = 8, 0.25, 4000

    def all_of(step: int, seed: int = 3, groups: int = 1) -> torch.Tensor:
        ids = torch.arange(lanes).chunk(groups)
        return torch.cat([dropped(share, seed=seed, step=step, lane_ids=group) for group in ids])

    drops = torch.stack([all_of(step) for step in range(steps)])
    for step in range(20):
        assert torch.equal(drops[step], all_of(step, groups=4))
        assert torch.equal(
            drops[step].flip(0), dropped(share, seed=3, step=step, lane_ids=torch.arange(lanes).flip(0))
        )
    spread = (share * (1 - share) / steps) ** 0.5
    assert (drops.double().mean(0) - share).abs().max() < 5 * spread
    together = (drops.double().T @ drops.double()) / steps  # of independent lanes: share squared
    together.fill_diagonal_(share**2)
    assert (together - share**2).abs().max() < 5 * spread
    assert not torch.equal(drops[:20], torch.stack([all_of(step, seed=4) for step in range(20)]))


def test_emptied_rows():
    before = memory([5, 6, 7])
    for layer, expected in zip(emptied(before, torch.tensor([True, False, True])), before, strict=True):
        for name, x in layer.items():
            assert torch.equal(x[1], expected[name][1]) and x[1].any()
            assert not x[0].any() and not x[2].any()
