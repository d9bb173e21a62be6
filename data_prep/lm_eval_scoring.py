"""How the tasks are scored. `infini-train evaluate tasks` copies this file beside the task files, where
lm-evaluation-harness finds it; so it imports nothing."""

import re
from typing import Any


def document(doc: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """Log-likelihood of a document, with what to divide it by: words, bytes, tokens."""
    (likelihood,) = results
    words, size = len(re.split(r"\s+", doc["text"])), len(doc["text"].encode())
    return {
        "word_perplexity": (likelihood, words),
        "byte_perplexity": (likelihood, size),
        "bits_per_byte": (likelihood, size),
        "nats_per_token": (likelihood, doc["tokens"]),
    }


def nats_per_token(items: list[tuple[float, int]]) -> float:
    """Mean loss over the tokens of all documents."""
    return -sum(likelihood for likelihood, _ in items) / sum(tokens for _, tokens in items)


def recall(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the first number of the answer is the one asked for, else 0; again under the depth it stood at."""
    right = float(results[0] == doc["target"])
    return {"exact_match": right, doc["depth"]: right}
