"""Tensor parallelism and FSDP2 of transformers: two processes (gloo) compute what one does; pipelines are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.distributed import DistributedConfig

from tests.helpers.models import OUTPUT, S, build

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import sys, torch
import infini_train.hf
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
for directory in sys.argv[1:]:
    whole, divided = (
        AutoModelForCausalLM.from_pretrained(directory, distributed_config=config).eval()
        for config in (None, DistributedConfig(tp_plan="auto"))
    )
    held, numbers = divided.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight.numel()
    assert held.to_local().numel() == numbers // 2, "each process holds half"
    ids = torch.load(f"{directory}/ids.pt")
    outs = [model(ids, labels=ids) for model in (whole, divided)]
    torch.testing.assert_close(outs[1].logits, outs[0].logits, rtol=1e-4, atol=1e-4)
    for out in outs:
        out.loss.backward()
    found, expected = (model.model.layers[0].self_attn.q_proj.weight.grad for model in (divided, whole))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    fsdp = DistributedConfig(fsdp_size=2)
    sharded = AutoModelForCausalLM.from_pretrained(directory, distributed_config=fsdp).eval()
    held, numbers = (model.model.layers[0].self_attn.q_proj.weight for model in (sharded, whole))
    assert held.to_local().numel() == numbers.numel() // 2
    loss = sharded(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, outs[0].loss)
    for name, p in whole.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(sharded.get_parameter(name).grad.full_tensor(), p.grad, msg=name)
    first, *others = (
        model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        for model in (whole, divided, sharded)
    )
    assert all(torch.equal(first, other) for other in others)
print("the same", flush=True)
"""


@pytest.mark.timeout(600)
def test_two_processes_equal_one(tmp_path):
    ids = torch.randint(3, 29, (2, 3 * S + 2), generator=torch.Generator().manual_seed(1))
    names = {"tied": ("selective-delta", True), "untied": ("selective-delta", False)}
    names |= {"output": ("paper-delta" + OUTPUT, False), "tied output": ("paper-delta" + OUTPUT, True)}
    for name, (memory, tied) in names.items():
        build(memory, torch.float32, tie_word_embeddings=tied).save_pretrained(tmp_path / name)
        torch.save(ids, tmp_path / name / "ids.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [*launch, tmp_path / "script.py", *(tmp_path / name for name in names)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same") == 2


def test_a_pipeline_is_refused():
    with pytest.raises(ValueError, match="pp_size: found 2, expected 1"):
        build("paper-linear")._resolve_parallel_plans(DistributedConfig(pp_size=2))
