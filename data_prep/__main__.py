"""`infini-train prep COMMAND`, or `python -m data_prep COMMAND`: prepares datasets. --help lists the commands."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.options import parser
from infini_train.commands import with_underscores
from infini_train.errors import reported


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m data_prep`; returns the exit code as `prep` does."""
    words = with_underscores(sys.argv[1:] if arguments is None else arguments)
    return _main(parser("python -m data_prep").parse_args(words), "data_prep")


def prep(words: Sequence[str]) -> int:
    """`infini-train prep`; returns 0 for success, 1 if `validate` found faults, 2 for bad input or options."""
    return _main(parser("infini-train prep").parse_args(words), "infini-train prep")


def _main(options: argparse.Namespace, name: str) -> int:
    # Of RuntimeErrors, libraries raise those that bad input leads to, such as too little text for a vocabulary.
    try:
        return reported(f"{name} {options.command}", _run, options, expected=(ValueError, OSError, RuntimeError))
    finally:
        if _reads_standard_input(options):
            from data_prep.sources import spooled

            spooled(options.to if options.command == "append" else options.out).unlink(missing_ok=True)


def _run(options: argparse.Namespace) -> int:
    def reading() -> dict[str, Any]:
        names = ("text_field", "encoding", "as_text", "chat_template")
        return {name: getattr(options, name) for name in names}

    # Each command imports its modules here, so that --help answers at once.
    match options.command:
        case "tokenizer":
            from data_prep.train_tokenizer import train_tokenizer

            train_tokenizer(
                options.inputs,
                options.out,
                vocab_size=options.vocab_size,
                model_type=options.model_type,
                sample_bytes=options.sample_bytes,
                overwrite=options.overwrite,
                accept=options.accept,
                include=options.include,
                exclude=options.exclude,
                user_symbols=options.user_symbols,
                **reading(),
            )
        case "shard" | "append":
            from data_prep.engine import Cluster
            from data_prep.shard import append_corpus, shard_corpus

            if (options.executor == "slurm") != (options.cluster is not None):
                raise ValueError("--executor slurm and --cluster FILE go together: the file says what jobs ask for")
            if options.cluster and _reads_standard_input(options):
                raise ValueError("inputs: found - (standard input), which jobs on a cluster cannot read")
            how: dict[str, Any] = {
                "workers": options.workers,
                "tasks": options.tasks,
                "cluster": Cluster.load(options.cluster) if options.cluster else None,
                "overwrite": options.overwrite,
                "accept": options.accept,
                "include": options.include,
                "exclude": options.exclude,
            }
            if options.command == "append":
                append_corpus(options.inputs, options.to, **how)
                return 0
            shard_corpus(
                options.inputs,
                options.out,
                options.tokenizer,
                validation_fraction=options.validation_fraction,
                test_fraction=options.test_fraction,
                shard_tokens=options.shard_tokens,
                id_field=options.id_field,
                unicode_form=options.unicode_form,
                line_ends=options.line_ends,
                **reading(),
                join=options.join,
                heading=options.heading,
                min_tokens=options.min_tokens,
                pipeline=options.pipeline,
                **how,
            )
        case "index":
            from data_prep.indexing import index_shards

            index_shards(options.dataset, options.tokenizer, overwrite=options.overwrite)
        case "import-tokens":
            from data_prep.import_tokens import import_tokens

            import_tokens(
                options.inputs,
                options.out,
                options.tokenizer,
                validation_fraction=options.validation_fraction,
                test_fraction=options.test_fraction,
                shard_tokens=options.shard_tokens,
                eos_id=options.eos_id,
                borders=options.borders,
                dtype=options.dtype,
                tokens_field=options.tokens_field,
                accept=options.accept,
                overwrite=options.overwrite,
            )
        case "convert-tokenizer":
            from data_prep.convert_tokenizer import convert_tokenizer

            convert_tokenizer(options.file, options.out, options.pattern, options.bos, options.eos)
        case "validate":
            from data_prep.validate import validate_dataset
            from infini_train.data.index import DatasetIndex

            if not DatasetIndex.load(options.dataset).sealed:
                print(
                    f"{options.dataset}: made by an earlier version, whose index.json has no digest of itself: "
                    "a change of its options would not be noticed"
                )
            faults = validate_dataset(options.dataset, workers=options.workers)
            for fault in faults:
                print(f"{options.dataset}: {fault}", file=sys.stderr)
            print(f"{options.dataset}: {len(faults)} faults" if faults else f"{options.dataset}: no fault")
            return 1 if faults else 0
        case "stats":
            from data_prep.stats import dataset_stats, show_stats, warning
            from infini_train import plots

            if options.plot:
                plots.check_available()
            stats = dataset_stats(options.dataset, options.segment_length, workers=options.workers)
            show_stats(stats, str(options.dataset), options.json, options.plot)
            if line := warning(stats):
                print(f"data_prep: warning: {line}", file=sys.stderr)
        case "synth":
            from data_prep.synth import synthesise
            from infini_train.synthetic import PasskeyTask, RecallTask, TaskMixture, Vocabulary

            length = {"tokens": options.tokens, "shortest": options.shortest}
            recall = RecallTask(**length, fewest=options.fewest, change=options.change, noise=options.noise)
            mentions = {"thick": options.thick, "longest_gap": options.longest_gap, "change": options.passkey_change}
            passkey = PasskeyTask(**length, digits=options.digits, **mentions)
            synthesise(
                options.out,
                TaskMixture(recall, passkey, options.passkey),
                Vocabulary(options.keys, options.values, options.noise_tokens),
                count=options.documents,
                tokenizer=options.tokenizer,
                seed=options.seed,
                validation_fraction=options.validation_fraction,
                test_fraction=options.test_fraction,
                shard_tokens=options.shard_tokens,
                overwrite=options.overwrite,
            )
        case "collect-stdlib":
            from data_prep.collect_stdlib import collect_stdlib

            collect_stdlib(options.out)
    return 0


def _reads_standard_input(options: argparse.Namespace) -> bool:
    return Path("-") in getattr(options, "inputs", ())


if __name__ == "__main__":
    sys.exit(main())
