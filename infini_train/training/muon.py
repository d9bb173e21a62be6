"""Muon for the hidden matrices and AdamW for all other parameters, as one optimizer, also under ZeRO.

Muon (torch.optim.Muon; arXiv 2502.16982) orthogonalises the momentum of a whole matrix, but a rank under ZeRO holds
flat partitions, which cut matrices anywhere. So the momentum is kept and updated where the gradient is, in the layout
of the partition, as AdamW's moments are. Only the update of a matrix of which several ranks hold pieces is put
together, one matrix at a time, and each rank applies its own piece of the result. A run therefore makes the same
steps under every strategy, and its checkpoints hold the momentum in fragments (fragments.py).

DeepSpeed has a Muon, too (0.19.8), which this does not use: it orthogonalises before gradients are clipped, so that
the updates are clipped in their place and the logged norm is theirs; it does not scale updates to AdamW's size;
and at stages 1 and 2 a rank keeps the whole momentum of every matrix of which it has a piece, so that the size and
layout of its state depend on the world size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from . import fragments

HIDDEN = "hidden"  # name of the parameter group whose matrices Muon updates
MOMENTUM = "momentum_buffer"  # key of the optimizer's state, as in torch.optim.Muon


@dataclass(frozen=True)
class Matrix:
    """A matrix that Muon updates, as one rank sees it.

    Attributes:
        shape: its rows and columns.
        fragment: the piece that this rank updates; None if other ranks have all of it.
        split: whether several ranks have pieces of it. All ranks then take part in its update.
    """

    shape: tuple[int, ...]
    fragment: fragments.Fragment | None
    split: bool


def partitioned(model: nn.Module, zero: Any, rank: int, device: torch.device) -> dict[Tensor, list[Matrix]]:
    """Return the matrices in each of DeepSpeed's flat partitions, in the same order on all ranks, which all call it.

    Args:
        model: the module that is trained.
        zero: DeepSpeed's ZeRO optimizer (stage 1 to 3).
        rank: this rank.
        device: the rank's device, on which ranks exchange tensors.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    held = {f.name: f for f in fragments.held(model, zero, rank)}
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        flats, groups = zero.fp32_partitioned_groups_flat, zero.fp16_groups
    else:
        flats, groups = zero.single_partition_of_fp32_groups, zero.bit16_groups
    holders = torch.tensor([name in held for name in names.values()], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(holders)
    split = dict(zip(names.values(), (holders > 1).tolist(), strict=True))

    def matrix(p: Any) -> Matrix:
        name = names[id(p)]
        return Matrix(tuple(getattr(p, "ds_shape", p.shape)), held.get(name), split[name])

    return {flat: [matrix(p) for p in group] for flat, group in zip(flats, groups, strict=True)}


class MuonWithAdamW(Optimizer):
    """One optimizer that updates the group named HIDDEN by torch's Muon, and all others by torch's fused AdamW.

    Muon has Nesterov momentum, as torch's has by default. Its updates are scaled to the size of AdamW's (torch's
    `match_rms_adamw`), so that learning rates and weight decay are those of AdamW. The state of a matrix is its
    momentum, float32 with the shape of the parameter or of the partition that holds it.

    Args:
        groups: parameter groups, each with `name`, `lr` and `weight_decay`; that named HIDDEN has matrices only.
        betas: betas of AdamW.
        eps: epsilon of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float):
        super().__init__(groups, {})
        for group in self._of_muon():
            group["momentum"] = 0.95  # torch's default
        self.adamw = AdamW(self._of_adamw(), betas=betas, eps=eps, fused=True)  # adds its options to the groups
        self.matrices: dict[Tensor, list[Matrix]] = {}
        self.device: torch.device | None = None

    def _of_muon(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["name"] == HIDDEN]

    def _of_adamw(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["name"] != HIDDEN]

    def partition(self, model: nn.Module, zero: Any, rank: int, device: torch.device) -> None:
        """Learn which matrices are in DeepSpeed's flat partitions; all ranks call it before the first step.

        Matrices are then put together and orthogonalised on the rank's device, also where partitions are offloaded.
        """
        self.matrices, self.device = partitioned(model, zero, rank, device), device

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self._of_muon():
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        # Loading a checkpoint replaces groups and state; DeepSpeed steps one group at a time.
        self.adamw.param_groups, self.adamw.state = self._of_adamw(), self.state
        self.adamw.step()
        return loss

    def _update(self, flat: Tensor, group: dict[str, Any]) -> None:
        """Update a matrix, or a partition that holds pieces of matrices."""
        assert flat.grad is not None
        state = self.state[flat]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(flat.grad)
        state[MOMENTUM].lerp_(flat.grad, 1 - group["momentum"])
        directions = flat.grad.lerp(state[MOMENTUM], group["momentum"])
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        whole = Matrix(tuple(flat.shape), fragments.Fragment("", 0, flat, 0, flat.numel()), split=False)
        for matrix in self.matrices.get(flat, [whole]):
            if matrix.fragment is not None or matrix.split:
                change = _change(_put_together(matrix, directions, self.device), group["lr"]).view(-1)
                if (f := matrix.fragment) is not None:
                    f.of(flat).add_(change[f.start : f.start + f.numel].to(flat.device))


def _put_together(matrix: Matrix, flat: Tensor, device: torch.device | None) -> Tensor:
    """Return a whole matrix, whose pieces are in `flat` on this rank and in its like on others."""
    f = matrix.fragment
    if not matrix.split:
        assert f is not None
        return f.of(flat).view(matrix.shape).to(device)
    whole = torch.zeros(matrix.shape, dtype=flat.dtype, device=device)
    if f is not None:
        whole.view(-1)[f.start : f.start + f.numel] = f.of(flat)
    torch.distributed.all_reduce(whole)
    return whole


def _change(direction: Tensor, lr: float) -> Tensor:
    """Return what torch's Muon adds to a matrix whose update, before it is orthogonalised, is `direction`."""
    change = torch.zeros_like(direction)
    change.grad = direction
    Muon([change], lr=lr, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw").step()
    return change
