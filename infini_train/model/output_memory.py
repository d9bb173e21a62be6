"""A memory at the output: what the document has taught the model about its next tokens.

The memories of the layers store what tokens are; this one stores which tokens came next, and changes the logits
directly. Per row, M [V, r] is a correction of the output weights W [V, D] that only the document in progress sees:

    f(h)    = unit(P h + b)                        features of the last hidden state h, r numbers of length 1
    logits  = W h + scale M f(h)                   M as it is before the chunk
    write   M <- DECAY M + clip(RATE sum_t (onehot(x_(t+1)) - softmax(logits_t)) f(h_t)^T)     after the chunk

A chunk is 128 tokens, or a shorter segment. A chunk is written when it is over, so the next token of all but its
last token is known, and the write is one gradient step of M on the chunk's own cross-entropy: the delta rule, with
the error of the softmax. `clip` limits the norm of each row of the step (each token's) to CLIP. This is the dynamic
evaluation of arXiv 1709.07432, restricted to low-rank output weights and made part of the model.

M is a constant for the gradient: P, b and scale learn from the read alone, and the decoder learns what is worth
reading. No graph through M has to be kept, and the gradients are made while the logits exist.

M is bounded for any input, because a chunk adds at most CLIP to each row: |M_v| <= CLIP / (1 - DECAY).

Chunks follow one another, because an error depends on what the memory already knows. This concerns the products of
this file only; the decoder still computes all segments of a window at once.

Shape suffixes: B rows, T tokens, n chunks, c positions in a chunk, D hidden size, V vocabulary, r features,
K columns of the call whose logits are wanted.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .cross_entropy import IGNORED, LOSS_CHUNK, add_weight_gradient, label_log_probs, product_dtype
from .memory_rule import MemoryState
from .window import Access, Placement

if TYPE_CHECKING:
    from .cache import InfiniCacheLayer
    from .configuration import InfiniConfig
    from .context import ContextGroup

RATE, CLIP, DECAY = 0.5, 1.0, 0.999
BIAS = 0.3  # initial value of b: a part of the features that is the same for all tokens learns the document's words
NAME = "output"  # of M in the state


class OutputMemory(nn.Module):
    """The features f(h) of an output memory. Parameters: `key_weight` [r, D] is P, `key_bias` [r] is b, and
    `scale` [1] multiplies what is read.

    Attributes:
        counted_chunks: losses go through so many of a window's chunks only, for counting memory: from the second on,
            each chunk takes as much. None: all chunks.
    """

    counted_chunks: int | None = None

    def __init__(self, hidden_size: int, features: int):
        super().__init__()
        self.key_weight = nn.Parameter(torch.empty(features, hidden_size))
        self.key_bias = nn.Parameter(torch.empty(features))
        self.scale = nn.Parameter(torch.empty(1))
        self.init_weights()

    def init_weights(self) -> None:
        # Hidden states are normalised, so every feature has a variance of about 1 at the start.
        init.normal_(self.key_weight, std=self.key_weight.shape[1] ** -0.5)
        init.constant_(self.key_bias, BIAS)
        init.ones_(self.scale)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """f(h) [..., r] of hidden states [..., D], and scale [1]; at least in float32."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            features = F.linear(hidden.to(wide), self.key_weight.to(wide), self.key_bias.to(wide))
            features = F.normalize(features, dim=-1)
            # A copy, because ZeRO-3 takes the parameter itself away after this call.
            return features, self.scale.to(wide, copy=True)


def init_state(config: "InfiniConfig", batch: int, **factory: Any) -> MemoryState:
    """The empty memory: M [batch, V, r], all zero."""
    assert config.output_memory_dim is not None
    return {NAME: torch.zeros(batch, config.vocab_size, config.output_memory_dim, **factory)}


@dataclass(frozen=True)
class OutputWindow:
    """What the output memory needs to know of a call.

    Attributes:
        size: c, tokens of a chunk.
        tokens_BT: int64 [B, T], the tokens of the call.
        memory_BVr: M before the call.
        access: which tokens read M and are written to it, by chunk; None: all.
        placement: where the tokens lie relative to chunks, in a call with cached tokens or padding.
        cached: in generation, what is cached of the current chunk: hidden states and tokens.
        context: the ranks that share the window, of which this one has consecutive chunks.
        reads_memory: whether tokens read M. Otherwise it is only written, which is for training.
    """

    size: int
    tokens_BT: Tensor
    memory_BVr: Tensor
    access: Access | None = None
    placement: Placement | None = None
    cached: "InfiniCacheLayer | None" = None
    context: "ContextGroup | None" = None
    reads_memory: bool = True

    @classmethod
    def of_call(
        cls,
        config: "InfiniConfig",
        tokens_BT: Tensor,
        state: MemoryState,
        starts: Tensor | None,
        **options: Any,
    ) -> "OutputWindow":
        """starts: bool [B, T], as for the decoder; options: the other attributes."""
        size, access = config.output_chunk, None
        if starts is not None and bool(starts.any()):
            padding = -starts.shape[1] % size
            documents = F.pad(starts.long(), (0, padding)).cumsum(1).unflatten(1, (-1, size))
            access = Access.of_documents(documents.to(tokens_BT.device, non_blocking=True))
        return cls(size, tokens_BT, state[NAME], access, **options)

    def of_rows(self, rows: slice) -> "OutputWindow":
        """The same for some rows."""
        access = self.access
        if access is not None:
            access = Access(*(x[rows] for x in (access.read_bns, access.write_bns, access.keep_bn)))
        return replace(self, tokens_BT=self.tokens_BT[rows], memory_BVr=self.memory_BVr[rows], access=access)


def add_read(logits_BcV: Tensor, queries_Bcr: Tensor, memory_BVr: Tensor, window: OutputWindow, chunk: int) -> Tensor:
    """Add to logits, in place, what the tokens of a chunk read; queries: scale * f(h)."""
    found = queries_Bcr.to(logits_BcV.dtype) @ memory_BVr.to(logits_BcV.dtype).mT
    if window.access is not None:  # `where`, because another document's memory must not come through even as NaN
        found = torch.where(window.access.read_bns[:, chunk, :, None], found, 0)
    return logits_BcV.add_(found)


def written(memory_BVr: Tensor, error_BcV: Tensor, features_Bcr: Tensor, window: OutputWindow, chunk: int) -> Tensor:
    """M after a chunk.

    Args:
        memory_BVr: M before the chunk.
        error_BcV, features_Bcr: their product, token by token, is (softmax(logits) - onehot(next token)) f(h)^T; a
            factor may be in either. The last token is ignored, because its next token belongs to the next chunk.
        window: tells which tokens are written.
        chunk: the chunk's number in the window.
    """
    features = features_Bcr[:, :-1]
    if window.access is not None:
        features = features * window.access.write_bns[:, chunk, :-1, None]
    step = (error_BcV[:, :-1].mT @ features.to(error_BcV.dtype)).to(memory_BVr.dtype).mul_(-RATE)
    step.mul_(CLIP / step.norm(dim=-1, keepdim=True).clamp_min_(CLIP))
    if window.access is not None:
        memory_BVr = torch.where(window.access.keep_bn[:, chunk, None, None], memory_BVr, 0)
    return step.add_(memory_BVr, alpha=DECAY)


class RememberedLosses(torch.autograd.Function):
    """Losses of a window whose tokens read the output memory; like SummedLosses, with gradients made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        weight_VD: Tensor,
        queries_BTr: Tensor,
        features_BTr: Tensor,
        labels_BT: Tensor,
        window: OutputWindow,
        differentiate: bool,
        counted_chunks: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide, dtype = torch.promote_types(x_BTD.dtype, torch.float32), product_dtype(x_BTD)
        needed = any(ctx.needs_input_grad)
        differentiate &= needed
        losses_BT = torch.empty_like(labels_BT, dtype=wide)
        grad_x, grad_queries = (torch.empty_like(x if needed else x[:0]) for x in (x_BTD, queries_BTr))
        grad_weight = torch.empty_like(weight_VD if needed else weight_VD[:0], dtype=wide)
        if differentiate:
            grad_weight.zero_()
        weight, size = weight_VD.to(dtype), window.size
        labelled_BT = labels_BT != IGNORED
        # The next token is written also where the loss ignores it.
        next_BT = torch.where(labelled_BT, labels_BT, window.tokens_BT.roll(-1, 1))
        before = window.memory_BVr if window.context is None else window.context.from_rank_before(window.memory_BVr)
        after = torch.empty_like(before)
        rows_at_once = max(1, LOSS_CHUNK // size)
        # Autocast would cast the weight again for every chunk, and does not apply to in-place products.
        with torch.autocast(x_BTD.device.type, enabled=False):
            for first in range(0, len(x_BTD), rows_at_once):
                rows = slice(first, first + rows_at_once)
                of_rows, memory = window.of_rows(rows), before[rows]
                for chunk in range(x_BTD.shape[1] // size)[:counted_chunks]:
                    at = rows, slice(chunk * size, (chunk + 1) * size)
                    x, features = x_BTD[at].to(dtype), features_BTr[at]
                    logits = add_read(x @ weight.T, queries_BTr[at], memory, of_rows, chunk)
                    of_label, errors, total = label_log_probs(logits.flatten(0, 1), next_BT[at].reshape(-1, 1), wide)
                    errors, total = errors.unflatten(0, x.shape[:2]), total.unflatten(0, x.shape[:2])
                    labelled = labelled_BT[at][..., None]
                    losses_BT[at] = torch.where(labelled[..., 0], -of_label.view(x.shape[:2]), 0)
                    if differentiate:
                        share = (labelled / total).to(dtype)
                        grad_x[at] = (errors @ weight).mul_(share)
                        grad_read = (errors @ memory.to(dtype)).mul_(share)
                        if of_rows.access is not None:
                            grad_read = torch.where(of_rows.access.read_bns[:, chunk, :, None], grad_read, 0)
                        grad_queries[at] = grad_read
                        add_weight_gradient(grad_weight, errors.flatten(0, 1), (x * share).flatten(0, 1))
                    # The errors are softmax - onehot, times the total.
                    memory = written(memory, errors, features / total, of_rows, chunk)
                after[rows] = memory
        if window.context is not None:
            window.context.to_rank_after(after)
            (state,) = window.context.after_window([{NAME: window.memory_BVr}], [{NAME: after}])
            after = state[NAME]
        ctx.save_for_backward(grad_x, grad_weight, grad_queries)
        ctx.mark_non_differentiable(losses_BT, after)
        ctx.dtype = weight_VD.dtype
        return losses_BT.sum(), losses_BT, after

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_queries = ctx.saved_tensors
        return (
            grad_total.to(grad_x.dtype) * grad_x,
            (grad_total * grad_weight).to(ctx.dtype),
            grad_total * grad_queries,
            *(None,) * 5,
        )


def remembered_logits(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    features_BTr: Tensor,
    scale: Tensor,
    window: OutputWindow,
    kept: slice | Tensor,
) -> tuple[Tensor, Tensor]:
    """Logits of the kept columns [B, kept, V], and M after the last complete chunk.

    In generation, what the incomplete chunk will write stays in the cache: hidden states, features and tokens.
    """
    (batch, length, hidden_size), memory = hidden_BTD.shape, window.memory_BVr
    if memory.is_inference() and not torch.is_inference_mode_enabled():  # autograd cannot save it
        memory = memory.clone()
    place = window.placement or Placement(torch.zeros(batch, dtype=torch.long), None, length, window.size)
    place, cached = place.to(hidden_BTD.device), window.cached
    columns = torch.arange(length, device=hidden_BTD.device)[kept]
    packed, tokens = torch.cat((hidden_BTD.to(features_BTr.dtype), features_BTr), dim=-1), window.tokens_BT[..., None]
    cached_parts = (None, None) if cached is None or cached.memory is None else (cached.keys, cached.values)
    packed, tokens = (place.join(*parts) for parts in zip(cached_parts, (packed, tokens), strict=True))
    if place.within and not place.writes:  # nothing is written, and cached tokens need no logits
        if window.access is not None:
            window = replace(window, access=replace(window.access, read_bns=window.access.read_bns[..., columns]))
        logits = F.linear(hidden_BTD[:, columns], weight_VD)
        logits = add_read(logits, features_BTr[:, columns] * scale, memory, window, 0)
    else:
        pieces, order = [], []
        at_BK = place.position_BT.expand(batch, -1)[:, columns]
        missing = place.segments * window.size - place.frame
        parts = (F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, window.size)) for x in (packed, tokens))
        for chunk, (x, following) in enumerate(zip(*(part.unbind(1) for part in parts), strict=True)):
            wanted_BK, writing_B = at_BK // window.size == chunk, (place.whole_B > chunk).to(x.device)
            hidden, features = x.split((hidden_size, x.shape[-1] - hidden_size), dim=-1)
            logits = F.linear(hidden.to(hidden_BTD.dtype), weight_VD)
            logits = add_read(logits, features * scale, memory, window, chunk)
            row, column = wanted_BK.nonzero(as_tuple=True)
            pieces.append(logits[row, at_BK[row, column] % window.size])
            order.append(row * len(columns) + column)
            if chunk < int(place.whole_B.max()):
                with torch.no_grad():
                    errors = logits.softmax(-1, dtype=packed.dtype)
                    errors.scatter_add_(-1, following.roll(-1, 1), -torch.ones_like(errors[..., :1]))
                    new = written(memory, errors, features, window, chunk)
                    memory = torch.where(writing_B[:, None, None], new, memory)
        logits = torch.cat(pieces)[torch.cat(order).argsort()].view(batch, len(columns), len(weight_VD))
    if cached is not None:
        cached.store(place.rest(packed), place.rest(tokens), None, {NAME: memory})
    return logits, memory
