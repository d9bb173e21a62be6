"""What a memory recalls: accuracy on answers that nothing but the memory can know, of documents drawn from a seed.

A model reads documents side by side, window after window, with the memories carried along and no gradient: memory use
grows with their length by a few bytes a token, those of the documents themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from infini_train.model import InfiniForCausalLM
from infini_train.model.head import CHUNK
from infini_train.model.memory_rule import MemoryState
from infini_train.synthetic import EVALUATION, PasskeyTask, RecallTask, SyntheticDocument, Vocabulary, documents

from .buckets import BUCKETS, bucket_name, bucket_of
from .ratios import ratio

MODES = ("on", "off", "other")
KINDS = {"memory_only": "only the memory knows", "latest": "of these, the latest of several values"}
TOKENS = 2**15  # that one forward pass reads, about, where segments need not be read one by one


@torch.no_grad()  # not inference mode: what ZeRO-3 gathers in it could not be trained afterwards
def right(
    model: InfiniForCausalLM,
    read: list[SyntheticDocument],
    wanted_BT: NDArray[np.bool_],
    modes: tuple[str, ...] = ("on",),
    window: int | None = None,
    quiet: bool = False,
) -> dict[str, NDArray[np.bool_]]:
    """Whether the model's first choice, given all tokens before, is the token that stands there; where wanted.

    Args:
        read: documents of equal length, side by side.
        wanted_BT: tokens to choose; others are false in the result.
        modes: "on": each document with its own memory; "off": no layer reads its memory; "other": each segment with
            the memory that the next document left (the last with that of the first).
        window: tokens read at once, a multiple of the segment length; None: a segment, as "other" needs it.
        quiet: show no progress.

    Returns:
        for each mode, bool [B, T].
    """
    window = window or model.config.segment_length
    ids_BT = torch.from_numpy(np.stack([d.tokens_T for d in read]).astype(np.int64))
    asked_BT = torch.from_numpy(wanted_BT)
    result = {mode: np.zeros_like(wanted_BT) for mode in modes}
    memory: list[MemoryState] = model.init_memory(len(read))
    windows, console = range(0, ids_BT.shape[1] - 1, window), Console(stderr=True)
    for at in track(windows, "reading", console=console, transient=True, disable=quiet):
        x, coming = ids_BT[:, at : at + window].to(model.device), slice(at + 1, at + window + 1)
        asked, y = asked_BT[:, coming], ids_BT[:, coming]
        out = model.model(x, memory=memory)
        for mode in modes if asked.any() else ():
            hidden = out.last_hidden_state
            if mode == "off":
                with model.memory_off():
                    hidden = model.model(x, memory=memory).last_hidden_state
            elif mode == "other":
                exchanged = [{name: state.roll(-1, 0) for name, state in layer.items()} for layer in memory]
                hidden = model.model(x, memory=exchanged).last_hidden_state
            choice = _choice(model, hidden[:, : asked.shape[1]][asked])  # the last input has no token after it
            result[mode][:, coming][asked.numpy()] = choice == y[asked].numpy()
        memory = out.memory
    return result


def _choice(model: InfiniForCausalLM, hidden_ND: Tensor) -> NDArray[np.int64]:
    return torch.cat([model.lm_head(h).argmax(-1) for h in hidden_ND.split(CHUNK)]).cpu().numpy()


@dataclass
class Counts:
    """Answers and right answers by kind (KINDS), mode (MODES), bucket of the segment asked in, and document.

    answers: int64 [kinds, BUCKETS, documents]; right: int64 [kinds, modes, BUCKETS, documents].
    """

    answers: NDArray[np.int64]
    right: NDArray[np.int64]

    def rows(self, kind: int) -> list[dict[str, Any]]:
        """Accuracies with their standard errors, a row for each bucket with answers, and one for all."""
        buckets = np.flatnonzero(self.answers[kind].sum(1)).tolist()
        named = [(bucket_name(b), [b]) for b in buckets] + [("all", buckets)]
        return [self._row(kind, name, those) for name, those in named if those]

    def _row(self, kind: int, name: str, buckets: list[int]) -> dict[str, Any]:
        answers_D = self.answers[kind, buckets].sum(0)
        row: dict[str, Any] = {"segment": name, "answers": int(answers_D.sum())}
        for mode, right_BD in zip(MODES, self.right[kind], strict=True):
            row[mode], row[f"{mode}_se"] = ratio(right_BD[buckets].sum(0), answers_D)
        return row


def recall_counts(
    model: InfiniForCausalLM, task: RecallTask, vocabulary: Vocabulary, *, count: int, rows: int, seed: int
) -> Counts:
    """Count right answers of `count` documents of the task, `rows` (which divide them) side by side."""
    size = model.config.segment_length
    answers, correct = (np.zeros((len(KINDS), *modes, BUCKETS, count), np.int64) for modes in ((), (len(MODES),)))
    bucket_T = np.array([bucket_of(max(t - 1, 0) // size) for t in range(task.tokens)])
    for first, read in _batches(task, vocabulary, count, rows, seed):
        wanted_BT = np.stack([d.memory_only(size) for d in read])
        found = right(model, read, wanted_BT, MODES)
        for row, document in enumerate(read):
            for kind, wanted_T in enumerate((wanted_BT[row], wanted_BT[row] & document.changed_T)):
                answers[kind, :, first + row] = np.bincount(bucket_T[wanted_T], minlength=BUCKETS)
                for mode, name in enumerate(MODES):
                    hits = bucket_T[wanted_T & found[name][row]]
                    correct[kind, mode, :, first + row] = np.bincount(hits, minlength=BUCKETS)
    return Counts(answers, correct)


def passkey_cells(
    model: InfiniForCausalLM,
    task: PasskeyTask,
    vocabulary: Vocabulary,
    *,
    lengths: list[int],
    depths: list[float],
    samples: int,
    rows: int,
    seed: int,
    generate: bool = False,
) -> list[dict[str, Any]]:
    """Share of passkeys with every digit right, by length (tokens of the document) and depth; in order.

    A digit is chosen given the true ones before it, so a key counts exactly when `generate` would spell it, as it
    does if asked to. "local": some digit stands in the segment of its question too, so that not only the memory can
    know.
    """
    size = model.config.segment_length
    cells: list[dict[str, Any]] = []
    for length in lengths:
        for depth in depths:
            whole, local = 0, False
            asked = replace(task, tokens=length, shortest=None, depth=depth)
            # Other keys in each cell: a few that are hard would else count in all.
            for _, read in _batches(asked, vocabulary, samples, rows, seed, number=len(cells) * samples):
                wanted_BT = np.stack([d.previous_T >= 0 for d in read])
                local |= not all(np.array_equal(d.memory_only(size), d.previous_T >= 0) for d in read)
                if generate:
                    whole += int(spelled(model, read, task.digits).sum())
                    continue
                window = size * max(1, TOKENS // (size * len(read)))
                whole += int((right(model, read, wanted_BT, window=window)["on"] == wanted_BT).all(1).sum())
            cells.append({"tokens": length, "depth": depth, "right": whole / samples, "local": local})
    return cells


def spelled(model: Any, read: list[SyntheticDocument], digits: int) -> NDArray[np.bool_]:
    """Whether greedy `generate`, given all up to the last question, goes on with that document's key; bool [B].

    model: InfiniForCausalLM, whose `generate` is typed too narrowly.
    """
    ids_BT = torch.from_numpy(np.stack([d.tokens_T for d in read]).astype(np.int64)).to(model.device)
    prompt, key = ids_BT[:, : -digits - 1], ids_BT[:, -digits - 1 : -1]
    nothing = 0  # <unk>, which no key holds, fills up a row that ended early
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=digits, do_sample=False, pad_token_id=nothing
    )
    new = F.pad(out[:, prompt.shape[1] :], (0, digits))[:, :digits]
    return (new == key).all(1).cpu().numpy()


def _batches(
    task: RecallTask | PasskeyTask, vocabulary: Vocabulary, count: int, rows: int, seed: int, number: int = 0
) -> Iterator[tuple[int, list[SyntheticDocument]]]:
    drawn = documents(task, vocabulary, count, seed=seed, stream=EVALUATION, first=number)
    for first in range(0, count, rows):
        yield first, [next(drawn) for _ in range(min(rows, count - first))]
