"""Makes a dataset from documents: webdataset tars with `BOS tokens EOS` of each document, and an index."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.engine import Cluster, run_here, submit
from data_prep.fields import Heading, check_path, read_template
from data_prep.filtering import load_pipeline
from data_prep.finished import is_finished, parts_of
from data_prep.formats import RECORDS, encoding_named
from data_prep.input_files import InputFile, fingerprint_inputs
from data_prep.planning import REJECTS, TooFewDocuments, UnknownField, count_rejects, format_counts
from data_prep.sources import find_inputs
from data_prep.split import check_fractions, split_options
from data_prep.steps import stages_of
from data_prep.texts import LineEnds, UnicodeForm
from data_prep.work import Work
from infini_train.tokenizer.loading import Tokenizer, load_tokenizer

# Limits of the default number of tasks.
TASK_BYTES = 8 << 20  # approximate bytes of input for a task
MAX_TASKS = 500
MAX_READERS = 8  # tasks that share the largest file of many documents, because each of them reads all of it


def shard_corpus(
    inputs: Sequence[Path | str],
    output: Path,
    tokenizer_path: Path,
    validation_fraction: float = 0.0,
    test_fraction: float = 0.0,
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
    line_ends: LineEnds = "lf",
    encoding: str | None = None,
    as_text: Sequence[str] = (),
    chat_template: Path | None = None,
    accept: bool = False,
    pipeline: Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    heading: str | None = None,
) -> None:
    """Tokenise all documents of `inputs` into the dataset `output`, or into `output`/train and those held out.

    A document with the text or the id of an earlier one is left out; rejects.jsonl lists everything that is left out.
    `output` appears only when it is complete and on disk. Its bytes depend on inputs and options, never on `tasks` or
    `workers`. A run that was interrupted continues when it is started again with the same options, without repeating
    finished tasks; a run whose output exists already does nothing.

    Args:
        inputs: files and directories (see `find_inputs`).
        output: dataset directory to make.
        tokenizer_path: the tokenizer, as `load_tokenizer` takes it.
        validation_fraction: documents go to `output`/valid if the hash of their id falls below this fraction, and the
            others to `output`/train; if none does, the one with the lowest hash goes there. 0: there is no such part.
        test_fraction: documents with the next higher hashes go to `output`/test in the same way.
        shard_tokens: approximate tokens of a shard.
        text_field: path of the text in a record (see `fields.value_at`).
        id_field: path of the id in a record; empty: file and line are the id.
        unicode_form: normalisation of the text.
        join: joins documents of a group into one: files of the same directory ("directory"), files below the same
            first N directories of an input ("directory:N"), or records with the same value of a field (its path).
        min_tokens: documents with fewer tokens are left out, after joining.
        workers: tasks that run at once.
        tasks: number of tasks into which the work is divided; None: by the size of the inputs.
        cluster: SLURM resources; the tasks are then submitted as jobs instead of run here.
        overwrite: replace an output, or discard unfinished work, of other options.
        line_ends: "lf" makes all line ends \\n, "keep" leaves them as they are.
        encoding: that of texts, None for UTF-8, "detect" to find out for each file.
        as_text: patterns of names of files that hold a text each, whatever they look like.
        chat_template: file with the Jinja template that makes a text of a list of messages in `text_field`.
        accept: leave out files of formats that are not read, and make a dataset even if little of the inputs became
            text, instead of raising an error.
        pipeline: file that names datatrove's filters, which documents pass before they are joined and tokenised (see
            `load_pipeline`).
        include: patterns of names of files to read; without any, all are read.
        exclude: patterns of names of files not to read.
        heading: template of a line before each of the documents that are joined, such as `# file: {path}` (see
            `fields.Heading`), with fields of records or the path of files in braces.

    Raises:
        FileNotFoundError: an input or the tokenizer does not exist.
        ValueError: the corpus is empty or was probably misread, an option is out of range, `output` holds anything
            else, or there is unfinished work of other options.
    """
    check_fractions(validation_fraction, test_fraction)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens: found {shard_tokens}, expected at least 1")
    if min_tokens < 0:
        raise ValueError(f"min_tokens: found {min_tokens}, expected at least 0")
    if join and join.startswith("directory:") and not join.removeprefix("directory:").isdigit():
        raise ValueError(f"join: found {join}, expected directory, directory:N or a field")
    for name, path in (("text_field", text_field), ("id_field", id_field), ("join", join)):
        if path and not path.startswith("directory:"):
            check_path(name, path)
    if heading:
        Heading(heading)
        if (not join and "[]." not in text_field) or text_field.count("[]") > 1:
            raise ValueError(
                f"heading: found text_field {text_field} {'with' if join else 'without'} --join, expected --join, or "
                "one list of objects, such as files[].content"
            )
    encoding = encoding_named(encoding)
    tokenizer = load_tokenizer(tokenizer_path)
    if example := tokenizer.changed_example():
        print(f"warning: {tokenizer_path} cannot give every text back: {example}", file=sys.stderr)
    filters = load_pipeline(pipeline) if pipeline else None
    files = find_inputs(inputs, output, text_field, as_text, encoding, accept, include, exclude)
    options: dict[str, Any] = {
        "inputs": fingerprint_inputs(files),
        "tokenizer_sha256": tokenizer.sha256,
        **split_options(validation_fraction, test_fraction),
        "shard_tokens": shard_tokens,
        "text_field": text_field,
        "id_field": id_field,
        "unicode_form": unicode_form,
        "join": join,
        "min_tokens": min_tokens,
        "bos_id": tokenizer.bos_id,  # not covered by the sha256 of a tokenizer.json
        "eos_id": tokenizer.eos_id,
    }
    # Only what is not the default, so that datasets of earlier versions were made with the same options.
    if line_ends != "lf":
        options["line_ends"] = line_ends
    if encoding:
        options["encoding"] = encoding
    if as_text:
        options["as_text"] = list(as_text)
    if chat_template:
        options["chat_template"] = read_template(chat_template)
    if filters:
        options["pipeline"] = filters
    if heading:
        options["heading"] = heading
    work = Work(output, options, _number_of_tasks(files, tasks))
    if is_finished(output, options, overwrite):
        print(f"{output} exists and was made with the same options: nothing to do")
        work.remove()  # the run that made it may have been killed before it could
        return
    run(work, files, tokenizer, inputs, workers, cluster, overwrite, accept)
    if not cluster:
        report(output)


def append_corpus(
    inputs: Sequence[Path | str],
    dataset: Path,
    workers: int = 1,
    tasks: int | None = None,
    cluster: Cluster | None = None,
    overwrite: bool = False,
    accept: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> None:
    """Add the documents of `inputs`, in new shards, to a dataset that `shard_corpus` made, with the same options.

    Existing shards do not change, and no document moves between train and valid. Duplicates of documents in the
    dataset or in `inputs` are left out (rejects-N.jsonl). Only new documents are joined with each other. Appending
    the newest inputs again changes nothing.

    Args:
        inputs: files and directories (see `find_inputs`).
        dataset: directory that was `output` of `shard_corpus`.
        workers: as in `shard_corpus`, as are the following.
        tasks: number of tasks.
        cluster: SLURM resources.
        overwrite: discard unfinished work of other options.
        accept: as in `shard_corpus`, as are the following.
        include: patterns of names of files to read.
        exclude: patterns of names of files not to read.

    Raises:
        ValueError: the dataset was made in another way or has these inputs already; or as in `shard_corpus`.
    """
    indexes = parts_of(dataset)
    if not indexes or not all("min_tokens" in index.options for index in indexes.values()):
        raise ValueError(f"{dataset}: expected a dataset that this version of `infini-train prep shard` made")
    first = next(iter(indexes.values()))
    tokenizer = load_tokenizer(first.root / first.tokenizer_file)
    made_with = first.options
    files = find_inputs(
        inputs,
        dataset,
        made_with["text_field"],
        made_with.get("as_text", ()),
        made_with.get("encoding"),
        accept,
        include,
        exclude,
    )
    same = {
        "validation_fraction",
        "test_fraction",
        "shard_tokens",
        "text_field",
        "id_field",
        "unicode_form",
        "join",
        "min_tokens",
    }
    same |= {"line_ends", "encoding", "as_text", "chat_template", "pipeline", "heading"}
    options: dict[str, Any] = {name: value for name, value in made_with.items() if name in same}
    options |= {"inputs": fingerprint_inputs(files), "tokenizer_sha256": tokenizer.sha256}
    base, done = {}, 0
    for part, index in indexes.items():
        index.check_files()
        index.remove_older_arrays()  # left over by an append that was killed
        appended = index.options.get("appended", [])
        if index.options["inputs"] == options["inputs"] or any(
            one["inputs"] == options["inputs"] for one in appended[:-1]
        ):
            raise ValueError(f"{dataset} has these inputs already")
        # If a killed run has finished this part already, the plan must start from the state before it.
        if appended and appended[-1]["inputs"] == options["inputs"]:
            base[part], done = (appended[-1]["shards"], appended[-1]["documents"]), done + 1
        else:
            base[part] = len(index.shards), index.documents
    options["base"] = base
    work = Work(dataset, options, _number_of_tasks(files, tasks))
    if done == len(indexes):
        print(f"{dataset} has these documents already: nothing to do")
        work.remove()
        return
    run(work, files, tokenizer, inputs, workers, cluster, overwrite, accept)
    if not cluster:
        report(dataset)


def run(
    work: Work,
    files: list[InputFile],
    tokenizer: Tokenizer,
    inputs: Sequence[Path | str],
    workers: int,
    cluster: Cluster | None,
    overwrite: bool,
    accept: bool,
) -> None:
    """Run all stages of a preparation on this machine, or submit them to a cluster.

    Args:
        work: the preparation.
        files: all files of the corpus.
        tokenizer: encodes the documents.
        inputs: the inputs as given, for messages.
        workers: tasks that run at once.
        cluster: SLURM resources, None to run here.
        overwrite: discard unfinished work of other options.
        accept: make a dataset even if little of the inputs became text.

    Raises:
        ValueError: there is unfinished work of other options, another run is writing, there are too few documents, or
            the inputs were probably misread.
    """
    if workers < 1:
        raise ValueError(f"workers: found {workers}, expected at least 1")
    with work.alone():
        work.open(files, overwrite)
        stages = stages_of(work, tokenizer, [str(path) for path in inputs], remote=cluster is not None, accept=accept)
        if cluster is None:
            try:
                run_here(stages, workers, work.logs)
            except (TooFewDocuments, UnknownField):  # running again could not succeed, so nothing is kept
                work.remove()
                raise
            print("\n".join(work.summary().lines()))
            work.remove()
            return
        jobs = submit(stages, workers, work.logs, cluster)
    print(f"submitted {', '.join(jobs)}: the last job makes {work.output}; logs are in {work.logs}")
    print("Run the same command again to submit the tasks that have not finished.")


def report(output: Path) -> None:
    """Print the size of a dataset and what its newest run left out."""
    for part, index in parts_of(output).items():
        print(f"{output / part}: {index.size}")
        appends = len(index.options.get("appended", []))
    rejects = output / (f"rejects-{appends}.jsonl" if appends else REJECTS)
    counts = count_rejects(rejects)
    print(f"left out: {format_counts(counts)}; see {rejects}" if counts else "no document left out")


def _number_of_tasks(files: list[InputFile], given: int | None) -> int:
    """Return the number of tasks: as given, or by the size of the inputs."""
    if given is not None:
        if given < 1:
            raise ValueError(f"tasks: found {given}, expected at least 1")
        return given
    total = sum(file.size for file in files)
    shared = max((file.size for file in files if file.format.kind in RECORDS), default=0)
    readers = MAX_READERS * total // shared if shared else MAX_TASKS
    return max(1, min(-(-total // TASK_BYTES), readers, MAX_TASKS))
