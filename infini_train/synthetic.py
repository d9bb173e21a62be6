"""Memory tasks as token sequences, drawn from a seed: key-value recall with overwrites and distractors, and passkeys.

One vocabulary serves all tasks, so that one model can learn them together:

| ids | names | |
|---|---|---|
| 0, 1, 2 | `<unk> <s> </s>` | unknown (never drawn), BOS, EOS |
| 3 | `passkey` | the digits that follow are told, or asked for |
| 4 ... 13 | `d0` ... `d9` | digits |
| from 14 | `k0` `k1` ... | keys |
| then | `v0` `v1` ... | values |
| then | `n0` `n1` ... | noise: phrases of 8 out of 64 that are always the same, and tell nothing |

In the vocabulary of a text tokenizer, to be mixed with text, all but the first three are its last tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

BOS, EOS, FIRST, DIGITS = 1, 2, 3, 10
PHRASES, PHRASE = 64, 8
DATASET, EVALUATION = 0, 1  # streams of one seed, drawn independently
SYNTHETIC = "synthetic"  # of a dataset's options in its index: what `data_prep synth` drew


@dataclass(frozen=True)
class Vocabulary:
    """How many keys, values and noise tokens there are; the id of the first of all these tokens, `passkey`; those of
    BOS and EOS. Raises ValueError if there are fewer than one key, two values and one noise token."""

    keys: int = 64
    values: int = 64
    noise: int = 64
    first: int = FIRST
    bos: int = BOS
    eos: int = EOS

    def __post_init__(self) -> None:
        at_least(self, keys=1, values=2, noise=1, first=0)

    def within(self, size: int, bos: int, eos: int, least: int) -> "Vocabulary":
        """The same as the last of `size` tokens. Raises ValueError if they reach down to the first `least`, which
        encode any text."""
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
        """One more than the last id."""
        return self.first_noise + self.noise

    def names(self) -> list[str]:
        """Of all tokens, by id, with `first` as it is by default."""
        counts = {"d": DIGITS, "k": self.keys, "v": self.values, "n": self.noise}
        return ["<unk>", "<s>", "</s>", "passkey", *(f"{kind}{i}" for kind, n in counts.items() for i in range(n))]

    def filler(self, rng: Generator, size: int) -> NDArray[np.int64]:
        """[size] noise tokens, phrase after phrase."""
        phrases = np.random.default_rng(0).integers(self.noise, size=(PHRASES, PHRASE))
        return self.first_noise + phrases[rng.integers(PHRASES, size=-(-size // PHRASE))].ravel()[:size]


@dataclass(frozen=True)
class Document:
    """One document, `BOS ... EOS`, and what of it can be known.

    tokens_T: uint32.
    told_T: int64; where a token is an answer, the place at which the same was told last before; -1 elsewhere. A value
        that is told for the first time, or is new, is no answer: nobody can know it.
    changed_T: bool; the answer is the latest of several values that its key has had.
    """

    tokens_T: NDArray[np.uint32]
    told_T: NDArray[np.int64]
    changed_T: NDArray[np.bool_]

    def memory_only(self, segment_length: int) -> NDArray[np.bool_]:
        """[T] answers that only the memory can know: told last, to the last token, in an earlier segment.

        The segment is that of the token before the answer, which is where a model must know it. A pair that a
        segment's border divides counts as told in the later one.
        """
        asked_T = np.arange(len(self.told_T)) - 1
        return (self.told_T >= 0) & (self.told_T // segment_length < asked_T // segment_length)


class Task(Protocol):
    def document(self, vocabulary: Vocabulary, rng: Generator) -> Document: ...


@dataclass(frozen=True)
class Recall:
    """A stream of `key value key value ...`; each document draws anew which value a key has.

    Args:
        tokens: of a document, BOS and EOS included.
        shortest: if given, documents have 1, 2, ... or tokens // shortest times so many, equally likely.
        fewest: if given, half of the documents use fewer keys: log-uniform from this number up to all.
        change: probability that a pair gives its key another value, from there on. With 1/16, half of 32 keys
            change in 512 tokens.
        noise: share of tokens that are noise between pairs (their number is geometric).

    Raises ValueError for values out of range.
    """

    tokens: int = 2048
    shortest: int | None = None
    fewest: int | None = None
    change: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, tokens=4, shortest=4, fewest=1)
        for name in ("change", "noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 0 and below 1")
        not_above(self, "shortest", self.tokens)

    def document(self, vocabulary: Vocabulary, rng: Generator) -> Document:
        not_above(self, "fewest", vocabulary.keys)
        size = _length(self.tokens, self.shortest, rng)
        tokens, told, changed = _blank(vocabulary, rng, size)
        gaps = rng.geometric((1 - self.noise) / (1 + self.noise), size=size // 2 - 1) - 1
        places = 1 + 2 * np.arange(len(gaps)) + gaps.cumsum()  # of the keys
        places = places[places + 1 < size - 1]
        keys = vocabulary.keys
        if self.fewest and rng.random() < 0.5:
            keys = round(math.exp(rng.uniform(math.log(self.fewest), math.log(keys))))
        key = rng.permutation(vocabulary.keys)[rng.integers(keys, size=len(places))]

        order = key.argsort(kind="stable")  # the pairs of each key side by side, in time
        first = np.append(True, key[order][1:] != key[order][:-1])[: len(order)]
        news = (rng.random(len(places)) < self.change) & ~first
        steps = np.where(news, rng.integers(1, vocabulary.values, size=len(places)), 0)  # to a value that differs
        value = rng.integers(vocabulary.values, size=vocabulary.keys)[key[order]] + _since(first, steps)
        at = places[order]
        tokens[at] = vocabulary.first_key + key[order]
        tokens[at + 1] = vocabulary.first_value + value % vocabulary.values
        told[at + 1] = np.where(first | news, -1, np.roll(at + 1, 1))
        changed[at + 1] = (told[at + 1] >= 0) & (_since(first, news) > 0)
        return Document(tokens, told, changed)


@dataclass(frozen=True)
class Passkey:
    """`passkey d d d d d` within noise: told at its first mention, asked for (and told again) at each later one.

    Args:
        tokens, shortest: as in Recall.
        digits: of the key.
        depth: None: mentions anywhere, their gaps log-uniform. Else two: told at this share of the way, 0 the
            beginning and 1 the end, and asked for at the end.
        thick: share of documents (without depth) that are full of mentions: their gaps are log-uniform up to a limit
            that is itself log-uniform, 4 to 64, for each document. From rare mentions alone nothing is learned; from
            gaps of up to 4 alone local attention learns to copy and the memory little; from gaps of up to 64 alone
            the memory learns and local attention nothing (docs/memory.md).
        change: probability that a mention (without depth) tells another key, from there on. What was told within a
            segment is for local attention to know, which it learns where the memory's answer is out of date.

    Raises ValueError for values out of range.
    """

    tokens: int = 2048
    shortest: int | None = None
    digits: int = 5
    depth: float | None = None
    thick: float = 0.0
    change: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, digits=1)
        least = 2 * self.mention + 2
        at_least(self, tokens=least, shortest=least)
        for name in ("depth", "thick"):
            if (found := getattr(self, name)) is not None and not 0 <= found <= 1:
                raise ValueError(f"{name}: found {found}, expected 0 to 1")
        if not 0 <= self.change < 1:
            raise ValueError(f"change: found {self.change}, expected at least 0 and below 1")
        not_above(self, "shortest", self.tokens)

    @property
    def mention(self) -> int:
        return 1 + self.digits

    def document(self, vocabulary: Vocabulary, rng: Generator) -> Document:
        size = _length(self.tokens, self.shortest, rng)
        tokens, told, changed = _blank(vocabulary, rng, size)
        digits = rng.integers(DIGITS, size=self.digits)
        last, several = None, False
        for at in self._mentions(size, rng):
            new = last is not None and self.depth is None and rng.random() < self.change
            if new:  # another in every digit
                digits = (digits + rng.integers(1, DIGITS, size=self.digits)) % DIGITS
                several = True
            tokens[at] = vocabulary.first
            here = slice(at + 1, at + self.mention)
            tokens[here] = vocabulary.first_digit + digits
            if last is not None and not new:
                told[here] = last + np.arange(1, self.mention)
                changed[here] = several
            last = at
        return Document(tokens, told, changed)

    def _mentions(self, size: int, rng: Generator) -> Iterator[int]:
        if self.depth is not None:
            yield 1 + round(self.depth * (size - 2 - 2 * self.mention))
            yield size - 1 - self.mention
            return
        thick = rng.random() < self.thick
        most = math.exp(rng.uniform(math.log(4), math.log(64))) if thick else size / 2
        at = 1
        while True:
            at += int(math.exp(rng.uniform(0, math.log(most))))
            if at + self.mention > size - 1:
                return
            yield at
            at += self.mention


@dataclass(frozen=True)
class Mixture:
    """Documents of Passkey, by this probability, and else of Recall."""

    recall: Recall
    passkey: Passkey
    passkey_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.passkey_share <= 1:
            raise ValueError(f"passkey_share: found {self.passkey_share}, expected 0 to 1")

    def document(self, vocabulary: Vocabulary, rng: Generator) -> Document:
        return (self.passkey if rng.random() < self.passkey_share else self.recall).document(vocabulary, rng)


def described(options: dict[str, Any]) -> tuple[Mixture, Vocabulary] | None:
    """What a dataset was drawn by, from its index's options; None if it was not drawn here."""
    if SYNTHETIC not in options:
        return None
    task = options[SYNTHETIC]["task"]
    mixture = Mixture(Recall(**task["recall"]), Passkey(**task["passkey"]), task["passkey_share"])
    return mixture, Vocabulary(**options[SYNTHETIC]["vocabulary"])


def documents(
    task: Task, vocabulary: Vocabulary, count: int, *, seed: int, stream: int, first: int = 0
) -> Iterator[Document]:
    """So many documents, from number `first` on; each depends on seed, stream and its own number alone."""
    for number in range(first, first + count):
        yield task.document(vocabulary, np.random.default_rng((seed, stream, number)))


def at_least(options: object, **least: int) -> None:
    """Raises ValueError that names the fields (those that are not None) below these values."""
    found = {name: value for name in least if (value := getattr(options, name)) is not None}
    wrong = [f"{name}: found {n}, expected at least {least[name]}" for name, n in found.items() if n < least[name]]
    if wrong:
        raise ValueError("; ".join(wrong))


def not_above(options: object, name: str, most: int) -> None:
    if (found := getattr(options, name)) is not None and found > most:
        raise ValueError(f"{name}: found {found}, expected at most {most}")


def _length(tokens: int, shortest: int | None, rng: Generator) -> int:
    return shortest * int(rng.integers(1, tokens // shortest + 1)) if shortest else tokens


def _blank(
    vocabulary: Vocabulary, rng: Generator, size: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.bool_]]:
    """A document of noise without an answer: its tokens, told, changed."""
    tokens = np.concatenate(([vocabulary.bos], vocabulary.filler(rng, size - 2), [vocabulary.eos])).astype(np.uint32)
    return tokens, np.full(size, -1), np.zeros(size, bool)


def _since(first: NDArray[np.bool_], steps: NDArray) -> NDArray[np.int64]:
    """Running sums of `steps` that begin anew where `first`; nothing is to be added there."""
    total = steps.cumsum()
    return total - total[np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))]
