"""Random text, the files that data preparation makes of it, and the configuration of a run on them."""

import hashlib
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.train_tokenizer import train_tokenizer

REPOSITORY = Path(__file__).parents[2]


def trained_tokenizer(root: Path) -> Path:
    """A small tokenizer of words as `text` draws them."""
    (root / "a.txt").write_text(text(0, 2000))
    train_tokenizer([root / "a.txt"], root / "t.model", vocab_size=290)
    return root / "t.model"


def text(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return "".join(
        draw.choice(["mem", "win", "seg", "ra"]) + draw.choice(["ory", "dow", "ment"]) + draw.choice(" \n")
        for _ in range(words)
    )


def read_with_tarfile(dataset: Path) -> list[tuple[dict[str, Any], list[int]]]:
    documents = []
    for path in sorted(dataset.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in sorted(tar.getnames()):
                if name.endswith(".json"):
                    about = json.load(tar.extractfile(name))
                    data = tar.extractfile(name.removesuffix("json") + "tokens.bin").read()
                    documents.append((about, np.frombuffer(data, "<u2").tolist()))
    return documents


def all_bytes(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


CONFIG = {
    "model": {
        "vocab_size": 290,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "data": {"segment_length": 32, "segments_per_window": 4, "lanes": 4, "micro_batch_size": 4, "num_workers": 2},
    "trainer": {"max_steps": 12, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
}
