"""Writes task files for lm-evaluation-harness: perplexity of whole documents, and recall from long prompts.

Recall is measured by length (tokens of a prompt, BOS included, in the model's own tokenizer) and by depth (where in
the prompt the answer is: 0 at the beginning, 1 at the end). All prompts are generated here from a seed.
"""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import infini_train.hf  # noqa: F401  registers the model type, without which AutoTokenizer asks to run remote code
from data_prep.documents import Document, DocumentReader
from data_prep.lm_eval_prompts import PROMPTS, fill_prompt
from data_prep.sources import find_inputs
from infini_train.files import check_new, new_directory

SCORING = "infini_scoring"
ANSWER_TOKENS = 16  # enough for five digits, a space, and what a model may put before them


def write_tasks(
    out: Path,
    *,
    tokenizer: Path,
    documents: list[Path],
    lengths: list[int],
    depths: list[float],
    samples: int,
    seed: int,
) -> None:
    """Write the tasks infini_passkey, infini_kv and, if there are documents, infini_documents to a new directory.

    Args:
        out: directory to make, complete or not at all, for lm_eval's `--include_path`. It cannot be moved: its files
            name each other by absolute paths, because lm_eval resolves relative ones from its working directory.
        tokenizer: directory of the model whose tokenizer counts the tokens.
        documents: files and directories as `infini-train prep` reads them: text, .jsonl, .parquet.
        lengths: lengths of the prompts, in tokens.
        depths: positions of the answer, from 0 to 1.
        samples: number of prompts for each length and depth.
        seed: seed of the prompts. The same seed gives the same files, and the prompts of a length do not depend on
            the other lengths.

    Raises:
        ValueError: an option is out of range, a document cannot be read or is empty, or a length is too short.
        FileExistsError: `out` exists.
        FileNotFoundError: the tokenizer or a document does not exist.
    """
    wrong = [f"lengths: found {n}, expected at least 1" for n in lengths if n < 1]
    wrong += [f"depths: found {d}, expected 0 to 1" for d in depths if not 0 <= d <= 1]
    wrong += [f"samples: found {samples}, expected at least 1"] if samples < 1 else []
    for option, values in (("lengths", lengths), ("depths", depths)):
        wrong += [f"{option}: found {values}, expected each once"] if len(set(values)) < len(values) else []
    if wrong:
        raise ValueError("; ".join(wrong))
    out = out.resolve()
    check_new(out)
    if not (tokenizer / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{tokenizer}: expected a model with its tokenizer (no tokenizer_config.json in it)")
    tokens = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    if not tokens.encode("a", add_special_tokens=False):  # filling prompts would never end
        raise ValueError(f"{tokenizer}: its tokenizer finds no tokens in a text")
    files = find_inputs(documents, out) if documents else []

    with new_directory(out) as partial:
        writer = Writer(partial, out)
        shutil.copyfile(Path(__file__).with_name("lm_eval_scoring.py"), partial / f"{SCORING}.py")
        if files:
            writer.documents(DocumentReader(files, "text", "id"), tokens)
        for kind in PROMPTS:
            for length in lengths:
                writer.recall(kind, length, recall_prompts(kind, tokens, length, depths, samples, seed), depths)
            writer.group(kind, lengths, depths)


def recall_prompts(
    kind: str, tokenizer: PreTrainedTokenizerBase, length: int, depths: list[float], samples: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Generate the samples of one length.

    Prompts begin with BOS, as documents do in training. Each sample has the fields `prompt`, `target`, `depth` (the
    name of its metric) and `tokens` (BOS included).

    Args:
        kind: "passkey" or "kv".
        tokenizer: counts the tokens.
        length: maximum tokens of a prompt.
        depths: positions of the answer.
        samples: number of prompts for each depth.
        seed: random seed.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    # If the tokenizer encodes the text of BOS as BOS, the prompt contains it, and lm_eval adds no other, whatever its
    # options and the tokenizer's. Otherwise the tokenizer itself must add BOS.
    bos = tokenizer.bos_token or ""
    if encode(bos + "a")[:1] != [tokenizer.bos_token_id]:
        bos = ""
    added = 0 if bos else len(tokenizer.encode("a")) - len(encode("a"))
    for depth in depths:
        for sample in range(samples):
            task = PROMPTS[kind](random.Random(f"{seed} {kind} {length} {depth:g} {sample}"), depth, bos)
            prompt, tokens = fill_prompt(task, lambda text: len(encode(text)), length, added)
            yield {"prompt": prompt, "target": task.target, "depth": depth_name(depth), "tokens": tokens}


def depth_name(depth: float) -> str:
    """Return the name of the metric for one depth, such as `depth_0.25`."""
    return f"depth_{depth:g}"


class _Function(str):
    """A function `module.name`, which lm_eval looks up when it reads the YAML tag `!function`."""


class _Dumper(yaml.SafeDumper):
    """Writes repeated values in full, without YAML aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Function, lambda dumper, function: dumper.represent_scalar("!function", str(function)))


class Writer:
    """Writes task files into `directory`, which will be moved to `final`."""

    def __init__(self, directory: Path, final: Path):
        self.directory, self.final = directory, final

    def documents(self, reader: DocumentReader, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the task of the perplexity of whole documents."""

        def records() -> Iterator[dict[str, Any]]:
            for document in reader:
                if not isinstance(document, Document):
                    raise ValueError(f"document {document.id}: {document.reason} {document.detail}".strip())
                # Without BOS and EOS, as lm_eval counts tokens with add_bos_token=False; special tokens in the text
                # are text, as in training.
                tokens = len(tokenizer.encode(document.text, add_special_tokens=False, split_special_tokens=True))
                yield {"id": document.id, "text": document.text, "tokens": tokens}

        self._task(
            "infini_documents",
            records(),
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="text",  # a field name; a template would turn a text like "[...]" into a list
            process_results=_Function(f"{SCORING}.document"),
            metric_list=[
                *({"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")),
                {
                    "metric": "nats_per_token",
                    "aggregation": _Function(f"{SCORING}.nats_per_token"),
                    "higher_is_better": False,
                },
            ],
        )

    def recall(self, kind: str, length: int, prompts: Iterator[dict[str, Any]], depths: list[float]) -> None:
        """Write the recall task of one kind and length."""
        self._task(
            f"infini_{kind}_{length}",
            prompts,
            output_type="generate_until",
            doc_to_text="prompt",
            doc_to_target="target",
            generation_kwargs={"do_sample": False, "max_gen_toks": ANSWER_TOKENS, "until": ["\n", "."]},
            filter_list=[
                {
                    "name": "number",
                    "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}],
                }
            ],
            process_results=_Function(f"{SCORING}.recall"),
            metric_list=[
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics(depths)
            ],
        )

    def group(self, kind: str, lengths: list[int], depths: list[float]) -> None:
        """Write the group of the recall tasks of all lengths, with their mean."""
        means = [{"metric": metric, "filter_list": ["number"], "weight_by_size": False} for metric in metrics(depths)]
        task = [f"infini_{kind}_{length}" for length in lengths]
        self._yaml(f"infini_{kind}", {"group": f"infini_{kind}", "task": task, "aggregate_metric_list": means})

    def _task(self, task: str, records: Iterator[dict[str, Any]], **config: Any) -> None:
        with open(self.directory / f"{task}.jsonl", "w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
        data = {"test": str(self.final / f"{task}.jsonl")}
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": data}, "test_split": "test"}
        self._yaml(task, {"task": task, **source, **config})

    def _yaml(self, task: str, config: dict[str, Any]) -> None:
        config["metadata"] = {"version": 1.0}
        with open(self.directory / f"{task}.yaml", "w", encoding="utf-8") as file:
            yaml.dump(config, file, Dumper=_Dumper, sort_keys=False)


def metrics(depths: list[float]) -> list[str]:
    """Return the names of the metrics of recall: in total and by depth."""
    return ["exact_match", *map(depth_name, depths)]
