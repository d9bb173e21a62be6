"""Padded rows, and rows into which a collator has packed several documents: how their tokens are laid out for the
decoder, so that every document is computed as if it were alone.

Three arguments of a collator tell where documents begin: `position_ids` [B, T] that restart at 0, `seq_idx` [B, T]
with the number of each token's document, and `cu_seq_lens_q` [documents + 1], the number of tokens before each
document, counted over all rows, and that of all tokens.

Shape suffixes: B rows, T columns of the call, L places of a packed row, X any width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration import InfiniConfig


class PackedRows:
    """Rows of tokens without padding, in which no document starts where it would cross the end of a segment that it
    could have started with.

    Segments are counted from the start of a document. In its packed row a document therefore begins at a segment
    boundary, or inside a segment that has room for all of it. What is left of the segment before is filled with any
    token: no document sees what comes after its end.

    Args:
        mask_BT: bool, false for padding; None without padding.
        starts_BT: bool, first tokens of documents that begin inside a row; None where a row is a single document.
        shape: B, T.
        config: gives the lengths of segments and of the chunks of an output memory.
        device: of the tensors that are laid out.

    Attributes:
        source_BL: the column of the token at each place.
        place_BT: the place of each token; 0 for padding.
        starts_BL: first tokens of documents; None as above.
        real_BL: bool, places that hold a token.
    """

    def __init__(
        self,
        mask_BT: Tensor | None,
        starts_BT: Tensor | None,
        shape: tuple[int, int],
        config: InfiniConfig,
        device: torch.device,
    ):
        batch, length = shape
        real_BT = torch.ones(shape, dtype=torch.bool, device=device) if mask_BT is None else mask_BT.to(device)
        place_BT, self.starts_BL = real_BT.cumsum(1) - 1, None
        if starts_BT is not None:
            documents_BT = starts_BT.to(device).cumsum(1)
            counts = torch.zeros(batch, int(documents_BT.max()) + 1, dtype=torch.long, device=device)
            counts.scatter_add_(1, documents_BT, real_BT.long())
            chunks = [] if config.output_memory_dim is None else [config.output_chunk]
            sizes = [*chunks, config.segment_length]
            rows = [_first_places(row, sizes) for row in counts.tolist()]
            length = max(end for _, end in rows)
            first = torch.tensor([places for places, _ in rows], device=device)
            moved = first - (counts.cumsum(1) - counts)  # how far each document moves
            place_BT = place_BT + moved.gather(1, documents_BT)
            self.starts_BL = torch.zeros(batch, length + 1, dtype=torch.bool, device=device)
            self.starts_BL = self.starts_BL.scatter_(1, first.where(counts > 0, length), True)[:, :length]
        self.place_BT = place_BT.where(real_BT, 0)
        columns = torch.arange(shape[1], device=device).expand(shape)
        source_BL = torch.zeros(batch, length + 1, dtype=torch.long, device=device)
        places_BT = place_BT.where(real_BT, length)
        self.source_BL = source_BL.scatter_(1, places_BT, columns)[:, :length]
        self.real_BL = torch.zeros_like(source_BL, dtype=torch.bool).scatter_(1, places_BT, True)[:, :length]

    def pack(self, x_BTX: Tensor) -> Tensor:
        """[B, T, X] -> [B, L, X]."""
        return x_BTX.take_along_dim(self.source_BL[..., None], dim=1)

    def unpack(self, x_BLX: Tensor) -> Tensor:
        """[B, L, X] -> [B, T, X]; undefined for padding."""
        return x_BLX.take_along_dim(self.place_BT[..., None], dim=1)


def _first_places(lengths: list[int], sizes: list[int]) -> tuple[list[int], int]:
    """The places at which documents of these lengths begin in a packed row, and the length of the row.

    sizes: of the chunks that a segment consists of, if there are any, and of segments.
    """
    places, end = [], 0
    for length in lengths:
        for size in sizes:
            room = -end % size
            if length > room:
                end += room
        places.append(end)
        end += length
    return places, max(end, 1)


def tokens_of_call(attention_mask: Tensor | None, shape: tuple[int, int], seen: int) -> Tensor | None:
    """Which columns of a call hold a token, bool [B, T], false for padding; None without padding.

    Args:
        attention_mask: [B, T], or with `seen` more columns in front; 0 for padding.
        shape: B, T.
        seen: columns that a cache has seen; 0 without a cache.

    Raises:
        ValueError: the mask has another shape. With more columns than tokens and no cache, the tokens before the call
            are missing, and it would be computed without them.
    """
    if attention_mask is None:
        return None
    rows, columns = shape
    if tuple(attention_mask.shape) not in ((rows, columns), (rows, seen + columns)):
        more = f", or {seen} more columns, those of the cache" if seen else " without a cache of earlier calls"
        found = f"found shape {tuple(attention_mask.shape)}, expected {tuple(shape)}"
        raise ValueError(f"attention_mask: {found}{more}")
    mask_BT = attention_mask[:, attention_mask.shape[1] - columns :].bool()
    if torch.compiler.is_compiling():  # a graph must not depend on values
        return mask_BT
    return None if mask_BT.is_meta or mask_BT.all() else mask_BT


def document_starts(
    shape: tuple[int, int],
    mask_BT: Tensor | None,
    before_B: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens_q: Tensor | None,
) -> Tensor | None:
    """Read what a collator says of packed documents.

    Args:
        shape: B, T.
        mask_BT: bool, false for padding, of which nothing is expected; None without padding.
        before_B: int64, tokens of each row before the call, in the cache; None: 0.
        position_ids, seq_idx, cu_seq_lens_q: see above; None where not given.

    Returns:
        bool [B, T], the first tokens of documents that begin inside a row; None if every row is a single document.

    Raises:
        ValueError: positions that neither continue nor restart at 0, shapes that do not fit, and arguments that
            contradict one another.
    """
    given = {"position_ids": position_ids, "seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q}
    device = next(x.device for x in given.values() if x is not None)
    real_BT = torch.ones(shape, dtype=torch.bool, device=device) if mask_BT is None else mask_BT.to(device)
    # The column of the last token, not padding, before each token; -1 before a row's first.
    columns = torch.arange(shape[1], device=device)
    last_BT = F.pad(torch.where(real_BT, columns, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    found = dict[str, Tensor]()
    for name, x in given.items():
        if x is None:
            continue
        if name == "cu_seq_lens_q":
            number_BT = _numbers(x, shape).to(device)
        elif x.dim() != 2 or x.shape[0] not in (1, shape[0]) or x.shape[1] != shape[1]:
            raise ValueError(f"{name}: found shape {tuple(x.shape)}, expected {shape}")
        else:
            number_BT = x.to(device).expand(shape)
        before_BT = number_BT.gather(1, last_BT.clamp_min(0))
        if name == "position_ids":
            found[name] = _restarts(number_BT, before_BT, real_BT, last_BT, before_B)
        else:
            found[name] = real_BT & (last_BT >= 0) & (number_BT != before_BT)
    (name, starts_BT), *others = found.items()
    for other, theirs_BT in others:
        if (differ_BT := starts_BT != theirs_BT).any():
            row, column = differ_BT.nonzero()[0].tolist()
            raise ValueError(f"{name} and {other}: only one of them begins a document in row {row}, column {column}")
    return starts_BT if starts_BT.any() else None


def _restarts(
    position_BT: Tensor, before_BT: Tensor, real_BT: Tensor, last_BT: Tensor, cached_B: Tensor | None
) -> Tensor:
    """Where positions restart at 0; everywhere else they have to continue those before."""
    first_B1 = 0 if cached_B is None else cached_B.to(position_BT.device)[:, None]
    next_BT = torch.where(last_BT < 0, first_B1, before_BT + 1)
    starts_BT = real_BT & (position_BT == 0) & (next_BT != 0)
    wrong_BT = real_BT & ~starts_BT & (position_BT != next_BT)
    if wrong_BT.any():
        row, column = wrong_BT.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids: found {position_BT[row, column]} in row {row}, column {column}, expected "
            f"{next_BT[row, column]}, which continues the document, or 0, which begins one"
        )
    return starts_BT


def _numbers(ends: Tensor, shape: tuple[int, int]) -> Tensor:
    """The number of each token's document, [B, T], from the cumulative lengths of documents laid end to end."""
    tokens = shape[0] * shape[1]
    values = ends.tolist() if ends.dim() == 1 else []
    if len(values) < 2 or values[0] != 0 or values[-1] != tokens or values != sorted(values):
        raise ValueError(
            f"cu_seq_lens_q: found {values or tuple(ends.shape)}, expected numbers that rise from 0 to {tokens}, "
            "the number of tokens of the batch"
        )
    if not set(range(0, tokens, shape[1])) <= set(values):
        raise ValueError(f"cu_seq_lens_q: found {values}, expected one of them at the start of every row")
    return torch.arange(len(values) - 1).repeat_interleave(torch.tensor(values).diff()).view(shape)
