"""The cluster, started for the session and left running, and a small dataset with a configuration for it."""

import argparse
import ast
import decimal
import inspect
import mailbox
import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import Cluster
from tests.slurm.runs import CONFIG


@pytest.fixture(scope="session")
def cluster():
    assert os.geteuid() == 0 and shutil.which("apt-get"), "the test cluster needs root on Debian"
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the jobs' python
    os.environ["OMP_NUM_THREADS"] = "1"
    return Cluster()


@pytest.fixture(scope="session")
def config(cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("slurm")
    sources = [Path(module.__file__) for module in (argparse, ast, decimal, inspect, mailbox, tarfile)]
    prep = (sys.executable, "-m", "data_prep")
    tokenizer = ("--out", root / "tokenizer.model", "--vocab-size", CONFIG["model"]["vocab_size"])
    cluster.run(*prep, "tokenizer", *sources, *tokenizer)
    cluster.run(*prep, "shard", *sources, "--tokenizer", root / "tokenizer.model", "--out", root / "shards")
    options = {**CONFIG, "data": {**CONFIG["data"], "train": str(root / "shards")}}
    (root / "tiny.yaml").write_text(yaml.safe_dump(options))
    return root / "tiny.yaml"
