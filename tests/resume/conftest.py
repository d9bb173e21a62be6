"""The unbroken run that interrupted ones are compared with."""

import pytest

from tests.helpers.datasets import make_dataset
from tests.helpers.results import LENGTHS, results
from tests.helpers.runs import fit


@pytest.fixture(scope="package")
def unbroken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    make_dataset(directory / "shards", LENGTHS)
    run = fit(directory / "unbroken", directory / "shards")
    assert run.code == 0, run.err
    found = results(directory / "unbroken")
    assert [step for step, _ in found["curves"]["train/loss"]] == list(range(1, 21))
    return directory / "shards", found, run.instants
