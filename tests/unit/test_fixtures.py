"""Checkpoints and exports of an earlier build (tests/fixtures) resume and load with today's code, to the bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infini_train.hf.commands import export
from tests.helpers.arithmetic import arithmetic
from tests.helpers.results import logged_losses, tensors

REPOSITORY, FIXTURES = Path(__file__).parents[2], Path(__file__).parents[1] / "fixtures"
RUNS = ["paper-linear", "selective-delta-tied", "paper-delta-zero2"]
SAVED, LAST = "step-00000003", "step-00000005"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
# Other versions, instruction sets and makes of processor sum in another order.
TOLERANCE = 0.0 if arithmetic().items() <= EXPECTED.items() else 1e-6

LOAD_OLD_THEN_NEW = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def load(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=remote)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=remote).eval()
    ids = tokenizer("the memory of a long text is read in each head by its queries", return_tensors="pt").input_ids
    assert ids.shape[1] > 2 * model.config.segment_length
    with torch.no_grad():
        logits = model(ids).logits
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    return type(model).__module__, ids, logits, made

exports = sys.argv[1:]
remote = True
old = [load(directory) for directory in exports]
assert "infini_train" not in sys.modules
import infini_train.hf
remote = False
for directory, (module, *expected) in zip(exports, old, strict=True):
    assert module.startswith("transformers_modules."), module
    module, *found = load(directory)
    assert module == "infini_train.model.modeling", module
    for name, a, b in zip(("ids", "logits", "generated"), found, expected, strict=True):
        assert torch.equal(a, b), f"{directory}: {name}"
"""


@pytest.fixture
def directory(tmp_path) -> Path:
    """A copy of the fixtures with whole exports; paths in the runs' configurations are relative to it."""
    root = tmp_path / "fixtures"
    shutil.copytree(FIXTURES, root)
    for name in RUNS:
        shutil.copytree(FIXTURES / "common", root / name / "export", dirs_exist_ok=True)
    return root


def python(directory: Path, *words: object) -> None:
    """Run the interpreter in `directory` with today's code and one thread, as the fixtures were made."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(directory / "home"),
    }
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def check_continuation(run: Path, expected: Path, losses: dict[str, float]) -> None:
    """Compare the last checkpoint and the logged losses of a resumed run with those of the unbroken run."""
    last = run / "checkpoints" / LAST
    compare(tensors(last), tensors(expected))
    lanes = sorted(file.name for file in expected.glob("lanes-*"))
    assert sorted(file.name for file in last.glob("lanes-*")) == lanes
    for name in lanes:
        compare(load_file(last / name), load_file(expected / name))
    assert json.loads((last / "cursor.json").read_text()) == json.loads((expected / "cursor.json").read_text())
    found_metrics, metrics = (json.loads((path / "metrics.json").read_text()) for path in (last, expected))
    assert found_metrics.pop("loss") == pytest.approx(metrics.pop("loss"), rel=TOLERANCE, abs=0)
    assert found_metrics == metrics
    (logged,) = logged_losses(run)
    assert [step for step, _ in logged] == [4, 5]
    assert dict(logged) == pytest.approx({step: losses[str(step)] for step in (4, 5)}, rel=TOLERANCE, abs=0)


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


# Two ranks take twice as long as one process.
@pytest.mark.parametrize("name", [*RUNS[:2], pytest.param(RUNS[2], marks=pytest.mark.slow)])
def test_checkpoint_resumes(directory, name):
    run = directory / name / "run"
    config = run / "checkpoints" / SAVED / "config.yaml"
    python(directory, "-m", "infini_train", "fit", "--config", config, "--ckpt_path", "last")
    check_continuation(run, directory / name / "expected", EXPECTED["losses"][name])


def test_exports_load_with_their_own_code_and_with_the_plugin(directory):
    python(directory, "-c", LOAD_OLD_THEN_NEW, *(directory / name / "export" for name in RUNS))


@pytest.mark.parametrize("name", RUNS)
def test_export_of_the_checkpoint_has_the_weights_of_the_old_export(directory, name):
    export(directory / name / "run" / "checkpoints", directory / "again", dataset=directory / "data")
    found, expected = (
        load_file(path / "model.safetensors") for path in (directory / "again", directory / name / "export")
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
