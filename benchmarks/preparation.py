"""Measures the speed and memory of `prep shard`: `python -m benchmarks.preparation --data BOOKS`.

Speed: all stages (read, normalise, tokenise, plan, write, check, index) in one process, on samples of BOOKS, of the
sources of Python's standard library and of documents of 200 characters, beside sentencepiece's own encoding of the
same texts in memory, by document and by line, and datatrove's tokenizer step for the same vocabulary.

Memory: the peak of all stages in one process above what it held before, for one document of `--megabytes` in several
forms and with both kinds of tokenizer, and for 300,000 documents of 200 characters.

The tokenizers are trained on BOOKS: a sentencepiece model of 4,096 tokens, and a tokenizer.json of 16,384 that splits
words as Llama 3's does. Takes about 4 minutes.
"""

import gzip
import json
import random
import shutil
import statistics
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece
import tokenizers
from datatrove.data import Document as TroveDocument
from datatrove.pipeline.tokens import DocumentTokenizer
from rich.table import Table

import data_prep.engine
from benchmarks import results
from benchmarks.timing import child, growth_mib, interleaved
from data_prep.convert_tokenizer import PATTERNS
from data_prep.shard import shard_corpus
from data_prep.train_tokenizer import train_tokenizer
from infini_train.tokenizer.export import export_tokenizer

ROUNDS = 3
SAMPLE = 6_000_000  # characters of a sample
TRAINING = 10_000_000  # characters that the tokenizers are trained on
SHORT, SHORT_DOCUMENTS = 200, 300_000


def sample(files: list[Path], size: int) -> list[str]:
    """Texts of files spaced evenly over all, of `size` characters in total."""
    step = max(1, sum(file.stat().st_size for file in files) // size)
    texts = (file.read_text(errors="replace") for file in files[::step])
    kept, left = [], size
    for text in texts:
        kept.append(text[:left])
        left -= len(kept[-1])
        if not left:
            break
    return kept


def short_documents(text: str, count: int) -> Iterator[str]:
    draw = random.Random(0)
    for _ in range(count):
        start = draw.randrange(len(text) - SHORT)
        yield text[start : start + SHORT]


def write_lines(path: Path, texts: Iterator[str]) -> None:
    with open(path, "w") as file:
        file.writelines(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts))


def train_tokenizers(books: list[Path], root: Path) -> dict[str, Path]:
    """Paths by kind: a sentencepiece model and a directory with a tokenizer.json."""
    train_tokenizer(books, root / "t.model", vocab_size=4096, sample_bytes=TRAINING)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS["cl100k"]), "isolated")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=16384, special_tokens=["<s>", "</s>"], initial_alphabet=level.alphabet(), show_progress=False
    )
    made.train_from_iterator(sample(books, TRAINING), trainer)
    (root / "json").mkdir()
    made.save(str(root / "json" / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (root / "json" / "tokenizer_config.json").write_text(json.dumps(config))
    return {"sentencepiece": root / "t.model", "tokenizer.json": root / "json"}


def in_this_process() -> None:
    """Run tasks here, so that the time to start workers is not measured, and all memory is this process's."""
    data_prep.engine.ordered_map = lambda function, items, _: map(function, items)


def speeds(texts: list[str], model: Path, root: Path) -> dict[str, float]:
    """M characters a second of each program."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    root.mkdir()
    write_lines(root / "corpus.jsonl", iter(texts))
    export_tokenizer(model, root, bos_id=processor.bos_id(), eos_id=processor.eos_id(), max_length=1 << 30)

    def ours() -> None:
        shard_corpus([root / "corpus.jsonl"], root / "out", model, tasks=1)
        shutil.rmtree(root / "out")

    def stock() -> None:
        eos = processor.id_to_piece(processor.eos_id())
        tokenizer = DocumentTokenizer(str(root / "stock"), str(root / "tokenizer.json"), eos_token=eos)
        tokenizer.run((TroveDocument(text=text, id=str(n)) for n, text in enumerate(texts)), 0, 1)
        shutil.rmtree(root / "stock")

    jobs: dict[str, Callable[[], object]] = {
        "prep shard, all stages": ours,
        "sentencepiece, whole documents": lambda: [processor.encode(text) for text in texts],
        "sentencepiece, line by line": lambda: [
            [processor.encode(line) for line in text.splitlines(keepends=True)] for text in texts
        ],
        "datatrove's DocumentTokenizer": stock,
    }
    characters = sum(map(len, texts))
    seconds = interleaved(jobs, ROUNDS)
    return {name: characters / statistics.median(times) / 1e6 for name, times in seconds.items()}


def memory(corpus: Path, tokenizer: Path, root: Path) -> None:
    """Print the growth of this process in MiB, for the parent."""
    in_this_process()
    print(json.dumps(growth_mib(lambda: shard_corpus([corpus], root / "out", tokenizer, tasks=1))))
    shutil.rmtree(root / "out")


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory of books, one text file each")
    parser.add_argument("--megabytes", type=int, default=32, help="size of the one document whose memory is measured")
    parser.add_argument("--memory", nargs=3, type=Path, help="CORPUS TOKENIZER DIRECTORY: for child processes")
    options = parser.parse_args()
    if options.memory:
        memory(*options.memory)
        return
    books = sorted(options.data.glob("*.txt"))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        kinds = train_tokenizers(books, root)
        model = kinds["sentencepiece"]
        text = "\n\n".join(book.read_text() for book in books)
        huge = (text * (options.megabytes * 1_000_000 // len(text) + 1))[: options.megabytes * 1_000_000]
        (root / "huge.txt").write_text(huge)
        (root / "huge.txt.gz").write_bytes(gzip.compress(huge.encode(), 1))
        write_lines(root / "huge.jsonl", iter([huge]))
        write_lines(root / "short.jsonl", short_documents(text, SHORT_DOCUMENTS))
        del huge
        size = f"{options.megabytes} MB"
        cases = {
            f"text of {size}": ("huge.txt", "sentencepiece"),
            f"text of {size}, tokenizer.json": ("huge.txt", "tokenizer.json"),
            f"text of {size}, .gz": ("huge.txt.gz", "sentencepiece"),
            f"JSON record of {size}": ("huge.jsonl", "sentencepiece"),
            f"{SHORT_DOCUMENTS:,} short documents": ("short.jsonl", "sentencepiece"),
        }
        peaks = {
            what: child("preparation", "--data", options.data, "--memory", root / file, kinds[kind], root)
            for what, (file, kind) in cases.items()
        }
        in_this_process()
        library = Path(sysconfig.get_path("stdlib"))
        sources = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
        samples = {
            "books": sample(books, SAMPLE),
            "Python's library": sample(sources, SAMPLE),
            f"documents of {SHORT} characters": list(short_documents(text, SAMPLE // SHORT)),
        }
        rates = {what: speeds(texts, model, root / what) for what, texts in samples.items()}
    speed = Table("M characters/s, one process", *rates)
    for program in next(iter(rates.values())):
        speed.add_row(program, *(f"{rate[program]:.1f}" for rate in rates.values()))
    peak = Table("all stages in one process", "MiB above the start")
    for what, mib in peaks.items():
        peak.add_row(what, f"{mib:.0f}")
    ours = [rate["prep shard, all stages"] for rate in rates.values()]
    summary = {
        f"documents to shards in one process: {'; '.join(rates)}": "; ".join(f"{rate:.1f}" for rate in ours)
        + " M characters/s",
        f"memory that a {next(iter(peaks))} takes": f"{next(iter(peaks.values())):.0f} MiB",
    }
    figures = {"M characters/s": rates, "MiB": peaks}
    results.report("preparation", {"": speed, "memory": peak}, figures, summary, options.results)


if __name__ == "__main__":
    main()
