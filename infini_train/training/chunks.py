"""The losses of a window, in one piece or in chunks of segments whose activations are recomputed in backward.

Only states cross the border of a segment: of each layer its memory and what else it carries (the last inputs of a
convolution and, with a sliding window, the last keys and values), and that of the output memory. The network is
therefore a function of a chunk's tokens and the states before it, which returns the chunk's losses and the states
after it. Running it chunk after chunk, each inside torch's non-reentrant checkpoint, gives the exact
gradients through the whole window, while the activations of a single chunk exist at a time.
"""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infini_train.model import InfiniForCausalLM
from infini_train.model.context import ContextGroup
from infini_train.model.memory_rule import MemoryState, density


class WindowLosses(NamedTuple):
    """What the model makes of a window of B rows of T tokens.

    Attributes:
        total: sum of all tokens' cross-entropies in nats, a float32 scalar.
        losses: each of them without a gradient, float32 [B, T], 0 where there is no label.
        memory: the states after the window, as `InfiniForCausalLM.forward` takes them.
        density: density of the writes (`memory_rule.density`), a scalar; None outside of training, and with rules
            that do not choose what they write.
    """

    total: Tensor
    losses: Tensor
    memory: list[MemoryState]
    density: Tensor | None


def window_losses(
    model: InfiniForCausalLM,
    input_ids: Tensor,
    labels: Tensor,
    *,
    starts: Tensor | None = None,
    memory: list[MemoryState] | None = None,
    segments_per_chunk: int | None = None,
    context: ContextGroup | None = None,
    own_segment: bool = False,
) -> WindowLosses:
    """Run the model over a window.

    Args:
        model: the model.
        input_ids: int64 [B, T], whole segments.
        labels: int64 [B, T], the next tokens; -100 where there is none.
        starts: bool [B, T], first tokens of documents; None: none.
        memory: the states before the window, as `InfiniForCausalLM.forward` takes them; None: all empty.
        segments_per_chunk: segments that the network runs over at a time. Their activations are recomputed in
            backward. The last chunk may have fewer segments. None: all segments at once, and nothing is recomputed.
        context: the ranks that share the window, which then cannot be cut into chunks.
        own_segment: all that is read of earlier segments are the layers' memories: local attention sees its own
            segment alone, whatever the model's `sliding_window`, and an output memory is only written.
    """
    length = input_ids.shape[1]
    size = length if segments_per_chunk is None else segments_per_chunk * model.config.segment_length
    assert context is None or size >= length, "every rank needs the memories after all chunks of the ranks before"
    totals, losses, strengths = [], [], []
    for first in range(0, length, size):
        # A weight that autocast has cast for one chunk would be the same tensor in the next, and the gradients of all
        # chunks would be added up in half precision.
        torch.clear_autocast_cache()
        run = model.token_losses
        if first + size < length:  # the last chunk's activations are needed at once
            run = partial(
                checkpoint,
                run,
                use_reentrant=False,
                context_fn=lambda: (model.lm_head.losses_only(), nullcontext()),
                preserve_rng_state=False,  # no random numbers are drawn
                early_stop=False,  # the last module would be left without its hooks, which ZeRO-3 needs
            )
        part = slice(first, first + size)
        chunk_starts = None if starts is None else starts[:, part]
        out = run(input_ids[:, part], labels[:, part], chunk_starts, memory, context, own_segment)
        memory = out.memory
        totals.append(out.total)
        losses.append(out.losses)
        if out.strengths is not None:
            strengths.append(out.strengths * (out.losses.shape[1] / length))  # its share of the window's mean
    assert memory is not None
    return WindowLosses(
        torch.stack(totals).sum(),
        torch.cat(losses, dim=1),
        memory,
        density(torch.stack(strengths).sum(0)) if strengths else None,
    )
