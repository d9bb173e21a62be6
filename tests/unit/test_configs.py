"""Every shipped config is parsed by the command line's own parser and its model built on the meta device."""

from pathlib import Path

import pytest
import torch

from benchmarks import recipe
from infini_train.cli import TrainingCLI, train
from infini_train.model import InfiniConfig
from infini_train.model.flops import parameters

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MILLIONS = {
    "debug": 1.3,
    "muon": 1.3,
    "160m": 162,
    "1b": 1100,
    "8b": 8030,
    "llama-continual": 135,
    "recall": 0.162,
}  # parameters, as each file's first line promises

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


class ParseOnly(TrainingCLI):
    def instantiate_trainer(self, **kwargs):
        return None

    def _run_subcommand(self, subcommand):
        pass


def parse(config: Path, *extra: str) -> TrainingCLI:
    return train(ParseOnly, ["fit", "--config", str(config), "--data.train", "somewhere", *extra])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config(path, tmp_path):
    extra = []
    if "pretrained:" in path.read_text():  # its weights are not here; SmolLM2-135M's shape is
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
        sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        InfiniConfig(**heads, **sizes, segment_length=256).save_pretrained(tmp_path)
        extra = ["--model.pretrained", str(tmp_path)]
    cli = parse(path, *extra)
    model = cli.model
    model.starts_fresh = False  # no weights are read
    with torch.device("meta"):
        model.configure_model()
    assert sum(p.numel() for p in model.parameters()) == parameters(model.config)
    assert parameters(model.config) / 1e6 == pytest.approx(MILLIONS[path.stem], rel=0.05)
    data, trainer = cli.config.fit.data, cli.config.fit.trainer
    ranks = int(trainer.devices) * trainer.num_nodes
    assert data.lanes == data.micro_batch_size * ranks * trainer.accumulate_grad_batches


def test_unknown_option_is_named(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("model:\n  hiden_size: 3\n")
    with pytest.raises(SystemExit) as stopped:
        parse(tmp_path / "c.yaml")
    assert stopped.value.code == 2
    assert "hiden_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arm", "name", "steps"), [("adamw", "debug", (300, 180)), (recipe.BEST, "muon", (600, 600))]
)
def test_the_measured_recipes_are_those_of_the_configurations(arm, name, steps):
    """configs/debug.yaml with the options of an arm of docs/recipe.md, and the file that has them; steps: of both."""
    options = [*recipe.BASE.split(), *recipe.ARMS[arm].split()]
    measured, shipped = (
        parse(CONFIGS[0].parent / f"{file}.yaml", *more).config.fit for file, more in (("debug", options), (name, ()))
    )
    assert measured.model == shipped.model
    assert measured.data == shipped.data
    assert (measured.trainer.max_steps, shipped.trainer.max_steps) == steps
