"""The options of `infini-train prep`, command by command."""

import argparse
import os
from pathlib import Path

from infini_train.errors import OptionParser


def _input(word: str) -> Path | str:
    return word if "://" in word else Path(word)


def parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of all commands; its description calls the program so."""
    top = OptionParser(prog=program, description="Turn documents into shards of tokens.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=description,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def add_inputs(p: argparse.ArgumentParser, text_field: bool = True) -> None:
        formats = "texts (one document each), JSON, CSV, Parquet, Arrow, WARC, tar or zip, also compressed, or "
        p.add_argument(
            "inputs",
            nargs="+",
            type=_input,
            metavar="INPUT",
            help=f"{formats}directories, URLs or patterns of them, or - for standard input",
        )
        if text_field:
            path = "field or column that holds the text, or its path: data.text, paragraphs[], files[].content"
            p.add_argument("--text_field", default="text", help=path)
            p.add_argument("--encoding", help="encoding of texts, such as cp1252, or `detect`; without it UTF-8")
            texts = "take files with such names as one text each, whatever they look like, as '*.json' in sources"
            p.add_argument("--as_text", action="append", default=[], metavar="PATTERN", help=texts)
            template = "file with a Jinja template, as tokenizers have, that makes a text of a list of messages"
            p.add_argument("--chat_template", type=Path, metavar="FILE", help=template)
        only = "read only files with such names, or paths below the input's parent; * also stands for /"
        p.add_argument("--include", action="append", default=[], metavar="PATTERN", help=only)
        without = "do not read files with such names or paths, nor files of formats that are not read among them"
        p.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help=without)
        accept = "leave out files that cannot be read, and continue even if little of the inputs becomes text"
        p.add_argument("--accept", action="store_true", help=accept)

    def add_dataset(p: argparse.ArgumentParser) -> None:
        p.add_argument("dataset", type=Path, help="directory of shards")

    def add_workers(p: argparse.ArgumentParser) -> None:
        cores = len(os.sched_getaffinity(0))
        p.add_argument("--workers", type=int, default=cores, help="number of processes; it never changes the result")

    def add_output(p: argparse.ArgumentParser) -> None:
        p.add_argument("--out", type=Path, required=True, help="directory of the dataset to make")
        fraction = "share of documents in OUT/valid, with the others in OUT/train; 0 puts all of them into OUT itself"
        p.add_argument("--validation_fraction", type=float, default=0.0, help=fraction)
        test = "share of documents in OUT/test, for a last evaluation of what was chosen on OUT/valid"
        p.add_argument("--test_fraction", type=float, default=0.0, help=test)
        p.add_argument("--shard_tokens", type=int, default=50_000_000, help="approximate number of tokens of a shard")

    def add_overwrite(p: argparse.ArgumentParser) -> None:
        replace = "replace an output that was made with other options"
        p.add_argument("--overwrite", action="store_true", help=replace)

    p = command("tokenizer", "train a sentencepiece tokenizer")
    add_inputs(p)
    p.add_argument("--out", type=Path, required=True, help="the model file to write")
    p.add_argument(
        "--vocab_size", type=int, default=32000, help="number of tokens, including the 256 bytes, BOS and EOS"
    )
    p.add_argument("--model_type", choices=["bpe", "unigram"], default="bpe", help="kind of sentencepiece model")
    symbol = "a text that is always one token, such as '<|user|>'; may be given several times"
    p.add_argument("--user_symbols", action="append", default=[], metavar="SYMBOL", help=symbol)
    p.add_argument(
        "--sample_bytes", type=int, default=50_000_000, help="number of characters of text to train on, at most"
    )
    add_overwrite(p)

    def add_engine(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--tasks", type=int, metavar="N", help="number of tasks; by default it depends on the size of the inputs"
        )
        where = "run --workers tasks at once, in processes of this machine or as array jobs"
        p.add_argument("--executor", choices=["local", "slurm"], default="local", help=where)
        p.add_argument("--cluster", type=Path, help="file with what the jobs ask for, like configs/slurm/cpu.yaml")
        add_workers(p)
        add_overwrite(p)

    p = command("shard", "tokenise documents into shards with an index")
    add_inputs(p)
    p.add_argument(
        "--id_field",
        default="id",
        help="field that names a document; without it, or if it is empty, file and line do",
    )
    a_tokenizer = "a sentencepiece model, a Hugging Face tokenizer.json, or the directory that holds it"
    p.add_argument("--tokenizer", type=Path, required=True, help=a_tokenizer)
    add_output(p)
    p.add_argument(
        "--unicode_form", choices=["NFC", "NFKC", "none"], default="NFC", help="Unicode normalization of the text"
    )
    keep = "make all line ends newline characters, or keep them"
    p.add_argument("--line_ends", choices=["lf", "keep"], default="lf", help=keep)
    joined = (
        "join the files of each `directory`, of each tree below N directories (`directory:N`), or the records with "
    )
    p.add_argument(
        "--join", metavar="KEY", help=f"{joined}the same value of a field (the field's name) to one document"
    )
    heading = "line before each of what is joined, such as '# file: {path}', by --join or as files[].content"
    p.add_argument("--heading", metavar="TEMPLATE", help=heading)
    blocks = "YAML file that names filters of datatrove, which documents pass before joining (docs/data.md, Filters)"
    p.add_argument("--pipeline", type=Path, metavar="FILE", help=blocks)
    p.add_argument(
        "--min_tokens", type=int, default=0, help="leave out documents with fewer tokens, counted after joining"
    )
    add_engine(p)

    p = command(
        "append", "add documents to a dataset that `shard` made, with the same options, without rewriting its shards"
    )
    add_inputs(p, text_field=False)
    p.add_argument("--to", type=Path, required=True, metavar="DATASET", help="directory that --out of `shard` named")
    add_engine(p)

    p = command("import-tokens", "make a dataset of documents that another program tokenised")
    formats = "Megatron .bin and .idx, llm.c or nanoGPT .bin, Dolma or NumPy .npy, datatrove .ds, MDS, Parquet"
    p.add_argument(
        "inputs", nargs="+", type=_input, metavar="INPUT", help=f"{formats}: files, directories or patterns of them"
    )
    p.add_argument("--tokenizer", type=Path, required=True, help=f"tokenizer that made the ids: {a_tokenizer}")
    add_output(p)
    p.add_argument("--eos_id", type=int, metavar="ID", help="id that separates documents in the files, if not EOS")
    borders = "documents end where the format says, or at EOS, also across files; without it the former if possible"
    p.add_argument("--borders", choices=["index", "eos"], help=borders)
    dtype = "type of ids in files that do not tell it; without it, it is guessed"
    p.add_argument("--dtype", choices=["uint16", "uint32", "int32", "int64"], help=dtype)
    column = "column of the ids in Parquet and MDS; without it input_ids or tokens"
    p.add_argument("--tokens_field", metavar="COLUMN", help=column)
    accept = "continue even if the ids seem to be those of another tokenizer"
    p.add_argument("--accept", action="store_true", help=accept)
    add_overwrite(p)

    p = command("convert-tokenizer", "make a tokenizer.json of a file of tiktoken or a tekken.json")
    p.add_argument("file", type=Path, help="*.tiktoken or tekken.json")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    pattern = "how a file of tiktoken splits a text into words: gpt2, cl100k, o200k or a regular expression"
    p.add_argument("--pattern", help=f"{pattern}; not needed for the files of OpenAI's encodings")
    p.add_argument("--bos", metavar="TOKEN", help="BOS of a file of tiktoken; without it, EOS serves as BOS too")
    p.add_argument("--eos", metavar="TOKEN", help="EOS of a file of tiktoken")

    p = command("index", "index tar shards (KEY.tokens.bin) of another program")
    add_dataset(p)
    p.add_argument("--tokenizer", type=Path, required=True, help=f"tokenizer of the shards: {a_tokenizer}")
    add_overwrite(p)

    p = command("validate", "check all checksums, offsets and tokens; exit code 1 stands for a fault")
    add_dataset(p)
    add_workers(p)

    p = command("stats", "report document lengths, sources, duplicates, bytes and words per token, unigram entropy")
    add_dataset(p)
    p.add_argument("--segment_length", type=int, default=2048, help="tokens of a segment, the unit of lengths")
    p.add_argument("--json", type=Path, help="JSON file to write the numbers to")
    p.add_argument("--plot", type=Path, help="PNG file to write the histogram of lengths to")
    add_workers(p)

    p = command("synth", "generate documents that test memory: key-value recall, passkeys in noise")
    add_output(p)
    p.add_argument("--documents", type=int, default=4096, help="number of documents")
    p.add_argument("--tokenizer", type=Path, help="tokenizer of the text dataset that is mixed with the documents")
    p.add_argument("--tokens", type=int, default=2048, help="tokens of a document, or of the longest one")
    p.add_argument("--shortest", type=int, metavar="N", help="if given, documents have N, 2N, ... tokens")
    p.add_argument("--keys", type=int, default=64, help="number of keys of a document")
    fewest = "if given, half of the documents use fewer keys, down to this number"
    p.add_argument("--fewest", type=int, metavar="KEYS", help=fewest)
    p.add_argument("--values", type=int, default=64, help="number of different values")
    p.add_argument("--change", type=float, default=0.0, help="probability that a pair gives its key a new value")
    p.add_argument("--noise", type=float, default=0.0, help="share of noise between pairs")
    p.add_argument("--noise_tokens", type=int, default=64, help="number of different noise tokens")
    p.add_argument("--passkey", type=float, default=0.0, help="share of documents with a passkey instead of pairs")
    p.add_argument("--digits", type=int, default=5, help="digits of a passkey")
    thick = "share of passkey documents with many mentions, without which the task is hardly learned"
    p.add_argument("--thick", type=float, default=0.5, help=thick)
    gap = "largest distance of mentions in such documents, in tokens: at least twice what local attention sees"
    p.add_argument("--longest_gap", type=int, default=64, help=gap)
    change = "probability that a mention gives another passkey"
    p.add_argument("--passkey_change", type=float, default=0.0, help=change)
    p.add_argument("--seed", type=int, default=0, help="seed of the documents")
    add_overwrite(p)

    p = command("collect-stdlib", "collect the sources of Python's standard library as long documents")
    p.add_argument("out", type=Path, help="file to write, ending in .jsonl.gz")
    return top
