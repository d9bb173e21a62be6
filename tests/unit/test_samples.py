"""Samples during training are what a loop over whole forward passes draws, and training does not notice them."""

import numpy as np
import pytest
import torch

from data_prep.__main__ import main as data_prep
from infini_train.inspection.events import history
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.training.callbacks.samples import Samples, continuation
from infini_train.training.callbacks.throughput import Throughput
from tests.helpers.corpora import text, trained_tokenizer
from tests.helpers.results import assert_identical, results
from tests.helpers.runs import fit

EOS = 2


def test_a_continuation_is_what_a_loop_draws():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    config = InfiniConfig(vocab_size=50, segment_length=8, memory="selective-delta", initializer_range=0.5, **sizes)
    model = InfiniForCausalLM(config).train()
    prompt_T = np.arange(3, 23)
    before = torch.random.get_rng_state()
    found_T = continuation(model, prompt_T, 15, eos_id=EOS, seed=7)
    assert model.training and torch.equal(torch.random.get_rng_state(), before)
    ids = torch.from_numpy(prompt_T)[None]
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(7)
        for _ in range(15):
            logits = model.eval()(ids).logits[0, -1] / 0.7
            logits[EOS] = -torch.inf
            ids = torch.cat([ids, torch.multinomial(logits.softmax(0)[None], 1)], 1)
    assert found_T.tolist() == ids[0, 20:].tolist()


def test_every_must_be_positive():
    with pytest.raises(ValueError, match="sample_every: found 0, expected at least 1"):
        Samples(0, Throughput())


@pytest.mark.slow
def test_training_does_not_notice_samples(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(10):
        (tmp_path / "texts" / f"{number}.txt").write_text(text(number, 200 + 10 * number))
    words = ["--tokenizer", str(trained_tokenizer(tmp_path)), "--out", str(tmp_path / "shards")]
    words += ["--validation_fraction", "0.2", "--workers", "1"]
    assert data_prep(["shard", str(tmp_path / "texts"), *words]) == 0
    options = ["--data.validation", str(tmp_path / "shards" / "valid"), "--model.vocab_size", "290"]
    for name, extra in (("with", ["--sample_every", "4"]), ("without", [])):
        run = fit(tmp_path / name, tmp_path / "shards" / "train", *options, "--trainer.max_steps", "10", *extra)
        assert run.code == 0, run.err
    samples = dict(history(tmp_path / "with" / "tensorboard").texts["sample/text_summary"])
    assert samples.keys() == {4, 8} and samples[4] != samples[8]
    assert all(sample.startswith("    | ") and "\n    > " in sample for sample in samples.values())
    assert_identical(results(tmp_path / "with"), results(tmp_path / "without"))
