"""docs/adding-a-memory-rule.md, carried out: its file and its three lines are all that a new rule needs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.datasets import make_dataset

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "adding-a-memory-rule.md"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a copy of the package to which the page's rule was added, as the page says."""
    root = tmp_path_factory.mktemp("package")
    shutil.copytree(REPOSITORY / "infini_train", root / "infini_train", ignore=shutil.ignore_patterns("__pycache__"))
    file, import_line, entry, names = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    model = root / "infini_train" / "model"
    (model / "gated_delta.py").write_text(file)
    rules = (model / "rules.py").read_text()
    rules = rules.replace("from .memory_rule", f"{import_line}from .memory_rule", 1)
    (model / "rules.py").write_text(rules.replace('    "paper-linear"', f'{entry}    "paper-linear"', 1))
    configuration = (model / "configuration.py").read_text()
    changed = re.sub(r"^MemoryRuleName = .*\n", lambda _: names, configuration, flags=re.MULTILINE)
    assert changed != configuration
    (model / "configuration.py").write_text(changed)
    return root


def run(package: Path, *words: str | Path) -> str:
    environment = {"PYTHONPATH": f"{package}{os.pathsep}{REPOSITORY}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, **environment},
        cwd=package,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "jobs",
    [("equals_a_loop", "generates", "counts"), pytest.param(("shares_windows",), marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_numerics(package, tmp_path, jobs):
    run(package, "-m", "tests.helpers.added_rule", tmp_path, *jobs)


def test_its_export_needs_only_transformers(package, tmp_path):
    run(package, "-m", "tests.helpers.added_rule", tmp_path, "exports")
    script = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/export', trust_remote_code=True)\n"
        "assert 'infini_train' not in sys.modules\n"
        "logits = model.eval()(torch.arange(40)[None] % 31).logits\n"
        "assert torch.equal(logits, torch.load(sys.argv[1] + '/logits.pt'))\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_trains_and_resumes_to_the_bit(package, tmp_path):
    make_dataset(tmp_path / "shards", [50, 300, 20, 170])
    options = {
        "--data.train": tmp_path / "shards",
        "--data.segment_length": 8,
        "--data.segments_per_window": 4,
        "--data.lanes": 2,
        "--data.micro_batch_size": 2,
        "--data.num_workers": 0,
        "--model.vocab_size": 100,
        "--model.hidden_size": 16,
        "--model.intermediate_size": 16,
        "--model.num_hidden_layers": 2,
        "--model.num_attention_heads": 2,
        "--model.num_key_value_heads": 1,
        "--model.memory": "gated-delta",
        "--model.optimizer.schedule": "wsd",
        "--model.optimizer.decay_steps": 1,
        "--checkpoint.every_n_steps": 3,
        "--checkpoint.keep_last": 9,
        "--trainer.accelerator": "cpu",
        "--trainer.max_steps": 6,
    }
    words = [word for option in options.items() for word in option]
    command = ["-m", "infini_train", "fit", *words]
    run(package, *command, "--run", tmp_path / "whole")
    begin, end = tmp_path / "whole/checkpoints/step-00000003", tmp_path / "whole/checkpoints/step-00000006"
    run(package, *command, "--run", tmp_path / "resumed", "--ckpt_path", begin)
    again = tmp_path / "resumed/checkpoints/step-00000006"
    for name in ("state-00000-of-00001.safetensors", "lanes-00000-of-00001.safetensors"):
        expected, found = load_file(end / name), load_file(again / name)
        assert expected.keys() == found.keys() and any("rule.decay_weight" in key or ".M" in key for key in found)
        for key in expected:
            assert torch.equal(expected[key], found[key]), key
