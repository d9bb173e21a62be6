"""What is saved with the plugin (`import infini_train.hf`) loads as remote code, without it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import infini_train.hf  # noqa: F401 (the Auto classes)
from infini_train.model import InfiniConfig, InfiniForCausalLM
from tests.helpers.exports import SIZES, tiny_export

IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, None])
def test_a_saved_model_holds_its_code(tmp_path: Path, auto: type | None) -> None:
    if auto is None:  # a model that was never exported
        model = InfiniForCausalLM(InfiniConfig(**SIZES))
    else:
        model = auto.from_pretrained(tiny_export(tmp_path / "export"), trust_remote_code=False)
    assert type(model).__module__ == "infini_train.model.modeling"
    model.save_pretrained(tmp_path / "saved")
    name = f"AutoModel{'' if auto is AutoModel else 'ForCausalLM'}"
    reference = model.config.auto_map[name]
    remote = get_class_from_dynamic_module(reference, str(tmp_path / "saved")).from_pretrained(tmp_path / "saved")
    assert type(remote).__module__.startswith("transformers_modules.")
    expected, found = (m.eval()(IDS, use_cache=False)[0] for m in (model, remote))
    assert torch.equal(found, expected)
    # What was saved of one kind of model holds the code of all that the configuration names.
    for other in model.config.auto_map.values():
        get_class_from_dynamic_module(other, str(tmp_path / "saved"))
