"""Scores the tasks of lm_eval_tasks. `infini-train evaluate tasks` copies this file beside the task files, where
lm-evaluation-harness finds it, so it must not import anything of this project."""

import re
from typing import Any


def document(doc: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """Return the log-likelihood of a document with the divisor of each metric: words, bytes or tokens."""
    (likelihood,) = results
    words, size = len(re.split(r"\s+", doc["text"])), len(doc["text"].encode())
    return {
        "word_perplexity": (likelihood, words),
        "byte_perplexity": (likelihood, size),
        "bits_per_byte": (likelihood, size),
        "nats_per_token": (likelihood, doc["tokens"]),
    }


def nats_per_token(items: list[tuple[float, int]]) -> float:
    """Aggregate to the mean loss per token over all documents."""
    return -sum(likelihood for likelihood, _ in items) / sum(tokens for _, tokens in items)


def recall(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 if the first number of the answer is the target, otherwise 0, in total and for the prompt's depth."""
    correct = float(results[0] == doc["target"])
    return {"exact_match": correct, doc["depth"]: correct}
