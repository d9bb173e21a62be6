"""docs/ecosystem.md names the versions of the clients that these tests run."""

import re
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"
CLIENTS = ["lm_eval", "accelerate", "peft", "trl", "openai", "transformers", "torch", "torchao", "huggingface_hub"]


def test_the_table_names_the_versions_that_run():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    for client, said, *_ in rows[1:]:
        named = re.findall(rf"\b({'|'.join(CLIENTS)})\b", f"{client} {said}".lower())
        assert named, client
        expected = [version(name).partition("+")[0] for name in dict.fromkeys(named)]
        assert re.findall(r"\d+\.\d+[\d.]*", said) == expected, client
