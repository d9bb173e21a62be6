"""docs/ecosystem.md names the versions of the clients that these tests run, and the extra `clients` installs them."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
CLIENTS = ["lm_eval", "accelerate", "peft", "trl", "openai", "transformers", "torch", "torchao", "huggingface_hub"]


def installed(name: str) -> str:
    return version(name).partition("+")[0]


def test_the_table_names_the_versions_that_run():
    page = (REPOSITORY / "docs" / "ecosystem.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    for client, said, *_ in rows[1:]:
        named = re.findall(rf"\b({'|'.join(CLIENTS)})\b", f"{client} {said}".lower())
        assert named, client
        assert re.findall(r"\d+\.\d+[\d.]*", said) == [installed(name) for name in dict.fromkeys(named)], client


def test_the_extra_pins_the_versions_that_run():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ours, *clients = map(Requirement, extras["clients"])
    assert ours.name == "infini-train" and {client.name for client in clients} == set(CLIENTS)
    for client in clients:
        assert str(client.specifier) == f"=={installed(client.name)}", client.name
