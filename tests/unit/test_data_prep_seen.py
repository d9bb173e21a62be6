"""What was seen is the same whether its digests are held in memory or lie in a file."""

import random
from pathlib import Path

import numpy as np
import pytest

import data_prep.seen as seen
from data_prep.seen import Seen
from data_prep.work import DocumentHeader
from infini_train.files import digest_of


def headers(seed: int) -> list[DocumentHeader]:
    """Documents of which some share a text, an id or both."""
    draw = random.Random(seed)
    drawn = [(f"id{draw.randrange(60)}", digest_of(b"%d" % draw.randrange(60)).hex()) for _ in range(120)]
    return [DocumentHeader(id, "", digest, None, 0, 0, 2, None) for id, digest in drawn]


def reference(documents: list[DocumentHeader]) -> tuple[list[str | None], set[str], set[str]]:
    texts, ids, reasons = set[str](), set[str](), list[str | None]()
    for document in documents:
        reason = "duplicate" if document.digest in texts else "duplicate_id" if document.id in ids else None
        reasons.append(reason)
        if reason is None:
            texts.add(document.digest)
            ids.add(document.id)
    return reasons, texts, ids


@pytest.mark.parametrize("held", [10, 20, 1000])
def test_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(seen, "HELD", held)
    monkeypatch.setattr(seen, "ROWS", 7)
    documents = headers(0) + headers(1)
    expected, texts, ids = reference(documents)
    assert {"duplicate", "duplicate_id", None} == set(expected[120:])
    first = Seen(None)
    found = [first.fault(document) for document in documents[:120]]
    first.save(tmp_path / "seen.npz")
    with np.load(tmp_path / "seen.npz", allow_pickle=False) as arrays:
        _, first_texts, first_ids = reference(documents[:120])
        assert {row.tobytes().hex() for row in arrays["texts"]} == first_texts
        assert {row.tobytes() for row in arrays["ids"]} == {digest_of(id.encode()) for id in first_ids}
        np.savez(tmp_path / "as_before.npz", **arrays)  # as earlier versions wrote the file
    again = Seen(tmp_path / "as_before.npz")
    found += [again.fault(document) for document in documents[120:]]
    assert [fault and fault[0] for fault in found] == expected
    again.save(tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz", allow_pickle=False) as arrays:
        assert {row.tobytes().hex() for row in arrays["texts"]} == texts and len(arrays["ids"]) == len(ids)
