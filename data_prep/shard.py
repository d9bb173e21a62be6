"""Documents to token shards: `BOS tokens EOS` of each in a webdataset tar, and the index beside them."""

from pathlib import Path
from typing import Any

from data_prep.documents import MANY, InputFile, UnicodeForm, find_inputs, fingerprint_inputs
from data_prep.engine import Cluster, run_here, submit
from data_prep.finished import is_finished, parts_of
from data_prep.planning import REJECTS, TooFewDocuments, counted, left_out
from data_prep.steps import stages_of
from data_prep.work import Work
from infini_train.tokenizer.loading import Tokenizer, load_tokenizer

TASK_BYTES = 8 << 20  # of input, about, unless the number of tasks is given
MOST_TASKS, MOST_READERS = 500, 8


def shard_corpus(
    inputs: list[Path],
    output: Path,
    tokenizer_path: Path,
    validation_fraction: float = 0.0,
    shard_tokens: int = 50_000_000,
    text_field: str = "text",
    id_field: str = "id",
    unicode_form: UnicodeForm = "NFC",
    join: str | None = None,
    min_tokens: int = 0,
    workers: int = 1,
    tasks: int | None = None,
    cluster: Cluster | None = None,
    overwrite: bool = False,
) -> None:
    """Tokenise all documents of `inputs` into the dataset `output`, or `output`/train and `output`/valid.

    Line ends become \\n, characters their `unicode_form`. A text or an id that an earlier document has is left out.
    `join` makes one document of those that belong together: the files of a directory ("directory"), of a tree below
    the first N directories of each input ("directory:N"), or records with the same value of a field (its name).
    Documents of fewer than `min_tokens` tokens are left out, then. A document goes to valid if the hash of its id
    falls below `validation_fraction`; if none does, the one with the lowest hash goes. What was left out stands in
    rejects.jsonl.

    The work is cut into `tasks` (None: by the size of the inputs), of which `workers` run at once, here or as jobs of
    a `cluster` that are only submitted. Those that are done are not done again by another run with the same options;
    `output` appears when everything is on disk, not before. Its bytes depend on inputs and options alone, neither on
    tasks nor on workers. A second run with the same options leaves it as it is.

    Raises ValueError for an empty corpus, for options out of range, and if `output` holds anything else or other
    options left unfinished work.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, not {validation_fraction}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, not {shard_tokens}")
    if min_tokens < 0:
        raise ValueError(f"min_tokens must be at least 0, not {min_tokens}")
    if join and join.startswith("directory:") and not join.removeprefix("directory:").isdigit():
        raise ValueError(f"join must be directory, directory:N or a field, not {join}")
    tokenizer = load_tokenizer(tokenizer_path)
    files = find_inputs(inputs, output)
    options = {
        "inputs": fingerprint_inputs(files),
        "tokenizer_sha256": tokenizer.sha256,
        "validation_fraction": validation_fraction,
        "shard_tokens": shard_tokens,
        "text_field": text_field,
        "id_field": id_field,
        "unicode_form": unicode_form,
        "join": join,
        "min_tokens": min_tokens,
        "bos_id": tokenizer.bos_id,  # tokenizer.json itself does not say which
        "eos_id": tokenizer.eos_id,
    }
    work = Work(output, options, _number_of_tasks(files, tasks))
    if is_finished(output, options, overwrite):
        print(f"{output} is there already, made with the same options: nothing to do")
        work.remove()  # whoever made it may have been killed before that
        return
    run(work, files, tokenizer, inputs, workers, cluster, overwrite)
    if not cluster:
        report(output)


def append_corpus(
    inputs: list[Path],
    dataset: Path,
    workers: int = 1,
    tasks: int | None = None,
    cluster: Cluster | None = None,
    overwrite: bool = False,
) -> None:
    """Add the documents of `inputs` to a dataset that `shard_corpus` made, with its options, in shards of their own.

    No shard is written anew, and no document changes from train to valid. Texts and ids that the dataset has are left
    out, as are those that come twice (rejects-N.jsonl). Groups (`join`) are of the new documents alone. The same
    inputs again change nothing.

    Raises as shard_corpus, and ValueError for a dataset that was made in another way.
    """
    indexes = parts_of(dataset)
    if not indexes or not all("min_tokens" in index.options for index in indexes.values()):
        raise ValueError(f"{dataset}: expected a dataset that this version of `data_prep shard` made")
    of = next(iter(indexes.values()))
    tokenizer = load_tokenizer(of.root / of.tokenizer_file)
    files = find_inputs(inputs, dataset)
    same = ("validation_fraction", "shard_tokens", "text_field", "id_field", "unicode_form", "join", "min_tokens")
    options: dict[str, Any] = {name: of.options[name] for name in same}
    options |= {"inputs": fingerprint_inputs(files), "tokenizer_sha256": tokenizer.sha256}
    base, done = {}, 0
    for place, index in indexes.items():
        index.check_files()
        index.remove_older_arrays()  # of an append that was killed
        appended = index.options.get("appended", [])
        if index.options["inputs"] == options["inputs"] or any(
            one["inputs"] == options["inputs"] for one in appended[:-1]
        ):
            raise ValueError(f"{dataset} has these inputs already")
        if appended and appended[-1]["inputs"] == options["inputs"]:  # a run that was killed did this part
            base[place], done = (appended[-1]["shards"], appended[-1]["documents"]), done + 1
        else:
            base[place] = len(index.shards), index.documents
    options["base"] = base
    work = Work(dataset, options, _number_of_tasks(files, tasks))
    if done == len(indexes):
        print(f"{dataset} has these documents already: nothing to do")
        work.remove()
        return
    run(work, files, tokenizer, inputs, workers, cluster, overwrite)
    if not cluster:
        report(dataset)


def run(
    work: Work,
    files: list[InputFile],
    tokenizer: Tokenizer,
    inputs: list[Path],
    workers: int,
    cluster: Cluster | None,
    overwrite: bool,
) -> None:
    """All stages of a work, here; or submit them."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    with work.alone():
        work.open(files, overwrite)
        stages = stages_of(work, tokenizer, [str(path) for path in inputs], remote=cluster is not None)
        if cluster is None:
            try:
                run_here(stages, workers, work.logs)
            except TooFewDocuments:  # nothing to go on from
                work.remove()
                raise
            work.remove()
            return
        jobs = submit(stages, workers, work.logs, cluster)
    print(f"submitted {', '.join(jobs)}: the last one makes {work.output}; logs in {work.logs}")
    print("The same command again submits what is not done.")


def report(output: Path) -> None:
    """Print what a dataset holds, and what its newest run left out."""
    for place, index in parts_of(output).items():
        print(
            f"{output / place}: {index.documents:,} documents, {index.total_tokens:,} tokens, "
            f"{len(index.shards)} shards"
        )
        appends = len(index.options.get("appended", []))
    rejects = output / (f"rejects-{appends}.jsonl" if appends else REJECTS)
    counts = left_out(rejects)
    print(f"left out: {counted(counts)}; see {rejects}" if counts else "no document left out")


def _number_of_tasks(files: list[InputFile], given: int | None) -> int:
    """By size; not so many that reading costs more than they give, as all who share a file read all of it."""
    if given is not None:
        if given < 1:
            raise ValueError(f"tasks must be at least 1, not {given}")
        return given
    total = sum(file.size for file in files)
    shared = max((file.size for file in files if file.format[0] in MANY), default=0)
    readers = MOST_READERS * total // shared if shared else MOST_TASKS
    return max(1, min(-(-total // TASK_BYTES), readers, MOST_TASKS))
