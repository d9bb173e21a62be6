"""`python -m data_prep COMMAND`: tokenizer, shard, append, index, validate, stats, synth, collect-stdlib."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.collect_stdlib import collect_stdlib
from data_prep.engine import Cluster
from data_prep.indexing import index_shards
from data_prep.shard import append_corpus, shard_corpus
from data_prep.stats import dataset_stats, show_stats, warning
from data_prep.synth import synthesise
from data_prep.train_tokenizer import train_tokenizer
from data_prep.validate import validate_dataset
from infini_train import plots
from infini_train.synthetic import PasskeyTask, RecallTask, TaskMixture, Vocabulary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 if validate found faults, 2 for bad input or options."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, OSError, RuntimeError) as error:
        message = " ".join(str(error).split())  # on one line
        print(f"data_prep {options.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"data_prep {options.command}: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    match options.command:
        case "tokenizer":
            train_tokenizer(
                options.inputs,
                options.out,
                vocab_size=options.vocab_size,
                model_type=options.model_type,
                sample_bytes=options.sample_bytes,
                text_field=options.text_field,
                overwrite=options.overwrite,
            )
        case "shard" | "append":
            if (options.executor == "slurm") != (options.cluster is not None):
                raise ValueError("--executor slurm and --cluster FILE go together: what the jobs ask for")
            how: dict[str, Any] = {
                "workers": options.workers,
                "tasks": options.tasks,
                "cluster": Cluster.load(options.cluster) if options.cluster else None,
                "overwrite": options.overwrite,
            }
            if options.command == "append":
                append_corpus(options.inputs, options.to, **how)
                return 0
            shard_corpus(
                options.inputs,
                options.out,
                options.tokenizer,
                validation_fraction=options.validation_fraction,
                shard_tokens=options.shard_tokens,
                text_field=options.text_field,
                id_field=options.id_field,
                unicode_form=options.unicode_form,
                join=options.join,
                min_tokens=options.min_tokens,
                **how,
            )
        case "index":
            index_shards(options.dataset, options.tokenizer, overwrite=options.overwrite)
        case "validate":
            faults = validate_dataset(options.dataset, workers=options.workers)
            for fault in faults:
                print(f"{options.dataset}: {fault}", file=sys.stderr)
            print(f"{options.dataset}: {len(faults)} faults" if faults else f"{options.dataset}: no fault")
            return 1 if faults else 0
        case "stats":
            if options.plot:
                plots.check_available()
            stats = dataset_stats(options.dataset, options.segment_length, workers=options.workers)
            show_stats(stats, str(options.dataset), options.json, options.plot)
            if line := warning(stats):
                print(f"data_prep: warning: {line}", file=sys.stderr)
        case "synth":
            length = {"tokens": options.tokens, "shortest": options.shortest}
            recall = RecallTask(**length, fewest=options.fewest, change=options.change, noise=options.noise)
            passkey = PasskeyTask(**length, digits=options.digits, thick=options.thick, change=options.passkey_change)
            synthesise(
                options.out,
                TaskMixture(recall, passkey, options.passkey),
                Vocabulary(options.keys, options.values, options.noise_tokens),
                count=options.documents,
                tokenizer=options.tokenizer,
                seed=options.seed,
                validation_fraction=options.validation_fraction,
                shard_tokens=options.shard_tokens,
                overwrite=options.overwrite,
            )
        case "collect-stdlib":
            collect_stdlib(options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Documents to token shards.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=description,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def add_inputs(p: argparse.ArgumentParser, text_field: bool = True) -> None:
        formats = "text files (one document each), .jsonl, .parquet, webdatasets of texts (.tar), or directories of "
        p.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=f"{formats}them; .gz and .zst too")
        if text_field:
            p.add_argument("--text-field", default="text", help="field or column that holds the text")

    def add_dataset(p: argparse.ArgumentParser) -> None:
        p.add_argument("dataset", type=Path, help="directory of shards")

    def add_workers(p: argparse.ArgumentParser) -> None:
        cores = len(os.sched_getaffinity(0))
        p.add_argument("--workers", type=int, default=cores, help="processes; they never change the result")

    def add_output(p: argparse.ArgumentParser) -> None:
        p.add_argument("--out", type=Path, required=True, help="the dataset directory to make")
        fraction = "share of documents for OUT/valid, the others go to OUT/train; 0: all go to OUT itself"
        p.add_argument("--validation-fraction", type=float, default=0.0, help=fraction)
        p.add_argument("--shard-tokens", type=int, default=50_000_000, help="tokens a shard, about")

    def add_overwrite(p: argparse.ArgumentParser) -> None:
        replace = "replace an output made with other options"
        p.add_argument("--overwrite", action="store_true", help=replace)

    p = command("tokenizer", "train a sentencepiece tokenizer")
    add_inputs(p)
    p.add_argument("--out", type=Path, required=True, help="the model file to write")
    p.add_argument("--vocab-size", type=int, default=32000, help="tokens, the 256 bytes and BOS, EOS included")
    p.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe", help="kind of model")
    p.add_argument("--sample-bytes", type=int, default=50_000_000, help="characters of text to train on, at most")
    add_overwrite(p)

    def add_engine(p: argparse.ArgumentParser) -> None:
        p.add_argument("--tasks", type=int, metavar="N", help="parts of the work; default: by the size of the inputs")
        where = "where tasks run, --workers of them at once: in processes here, or as array jobs"
        p.add_argument("--executor", choices=["local", "slurm"], default="local", help=where)
        p.add_argument("--cluster", type=Path, help="what jobs ask for, a file like configs/slurm/cpu.yaml")
        add_workers(p)
        add_overwrite(p)

    p = command("shard", "tokenise documents into shards with an index")
    add_inputs(p)
    p.add_argument("--id-field", default="id", help="field that names a document (else file and line do)")
    a_tokenizer = "sentencepiece model, or tokenizer.json of Hugging Face, or the directory that holds it"
    p.add_argument("--tokenizer", type=Path, required=True, help=a_tokenizer)
    add_output(p)
    p.add_argument("--unicode-form", choices=["NFC", "NFKC", "none"], default="NFC", help="of all characters")
    joined = "make one document of the files of a `directory`, of a tree below N directories (`directory:N`), or of "
    p.add_argument("--join", metavar="KEY", help=f"{joined}records with the same value of a field (its name)")
    p.add_argument("--min-tokens", type=int, default=0, help="leave out documents with fewer, once joined")
    add_engine(p)

    p = command("append", "add documents to a dataset that `shard` made, with its options; no shard is written anew")
    add_inputs(p, text_field=False)
    p.add_argument("--to", type=Path, required=True, metavar="DATASET", help="what --out was")
    add_engine(p)

    p = command("index", "index tar shards (KEY.tokens.bin) that another program wrote")
    add_dataset(p)
    p.add_argument("--tokenizer", type=Path, required=True, help=f"what they were made with: {a_tokenizer}")
    add_overwrite(p)

    p = command("validate", "check every checksum, offset and token; exit code 1 if there is a fault")
    add_dataset(p)
    add_workers(p)

    p = command("stats", "document lengths, sources, duplicates, bytes and words per token, unigram entropy")
    add_dataset(p)
    p.add_argument("--segment-length", type=int, default=2048, help="tokens a segment, the unit of lengths")
    p.add_argument("--json", type=Path, help="file to write the numbers to")
    p.add_argument("--plot", type=Path, help="PNG file to write the histogram of lengths to")
    add_workers(p)

    p = command("synth", "draw documents that only a memory can tell: key-value recall, passkeys in noise")
    add_output(p)
    p.add_argument("--documents", type=int, default=4096, help="how many")
    p.add_argument("--tokenizer", type=Path, help="of a text dataset that they are to be mixed with")
    p.add_argument("--tokens", type=int, default=2048, help="tokens of a document, or of the longest")
    p.add_argument("--shortest", type=int, metavar="N", help="if given, documents have N, 2N, ... tokens")
    p.add_argument("--keys", type=int, default=64, help="keys of a document")
    fewest = "if given, half of the documents use fewer keys, down to so many"
    p.add_argument("--fewest", type=int, metavar="KEYS", help=fewest)
    p.add_argument("--values", type=int, default=64, help="values that there are")
    p.add_argument("--change", type=float, default=0.0, help="probability that a pair gives its key another value")
    p.add_argument("--noise", type=float, default=0.0, help="share of noise between pairs")
    p.add_argument("--noise-tokens", type=int, default=64, help="noise tokens that there are")
    p.add_argument("--passkey", type=float, default=0.0, help="share of documents with a passkey instead of pairs")
    p.add_argument("--digits", type=int, default=5, help="of a passkey")
    thick = "share of passkey documents full of mentions, without which it is hardly learned"
    p.add_argument("--thick", type=float, default=0.5, help=thick)
    change = "probability that a passkey's mention tells another key"
    p.add_argument("--passkey-change", type=float, default=0.0, help=change)
    p.add_argument("--seed", type=int, default=0, help="of the documents")
    add_overwrite(p)

    p = command("collect-stdlib", "the Python standard library's sources as a corpus of long documents")
    p.add_argument("out", type=Path, help="file to write, ending in .jsonl.gz")
    return parser


if __name__ == "__main__":
    sys.exit(main())
