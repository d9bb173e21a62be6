"""What simple methods find in the same far past without any training: a scale for what a memory is worth.

Each changes the model's distribution of the next token with what the document has shown before the previous segment,
which local attention may still see:

- cache: the continuous cache of arXiv 1612.04426. Every earlier token votes for the token that followed it, weighted
  by softmax(CACHE_THETA x cosine similarity of the hidden states). It keeps everything, so it is an upper anchor.
- head: the output weights of the document take one gradient step a segment, on the sum of its losses and with hidden
  states of length 1 in the update. Of constant size: vocabulary x hidden size.
- unigram: counts of the tokens so far, a lower anchor.

Cache and unigram are mixed with the model's distribution at a constant weight.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from infini_train.data.batches import IGNORED
from infini_train.metrics.buckets import bucket_name, bucket_of
from infini_train.metrics.ratios import ratio
from infini_train.model import InfiniForCausalLM

ANCHORS = ("cache", "head", "unigram")
# The best of a few values for a Transformer-XL of 2.6 M parameters on five books.
CACHE_WEIGHT, CACHE_THETA, HEAD_RATE, UNIGRAM_WEIGHT = 0.15, 16.0, 0.03, 0.02
DELAY = 2  # segments: a token uses what lies before the previous segment


@dataclass
class _Row:
    """What one document has shown: hidden states [n, D] and the tokens after them [n] of each far segment, the change
    of the output weights [V, D], and the segments that are not far yet."""

    states: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    change: Tensor | None = None
    pending: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


class Anchors:
    """Sums of losses with each anchor, float64 [buckets, D] as in SegmentLosses.

    RAM grows with the length of the documents, because the cache keeps their hidden states.

    Args:
        model: the model whose distribution is changed.
        buckets, documents: the shape of the sums.
    """

    def __init__(self, model: InfiniForCausalLM, buckets: int, documents: int):
        self.weight = model.lm_head.weight.detach()
        self.rows: list[_Row] = []
        self.sums = {name: np.zeros((buckets, documents)) for name in ANCHORS}

    def read(
        self, hidden_BTD: Tensor, logits_BTV: Tensor, labels_BT: Tensor, segment: int, bucket: int, docs_B: NDArray
    ) -> None:
        """Add the losses of one segment of each row, then learn from it.

        Args:
            hidden_BTD: last hidden states.
            logits_BTV: the model's logits.
            labels_BT: next tokens, IGNORED where there is none.
            segment: number of the segment in its documents; at 0 all rows begin anew.
            bucket: its bucket.
            docs_B: numbers of the documents in the sums.
        """
        if segment == 0:
            self.rows = [_Row() for _ in hidden_BTD]
        batch = zip(self.rows, hidden_BTD, logits_BTV, labels_BT, docs_B, strict=False)
        for row, hidden_TD, logits_TV, labels_T, doc in batch:
            there = labels_T != IGNORED
            h, logits, y = hidden_TD[there], logits_TV[there], labels_T[there]
            if len(row.pending) == DELAY:
                self._learn(row, *row.pending.pop(0))
            for name, loss in self._losses(row, h, logits, y).items():
                self.sums[name][bucket, doc] += loss
            row.pending.append((h, logits, y))

    def _losses(self, row: _Row, h: Tensor, logits: Tensor, y: Tensor) -> dict[str, float]:
        """Sums of the losses of tokens y [T], given hidden states h [T, D] and logits [T, V], with each anchor."""
        own = F.cross_entropy(logits, y, reduction="none").double()
        if row.change is None:  # nothing is known yet
            return dict.fromkeys(ANCHORS, own.sum().item())
        seen = torch.cat(row.tokens)
        similarity = F.normalize(h, dim=-1) @ torch.cat(row.states).T
        votes = (CACHE_THETA * similarity).softmax(-1)
        cache = torch.where(seen == y[:, None], votes, 0).sum(-1).double()
        unigram = torch.bincount(seen, minlength=len(self.weight))[y].double() / len(seen)
        p = own.neg().exp()
        adapted = F.cross_entropy(logits + h @ row.change.T, y, reduction="none").double()
        mixed = {
            "cache": -((1 - CACHE_WEIGHT) * p + CACHE_WEIGHT * cache).log(),
            "head": adapted,
            "unigram": -((1 - UNIGRAM_WEIGHT) * p + UNIGRAM_WEIGHT * unigram).log(),
        }
        return {name: losses.sum().item() for name, losses in mixed.items()}

    def _learn(self, row: _Row, h: Tensor, logits: Tensor, y: Tensor) -> None:
        """Take up a segment that has become far."""
        change = torch.zeros_like(self.weight) if row.change is None else row.change
        error = (logits + h @ change.T).softmax(-1)
        error[torch.arange(len(y)), y] -= 1
        unit = F.normalize(h, dim=-1)
        row.change = change - HEAD_RATE * error.T @ unit
        row.states.append(unit)
        row.tokens.append(y)

    def table(self, on: NDArray[np.float64], tokens: NDArray[np.float64]) -> list[dict[str, Any]]:
        """Return what each anchor gains, in nats per token, with standard errors over documents, by bucket; the last
        row is over segments 2 and later. on, tokens: as in SegmentLosses."""
        used = [bucket for bucket in np.flatnonzero(tokens.sum(1)).tolist() if bucket >= bucket_of(DELAY)]
        table = []
        groups = [(bucket_name(bucket), [bucket]) for bucket in used]
        for name, buckets in groups + ([("2 on", used)] if used else []):
            count_D = tokens[buckets].sum(0)
            row: dict[str, Any] = {"segment": name, "tokens": int(count_D.sum())}
            for anchor, sums in self.sums.items():
                row[anchor], row[f"{anchor}_se"] = ratio((on - sums)[buckets].sum(0), count_D)
            table.append(row)
        return table
