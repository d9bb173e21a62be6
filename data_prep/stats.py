"""Statistics of a dataset: lengths in segments, sources, duplicates, bytes and words per token, unigram entropy."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.indexing import read_entries
from data_prep.parallel import ordered_map, progress_bar
from infini_train import plots
from infini_train.data.index import DatasetIndex
from infini_train.files import atomic_file, digest_of
from infini_train.tokenizer.loading import load_tokenizer

LONGER_THAN = (1, 4, 16, 64)  # lengths in segments, for token_share_longer_than
FERTILITY_TOKENS = 100_000  # tokens of each shard that are decoded to count words


class ShardCounts(NamedTuple):
    """Counts of one shard."""

    counts_V: np.ndarray  # occurrences of each token, int64 [vocab_size]
    words: int  # words in the decoded sample
    sampled: int  # tokens in the decoded sample
    digests: list[bytes]  # of each document's tokens, in order
    sources: dict[str, int]  # tokens by source


def dataset_stats(directory: Path, segment_length: int = 2048, workers: int = 1) -> dict[str, Any]:
    """Compute statistics over all documents of a dataset.

    Lengths in tokens include BOS and EOS. The labels are the tokens that a model is trained to predict, which are all
    but BOS. `unigram_entropy`, in nats per label, is the loss of the best model that knows only token frequencies.
    `bytes_per_token` is over labels too. `fertility` is the number of tokens per word (words are separated by
    spaces), in the first 100,000 tokens of each shard. `duplicates` counts documents with the same tokens as an
    earlier one. `sources` counts tokens by the first part of a document's source (`a` of `a/b.txt`).

    Args:
        directory: the dataset.
        segment_length: tokens of a segment, the unit of the histogram of lengths.
        workers: number of processes.

    Returns:
        The statistics, as plain JSON.

    Raises:
        ValueError: `segment_length` is below 1, or the dataset is damaged.
    """
    if segment_length < 1:
        raise ValueError(f"segment_length: found {segment_length}, expected at least 1")
    index = DatasetIndex.load(directory)
    index.check_files()
    counts_V, sources = np.zeros(index.vocab_size, np.int64), Counter[str]()
    words, sampled, seen, duplicates = 0, 0, set[bytes](), 0
    with progress_bar() as progress:
        task = progress.add_task("counting", total=index.total_tokens, note="")
        numbers = range(len(index.shards))
        for shard, found in zip(index.shards, ordered_map(partial(_count, index), numbers, workers), strict=True):
            counts_V += found.counts_V
            words, sampled = words + found.words, sampled + found.sampled
            sources.update(found.sources)
            for digest in found.digests:
                duplicates += digest in seen
                seen.add(digest)
            progress.update(task, advance=shard.tokens)
    counts_V[index.bos_id] -= index.documents
    labels = int(counts_V.sum())
    p = counts_V[counts_V > 0] / labels
    text_bytes = int(counts_V @ load_tokenizer(index.root / index.tokenizer_file).bytes_V)
    tokens_D = index.tokens_D
    segments_D = -(-tokens_D // segment_length)
    bins_D = np.ceil(np.log2(segments_D)).astype(np.int64)  # bin i: more than 2^(i-1), at most 2^i segments
    return {
        "documents": index.documents,
        "tokens": index.total_tokens,
        "labels": labels,
        "bytes": text_bytes,
        "bytes_per_token": text_bytes / labels,
        "fertility": sampled / max(words, 1),
        "duplicates": duplicates,
        "sources": dict(sources.most_common()),
        "unigram_entropy": float(-(p * np.log(p)).sum()),
        "vocab_size": index.vocab_size,
        "tokens_seen": int((counts_V > 0).sum()),
        "segment_length": segment_length,
        "document_tokens": {
            "mean": float(tokens_D.mean()),
            "median": float(np.median(tokens_D)),
            "max": int(tokens_D.max()),
        },
        "histogram": [
            {
                "segments": [1 if i == 0 else 2 ** (i - 1) + 1, 2**i],
                "documents": int((bins_D == i).sum()),
                "tokens": int(tokens_D[bins_D == i].sum()),
            }
            for i in range(int(bins_D.max()) + 1)
        ],
        "token_share_longer_than": {
            str(n): float(tokens_D[tokens_D > n * segment_length].sum() / index.total_tokens) for n in LONGER_THAN
        },
    }


def warning(stats: dict[str, Any]) -> str | None:
    """Return a warning if the documents are too short to train a memory, otherwise None."""
    share = stats["token_share_longer_than"]["4"]
    if share >= 0.5:
        return None
    return (
        f"{share:.0%} of the tokens are in documents longer than 4 segments of {stats['segment_length']:,}, expected "
        "at least 50% to train a memory: use shorter segments or longer documents"
    )


def show_stats(stats: dict[str, Any], title: str, json_file: Path | None, plot: Path | None = None) -> None:
    """Print statistics as tables.

    Args:
        stats: what `dataset_stats` returned.
        title: name of the dataset.
        json_file: file to write the statistics to, if given.
        plot: PNG file to write the histogram of lengths to, if given.
    """
    console = Console()
    table = Table("", title, show_header=True)
    length = stats["document_tokens"]
    for name, value in (
        ("documents", f"{stats['documents']:,}"),
        ("tokens", f"{stats['tokens']:,}"),
        (
            "tokens per document: mean, median, max",
            f"{length['mean']:,.0f}, {length['median']:,.0f}, {length['max']:,}",
        ),
        ("text bytes", f"{stats['bytes']:,}"),
        ("bytes per token", f"{stats['bytes_per_token']:.3f}"),
        ("tokens per word", f"{stats['fertility']:.3f}"),
        ("documents equal to an earlier one", f"{stats['duplicates']:,}"),
        ("unigram entropy, nats per token", f"{stats['unigram_entropy']:.4f}"),
        ("vocabulary used", f"{stats['tokens_seen']:,} of {stats['vocab_size']:,}"),
        *(
            (f"tokens in documents longer than {n} segment{'' if n == '1' else 's'}", f"{share:.1%}")
            for n, share in stats["token_share_longer_than"].items()
        ),
    ):
        table.add_row(name, value)
    console.print(table)
    histogram = Table(f"segments of {stats['segment_length']:,}", "documents", "tokens", "share of tokens")
    for row in stats["histogram"]:
        low, high = row["segments"]
        histogram.add_row(
            f"{low}" if low == high else f"{low} to {high}",
            f"{row['documents']:,}",
            f"{row['tokens']:,}",
            f"{row['tokens'] / stats['tokens']:.1%}",
        )
    console.print(histogram)
    if len(stats["sources"]) > 1:
        by_source = Table("source", "tokens", "share of tokens")
        for name, tokens in list(stats["sources"].items())[:20]:
            by_source.add_row(name, f"{tokens:,}", f"{tokens / stats['tokens']:.1%}")
        if (more := len(stats["sources"]) - 20) > 0:
            by_source.add_row(f"and {more:,} more", "", "")
        console.print(by_source)
    if plot:
        _plot(stats, title, plot)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(json_file) as f:
            f.write(json.dumps(stats, indent=1).encode() + b"\n")


def _plot(stats: dict[str, Any], title: str, path: Path) -> None:
    """Plot documents and tokens by length."""
    rows = stats["histogram"]
    names = [f"{row['segments'][1]:,}" for row in rows]
    figure = plots.new_figure(9, 4)
    for axes, kind in zip(figure.subplots(1, 2), ("documents", "tokens"), strict=True):
        axes.bar(names, [row[kind] for row in rows])
        axes.set(title=f"{kind}: {title}", xlabel=f"at most this many segments of {stats['segment_length']:,}")
        axes.tick_params(axis="x", rotation=45)
    plots.save(figure, path)


def _count(index: DatasetIndex, number: int) -> ShardCounts:
    """Count one shard."""
    counts_V, digests, sources = np.zeros(index.vocab_size, np.int64), [], Counter[str]()
    tokenizer, words, sampled = load_tokenizer(index.root / index.tokenizer_file), 0, 0
    path = index.root / index.shards[number].name
    entries = read_entries(path)
    for document, entry in zip(np.flatnonzero(index.shard_D == number), entries, strict=True):
        tokens = np.fromfile(path, index.dtype, index.tokens_D[document], offset=index.offset_D[document])
        if tokens.max() >= index.vocab_size:
            raise ValueError(
                f"{path}: document {document} holds a token outside the vocabulary: run `infini-train prep validate`"
            )
        counts_V += np.bincount(tokens, minlength=index.vocab_size)
        digests.append(digest_of(tokens.tobytes()))
        sources[str(entry.about.get("source", "")).split("/")[0]] += len(tokens)
        if sampled < FERTILITY_TOKENS:
            sample = tokens[1:-1][: FERTILITY_TOKENS - sampled]
            words, sampled = words + len(tokenizer.decode(sample).split()), sampled + len(sample)
    return ShardCounts(counts_V, words, sampled, digests, dict(sources))
