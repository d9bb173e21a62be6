"""`infini-train evaluate COMMAND` (or `python -m infini_train.evaluation`): segments, recall, passkey, tasks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from infini_train.commands import EVALUATIONS, PROGRAM, load, with_underscores
from infini_train.errors import OptionParser, reported

NAME = f"{PROGRAM} evaluate"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 for success, 2 for bad input or options."""
    options = vars(_parser().parse_args(with_underscores(sys.argv[1:] if arguments is None else arguments)))
    command = options.pop("command")
    return reported(f"{NAME} {command}", lambda: load(EVALUATIONS[command].function)(**options))


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(prog=NAME, description="Measure what a trained model remembers of long text.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str) -> argparse.ArgumentParser:
        style, description = argparse.ArgumentDefaultsHelpFormatter, EVALUATIONS[name].summary
        return commands.add_parser(name, help=description, description=description, formatter_class=style)

    def add_subject(p: argparse.ArgumentParser, rows: int, dataset: str) -> None:
        what = "an exported or imported model, a checkpoint, or a run for its latest one"
        p.add_argument("directory", type=Path, metavar="MODEL", help=what)
        p.add_argument("--dataset", required=True, help=f"directory or URL of shards{dataset}")
        p.add_argument("--rows", type=int, default=rows, help="documents that are read in parallel")
        p.add_argument("--out", type=Path, help="JSON file to write; it must not exist")
        p.add_argument("--plot", type=Path, help="PNG file to write; it must not exist")
        where = "where to compute; auto: on a GPU if there is one"
        p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help=where)
        dtypes = ["float32", "bfloat16", "float64"]
        p.add_argument("--dtype", choices=dtypes, default="float32", help="data type of the weights")

    def add_drawn(p: argparse.ArgumentParser, rows: int) -> None:
        add_subject(p, rows, " that `infini-train prep synth` made; new documents of the same kind are drawn")
        p.add_argument("--seed", type=int, default=0, help="seed of the documents")

    p = command("segments")
    add_subject(p, 8, "")
    p.add_argument("--documents", type=int, help="read only this many documents, the longest ones")
    p.add_argument("--max_tokens", type=int, help="read only this many tokens of each document, from its start")

    anchors = "also measure what a continuous cache, an adapted head and a unigram cache find in the same past"
    p.add_argument("--anchors", action="store_true", help=anchors)

    p = command("recall")
    add_drawn(p, rows=8)
    p.add_argument("--times", type=float, default=16, help="document length, relative to the dataset's longest")
    p.add_argument("--documents", type=int, default=16, help="number of documents")

    p = command("passkey")
    add_drawn(p, rows=10)
    p.add_argument("--lengths", type=int, nargs="+", default=[2048, 16384, 131072], help="tokens of the documents")
    p.add_argument("--depths", type=int, default=11, help="number of depths, evenly from the beginning to the end")
    p.add_argument("--samples", type=int, default=10, help="documents for each length and depth")
    spelled = "let `generate` write the keys, instead of predicting each digit after the true ones"
    p.add_argument("--generate", action="store_true", help=spelled)

    p = command("tasks")
    p.add_argument("out", type=Path, metavar="OUT", help="directory to make, for lm_eval's --include_path")
    p.add_argument("--tokenizer", type=Path, required=True, help="directory of the model whose tokenizer is used")
    formats = "text files (one document each), .jsonl, .parquet, or directories of them"
    p.add_argument("--documents", type=Path, nargs="+", default=[], help=formats)
    p.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens of the prompts")
    depths = [0, 0.25, 0.5, 0.75, 1]
    p.add_argument("--depths", type=float, nargs="+", default=depths, help="position of the answer, from 0 to 1")
    p.add_argument("--samples", type=int, default=10, help="prompts for each length and depth")
    p.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
