"""Writes synthetic memory tasks as an ordinary dataset: shards, an index, and a tokenizer of the tasks' tokens."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from data_prep.finished import is_finished
from data_prep.split import check_fractions, split_options
from data_prep.writing import TokenisedDocument, write_datasets
from infini_train.files import new_directory
from infini_train.synthetic import BOS, DATASET, EOS, SYNTHETIC, TaskMixture, Vocabulary, documents
from infini_train.tokenizer.loading import (
    CONFIG,
    JSON,
    RESERVED_TOKENS,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
)


def synthesise(
    output: Path,
    task: TaskMixture,
    vocabulary: Vocabulary,
    *,
    count: int,
    seed: int = 0,
    tokenizer: Path | None = None,
    validation_fraction: float = 0.0,
    test_fraction: float = 0.0,
    shard_tokens: int = 50_000_000,
    overwrite: bool = False,
) -> None:
    """Write documents of the tasks to the dataset `output`, or to `output`/train and those held out.

    The bytes depend on the arguments alone. `output` appears only when it is complete and on disk; a second run with
    the same arguments leaves it as it is.

    Args:
        output: dataset directory to make.
        task: distribution to draw the documents from.
        vocabulary: numbers of keys, values and noise tokens.
        count: number of documents.
        seed: random seed.
        tokenizer: the tokenizer of a text dataset with which the documents will be mixed; the tasks' tokens are then
            the last of its vocabulary. None: a tokenizer whose words are the tasks' tokens.
        validation_fraction: expected share of documents in `output`/valid.
        test_fraction: expected share of documents in `output`/test. Both 0: there is no split.
        shard_tokens: approximate tokens of a shard.
        overwrite: replace an output that was made with other arguments.

    Raises:
        ValueError: an argument is out of range, or `output` holds anything else.
    """
    if count < 1:
        raise ValueError(f"documents: found {count}, expected at least 1")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: found {shard_tokens}, expected at least 1")
    check_fractions(validation_fraction, test_fraction)
    if tokenizer is None:
        used: Tokenizer = word_tokenizer(vocabulary)
    else:
        used = load_tokenizer(tokenizer)
        vocabulary = vocabulary.within(used.vocab_size, used.bos_id, used.eos_id, least=RESERVED_TOKENS)
    drawn = {"documents": count, "seed": seed, "vocabulary": asdict(vocabulary), "task": asdict(task)}
    options = {
        SYNTHETIC: drawn,
        "tokenizer_sha256": used.sha256,
        **split_options(validation_fraction, test_fraction),
        "shard_tokens": shard_tokens,
    }
    if is_finished(output, options | {"bos_id": vocabulary.bos, "eos_id": vocabulary.eos}, overwrite):
        print(f"{output} exists and was made with the same options: nothing to do")
        return

    def tokenised() -> Iterator[TokenisedDocument]:
        for number, document in enumerate(documents(task, vocabulary, count, seed=seed, stream=DATASET)):
            data = document.tokens_T.astype(np.dtype(used.dtype).newbyteorder("<")).tobytes()
            yield TokenisedDocument(f"{seed}-{number}", SYNTHETIC, [data], len(document.tokens_T))

    with new_directory(output, replace=True) as directory:
        indexes = write_datasets(directory, tokenised(), used, options)
    for name, index in indexes.items():
        print(f"{output / name}: {index.size}")


def word_tokenizer(vocabulary: Vocabulary) -> HuggingFaceTokenizer:
    """Make a tokenizer of words separated by spaces, such as `k3 v7 passkey d1`; other words become `<unk>`.

    No text is encoded as BOS or EOS, because the pre-tokenizer splits `<s>` into punctuation and a letter. BOS is
    added to prompts.
    """
    names = vocabulary.names()
    words = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    bos, eos = names[BOS], names[EOS]
    words.add_special_tokens([bos, eos])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS)])
    with TemporaryDirectory() as directory:
        words.save(str(Path(directory) / JSON))
        (Path(directory) / CONFIG).write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
        return HuggingFaceTokenizer(Path(directory) / JSON)
