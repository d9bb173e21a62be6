"""The main job, `make train`: from long documents to a tokenizer, shards, a model, generated text and a report.

Every step is a command that a user can type, and is printed before it runs; after it, the time that it took. Finished
steps are not repeated.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def step(title: str, *command: str | Path) -> None:
    """Print a title and a command, run the command, and print how long it took."""
    words = [str(word) for word in command]
    print(f"\n=== {title}\n$ {shlex.join(words)}", flush=True)
    begin = time.monotonic()
    if code := subprocess.run([str(BIN / words[0]), *words[1:]], cwd=ROOT).returncode:
        sys.exit(f"quickstart: the step above failed with exit code {code}")
    print(f"({time.monotonic() - begin:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="directory of documents; by default Python's standard library")
    parser.add_argument("--config", type=Path, default=Path("configs/debug.yaml"))
    options = parser.parse_args()
    if options.data and not options.data.is_dir():
        sys.exit(f"quickstart: --data {options.data}: no such directory")

    name = f"{options.config.stem}-{options.data.resolve().name if options.data else 'stdlib'}"
    data, run = Path("data") / name, Path("runs") / name
    (ROOT / data).mkdir(parents=True, exist_ok=True)
    documents: Path = options.data.resolve() if options.data else data / "documents.jsonl.gz"
    tokenizer, shards = data / "tokenizer.model", data / "shards"
    train, valid = shards / "train", shards / "valid"
    prep = ("infini-train", "prep")
    datasets = ("--data.train", train, "--data.validation", valid)

    # The commands detect finished outputs that were made with the same options.
    if not options.data:
        step("documents: the standard library", *prep, "collect-stdlib", documents)
    step("tokenizer", *prep, "tokenizer", documents, "--out", tokenizer, "--vocab_size", "4096", "--overwrite")
    step(
        "shards and index",
        *(*prep, "shard", documents, "--tokenizer", tokenizer, "--out", shards),
        *("--validation_fraction", "0.05", "--overwrite"),
    )
    for dataset in (train, valid):
        step("checking the shards", *prep, "validate", dataset)
    step("statistics, to compare the validation loss with", *prep, "stats", valid, "--segment_length", "64")
    config = ("--config", options.config, "--run", run, *datasets)
    step("training", "infini-train", "fit", *config, "--ckpt_path", "last")
    step("validation", "infini-train", "validate", *config)
    export = run / f"export-{(ROOT / run / 'checkpoints' / 'latest').read_text()}"
    if not (ROOT / export).exists():
        step("export", "infini-train", "export", run / "checkpoints", export)
    step("the export, in transformers", "python", "launch/sample.py", export, "--dataset", valid)
    step("curves, heat maps and samples", "infini-train", "report", run, "--out", run / "report.html")
    print(
        f"\nLook at {ROOT / run / 'report.html'}; for more: {BIN}/tensorboard --logdir {run}, http://localhost:6006"
    )


if __name__ == "__main__":
    main()
