"""Cross-entropy of a linear head, without holding the logits of a whole window.

torch.nn.functional.linear_cross_entropy does the same in float32. For bfloat16 inputs (ZeRO) it rounds the sum of all
losses to bfloat16, and under autocast it multiplies in float32; therefore this one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label that torch's cross_entropy skips
LOSS_CHUNK = 1024  # number of tokens whose logits exist at a time


class SummedLosses(torch.autograd.Function):
    """Computes the gradients in forward, while the logits of a chunk exist, and scales them in backward: nothing is
    computed twice, and what is saved has the size of the inputs."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        device, dtype = x_ND.device.type, product_dtype(x_ND)
        needed = any(ctx.needs_input_grad)
        differentiate &= needed
        losses_N = torch.empty(len(x_ND), dtype=wide, device=x_ND.device)
        grad_x = torch.empty_like(x_ND if needed else x_ND[:0])
        grad_weight = torch.empty_like(weight_VD if needed else weight_VD[:0], dtype=wide)
        if differentiate:
            grad_weight.zero_()
        weight = weight_VD.to(dtype)
        # Autocast would cast the weight again for every chunk, and does not apply to in-place products.
        with torch.autocast(device, enabled=False):
            for first in range(0, len(x_ND), LOSS_CHUNK):
                chunk = slice(first, first + LOSS_CHUNK)
                x, labels = x_ND[chunk].to(dtype), labels_N[chunk, None]
                labelled, labels = labels != IGNORED, labels.clamp_min(0)
                logits = x @ weight.T
                of_label, rows, total = label_log_probs(logits, labels, wide)
                losses_N[chunk] = torch.where(labelled, -of_label, 0)[:, 0]
                if not differentiate:
                    continue
                share = (labelled / total).to(dtype)
                grad_x[chunk] = (rows @ weight).mul_(share)
                add_weight_gradient(grad_weight, rows, x * share)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(losses_N)
        ctx.dtype = weight_VD.dtype
        return losses_N.sum(), losses_N

    @staticmethod
    def backward(ctx, grad_total: Tensor, _: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_total.to(grad_x.dtype) * grad_x, (grad_total * grad_weight).to(ctx.dtype), None, None


def add_weight_gradient(grad_weight_VD: Tensor, grad_logits_NV: Tensor, x_ND: Tensor) -> None:
    """Add the gradient of the weight of logits = x W^T, in place."""
    if grad_logits_NV.dtype == grad_weight_VD.dtype:
        grad_weight_VD.addmm_(grad_logits_NV.T, x_ND)  # saves a copy as large as the weight
    else:
        grad_weight_VD += grad_logits_NV.T @ x_ND


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with x are computed, which autocast may set."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def label_log_probs(logits_NV: Tensor, labels_N1: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the labels, [N, 1] in `wide`; and the gradient of minus these, as [N, V] divided by [N,
    1].

    Passes over the logits dominate the time, so there are few, and the logits may be overwritten.
    """
    if logits_NV.dtype == wide:
        of_label = logits_NV.sub_(logits_NV.amax(-1, keepdim=True)).gather(1, labels_N1)
        total = logits_NV.exp_().sum(-1, keepdim=True)
        return of_label - total.log(), logits_NV.scatter_add_(1, labels_N1, -total), total
    of_label = F.log_softmax(logits_NV, -1, dtype=wide).gather(1, labels_N1)
    less_one = of_label.exp().sub_(1)  # in `wide`: in half precision probabilities near 1 lose all digits
    rows = F.softmax(logits_NV, -1).scatter_(1, labels_N1, less_one.to(logits_NV.dtype))
    return of_label, rows, torch.ones_like(of_label)
