"""The compressive memory of Infini-attention (arXiv 2404.07143, section 2.1.2), all segments of a window at once.

The memory before segment s depends on the layer's inputs only through sums over segments, so nothing here loops
over segments through the network; only the delta rule takes n small steps on d x d matrices. Everything runs in
float32 (float64 for a float64 model) whatever the model's dtype: in bfloat16 z stops counting after some hundred
segments.

A rule is a `MemoryRule`, with a state of named float32 tensors, batch first. Layers, lanes, cache, checkpoints and
export treat that state as opaque. The rules of the paper are here; rules.py names them all.

Shape suffixes: b batch, n segments, s positions in a segment, k key/value heads, g query heads per key/value head,
d key dim, e value dim; in rows that are not cut yet B rows, T new tokens, L tokens, D the model's width, C channels.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .writes import affine_steps

if TYPE_CHECKING:
    from .configuration import InfiniConfig
    from .window import Window

MemoryState = dict[str, Tensor]


def scan(initial: Tensor, added_bn: Tensor, keep_bn: Tensor | None) -> Tensor:
    """Running sums over segments: out[:, s] = initial + added[:, 0] + ... + added[:, s - 1], for s = 0 ... n.

    initial: [b, ...]; added_bn: [b, n, ...]; returns [b, n + 1, ...]. Where keep_bn is false, what was summed
    before segment s is dropped as segment s is added.
    """
    if keep_bn is None:
        return torch.cat((initial[:, None], added_bn), dim=1).cumsum(dim=1)
    # A masked step, not a difference of cumulative sums: a subtraction would leave the rounding errors (or the
    # infinities) of one document in the memory of the next.
    sums = [initial]
    for s in range(added_bn.shape[1]):
        keep = keep_bn[:, s].view(-1, *[1] * (initial.dim() - 1))
        sums.append(torch.where(keep, sums[-1], 0) + added_bn[:, s])
    return torch.stack(sums, dim=1)


def stepped(initial: Tensor, kept_bn: Tensor, added_bn: Tensor, keep_bn: Tensor | None) -> Tensor:
    """As `scan`, of steps M' = kept M + added: initial [b, k, d, e], kept [b, n, k, d, d], added [b, n, k, d, e]."""
    kept, added = (x.transpose(0, 1).flatten(1, 2) for x in (kept_bn, added_bn))
    drop = None
    if keep_bn is not None:
        drop = ~keep_bn.expand(len(initial), -1).T.repeat_interleave(initial.shape[1], dim=1)
    out = affine_steps(initial.flatten(0, 1), kept, added, drop)
    return out.unflatten(1, initial.shape[:2]).transpose(0, 1)


def composed(kept_bn: Tensor, added_bn: Tensor, keep_bn: Tensor | None) -> tuple[Tensor, Tensor]:
    """Steps M' = kept M + added of all segments [b, n, k, d, d] as one; where keep_bn is false, M counts as 0 (its
    share of the first result then means nothing)."""
    (kept, *steps), (added, *adds) = kept_bn.unbind(1), added_bn.unbind(1)
    for s, (keep, add) in enumerate(zip(steps, adds, strict=True), start=1):
        old = added if keep_bn is None else torch.where(keep_bn[:, s, None, None, None], added, 0)
        kept, added = keep @ kept, keep @ old + add
    return kept, added


class MemoryRule(nn.Module):
    """What attention knows of a memory rule, one a layer; its parameters are the layer's `rule.*`.

    The defaults are those of a rule with nothing to learn whose state is M alone, which attends by q, k and v.
    """

    as_on_gpu = False  # true: on a CPU, too, it computes as on a GPU, where memory is counted (training/footprint.py)

    def __init__(self, config: "InfiniConfig"):
        super().__init__()

    def init_weights(self) -> None:
        """Give the rule's own parameters their initial values."""

    def leave_local_attention(self) -> None:
        """After `init_weights`, in a pretrained decoder: let local attention see its queries and keys as they are."""

    @classmethod
    def init_state(cls, config: "InfiniConfig", batch: int, **factory) -> MemoryState:
        """The empty memory: M [batch, kv heads, d, d], all zero, and what else the rule carries."""
        heads, dim = config.num_key_value_heads, config.head_dim
        assert heads and dim  # LlamaConfig fills them in
        return {"M": torch.zeros(batch, heads, dim, dim, **factory)}

    def of_tokens(self, x_BTD: Tensor, q_BTC: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """From the layer's input and queries: what to add to the gate's beta [B, T, heads] (None: nothing), and what
        else than its key and value the rule needs of a token, each [B, T, .]: the cache keeps it beside the key."""
        return None, []

    def queries_and_keys(
        self, state: MemoryState, q_BTC: Tensor, tokens: tuple[Tensor, ...], window: "Window"
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """What local attention and the memory take for queries and keys, here the projections as they are; and what
        that leaves in the state after the window.

        Args: as of `read_and_write`; q_BTC of the tokens that ask, in the place of which the result stands.
        """
        return q_BTC, tokens[0], {}

    def read_and_write(
        self,
        state: MemoryState,
        q_bnkgsd: Tensor,
        k_bnksd: Tensor,
        v_bnkse: Tensor,
        tokens: tuple[Tensor, ...],
        window: "Window",
    ) -> tuple[Tensor, Tensor, MemoryState, Tensor | None]:
        """Read for every query of a window, then the state after it; called without autocast.

        Args:
            state: memory before the window.
            q_bnkgsd, k_bnksd: of `queries_and_keys`, v_bnkse: the projection, all without RoPE, any float dtype. Keys
                and values may be fewer than queries: none at all where nothing is to be written yet (generation
                within a segment).
            tokens: projected keys, values and `of_tokens`' list, each [B, L, .]; with `window.placement`, frames of
                cached tokens and new ones.
            window: `access`, None where the whole window continues the carried document; `read`, False where every
                token shall find its memory empty; `split`, which cuts rows; `context`, the ranks that share it.

        Returns:
            read [b, n, k, g, s, e] in the state's dtype; `known` [b or 1, n or 1, k or 1, 1, s or 1, 1] bool, whether
            that read means anything (in the paper's rules: the token's document has written to the memory); the state
            after the window, without what `queries_and_keys` has left, no view of anything larger, as lanes keep it;
            in training, if the rule chooses what to write, how densely it wrote [b, k], 0 to 1.
        """
        raise NotImplementedError
