"""`infini-train evaluate COMMAND` (or `python -m infini_train.evaluation`): segments, recall, passkey, tasks."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data_prep.lm_eval_tasks import write_tasks

from .commands import evaluate_passkey, evaluate_recall, evaluate_segments

NAME = "infini-train evaluate"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 2 for bad input or options."""
    options = vars(_parser().parse_args(arguments))
    command, run = options.pop("command"), options.pop("run")
    try:
        run(**options)
    except (ValueError, OSError) as error:
        if os.environ.get("INFINI_TRACEBACK"):
            raise
        print(f"{NAME} {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=NAME, description="What a trained model makes of long text.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, description: str) -> argparse.ArgumentParser:
        style = argparse.ArgumentDefaultsHelpFormatter
        return commands.add_parser(name, help=description, description=description, formatter_class=style)

    def add_subject(p: argparse.ArgumentParser, rows: int, dataset: str) -> None:
        what = "an exported or imported model, a checkpoint, or a run's checkpoints for the latest"
        p.add_argument("directory", type=Path, metavar="MODEL", help=what)
        p.add_argument("--dataset", required=True, help=f"directory or URL of shards{dataset}")
        p.add_argument("--rows", type=int, default=rows, help="documents read side by side")
        p.add_argument("--out", type=Path, help="JSON file to write; must not exist")
        p.add_argument("--plot", type=Path, help="PNG file to write; must not exist")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        p.add_argument("--device", choices=["cpu", "cuda"], default=device, help="where to compute")
        dtypes = ["float32", "bfloat16", "float64"]
        p.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights")

    def add_drawn(p: argparse.ArgumentParser, rows: int) -> None:
        add_subject(p, rows, " by `data_prep synth`; other documents of its kind are drawn")
        p.add_argument("--seed", type=int, default=0, help="of the documents")

    p = command("segments", "loss by segment with the memory on, off, and exchanged for another document's")
    add_subject(p, 8, "")
    p.add_argument("--documents", type=int, help="read only so many, the longest ones")
    p.add_argument("--max-tokens", type=int, help="read only so many tokens of each document, from its start")
    p.set_defaults(run=evaluate_segments)

    p = command("recall", "accuracy on what only the memory knows, by segment, with it on, off, and another's")
    add_drawn(p, rows=8)
    p.add_argument(
        "--times", type=float, default=16, help="length of the documents, in those of the dataset's longest"
    )
    p.add_argument("--documents", type=int, default=16, help="how many")
    p.set_defaults(run=evaluate_recall)

    p = command("passkey", "passkeys recalled, by length of the document and depth of the key in it")
    add_drawn(p, rows=10)
    p.add_argument("--lengths", type=int, nargs="+", default=[2048, 16384, 131072], help="tokens of a document")
    p.add_argument("--depths", type=int, default=11, help="how many, evenly from the beginning to the end")
    p.add_argument("--samples", type=int, default=10, help="documents of each length and depth")
    spelled = "let `generate` spell the keys, instead of choosing each digit after the true ones"
    p.add_argument("--generate", action="store_true", help=spelled)
    p.set_defaults(run=evaluate_passkey)

    p = command("tasks", "write task files for lm-evaluation-harness: documents, passkey, key-value recall")
    p.add_argument("out", type=Path, metavar="OUT", help="directory to make; goes to lm_eval's --include_path")
    p.add_argument("--tokenizer", type=Path, required=True, help="directory of the model, for its tokenizer")
    formats = "text files (one document each), .jsonl, .parquet, or directories of them"
    p.add_argument("--documents", type=Path, nargs="+", default=[], help=formats)
    p.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens of a prompt")
    p.add_argument("--depths", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1], help="where the answer stands")
    p.add_argument("--samples", type=int, default=10, help="prompts of each length and depth")
    p.add_argument("--seed", type=int, default=0, help="of the prompts")
    p.set_defaults(run=write_tasks)
    return parser


if __name__ == "__main__":
    sys.exit(main())
