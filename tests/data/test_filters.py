"""`prep shard --pipeline` runs datatrove's filters; `--include` and `--exclude` choose files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import C4ParagraphFilter, RegexFilter
from datatrove.pipeline.formatters import PIIFormatter, SymbolLinesFormatter

from data_prep.__main__ import main
from data_prep.filtering import load_pipeline
from data_prep.shard import append_corpus, shard_corpus
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
    assert main([*words, "--overwrite", "--include", "*.rst"]) == 2
    assert "none of 6 files is left by --include and --exclude" in capsys.readouterr().err
