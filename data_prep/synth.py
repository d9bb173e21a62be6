"""Synthetic memory tasks as an ordinary dataset: shards, index, and a tokenizer whose words are the tasks' tokens."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from data_prep.finished import is_finished, staging_of
from data_prep.train_tokenizer import RESERVED
from data_prep.writing import Tokens, write_datasets
from infini_train.synthetic import BOS, DATASET, EOS, SYNTHETIC, TaskMixture, Vocabulary, documents
from infini_train.tokenizer.loading import CONFIG, JSON, HuggingFaceTokenizer, Tokenizer, load_tokenizer


def synthesise(
    output: Path,
    task: TaskMixture,
    vocabulary: Vocabulary,
    *,
    count: int,
    seed: int = 0,
    tokenizer: Path | None = None,
    validation_fraction: float = 0.0,
    shard_tokens: int = 50_000_000,
    overwrite: bool = False,
) -> None:
    """Write `count` documents of the tasks to the dataset `output`, or to `output`/train and `output`/valid.

    With the tokenizer of a text dataset they can be mixed with it: the tasks' tokens are the last of its vocabulary.
    Bytes depend on the arguments alone. `output` appears when everything is on disk, not before; a second run with
    the same arguments leaves it as it is. Raises ValueError for arguments out of range, and if `output` holds
    anything else.
    """
    if count < 1:
        raise ValueError(f"documents: found {count}, expected at least 1")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: found {shard_tokens}, expected at least 1")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction: found {validation_fraction}, expected at least 0 and below 1")
    spelling: Tokenizer = word_tokenizer(vocabulary) if tokenizer is None else load_tokenizer(tokenizer)
    if tokenizer is not None:
        vocabulary = vocabulary.within(spelling.vocab_size, spelling.bos_id, spelling.eos_id, least=RESERVED)
    drawn = {"documents": count, "seed": seed, "vocabulary": asdict(vocabulary), "task": asdict(task)}
    options = {
        SYNTHETIC: drawn,
        "tokenizer_sha256": spelling.sha256,
        "validation_fraction": validation_fraction,
        "shard_tokens": shard_tokens,
    }
    if is_finished(output, options | {"bos_id": vocabulary.bos, "eos_id": vocabulary.eos}, overwrite):
        print(f"{output} is there already, made with the same options: nothing to do")
        return

    def items() -> Iterator[Tokens]:
        for number, document in enumerate(documents(task, vocabulary, count, seed=seed, stream=DATASET)):
            data = document.tokens_T.astype(np.dtype(spelling.dtype).newbyteorder("<")).tobytes()
            yield Tokens(f"{seed}-{number}", SYNTHETIC, data, len(document.tokens_T))

    with staging_of(output) as staging:
        indexes = write_datasets(staging, items(), spelling, options)
    for name, index in indexes.items():
        print(f"{output / name}: {index.documents:,} documents, {index.total_tokens:,} tokens")


def word_tokenizer(vocabulary: Vocabulary) -> HuggingFaceTokenizer:
    """Words to the ids of `vocabulary`: `k3 v7 passkey d1`, with spaces between; any other word is `<unk>`.

    As text, `<s>` is taken for punctuation and a letter, so no text becomes BOS or EOS. Prompts get BOS.
    """
    names = vocabulary.names()
    made = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    made.add_special_tokens([names[BOS], names[EOS]])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single=f"{names[BOS]} $A", special_tokens=[(names[BOS], BOS)])
    special = {"bos_token": names[BOS], "eos_token": names[EOS]}
    with TemporaryDirectory() as directory:
        made.save(str(Path(directory) / JSON))
        (Path(directory) / CONFIG).write_text(json.dumps(special))
        return HuggingFaceTokenizer(Path(directory) / JSON)
