"""Datasets, models and runs from elsewhere: no name in them leads out of their directory, and no class is hidden."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from jsonargparse import Namespace

import infini_train.data.remote as remote
from infini_train.data.remote import load_index
from infini_train.files import plain_name
from infini_train.inspection.report import _checkpoint
from infini_train.model.loading import read_safetensors
from infini_train.parsing import foreign_classes
from infini_train.plan import plan
from infini_train.run_files import latest
from infini_train.training.callbacks.step_guard import StepGuard
from infini_train.training.checkpoint_format import check
from infini_train.training.loggers import continued
from infini_train.training.run_lock import lock
from tests.helpers.datasets import make_dataset

OUTSIDE = ["../outside", "/tmp/outside", "a/b", "a\\b", "..", ".", "", "a\0b", 7, None]
FIELDS = {
    "index_npz": lambda index, name: index.update(index_npz=name),
    "tokenizer.file": lambda index, name: index["tokenizer"].update(file=name),
    "shards[1].name": lambda index, name: index["shards"][1].update(name=name),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_a_directory(name):
    with pytest.raises(ValueError, match=r"latest: found .*, expected the plain name of a file"):
        plain_name(name, "latest")


@pytest.mark.parametrize("name", ["shard-00000.tar", "..a", "a b", "ä.npz"])
def test_plain_names(name):
    assert plain_name(name, "latest") == name


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("local", [True, False])
def test_index_of_a_dataset(tmp_path, monkeypatch, field, local):
    """Nothing but the index itself is asked for, and nothing is written outside of the cache."""
    make_dataset(tmp_path / "set", [30, 20, 10, 40])
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    FIELDS[field](index, "../../harmless")
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    asked = []
    request = remote.RemoteFiles._request
    monkeypatch.setattr(
        remote.RemoteFiles, "_request", lambda self, name, *place: asked.append(name) or request(self, name, *place)
    )
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    where = str(tmp_path / "set") if local else f"file://{tmp_path}/set"
    message = rf"index.json: {re.escape(field)}: found '../../harmless', expected the plain name"
    with pytest.raises(ValueError, match=message):
        load_index(where, tmp_path / "cache")
    assert asked == ([] if local else ["index.json"])
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_names_in_a_run(tmp_path):
    (tmp_path / "latest").write_text("../elsewhere\n")
    with pytest.raises(ValueError, match=r"latest: found '../elsewhere'"):
        latest(tmp_path)
    assert "latest: found '../elsewhere'" in _checkpoint(tmp_path).fault
    (tmp_path / "latest").write_text("step-00000003")
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "COMPLETE").write_text(json.dumps({"../latest": 13}))
    with pytest.raises(ValueError, match=r"COMPLETE: found '../latest'"):
        check(tmp_path / "step-00000003")
    assert "COMPLETE: found '../latest'" in _checkpoint(tmp_path).fault


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside"])
def test_names_of_loggers(tmp_path, name):
    (tmp_path / "loggers.json").write_text(json.dumps([["CSVLogger", name]]))
    with pytest.raises(ValueError, match=rf"loggers.json: found '{name}', expected the plain name"):
        continued(Namespace(class_path="CSVLogger", init_args=Namespace(version=None)), tmp_path)


def test_names_of_a_models_shards(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(ValueError, match=r"index.json: found '../b.safetensors'"):
        read_safetensors(tmp_path)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "notes")
    with pytest.raises(OSError, match="lock"):
        lock(tmp_path)
    assert (tmp_path / "notes").read_text() == "mine"


def test_what_is_told_of_a_skipped_step_follows_no_links(tmp_path):
    """Files of known names that are written when a loss is not finite."""
    guard = StepGuard(tmp_path, nonfinite="skip")
    guard.norm, guard.batches = torch.tensor(float("nan")), [{"lane_ids": torch.zeros(1), "docs": torch.zeros(1)}]
    trainer = SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True, datamodule=None)
    trainer.strategy = SimpleNamespace(barrier=lambda: None)
    module = SimpleNamespace(step_loss=torch.tensor(1.0), mean_step_loss=lambda: torch.tensor(1.0))
    module.lanes = SimpleNamespace(empty_non_finite=list)
    (tmp_path / "notes").write_text("mine")
    for name in ("nonfinite-step-00000000-rank-00000.pt", "skipped-steps.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "notes")
    reason = guard._non_finite(trainer, module)
    with pytest.raises(OSError, match=r"skipped-steps.jsonl"):
        guard._record(trainer, module, reason)
    assert (tmp_path / "notes").read_text() == "mine"
    dumped = torch.load(tmp_path / "nonfinite-step-00000000-rank-00000.pt", weights_only=True)
    assert dumped[0].keys() == guard.batches[0].keys()


def test_plan_imports_no_class_that_a_configuration_names(tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Some: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load((Path(__file__).parents[2] / "configs" / "debug.yaml").read_text())
    config["trainer"] |= {"callbacks": ["elsewhere.Some"], "logger": {"class_path": "elsewhere.Some"}}
    config["trainer"] |= {"profiler": "elsewhere.Some", "plugins": [{"class_path": "elsewhere.Some"}]}
    (tmp_path / "named.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("infini_train.plan.bytes_per_rank", lambda *_: {"weights": 1.0})  # takes seconds
    plan(str(tmp_path / "named.yaml"), gpus_per_node=1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens_per_step"] == 4 * 64 * 16
    for value in ("elsewhere.Some", {"class_path": "elsewhere.Some"}):
        config["trainer"]["strategy"] = value
        (tmp_path / "named.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(ValueError, match=r"named.yaml: found elsewhere.Some, expected no class of another"):
            plan(str(tmp_path / "named.yaml"))
    assert not (tmp_path / "imported").exists()


def test_foreign_classes_are_found_anywhere():
    options = {
        "trainer": {
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}],
            "strategy": {"class_path": "infini_train.training.strategy.ZeroStrategy"},
            "callbacks": [{"class_path": "a.B", "init_args": {"inner": {"class_path": "torchvision.C"}}}],
        }
    }
    assert foreign_classes(options) == {"a.B", "torchvision.C"}


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_are_those_of_the_umask(tmp_path, umask, mode):
    code = "from pathlib import Path; from infini_train.files import atomic_file\nwith atomic_file(Path('f')): pass"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, umask=umask)
    assert (tmp_path / "f").stat().st_mode & 0o777 == mode
