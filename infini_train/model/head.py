"""Output embeddings that give losses without ever holding the logits of a whole window.

torch.nn.functional.linear_cross_entropy does the same in float32; of bfloat16 inputs (ZeRO) it rounds the sum of all
losses to bfloat16, and under autocast it multiplies in float32, so we have our own (docs/performance.md).
"""

from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # label of a token without one, as in torch
CHUNK = 1024  # tokens whose logits exist at a time


class LanguageHead(nn.Linear):
    """nn.Linear without a bias [vocabulary, hidden]. Losses are a call of the module, too, so that whoever hooks its
    calls sees them, as ZeRO-3, which gathers weights for them."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Any:
        """Logits [..., vocabulary] of hidden [..., hidden]; with labels [...] int64, -100 for none: the sum of their
        cross-entropies in nats, a scalar, and each of them [...], without a gradient, 0 where there is no label;
        both float32 (float64 for float64)."""
        if labels is None:
            return super().forward(hidden)
        total, losses = _SummedLosses.apply(hidden.flatten(0, -2), self.weight, labels.flatten())
        return total, losses.view_as(labels)


class _SummedLosses(torch.autograd.Function):
    """Gradients of the sum are made in forward, while a chunk's logits are there, and scaled in backward: nothing is
    computed twice, and what is kept has the size of the inputs."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        differentiate = any(ctx.needs_input_grad)
        losses_N = torch.empty(len(x_ND), dtype=wide, device=x_ND.device)
        grad_x = torch.empty_like(x_ND if differentiate else x_ND[:0])
        grad_weight = torch.zeros_like(weight_VD if differentiate else weight_VD[:0], dtype=wide)
        for first in range(0, len(x_ND), CHUNK):
            chunk = slice(first, first + CHUNK)
            x, labels = x_ND[chunk], labels_N[chunk, None]
            labelled, labels = labels != IGNORED, labels.clamp_min(0)
            logits = (x @ weight_VD.T).to(wide)
            # In place, as another copy of the logits takes longer than all else here.
            of_label = logits.sub_(logits.amax(-1, keepdim=True)).gather(1, labels)
            total = logits.exp_().sum(-1, keepdim=True)
            losses_N[chunk] = torch.where(labelled, total.log() - of_label, 0)[:, 0]
            if differentiate:
                probabilities = logits.div_(total)
                grad = probabilities.scatter_add_(1, labels, torch.full_like(total, -1)).mul_(labelled).to(x.dtype)
                grad_x[chunk] = grad @ weight_VD
                if x.dtype == wide:
                    grad_weight.addmm_(grad.T, x)  # a copy the less, as large as the weight
                else:
                    grad_weight += grad.T @ x
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(losses_N)
        ctx.dtype = weight_VD.dtype
        return losses_N.sum(), losses_N

    @staticmethod
    def backward(ctx, grad_total: Tensor, _: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_total.to(grad_x.dtype) * grad_x, (grad_total * grad_weight).to(ctx.dtype), None
