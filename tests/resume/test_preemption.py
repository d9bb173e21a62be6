"""A signal at any instant: the run saves, leaves, and goes on as if nothing had been; every step is done once."""

import random
import signal

import pytest

from tests.helpers.results import assert_identical, logged_losses, results
from tests.helpers.runs import fit


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("seed", range(5))
def test_a_signal_at_any_instant(unbroken, tmp_path, number, seed):
    dataset, expected, instants = unbroken
    run = tmp_path / "run"
    for instant in sorted(random.Random(f"{number}{seed}").sample(range(1, instants - 20), 2)):
        left = fit(run, dataset, die_at=instant, number=number)
        assert left.code in (128 + number, 0), left.err  # 0: it was in the last step or after
    if left.code:
        assert f"infini-train: {number.name}: leaving, saved up to" in left.err
        assert fit(run, dataset).code == 0
    found = results(run)
    for state in (expected["state"], found["state"]):
        state.pop("loops", None)  # as in test_resume
    assert_identical(found, expected)
    assert [step for losses in logged_losses(run) for step, _ in losses] == list(range(1, 21))
