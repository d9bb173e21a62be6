"""Measures the speed of sharding: `python -m benchmarks.preparation DOCUMENTS... --tokenizer T.model`.

Runs all of `data_prep shard` in one process (read, normalise, tokenise, plan, write, check, index) on a sample of the
documents, and compares it with sentencepiece's own encoding of the same texts in memory, by document and by line, and
with datatrove's tokenizer step for the same vocabulary. With `--all`, it then prepares all documents by the command
with --workers processes, and reports the peak memory of the largest process.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece
from datatrove.data import Document as TroveDocument
from datatrove.pipeline.tokens import DocumentTokenizer
from rich.console import Console
from rich.table import Table

import data_prep.engine
from benchmarks.timing import interleaved
from data_prep.documents import Document, DocumentReader
from data_prep.shard import shard_corpus
from data_prep.sources import find_inputs
from infini_train.tokenizer.export import export_tokenizer

ROUNDS = 3


def sample(inputs: list[Path], size: int) -> list[str]:
    """Return texts of about `size` characters in total, from files spaced evenly over the inputs."""
    files = [file for file in find_inputs(inputs, Path("none")) if file.size]
    step = max(1, sum(file.size for file in files) // size)
    reader = DocumentReader(files[::step], "text", "id")
    return [item.text for item in reader if isinstance(item, Document)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a sentencepiece model")
    parser.add_argument("--megabytes", type=int, default=16, help="approximate size of the sample")
    parser.add_argument(
        "--all",
        nargs=argparse.REMAINDER,
        help="also prepare all documents, with the `data_prep shard` options that follow",
    )
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    texts = sample(options.inputs, options.megabytes * 1_000_000)
    characters = sum(map(len, texts))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(options.tokenizer))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "corpus").mkdir()
        for number, text in enumerate(texts):
            (root / "corpus" / f"{number:06d}.txt").write_text(text)
        export_tokenizer(
            options.tokenizer, root, bos_id=processor.bos_id(), eos_id=processor.eos_id(), max_length=1 << 30
        )
        # In this process, so that the time to start workers is not measured.
        data_prep.engine.ordered_map = lambda function, items, _: map(function, items)

        def ours() -> None:
            shard_corpus([root / "corpus"], root / "out", options.tokenizer, tasks=1)
            shutil.rmtree(root / "out")

        def stock() -> None:
            eos = processor.id_to_piece(processor.eos_id())
            tokenizer = DocumentTokenizer(str(root / "stock"), str(root / "tokenizer.json"), eos_token=eos)
            documents = (TroveDocument(text=text, id=str(n)) for n, text in enumerate(texts))
            tokenizer.run(documents, 0, 1)
            shutil.rmtree(root / "stock")

        jobs = {
            "data_prep shard, all stages": ours,
            "sentencepiece, whole documents": lambda: [processor.encode(text) for text in texts],
            "sentencepiece, line by line": lambda: [
                [processor.encode(line) for line in text.splitlines(keepends=True)] for text in texts
            ],
            "datatrove's DocumentTokenizer": stock,
        }
        seconds = interleaved(jobs, ROUNDS)
    table = Table(
        "one process", "M characters/s", title=f"{len(texts):,} documents, {characters / 1e6:.1f} M characters"
    )
    rates = {name: characters / statistics.median(times) / 1e6 for name, times in seconds.items()}
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.2f}")
    Console().print(table)
    found: dict[str, object] = {"M characters/s": {name: round(rate, 3) for name, rate in rates.items()}}
    if options.all is not None:
        with tempfile.TemporaryDirectory() as name:
            words = [sys.executable, "-m", "data_prep", "shard", *options.inputs, "--tokenizer", options.tokenizer]
            words += ["--out", Path(name) / "out", "--workers", options.workers, *options.all]
            begin = time.perf_counter()
            subprocess.run([str(word) for word in words], check=True)
            found["all: seconds"] = round(time.perf_counter() - begin, 1)
            found["all: M characters read"] = (
                sum(file.size for file in find_inputs(options.inputs, Path("none"))) / 1e6
            )
            found["all: peak MiB of a process"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
