"""Memory tasks as token sequences: key-value recall with overwrites and noise, and passkeys hidden in noise.

All tasks share one vocabulary, so that one model can learn them together:

| ids | names | meaning |
|---|---|---|
| 0, 1, 2 | `<unk> <s> </s>` | unknown (never drawn), BOS, EOS |
| 3 | `passkey` | announces the digits of a passkey |
| 4 ... 13 | `d0` ... `d9` | digits |
| from 14 | `k0` `k1` ... | keys |
| then | `v0` `v1` ... | values |
| then | `n0` `n1` ... | noise: 64 fixed phrases of 8 tokens, which carry no information |

When the documents are to be mixed with text, the tokens from `passkey` on take the last ids of the text tokenizer's
vocabulary instead, and BOS and EOS are the tokenizer's own.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

BOS, EOS, FIRST, DIGITS = 1, 2, 3, 10
PHRASES, PHRASE_LENGTH = 64, 8
SHORTEST_GAP = 4  # the smallest limit of the distances between a passkey's mentions in a document dense with them
DATASET, EVALUATION = 0, 1  # independent random streams of one seed: training documents and evaluation documents
SYNTHETIC = "synthetic"  # key of the task's description in the options of a dataset's index


@dataclass(frozen=True)
class Vocabulary:
    """The token ids of the tasks. Raises ValueError for fewer than one key, two values or one noise token."""

    keys: int = 64  # number of keys, values and noise tokens
    values: int = 64
    noise: int = 64
    first: int = FIRST  # id of the token `passkey`, the first of the tasks' tokens
    bos: int = BOS
    eos: int = EOS

    def __post_init__(self) -> None:
        check_at_least(self, keys=1, values=2, noise=1, first=0)

    def within(self, size: int, bos: int, eos: int, least: int) -> "Vocabulary":
        """Return this vocabulary moved to the last ids of a text tokenizer with `size` tokens and these BOS and EOS.

        Raises ValueError if it would reach into the first `least` ids, which the tokenizer needs to encode any text.
        """
        first = size - (self.size - self.first)
        if first < least:
            raise ValueError(
                f"vocabulary: found {size} tokens, expected at least {least + size - first} for so many "
                "keys, values and noise tokens beside those of text"
            )
        return replace(self, first=first, bos=bos, eos=eos)

    @property
    def first_digit(self) -> int:
        return self.first + 1

    @property
    def first_key(self) -> int:
        return self.first_digit + DIGITS

    @property
    def first_value(self) -> int:
        return self.first_key + self.keys

    @property
    def first_noise(self) -> int:
        return self.first_value + self.values

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return self.first_noise + self.noise

    def names(self) -> list[str]:
        """Return the name of every token, indexed by id, for a vocabulary whose `first` is the default."""
        counts = {"d": DIGITS, "k": self.keys, "v": self.values, "n": self.noise}
        return ["<unk>", "<s>", "</s>", "passkey", *(f"{kind}{i}" for kind, n in counts.items() for i in range(n))]

    def filler(self, rng: Generator, size: int) -> NDArray[np.int64]:
        """Draw `size` noise tokens, phrase after phrase; the last phrase may be cut."""
        phrases = np.random.default_rng(0).integers(self.noise, size=(PHRASES, PHRASE_LENGTH))
        return self.first_noise + phrases[rng.integers(PHRASES, size=-(-size // PHRASE_LENGTH))].ravel()[:size]


@dataclass(frozen=True)
class SyntheticDocument:
    """One document, `BOS ... EOS`, with the positions at which recall can be measured.

    An answer is a token that repeats what was stated earlier. A value that is stated for the first time, or that
    replaces another, is not an answer, because it cannot be predicted.

    Args:
        tokens_T: uint32 token ids.
        previous_T: int64; index of the answer's latest earlier occurrence, -1 where the token is not an answer.
        changed_T: bool; whether the token is an answer whose key has had several values so far.
    """

    tokens_T: NDArray[np.uint32]
    previous_T: NDArray[np.int64]
    changed_T: NDArray[np.bool_]

    def memory_only(self, segment_length: int, sliding_window: int | None) -> NDArray[np.bool_]:
        """Mark the answers that only the memory can give: local attention does not see their latest occurrence.

        The result is bool [T]. An answer is asked for at the token before it, which is where the model predicts it,
        and local attention of that token sees as far back as `InfiniConfig.sliding_window` tells. A pair of which
        attention sees the value alone counts as seen. Layers of attention, one after the other, may hand on what a
        token between the two has taken up.
        """
        asked_T = np.arange(len(self.previous_T)) - 1
        seen_from_T = asked_T // segment_length * segment_length
        if sliding_window is not None:
            seen_from_T = np.maximum(asked_T - sliding_window + 1, seen_from_T - segment_length)
        return (self.previous_T >= 0) & (self.previous_T < seen_from_T)


class Task(Protocol):
    """A distribution of documents, from which `document` draws one."""

    def document(self, vocabulary: Vocabulary, rng: Generator) -> SyntheticDocument: ...


@dataclass(frozen=True)
class RecallTask:
    """Key-value recall: documents are streams of `key value key value ...`, with a new assignment in each document.

    Args:
        tokens: length of a document, BOS and EOS included.
        shortest: if given, the length is drawn uniformly from the multiples of `shortest` up to `tokens`.
        fewest: if given, half of the documents use fewer keys: a log-uniform number from `fewest` up to all keys.
        change: probability that a pair gives its key a new value, which holds from there on. With 1/16, half of 32
            keys change within 512 tokens.
        noise: share of tokens that are noise between pairs; the lengths of the gaps are geometric.

    Raises:
        ValueError: a value is out of range.
    """

    tokens: int = 2048
    shortest: int | None = None
    fewest: int | None = None
    change: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(self, tokens=4, shortest=4, fewest=1)
        for name in ("change", "noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 0 and below 1")
        check_at_most(self, "shortest", self.tokens)

    def document(self, vocabulary: Vocabulary, rng: Generator) -> SyntheticDocument:
        check_at_most(self, "fewest", vocabulary.keys)
        size = _draw_length(self.tokens, self.shortest, rng)
        tokens, previous, changed = _noise_document(vocabulary, rng, size)

        # Positions of the keys: pairs of two tokens with a geometric number of noise tokens before each.
        gaps = rng.geometric((1 - self.noise) / (1 + self.noise), size=size // 2 - 1) - 1
        positions = 1 + 2 * np.arange(len(gaps)) + gaps.cumsum()
        positions = positions[positions + 1 < size - 1]

        # The key of each pair.
        keys = vocabulary.keys
        if self.fewest and rng.random() < 0.5:
            keys = round(math.exp(rng.uniform(math.log(self.fewest), math.log(keys))))
        key = rng.permutation(vocabulary.keys)[rng.integers(keys, size=len(positions))]

        # A stable sort puts the pairs of each key next to each other in document order, so that the values of all
        # keys are running sums: a change adds a step from 1 to values - 1 modulo `values`, hence a different value.
        order = key.argsort(kind="stable")
        first = np.append(True, key[order][1:] != key[order][:-1])[: len(order)]
        change = (rng.random(len(positions)) < self.change) & ~first
        steps = np.where(change, rng.integers(1, vocabulary.values, size=len(positions)), 0)
        value = rng.integers(vocabulary.values, size=vocabulary.keys)[key[order]] + _running_sum(steps, first)

        at = positions[order]
        tokens[at] = vocabulary.first_key + key[order]
        tokens[at + 1] = vocabulary.first_value + value % vocabulary.values
        previous[at + 1] = np.where(first | change, -1, np.roll(at + 1, 1))
        changed[at + 1] = (previous[at + 1] >= 0) & (_running_sum(change, first) > 0)
        return SyntheticDocument(tokens, previous, changed)


@dataclass(frozen=True)
class PasskeyTask:
    """Passkeys in noise: `passkey d d d d d` states the key at its first mention; later mentions ask for it.

    A later mention spells the digits again, so its digits are the answers.

    Args:
        tokens: length of a document, BOS and EOS included.
        shortest: if given, the length is drawn uniformly from the multiples of `shortest` up to `tokens`.
        digits: digits of the key.
        depth: None: mentions are anywhere, at log-uniform distances. Otherwise there are two mentions: the first at
            this share of the document, from 0 (the beginning) to 1 (the end), and the second at the end.
        thick: share of the documents without `depth` that are dense with mentions. In these the distances are
            log-uniform up to a limit, which itself is drawn log-uniformly from 4 to `longest_gap` for each document.
            From rare mentions alone a model learns nothing; from distances of up to 4 alone local attention learns to
            copy and the memory learns little; from distances of up to 64 alone the memory learns and local attention
            does not (docs/memory.md).
        longest_gap: the largest of these limits, in tokens. The memory learns from distances beyond what local
            attention sees, so this should be at least twice its reach.
        change: probability that a mention without `depth` states a new key, which holds from there on. Local
            attention must then learn to answer from its own segment, where the memory's answer is out of date.

    Raises:
        ValueError: a value is out of range.
    """

    tokens: int = 2048
    shortest: int | None = None
    digits: int = 5
    depth: float | None = None
    thick: float = 0.0
    longest_gap: int = 64
    change: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(self, digits=1, longest_gap=SHORTEST_GAP)
        least = 2 * self.mention_length + 2
        check_at_least(self, tokens=least, shortest=least)
        for name in ("depth", "thick"):
            if (found := getattr(self, name)) is not None and not 0 <= found <= 1:
                raise ValueError(f"{name}: found {found}, expected 0 to 1")
        if not 0 <= self.change < 1:
            raise ValueError(f"change: found {self.change}, expected at least 0 and below 1")
        check_at_most(self, "shortest", self.tokens)

    @property
    def mention_length(self) -> int:
        """Tokens of a mention: `passkey` and the digits."""
        return 1 + self.digits

    def document(self, vocabulary: Vocabulary, rng: Generator) -> SyntheticDocument:
        size = _draw_length(self.tokens, self.shortest, rng)
        tokens, previous, changed = _noise_document(vocabulary, rng, size)
        key = rng.integers(DIGITS, size=self.digits)
        last, several = None, False
        for at in self._mentions(size, rng):
            new = last is not None and self.depth is None and rng.random() < self.change
            if new:  # the new key differs from the old one in every digit
                key = (key + rng.integers(1, DIGITS, size=self.digits)) % DIGITS
                several = True
            tokens[at] = vocabulary.first
            digits = slice(at + 1, at + self.mention_length)
            tokens[digits] = vocabulary.first_digit + key
            if last is not None and not new:
                previous[digits] = last + np.arange(1, self.mention_length)
                changed[digits] = several
            last = at
        return SyntheticDocument(tokens, previous, changed)

    def _mentions(self, size: int, rng: Generator) -> Iterator[int]:
        """Draw the positions of the token `passkey` in a document of `size` tokens."""
        if self.depth is not None:
            yield 1 + round(self.depth * (size - 2 - 2 * self.mention_length))
            yield size - 1 - self.mention_length
            return
        thick = rng.random() < self.thick
        longest_gap = math.exp(rng.uniform(math.log(SHORTEST_GAP), math.log(self.longest_gap))) if thick else size / 2
        at = 1
        while True:
            at += int(math.exp(rng.uniform(0, math.log(longest_gap))))
            if at + self.mention_length > size - 1:
                return
            yield at
            at += self.mention_length


@dataclass(frozen=True)
class TaskMixture:
    """A mixture of both tasks: a document is of `passkey` with probability `passkey_share`, otherwise of `recall`."""

    recall: RecallTask
    passkey: PasskeyTask
    passkey_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.passkey_share <= 1:
            raise ValueError(f"passkey_share: found {self.passkey_share}, expected 0 to 1")

    def document(self, vocabulary: Vocabulary, rng: Generator) -> SyntheticDocument:
        return (self.passkey if rng.random() < self.passkey_share else self.recall).document(vocabulary, rng)


def synthetic_task(options: dict[str, Any]) -> tuple[TaskMixture, Vocabulary] | None:
    """Return the task and vocabulary stored in the options of a dataset's index, None if it is not synthetic."""
    if SYNTHETIC not in options:
        return None
    task = options[SYNTHETIC]["task"]
    mixture = TaskMixture(RecallTask(**task["recall"]), PasskeyTask(**task["passkey"]), task["passkey_share"])
    return mixture, Vocabulary(**options[SYNTHETIC]["vocabulary"])


def documents(
    task: Task, vocabulary: Vocabulary, count: int, *, seed: int, stream: int, first: int = 0
) -> Iterator[SyntheticDocument]:
    """Draw the documents numbered `first` to `first + count - 1` of a random stream (DATASET or EVALUATION).

    Each document depends only on the task, the vocabulary, `seed`, `stream` and its own number.
    """
    for number in range(first, first + count):
        yield task.document(vocabulary, np.random.default_rng((seed, stream, number)))


def check_at_least(options: object, **least: int) -> None:
    """Raise ValueError naming all fields of `options` that are below these bounds; fields that are None pass."""
    found = {name: value for name in least if (value := getattr(options, name)) is not None}
    wrong = [f"{name}: found {n}, expected at least {least[name]}" for name, n in found.items() if n < least[name]]
    if wrong:
        raise ValueError("; ".join(wrong))


def check_at_most(options: object, name: str, most: int) -> None:
    """Raise ValueError if the field `name` of `options` is above `most`; None passes."""
    if (found := getattr(options, name)) is not None and found > most:
        raise ValueError(f"{name}: found {found}, expected at most {most}")


def _draw_length(tokens: int, shortest: int | None, rng: Generator) -> int:
    return shortest * int(rng.integers(1, tokens // shortest + 1)) if shortest else tokens


def _noise_document(
    vocabulary: Vocabulary, rng: Generator, size: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.bool_]]:
    """Draw tokens_T, previous_T and changed_T of a document of noise, which has no answers."""
    tokens = np.concatenate(([vocabulary.bos], vocabulary.filler(rng, size - 2), [vocabulary.eos])).astype(np.uint32)
    return tokens, np.full(size, -1), np.zeros(size, bool)


def _running_sum(steps: NDArray, first: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Cumulative sum of `steps` that restarts from zero wherever `first` is true; `steps` must be zero there."""
    total = steps.cumsum()
    return total - total[np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))]
