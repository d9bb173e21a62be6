"""Texts, ids and groups by the path of a field, chats by template, and what options that fit nothing lead to."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from data_prep.__main__ import main
from data_prep.fields import NoField, read_template, value_at
from tests.helpers.corpora import read_with_tarfile, text
from tests.helpers.reading import json_lines, read

TREES = st.recursive(
    st.text("xyz", max_size=3),
    lambda below: st.dictionaries(st.sampled_from("abc"), below, min_size=1) | st.lists(below, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from("abc"), TREES),
    st.lists(st.sampled_from(["a", "b", "c", "a[]", "b[]"]), min_size=1),
)
def test_paths_are_those_of_a_plain_walk(record: dict, steps: list[str]) -> None:
    def walk(value: object, steps: list[str]) -> object:
        for number, step in enumerate(steps):
            value = value[step.removesuffix("[]")]  # type: ignore[index]
            if step.endswith("[]"):
                assert isinstance(value, list)
                parts = [walk(part, steps[number + 1 :]) for part in value]
                return "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else parts  # type: ignore[arg-type]
        return value

    try:
        expected = walk(record, steps)
    except (KeyError, TypeError, AssertionError):
        with pytest.raises(NoField):
            value_at(record, ".".join(steps))
    else:
        assert value_at(record, ".".join(steps)) == expected


RECORD = {
    "data": {"text": "below", "url": "u"},
    "data.url": "a dotted name",
    "paragraphs": ["one", "two"],
    "files": [{"path": "a.c", "content": "int a;"}, {"path": "b.c", "content": "int b;"}],
    "repo": {"name": "r"},
}


@pytest.mark.parametrize("form", ["lines", "parquet"])
def test_texts_by_path(tmp_path: Path, form: str) -> None:
    if form == "lines":
        (tmp_path / "a").write_bytes(json_lines([RECORD]))
    else:
        pq.write_table(pa.Table.from_pylist([RECORD]), tmp_path / "a")
    for path, expected in (
        ("data.text", "below"),
        ("data.url", "a dotted name"),
        ("paragraphs[]", "one\n\ntwo"),
        ("files[].content", "int a;\n\nint b;"),
    ):
        assert read(tmp_path / "a", text_field=path)[0] == [expected], path
    for path, reason in (
        ("paragraphs", "text_not_a_string"),
        ("data", "text_not_a_string"),
        ("body", "no_text_field"),
    ):
        assert set(read(tmp_path / "a", text_field=path)[1].values()) == {reason}
    assert read(tmp_path / "a", text_field="files[].body")[1] == {"a:1": "no_text_field"}


def test_chats_are_rendered_as_transformers_does(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}"
    chats = [
        [{"role": "user", "content": f" {text(i, 5)}"}, {"role": "assistant", "content": "ok"}] for i in range(3)
    ]
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"messages": chat} for chat in [*chats, [1], [{"content": {}}]]]))
    texts, rejects, _ = read(tmp_path / "a.jsonl", text_field="messages", chat_template=template)
    assert texts[:3] == render_jinja_template(chats, chat_template=template)[0]
    assert rejects == {"a.jsonl:4": "bad_chat"}
    assert read(tmp_path / "a.jsonl", text_field="messages")[1]["a.jsonl:1"] == "text_not_a_string"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_nothing_left_prints_the_reasons(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"body": text(i, 9), "title": "t"} for i in range(50)]) + b"{\n")
    code, _, err = run(
        capsys, "shard", tmp_path / "a.jsonl", "--tokenizer", tokenizer_path, "--out", tmp_path / "out"
    )
    assert code == 2
    assert "(1 bad_json, 50 no_text_field left out)" in err
    assert "no_text_field: a.jsonl:1: expected 'text', found body, title" in err
    assert "bad_json: a.jsonl:51" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_misspelt_fields_are_errors(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"text": text(i, 9), "repo": "r", "name": f"n{i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(records))
    words = ("shard", tmp_path / "a.jsonl", "--tokenizer", tokenizer_path, "--out", tmp_path / "out")
    for option in ("--join", "--id_field"):
        code, _, err = run(capsys, *words, option, "repro")
        assert code == 2 and f"{option[2:]}: found 'repro', a field that none of 5 records has" in err
        assert not (tmp_path / "out").exists()
    for option in ("--join", "--id_field", "--text_field"):
        code, _, err = run(capsys, *words, option, "a..b")
        assert code == 2 and f"{option[2:]}: found 'a..b', expected a field" in err
    code, out, _ = run(capsys, *words, "--join", "repo", "--id_field", "name")
    assert code == 0 and [about["id"] for about, _ in read_with_tarfile(tmp_path / "out")] == ["r"]
    assert "JSON lines" in out and "no document left out" in out


def test_little_text_needs_accept(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The work that is done stays, so that `--accept` alone finishes it."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "memory", "image": "A" * 1000}) + '\n{"body": 1}')
    words = ("shard", tmp_path / "a.jsonl", "--tokenizer", tokenizer_path, "--out", tmp_path / "out")
    code, _, err = run(capsys, *words)
    assert "no_text_field: a.jsonl:2: expected 'text', found body" in err
    assert code == 2 and "6 of 1,043 bytes became text (0.6%), expected at least 20%" in err and "--accept" in err
    part = next(tmp_path.glob(".out.work-*/parts/part-00000.jsonl"))
    (tmp_path / "read").hardlink_to(part)
    code, out, _ = run(capsys, *words, "--accept")
    assert code == 0 and "0.6%" in out
    assert len(read_with_tarfile(tmp_path / "out")) == 1 and (tmp_path / "read").stat().st_nlink == 1


def test_tokenizers_are_trained_on_what_shards_are_made_of(tmp_path: Path) -> None:
    chat = [{"role": "qq", "content": text(i, 30)} for i in range(30)]
    (tmp_path / "chat.jsonl").write_bytes(json_lines([{"chat": chat}]))
    (tmp_path / "data.json").write_bytes("Füße {".encode("latin-1") * 20)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    how = ("--text_field", "chat", "--chat_template", tmp_path / "t.jinja", "--vocab_size", 280)
    words = [tmp_path / "chat.jsonl", tmp_path / "data.json", "--encoding", "latin-1", "--as_text", "data.*", *how]
    assert main(["tokenizer", *map(str, words), "--out", str(tmp_path / "t.model")]) == 0
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    vocabulary = "".join(pieces.id_to_piece(i) for i in range(259, pieces.vocab_size()))
    assert set("Füße{q:") <= set(vocabulary)


def test_append_reads_as_shard_did(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The options of reading are kept, and are only in the index if they are not the default."""
    for name in ("first", "more"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").write_bytes(f"{{ {name}\r\nna\u00efve\u037e".encode("utf-16"))
    how = ("--encoding", "utf-16", "--as_text", "*.json", "--line_ends", "keep", "--unicode_form", "none")
    words = ("--tokenizer", tokenizer_path, "--out", tmp_path / "out")
    assert run(capsys, "shard", tmp_path / "first", *words, *how)[0] == 0
    assert run(capsys, "append", tmp_path / "more", "--to", tmp_path / "out")[0] == 0
    assert run(capsys, "shard", tmp_path / "first", *words, *how, "--overwrite")[0] == 0
    options = json.loads((tmp_path / "out" / "index.json").read_text())["options"]
    assert options["as_text"] == ["*.json"] and options["encoding"] == "utf-16" and options["line_ends"] == "keep"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{{ '\xff' }}", "chat.jinja is not UTF-8"),
        (b"one\n{% for message in messages %}", "chat.jinja, line 2: Unexpected end of template"),
    ],
)
def test_broken_chat_template_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    """Before anything is read; the template of a chat without messages need not render."""
    (tmp_path / "chat.jinja").write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        read_template(tmp_path / "chat.jinja")
    (tmp_path / "chat.jinja").write_text(template := "{{ messages[0].content }}{{ raise_exception('no') }}")
    assert read_template(tmp_path / "chat.jinja") == template
