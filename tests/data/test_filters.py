"""`prep shard --pipeline` runs datatrove's filters; `--include` and `--exclude` choose files."""

import importlib.util
import json
import random
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import (
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    RegexFilter,
)
from datatrove.pipeline.filters.base_filter import get_filter_result
from datatrove.pipeline.formatters import PIIFormatter, SymbolLinesFormatter
from datatrove.utils.lid import FT176LID
from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

import data_prep.documents as documents
from data_prep.__main__ import main
from data_prep.filtering import Filters, load_pipeline
from data_prep.near_duplicates import HASHES, clusters
from data_prep.shard import append_corpus, shard_corpus
from data_prep.summary import Summary
from infini_train.tokenizer.loading import load_tokenizer
from tests.helpers.corpora import all_bytes, read_with_tarfile, text

PIPELINE = """
# Comments are no part of the options.
- RegexFilter: {regex_exp: secret}
- PIIFormatter: {ip_replacement: [1.2.3.4, 5.6.7.8]}
- SymbolLinesFormatter
- C4ParagraphFilter
"""


def paragraphs(seed: int) -> str:
    return "\n".join(text(seed + i, 40).replace("\n", " ") for i in range(3 + seed % 2))


def corpus() -> list[str]:
    texts = [paragraphs(10 * seed) for seed in range(40)]
    texts[3] += "\nwrite to someone@company.com and other@company.com, or 8.8.8.8 and 9.9.9.9"
    texts[4] += "\nwrite to third@company.com, or 8.8.4.4"
    texts[5] += "\n-----\n***\nthe end"
    texts[6] = "a secret " + texts[6]
    texts[7] = text(7, 30)
    texts[8] = "-----\n****"
    texts[9] += "\nsecret"
    return texts


def write_corpus(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": content}) + "\n" for i, content in enumerate(texts)))


def by_datatrove(texts: list[str]) -> dict[str, str]:
    """The documents that datatrove's own pipeline keeps, with new blocks for each of them."""
    kept = {}
    for number, content in enumerate(texts):
        documents: Any = iter([Document(content, f"d{number}")])
        for block in (
            RegexFilter("secret"),
            PIIFormatter(ip_replacement=("1.2.3.4", "5.6.7.8")),
            SymbolLinesFormatter(),
            C4ParagraphFilter(),
        ):
            documents = block.run(documents)
        kept |= {document.id: document.text for document in documents}
    return kept


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path / "pipeline.yaml"


def test_filters_are_those_of_datatrove(
    tmp_path: Path, tokenizer_path: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = corpus()
    write_corpus(tmp_path / "a.jsonl", texts)
    shard_corpus([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer_path, pipeline=pipeline)
    tokenizer = load_tokenizer(tokenizer_path)
    expected = by_datatrove(texts)
    assert {about["id"]: ids for about, ids in read_with_tarfile(tmp_path / "out")} == {
        id: tokenizer.encode(content).tolist() for id, content in expected.items()
    }
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["id"], reject["reason"]) for reject in rejects] == [
        ("d6", "RegexFilter"),
        ("d7", "C4ParagraphFilter"),
        ("d8", "SymbolLinesFormatter"),
        ("d9", "RegexFilter"),
    ]
    assert [reject["detail"] for reject in rejects[1:3]] == ["< 3 paragraphs", "it leaves no text"]
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["filter", "documents", "left", "out", "changed"] in told
    assert ["1.", "RegexFilter", "40", "2", "0"] in told
    assert ["2.", "PIIFormatter", "38", "0", "2"] in told
    assert ["3.", "SymbolLinesFormatter", "38", "1", "1"] in told
    assert ["4.", "C4ParagraphFilter", "37", "1", "0"] in told


def test_bytes_depend_on_the_pipeline_and_not_on_tasks(
    tmp_path: Path, tokenizer_path: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what a block draws at random, and which replacement it takes in turn."""
    pipeline.write_text(PIPELINE + "- SamplerFilter: {rate: 0.5, seed: 7}\n")
    write_corpus(tmp_path / "a.jsonl", corpus())
    how: dict[str, Any] = {"pipeline": pipeline, "validation_fraction": 0.2}
    for tasks in (1, 7):
        shard_corpus([tmp_path / "a.jsonl"], tmp_path / f"out{tasks}", tokenizer_path, tasks=tasks, **how)
    assert all_bytes(tmp_path / "out1") == all_bytes(tmp_path / "out7")
    assert 5 < len(read_with_tarfile(tmp_path / "out1" / "train")) < 30  # of 36
    pipeline.write_text("# the same\n" + pipeline.read_text())
    shard_corpus([tmp_path / "a.jsonl"], tmp_path / "out1", tokenizer_path, **how)
    assert "nothing to do" in capsys.readouterr().out
    pipeline.write_text(PIPELINE + "- SamplerFilter: {rate: 0.5, seed: 8}\n")
    with pytest.raises(ValueError, match=r"made with other options \(pipeline\)"):
        shard_corpus([tmp_path / "a.jsonl"], tmp_path / "out1", tokenizer_path, **how)
    shard_corpus([tmp_path / "a.jsonl"], tmp_path / "out1", tokenizer_path, overwrite=True, **how)
    assert all_bytes(tmp_path / "out1") != all_bytes(tmp_path / "out7")


def test_appended_documents_are_filtered(tmp_path: Path, tokenizer_path: Path, pipeline: Path) -> None:
    texts = corpus()
    write_corpus(tmp_path / "a.jsonl", texts[10:])
    write_corpus(tmp_path / "b.jsonl", texts[:10])
    shard_corpus([tmp_path / "a.jsonl"], tmp_path / "filtered", tokenizer_path, pipeline=pipeline)
    (tmp_path / "b.jsonl").write_text((tmp_path / "b.jsonl").read_text().replace('"d', '"e'))
    append_corpus([tmp_path / "b.jsonl"], tmp_path / "filtered")
    found = {about["id"] for about, _ in read_with_tarfile(tmp_path / "filtered")}
    assert {id for id in found if id.startswith("e")} == {f"e{i}" for i in (0, 1, 2, 3, 4, 5)}


class Words(WordTokenizer):
    """Stands for spaCy where it is not installed; how it splits a text is not the point here."""

    def word_tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)

    def sent_tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^.!?]+[.!?]*", text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"[^.!?]+[.!?]*", text)]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if importlib.util.find_spec("spacy") is None:
        monkeypatch.setattr("datatrove.utils.word_tokenizers.SpaCyTokenizer", Words)
    load_word_tokenizer.cache_clear()
    yield
    load_word_tokenizer.cache_clear()


class TwoLanguages:
    """Stands for fastText and its model, which is downloaded."""

    def predict(self, text: str, k: int) -> tuple[list[str], np.ndarray]:
        german = len(re.findall(r"\b(der|die|und)\b", text)) / max(1, len(text.split()))
        return ["__label__de", "__label__en"], np.array([german, 1 - german])


def letters(draw: random.Random) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6))


def prose(seed: int, sentences: int) -> str:
    """Text that passes the filters below."""
    draw = random.Random(seed)
    known = ["the", "of", "and", "to", "that", "have", "with", "be"] * 4 + [
        f"w{draw.randrange(9**5)}" for _ in range(300)
    ]
    lines = [" ".join(draw.choices(known, k=12)).capitalize() + "." for _ in range(sentences)]
    return "\n\n".join(" ".join(lines[start : start + 3]) for start in range(0, sentences, 3))


@pytest.mark.parametrize(
    ("item", "block"),
    [
        ("GopherQualityFilter: {min_doc_words: 30, max_doc_words: 300}", lambda: GopherQualityFilter(30, 300)),
        ("GopherRepetitionFilter", GopherRepetitionFilter),
        (
            "GopherRepetitionFilter: {top_n_grams: [[2, 0.5]]}",
            lambda: GopherRepetitionFilter(top_n_grams=((2, 0.5),)),
        ),
        ("C4QualityFilter: {min_words_per_line: 4}", lambda: C4QualityFilter(min_words_per_line=4)),
        ("FineWebQualityFilter: {line_punct_thr: 0.2}", lambda: FineWebQualityFilter(line_punct_thr=0.2)),
        ("LanguageFilter: {languages: [en], language_threshold: 0.8}", lambda: LanguageFilter(["en"], 0.8)),
    ],
)
def test_length_repetition_quality_and_language(
    tmp_path: Path, words: None, monkeypatch: pytest.MonkeyPatch, item: str, block: Any
) -> None:
    """With arguments and without, each keeps what datatrove's own block keeps, for its own reasons."""
    monkeypatch.setattr(FT176LID, "model", TwoLanguages())
    for what in ("package", "distribution"):
        monkeypatch.setattr(f"datatrove.utils._import_utils._is_{what}_available", lambda _: True)
    line = "The same line is here again and again, with no other word."
    texts = [prose(seed, 12) for seed in range(6)] + [prose(7, 2), prose(8, 90), f"{line}\n" * 20, f"{line} " * 20]
    texts += ["und der die " * 40, "* item\n" * 60, "Lorem ipsum dolor sit amet of the and.\n" + prose(9, 9)]
    texts += ["{ a = b } of the and to\n" * 9, "of the and to be. # # # # # # # # # #\n" + prose(10, 3)]
    (tmp_path / "pipeline.yaml").write_text(f"- {item}")
    filters = Filters(load_pipeline(tmp_path / "pipeline.yaml"))
    kept = 0
    for number, content in enumerate(texts):
        document = Document(content, f"d{number}")
        passed, reason = get_filter_result(block().filter(document))
        found = filters.apply(documents.Document(f"d{number}", "", content), Summary())
        if passed:
            assert isinstance(found, documents.Document) and found.text == document.text
        else:
            assert isinstance(found, documents.Reject) and found.detail == (reason or "")
        kept += passed
    assert 0 < kept < len(texts)


def near_duplicates() -> list[str]:
    """Texts in clusters of one to four that differ by some words, an exact copy, and texts of too few words."""
    draw = random.Random(0)
    texts = []
    for seed in range(25):
        for _ in range(draw.randrange(1, 5)):
            changed = prose(seed, 30).split(" ")
            for _ in range(draw.randrange(1, 9)):
                changed[draw.randrange(len(changed))] = letters(draw)
            texts.append(" ".join(changed))
    texts += [texts[3], "too few words", "too few words.", "three short words"]
    draw.shuffle(texts)
    return texts


def clusters_of_datatrove(texts: list[str], root: Path, config: MinhashConfig) -> list[set[int]]:
    signatures = MinhashDedupSignature(str(root / "signatures"), config)
    for rank in range(3):
        signatures.run(iter([Document(t, str(n)) for n, t in enumerate(texts)][rank::3]), rank, 3)
    for bucket in range(config.num_buckets):
        MinhashDedupBuckets(str(root / "signatures"), str(root / "pairs"), config=config).run(
            None, bucket, config.num_buckets
        )
    MinhashDedupCluster(str(root / "pairs"), str(root / "clusters"), config, save_cluster_id=True).run(None, 0, 1)
    found: dict[int, set[int]] = {}
    for path in (root / "clusters").glob("*.clusters"):
        for row, cluster in struct.iter_unpack("<2I", path.read_bytes()):
            found.setdefault(cluster, set()).add(3 * row + int(path.stem))
    return list(found.values())


@pytest.mark.parametrize("arguments", [{}, {"n_grams": 6, "num_buckets": 20, "hashes_per_bucket": 5, "seed": 2}])
def test_near_duplicates_are_those_of_datatrove(
    tmp_path: Path,
    tokenizer_path: Path,
    words: None,
    arguments: dict[str, int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of each cluster the first document is kept, however many tasks read the corpus."""
    monkeypatch.setattr("data_prep.near_duplicates.SHINGLES", 50)
    texts = near_duplicates()
    expected = clusters_of_datatrove(texts, tmp_path / "peer", MinhashConfig(**arguments, hash_config=HASHES))
    assert len(expected) > 8 and max(map(len, expected)) > 2
    later = {number for cluster in expected for number in cluster - {min(cluster)}}
    write_corpus(tmp_path / "a.jsonl", texts)
    (tmp_path / "p.yaml").write_text(
        f"- RegexFilter: {{regex_exp: secret}}\n- MinhashDedupFilter: {json.dumps(arguments)}"
    )
    how: dict[str, Any] = {"pipeline": tmp_path / "p.yaml", "unicode_form": "none"}
    for tasks in (1, 5):
        shard_corpus([tmp_path / "a.jsonl"], tmp_path / f"out{tasks}", tokenizer_path, tasks=tasks, **how)
        told = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["2.", "MinhashDedupFilter", str(len(texts)), str(len(later)), "0"] in told
    assert all_bytes(tmp_path / "out1") == all_bytes(tmp_path / "out5")
    kept = {about["id"] for about, _ in read_with_tarfile(tmp_path / "out1")}
    assert kept == {f"d{number}" for number in range(len(texts)) if number not in later}
    rejects = [json.loads(line) for line in (tmp_path / "out1" / "rejects.jsonl").read_text().splitlines()]
    first = {number: min(cluster) for cluster in expected for number in cluster}
    assert {(one["id"], one["reason"], one["detail"]) for one in rejects} == {
        (f"d{number}", "MinhashDedupFilter", f"nearly the text of d{first[number]}") for number in later
    }


def test_a_near_duplicate_of_what_is_left_out_is_kept(tmp_path: Path, tokenizer_path: Path, words: None) -> None:
    """The first of the pair has the id of an earlier document."""
    near = [prose(1, 30), prose(1, 30) + " end"]
    records = [{"id": f"d{n}", "text": prose(n, 9)} for n in range(2, 9)]
    records += [{"id": "d2", "text": near[0]}, {"id": "d1", "text": near[1]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "p.yaml").write_text("- MinhashDedupFilter")
    shard_corpus([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer_path, pipeline=tmp_path / "p.yaml")
    assert {about["id"] for about, _ in read_with_tarfile(tmp_path / "out")} == {f"d{n}" for n in range(1, 9)}


def test_clusters_are_connected_components() -> None:
    draw = np.random.default_rng(0)
    for count in (0, 1, 40):
        bands = draw.integers(0, 60, (4, count)).astype("<u8")
        reach = np.eye(count, dtype=bool)
        for band in bands:
            reach |= (band[:, None] == band) & (band != 0)
        for _ in range(6):
            reach = reach @ reach
        found = clusters(bands, count)
        assert np.array_equal(found[:, None] == found, reach)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "- MinhashDedupFilter\n- SymbolLinesFormatter",
            "MinhashDedupFilter before other blocks, expected it as the last",
        ),
        ("- MinhashDedupFilter\n- MinhashDedupFilter", "expected it as the last item, and once"),
        ("- MinhashDedupFilter: {n_grams: 0}", "found 0 or less, expected n_grams, num_buckets"),
        ("- MinhashDedupFilter: {buckets: 9}", "found 'buckets', expected arguments among n_grams, num_buckets"),
        ("- MinhashDedupFilter: {language: klingon}", "Language 'klingon' doesn't have a tokenizer"),
    ],
)
def test_bad_pipelines_of_near_duplicates(
    tmp_path: Path, pipeline: Path, words: None, content: str, message: str
) -> None:
    pipeline.write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(pipeline))}.*{re.escape(message)}"):
        load_pipeline(pipeline)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "- NoFilter",
            ", item 1, NoFilter: found a block that cannot be used: expected one of C4BadWord",
        ),
        ("- LambdaFilter", "it takes a function, which a file cannot hold"),
        ("- URLFilter", "documents have no URL here"),
        ("- BaseFilter", "expected one of C4BadWordsFilter"),
        ("- os.system: {command: ls}", "expected one of C4BadWordsFilter"),
        ("- RegexFilter: {regexp: a}", "item 1, RegexFilter: found 'regexp', expected arguments among regex_exp"),
        (
            "- C4ParagraphFilter\n- RegexFilter",
            "item 2, RegexFilter: the following arguments are required: regex_exp",
        ),
        ("- RegexFilter: {regex_exp: '('}", "item 1, RegexFilter: missing ), unterminated subpattern"),
        ("- RegexFilter: [a]", "found ['a'], expected arguments among regex_exp"),
        ("- SamplerFilter: {rate: high}", 'SamplerFilter: Parser key "rate"'),
        ("- SamplerFilter: {exclusion_writer: x}", "found 'exclusion_writer', expected arguments among rate, seed"),
        ("RegexFilter: {regex_exp: a}", "found dict, expected a list of datatrove's filters"),
        ("- RegexFilter: {regex_exp: a}\n  SamplerFilter: {}", "expected the name of a filter, or NAME: {ARGUMENT"),
        ("- [a", ": while parsing"),
        ("", "found NoneType, expected a list"),
    ],
)
def test_bad_pipelines(tmp_path: Path, pipeline: Path, content: str, message: str) -> None:
    pipeline.write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(pipeline))}.*{re.escape(message)}"):
        load_pipeline(pipeline)


def test_missing_packages_are_named_before_anything_is_read(
    tmp_path: Path,
    tokenizer_path: Path,
    pipeline: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datatrove.utils._import_utils._is_package_available", lambda _: False)
    pipeline.write_text("- FTFYFormatter")
    write_corpus(tmp_path / "a.jsonl", corpus())
    words = ["shard", str(tmp_path / "a.jsonl"), "--tokenizer", str(tokenizer_path), "--out", str(tmp_path / "out")]
    assert main([*words, "--pipeline", str(pipeline)]) == 2
    error = capsys.readouterr().err
    assert "item 1, FTFYFormatter: Please install `ftfy`" in error and "Traceback" not in error
    assert not list(tmp_path.glob(".out*"))


def test_include_and_exclude(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "b.md", "tests/c.txt", "deep/tests/d.txt", "deep/e.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} {text(len(name), 30)}")
    (tmp_path / "in" / "f.pdf").write_bytes(b"%PDF-1.4 is refused where it is not excluded")
    words = ["shard", str(tmp_path / "in"), "--tokenizer", str(tokenizer_path), "--out", str(tmp_path / "out")]
    assert main([*words, "--include", "*.txt", "--include", "in/b*", "--exclude", "*/tests/*"]) == 0
    assert sorted(about["id"] for about, _ in read_with_tarfile(tmp_path / "out")) == [
        "in/a.txt",
        "in/b.md",
        "in/deep/e.txt",
    ]
    assert not capsys.readouterr().err
    assert main([*words, "--overwrite", "--include", "*.txt", "--include", "*.rts", "--exclude", "tets/*"]) == 0
    told = capsys.readouterr().err
    assert "--include '*.rts' matches none of the files" in told
    assert "--exclude 'tets/*' matches none of the files" in told and "*.txt" not in told
    assert main([*words, "--overwrite", "--include", "*.rst"]) == 2
    assert "none of 6 files is left by --include and --exclude" in capsys.readouterr().err
