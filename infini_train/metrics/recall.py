"""Measures what a memory recalls: accuracy on answers that only the memory can know, in synthetic documents.

The model reads several documents side by side, window after window, without gradients, and carries the memories from
one window to the next. What this takes in RAM grows with the documents' length by a few bytes a token, which are the
documents themselves.
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

from infini_train.model import InfiniForCausalLM
from infini_train.model.memory_rule import MemoryState
from infini_train.synthetic import EVALUATION, PasskeyTask, RecallTask, SyntheticDocument, Vocabulary, documents

from .buckets import BUCKETS, bucket_name, bucket_of
from .ratios import ratio

MODES = ("on", "off", "other")  # whose memory is read, see `correct_predictions`
# Kinds of answers, and how reports call them.
KINDS = {"memory_only": "only the memory knows", "latest": "of these, the latest of several values"}
TOKENS = 2**15  # tokens in a forward pass, roughly, if segments need not be read one by one


@torch.no_grad()  # not inference mode: weights that ZeRO-3 gathers in it could not be trained afterwards
def correct_predictions(
    model: InfiniForCausalLM,
    read: list[SyntheticDocument],
    wanted_BT: NDArray[np.bool_],
    modes: tuple[str, ...] = ("on",),
    window: int | None = None,
    quiet: bool = False,
) -> dict[str, NDArray[np.bool_]]:
    """Greedy next-token correctness at the masked positions: whether the model's most likely token is the true one.

    Args:
        model: the model, on any device.
        read: B documents of equal length T, which are read side by side.
        wanted_BT: bool [B, T], the tokens to predict; all others are false in the result.
        modes: "on": each document reads its own memory; "off": no layer reads its memory; "other": each segment reads
            the memory of the next document (and the last document that of the first).
        window: tokens read at a time, a multiple of the segment length; None: one segment, which "other" needs.
        quiet: show no progress bar.

    Returns:
        for each mode, bool [B, T], true where the prediction is correct.
    """
    window = window or model.config.segment_length
    ids_BT = torch.from_numpy(np.stack([d.tokens_T for d in read]).astype(np.int64))
    asked_BT = torch.from_numpy(wanted_BT)
    result = {mode: np.zeros_like(wanted_BT) for mode in modes}
    memory: list[MemoryState] = model.init_memory(len(read))
    windows, console = range(0, ids_BT.shape[1] - 1, window), Console(stderr=True)
    for at in track(windows, "reading", console=console, transient=True, disable=quiet):
        # The inputs x predict the tokens y that follow each of them; the last window's last input has none.
        x, following = ids_BT[:, at : at + window].to(model.device), slice(at + 1, at + window + 1)
        asked, y = asked_BT[:, following], ids_BT[:, following]
        columns = asked.any(0).nonzero()[:, 0]  # logits of all positions would take much memory
        answers = columns.to(model.device)
        own = model(x, memory=memory, logits_to_keep=answers)
        for mode in modes if len(columns) else ():
            out = own
            if mode == "off":
                with model.memory_off():
                    out = model(x, memory=memory, logits_to_keep=answers)
            elif mode == "other":
                out = model(x, memory=model.with_memory_of_next_row(memory), logits_to_keep=answers)
            right = (out.logits.argmax(-1).cpu() == y[:, columns]) & asked[:, columns]
            result[mode][:, following][:, columns.numpy()] = right.numpy()
        memory = own.memory
    return result


@dataclass
class Counts:
    """Numbers of answers, by kind (KINDS), bucket of the segment in which they are asked for, and document.

    Attributes:
        answers: int64 [kinds, BUCKETS, documents], all answers.
        correct: int64 [kinds, modes, BUCKETS, documents], correct answers in each mode (MODES).
    """

    answers: NDArray[np.int64]
    correct: NDArray[np.int64]

    def rows(self, kind: int) -> list[dict[str, Any]]:
        """Return accuracies with standard errors (MODE_se): a row for each bucket with answers, and one for all."""
        buckets = np.flatnonzero(self.answers[kind].sum(1)).tolist()
        named = [(bucket_name(b), [b]) for b in buckets] + [("all", buckets)]
        return [self._row(kind, name, those) for name, those in named if those]

    def _row(self, kind: int, name: str, buckets: list[int]) -> dict[str, Any]:
        answers_D = self.answers[kind, buckets].sum(0)
        row: dict[str, Any] = {"segment": name, "answers": int(answers_D.sum())}
        for mode, correct_BD in zip(MODES, self.correct[kind], strict=True):
            row[mode], row[f"{mode}_se"] = ratio(correct_BD[buckets].sum(0), answers_D)
        return row


def recall_counts(
    model: InfiniForCausalLM, task: RecallTask, vocabulary: Vocabulary, *, count: int, rows: int, seed: int
) -> Counts:
    """Count the correct answers in new documents of a task.

    Args:
        model: the model, on any device.
        task: describes the documents.
        vocabulary: the task's vocabulary.
        count: number of documents, a multiple of `rows`.
        rows: documents read side by side.
        seed: seed of the documents.
    """
    size = model.config.segment_length
    answers, correct = (np.zeros((len(KINDS), *modes, BUCKETS, count), np.int64) for modes in ((), (len(MODES),)))
    bucket_T = np.array([bucket_of(max(t - 1, 0) // size) for t in range(task.tokens)])
    for first, read in _batches(task, vocabulary, count, rows, seed):
        wanted_BT = np.stack([d.memory_only(size, model.config.sliding_window) for d in read])
        found = correct_predictions(model, read, wanted_BT, MODES)
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
    """Return the share of passkeys that are recalled with every digit correct, by length of the document and depth.

    Each digit is predicted given the true digits before it. All of them are then correct exactly if greedy generation
    spells the key, so one forward pass is enough.

    Args:
        model: the model, on any device.
        task: describes the documents, except for their length and the passkey's depth.
        vocabulary: the task's vocabulary.
        lengths: tokens of the documents.
        depths: positions of the passkey in the document, as shares of its length.
        samples: documents for each length and depth.
        rows: documents read side by side.
        seed: seed of the documents.
        generate: generate the key token by token instead.

    Returns:
        a dictionary for each length and depth, in order: `tokens`, `depth`, `right` (the share), and `local`, whether
        local attention sees some digit from the question, and can know it too.
    """
    size = model.config.segment_length
    cells: list[dict[str, Any]] = []
    for length in lengths:
        for depth in depths:
            whole, local = 0, False
            asked = replace(task, tokens=length, shortest=None, depth=depth)
            # Every cell has documents of its own; a few hard keys would otherwise count in all cells.
            for _, read in _batches(asked, vocabulary, samples, rows, seed, number=len(cells) * samples):
                wanted_BT = np.stack([d.previous_T >= 0 for d in read])
                remembered_BT = np.stack([d.memory_only(size, model.config.sliding_window) for d in read])
                local |= not np.array_equal(remembered_BT, wanted_BT)
                if generate:
                    recalled = spelled(model, read, task.digits)
                else:
                    window = size * max(1, TOKENS // (size * len(read)))
                    recalled = (correct_predictions(model, read, wanted_BT, window=window)["on"] == wanted_BT).all(1)
                whole += int(recalled.sum())
            cells.append({"tokens": length, "depth": depth, "right": whole / samples, "local": local})
    return cells


def spelled(model: Any, read: list[SyntheticDocument], digits: int) -> NDArray[np.bool_]:
    """Return for which documents greedy generation continues the last question with the document's key, bool [B].

    Args:
        model: an InfiniForCausalLM; annotated as Any because transformers types `generate` too narrowly.
        read: B documents of equal length, which end with the question and the key.
        digits: number of digits in a key.
    """
    ids_BT = torch.from_numpy(np.stack([d.tokens_T for d in read]).astype(np.int64)).to(model.device)
    prompt, key = ids_BT[:, : -digits - 1], ids_BT[:, -digits - 1 : -1]
    padding = 0  # <unk>, which is in no key, fills up a row that ends early
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=digits, do_sample=False, pad_token_id=padding
    )
    new = F.pad(out[:, prompt.shape[1] :], (0, digits))[:, :digits]
    return (new == key).all(1).cpu().numpy()


def _batches(
    task: RecallTask | PasskeyTask, vocabulary: Vocabulary, count: int, rows: int, seed: int, number: int = 0
) -> Iterator[tuple[int, list[SyntheticDocument]]]:
    drawn = documents(task, vocabulary, count, seed=seed, stream=EVALUATION, first=number)
    for first in range(0, count, rows):
        yield first, [next(drawn) for _ in range(min(rows, count - first))]
