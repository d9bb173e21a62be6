"""What is carried beside the memories of the layers (the end of the segment before, for local attention; the output
memory) in training: saved, restored to the bit, and exported."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infini_train.hf.export import write_model
from infini_train.model import InfiniForCausalLM
from infini_train.training.checkpoint_format import read_model
from tests.helpers.datasets import make_dataset
from tests.helpers.results import LENGTHS, assert_identical, results
from tests.helpers.runs import fit

MODEL = ["--model.memory", "selective-delta", "--model.output_memory_dim", "4"]
MODEL += ["--model.window_dropout", "0.4", "--model.sliding_window"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sliding") / "shards"
    make_dataset(root, LENGTHS)
    return root


@pytest.mark.parametrize("sliding", [pytest.param("3", marks=pytest.mark.slow), "16"])
def test_resumes_to_the_bit_and_exports(shards, tmp_path, sliding):
    whole = fit(tmp_path / "whole", shards, *MODEL, sliding)
    assert whole.code == 0, whole.err
    killed = fit(tmp_path / "killed", shards, *MODEL, sliding, die_at=whole.instants // 2)
    assert killed.code != 0
    resumed = fit(tmp_path / "killed", shards, *MODEL, sliding)
    assert resumed.code == 0, resumed.err
    assert_identical(results(tmp_path / "whole"), results(tmp_path / "killed"))

    checkpoint = sorted((tmp_path / "whole" / "checkpoints").glob("step-*"))[-1]
    lanes = load_file(checkpoint / "lanes-00000-of-00001.safetensors")
    assert lanes["layers.0.near_k"].abs().amax(dim=(1, 2, 3)).min() > 0  # of every lane
    assert lanes["layers.2.output"].abs().amax(dim=(1, 2)).min() > 0
    config, weights = read_model(checkpoint)
    assert config.sliding_window == int(sliding)
    write_model(config, weights, tmp_path / "export", source=checkpoint, add_files=lambda directory: None)
    ids = torch.arange(40)[None] % config.vocab_size
    expected = InfiniForCausalLM.from_pretrained(tmp_path / "export").eval()(ids).logits
    torch.save(expected, tmp_path / "logits.pt")
    script = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/export', trust_remote_code=True)\n"
        "ids = torch.arange(40)[None] % model.config.vocab_size\n"
        "assert torch.equal(model.eval()(ids).logits, torch.load(sys.argv[1] + '/logits.pt'))\n"
        "assert 'infini_train' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_sliding_window_is_refused(shards, tmp_path):
    begun = fit(tmp_path / "run", shards, *MODEL, "4", "--trainer.max_steps", "3")
    assert begun.code == 0, begun.err
    other = fit(tmp_path / "run", shards, *MODEL, "5", "--trainer.max_steps", "6")
    assert other.code == 2 and "sliding_window: found 4, expected 5" in other.err


def test_more_than_two_segments_is_refused(shards, tmp_path):
    wide = fit(tmp_path / "run", shards, *MODEL, "17")
    assert wide.code == 2 and "sliding_window: found 17, expected 1 to 2 * segment_length = 16" in wide.err
