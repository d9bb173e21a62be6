"""Trains a sentencepiece tokenizer on a bounded sample of the text."""

import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from data_prep.documents import Document, DocumentReader
from data_prep.fields import check_path, read_template
from data_prep.formats import encoding_named
from data_prep.input_files import fingerprint_inputs
from data_prep.parallel import ordered_map, progress_bar
from data_prep.sources import find_inputs
from infini_train.files import atomic_file
from infini_train.tokenizer.cutting import CONTEXT
from infini_train.tokenizer.loading import RESERVED_TOKENS, load_tokenizer
from infini_train.tokenizer.sentencepiece_text import SPACE_MARK

LONGEST_LINE = 4000  # characters; longer lines are cut, because the trainer skips lines over max_sentence_length


def train_tokenizer(
    inputs: Sequence[Path | str],
    output: Path,
    vocab_size: int,
    model_type: str = "bpe",
    sample_bytes: int = 50_000_000,
    text_field: str = "text",
    overwrite: bool = False,
    encoding: str | None = None,
    as_text: Sequence[str] = (),
    chat_template: Path | None = None,
    accept: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    user_symbols: Sequence[str] = (),
) -> None:
    """Train a sentencepiece model on a sample of the documents in `inputs` and write it to `output`.

    Decoding restores a text exactly: nothing is normalised, unknown characters are encoded as bytes, and newlines and
    tabs have tokens. The ids are unknown 0, BOS 1, EOS 2, then the 256 bytes. The options are written to
    `output`.options.json; a second run with the same options does nothing.

    Args:
        inputs: files and directories (see `find_inputs`).
        output: model file to write.
        vocab_size: number of tokens.
        model_type: "bpe" or "unigram".
        sample_bytes: maximum number of characters to train on.
        text_field: path of the text in a record (see `fields.value_at`).
        overwrite: replace a model that was made with other options.
        encoding: as in `shard_corpus`, as are the following.
        as_text: patterns of names of files that hold a text each.
        chat_template: file with the template of chats.
        accept: leave out files of formats that are not read.
        include: patterns of names of files to read.
        exclude: patterns of names of files not to read.
        user_symbols: texts that are always one token each, such as <|user|>. Their ids follow EOS.

    Raises:
        ValueError: the corpus is empty or too small for `vocab_size`, an option is out of range, or `output` was made
            with other options.
    """
    _check_symbols(user_symbols)
    if vocab_size <= (reserved := RESERVED_TOKENS + len(user_symbols)):
        raise ValueError(
            f"vocab_size: found {vocab_size}, expected more than {reserved} (unknown, BOS, EOS, 256 bytes"
            + (f", {len(user_symbols)} user symbols)" if user_symbols else ")")
        )
    if sample_bytes < 1:
        raise ValueError(f"sample_bytes: found {sample_bytes}, expected at least 1")
    check_path("text_field", text_field)
    encoding = encoding_named(encoding)
    files = find_inputs(inputs, output, text_field, as_text, encoding, accept, include, exclude)
    # Only what is not the default, so that models of earlier versions were made with the same options.
    reading: dict[str, Any] = {"encoding": encoding} if encoding else {}
    if chat_template:
        reading["chat_template"] = read_template(chat_template)
    if as_text:
        reading["as_text"] = list(as_text)
    options = {
        "inputs": fingerprint_inputs(files),
        "vocab_size": vocab_size,
        "model_type": model_type,
        "sample_bytes": sample_bytes,
        "text_field": text_field,
        **reading,
        **({"user_symbols": list(user_symbols)} if user_symbols else {}),
    }
    record = output.with_name(output.name + ".options.json")
    if output.exists() and record.exists() and json.loads(record.read_bytes()) == options:
        print(f"{output} exists and was made with the same options: nothing to do")
        return
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists and was made with other options: give --overwrite to replace it")

    lines = _sample(DocumentReader(files, text_field, "id", **reading), sample_bytes)
    size = sum(map(len, lines))
    if not size:
        raise ValueError(f"no text in {', '.join(map(str, inputs))}: nothing to train a tokenizer on")
    with progress_bar() as progress:
        progress.add_task(f"training {model_type} on {size / 1e6:.1f} M characters", total=None, note="")
        # In a process of its own, because the trainer holds the interpreter lock and would stop the progress bar.
        (model,) = ordered_map(_train, [(lines, vocab_size, model_type, list(user_symbols))], workers=1)
    output.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    with atomic_file(output) as f:
        f.write(model)
    with atomic_file(record) as f:
        f.write(json.dumps(options, indent=1).encode() + b"\n")
    tokenizer = load_tokenizer(output)
    print(f"{output}: {model_type}, {tokenizer.vocab_size:,} tokens, from {size / 1e6:.1f} M characters")


def _sample(reader: DocumentReader, sample_bytes: int) -> list[str]:
    """Draw lines uniformly from the whole corpus, at most `sample_bytes` characters, always the same ones.

    Each line gets a random rank. Whenever the kept lines are too many, those of the highest ranks are dropped.
    """
    draw = random.Random(0)
    kept: list[tuple[float, str]] = []
    size, threshold = 0, 1.0
    with progress_bar() as progress:
        task = progress.add_task("reading the sample", total=reader.bytes_total, note="")
        for document in reader:
            if isinstance(document, Document):
                assert isinstance(document.text, str), "the iterator's documents are whole"
                for line in _lines(document.text):
                    rank = draw.random()
                    if rank < threshold:
                        kept.append((rank, line))
                        size += len(line)
                while size > sample_bytes:
                    threshold *= 0.9
                    kept = [(rank, line) for rank, line in kept if rank < threshold]
                    size = sum(len(line) for _, line in kept)
            progress.update(task, completed=reader.bytes_read)
        progress.update(task, completed=reader.bytes_total)
    return [line for _, line in kept]


def _lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        for start in range(0, len(line), LONGEST_LINE):
            yield line[start : start + LONGEST_LINE]


def _check_symbols(symbols: Sequence[str]) -> None:
    """Raise ValueError for a symbol that sentencepiece would change, or that a text may be cut in."""
    for symbol in symbols:
        if not symbol or len(symbol) > CONTEXT or SPACE_MARK in symbol or "," in symbol or re.search(r"\s", symbol):
            raise ValueError(
                f"user_symbols: found {symbol!r}, expected 1 to {CONTEXT} characters without white space, comma or "
                f"{SPACE_MARK}"
            )
    if len(set(symbols)) < len(symbols) or {"<unk>", "<s>", "</s>"} & set(symbols):
        raise ValueError(
            f"user_symbols: found {', '.join(symbols)}, expected other ones than <unk>, <s>, </s>, each once"
        )


def _train(job: tuple[list[str], int, str, list[str]]) -> bytes:
    """Train a model on (lines, vocab_size, model_type, user symbols) and return its serialised bytes."""
    lines, vocab_size, model_type, user_symbols = job
    model = io.BytesIO()
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "model_type": model_type,
        "byte_fallback": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "max_sentence_length": 4 * LONGEST_LINE + 4,  # bytes
        "minloglevel": 2,
    }
    if user_symbols:
        options["user_defined_symbols"] = user_symbols
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    except RuntimeError as error:
        high = re.search(r"Vocabulary size too high .* value <= (\d+)", str(error))
        low = re.search(r"Vocabulary size is smaller than required_chars. \d+ vs (\d+)", str(error))
        if high:
            message = f"is too large for so little text: at most {high[1]}"
        elif low:
            message = f"is too small: bytes and frequent characters alone need {low[1]}"
        else:
            raise
        raise ValueError(f"vocab_size {vocab_size} {message}") from None
    return model.getvalue()
