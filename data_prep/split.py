"""Divides documents into the datasets train, valid and test, by the hash of their ids."""

import hashlib
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar


def check_fractions(validation: float, test: float) -> None:
    """Raise ValueError unless both are at least 0 and documents are left for training."""
    for name, fraction in (("validation_fraction", validation), ("test_fraction", test)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name}: found {fraction}, expected at least 0 and below 1")
    if validation + test >= 1:
        raise ValueError(f"validation_fraction + test_fraction: found {validation + test:g}, expected below 1")


def split_options(validation: float, test: float) -> dict[str, float]:
    """Return the options of a split as an index keeps them: without a test part as earlier versions did."""
    return {"validation_fraction": validation} | ({"test_fraction": test} if test else {})


def split_parts(options: dict[str, Any]) -> list[str]:
    """Return the subdirectories of a dataset with these options: "." alone, or "train" first."""
    held_out = {"valid": options["validation_fraction"], "test": options.get("test_fraction", 0.0)}
    parts = [part for part, fraction in held_out.items() if fraction]
    return ["train", *parts] if parts else ["."]


class Named(Protocol):
    @property
    def id(self) -> str: ...


AnyDocument = TypeVar("AnyDocument", bound=Named)


class Split(Generic[AnyDocument]):
    """Assigns documents to the parts of `split_parts`, by number, by the hash of their ids alone.

    The hash is a number from 0 to 1. Documents below `validation_fraction` go to valid, those of the next
    `test_fraction` to test, all others to train. With `hold`, the documents of the lowest hashes are held back while
    a part has none yet, and go there if it stays empty, so that every part has at least one document.
    """

    def __init__(self, options: dict[str, Any], hold: bool = True) -> None:
        fractions = [options["validation_fraction"], options.get("test_fraction", 0.0)]
        ends = [fractions[0], sum(fractions)]
        self.ends = [end for end, fraction in zip(ends, fractions, strict=True) if fraction]
        self.empty = set(range(1, len(self.ends) + 1)) if hold else set()
        self.held: list[tuple[float, AnyDocument]] = []

    def add(self, document: AnyDocument) -> Iterator[tuple[AnyDocument, int]]:
        """Yield the documents whose part is now known: `document`, one held back earlier, or none."""
        rank = int.from_bytes(hashlib.sha256(document.id.encode(errors="surrogatepass")).digest()[:8]) / 2**64
        for part, end in enumerate(self.ends, 1):
            if rank < end:
                self.empty.discard(part)
                yield document, part
                return
        if self.empty and (len(self.held) < len(self.empty) or rank < self.held[-1][0]):
            if len(self.held) >= len(self.empty):
                yield self.held.pop()[1], 0
            self.held = sorted([*self.held, (rank, document)], key=lambda held: held[0])
        else:
            yield document, 0

    def finish(self) -> Iterator[tuple[AnyDocument, int]]:
        """Yield the documents that are still held back, if any."""
        for (_, document), part in zip(self.held, [*sorted(self.empty), 0, 0], strict=False):
            yield document, part
