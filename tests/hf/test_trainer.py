"""transformers' Trainer on an export: padded, accumulated and distributed batches are trained as documents alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import infini_train.hf  # noqa: F401 (the Auto classes)
from tests.helpers.exports import SIZES, tiny_export

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer
from transformers import TrainingArguments
import infini_train.hf

TEXTS = ["def f(x): return x", "import os", "class A:\\n    pass\\n", "for i in range(10): print(i)"]
for export in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(export)
    alone, model = (AutoModelForCausalLM.from_pretrained(export).train() for _ in range(2))
    documents = [torch.tensor(tokenizer(text).input_ids) for text in TEXTS]
    logits = [alone(ids[None], use_cache=False).logits[0, :-1] for ids in documents]
    loss = F.cross_entropy(torch.cat(logits), torch.cat([ids[1:] for ids in documents]))
    loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=f"{export}-run", max_steps=1, use_cpu=True, per_device_train_batch_size=ROWS, seed=0,
        gradient_accumulation_steps=STEPS, gradient_checkpointing=True, optim="sgd", learning_rate=1.0,
        weight_decay=0.0, max_grad_norm=1e9, **quiet,
    )
    trainer = Trainer(
        model, arguments, train_dataset=Dataset.from_dict({"input_ids": [ids.tolist() for ids in documents]}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False), processing_class=tokenizer,
    )
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    # The trainer divides by the number of labels, and counts the first token of rows that are padded on the left.
    labels = sum(len(ids) - 1 for ids in documents)
    share = labels / (labels + PADDED)
    assert abs(logged - share * loss.item()) < 1e-4, (logged, share * loss.item())
    for name, p in alone.named_parameters():
        step = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(step, share * p.grad, rtol=1e-4, atol=1e-5, msg=name)
print("the same", flush=True)
if torch.distributed.is_initialized():  # gloo's threads must not outlive the interpreter
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("processes", "rows", "padded"), [(1, 4, 3), (2, 1, 0)])
def test_a_step_is_that_of_each_document_alone(tmp_path, processes, rows, padded):
    """One process with a batch padded on the left; two (gloo, DDP) with gradient accumulation."""
    exports = [
        tiny_export(tmp_path / "sliding", memory="selective-delta", sliding_window=8),
        tiny_export(tmp_path / "output", memory="paper-delta", output_memory_dim=4),
    ]
    values = {"ROWS": rows, "STEPS": 4 // (rows * processes), "PADDED": padded}
    lines = [f"{name} = {value}" for name, value in values.items()]
    (tmp_path / "script.py").write_text("\n".join((*lines, SCRIPT)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, tmp_path / "script.py", *exports], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same") == processes


@pytest.mark.parametrize("use_cache", [True, False])
def test_predictions_are_logits_alone(tmp_path, use_cache):
    """Not the cache, nor the memories that the model returns after whole segments without one."""
    model = AutoModelForCausalLM.from_pretrained(tiny_export(tmp_path / "export"), use_cache=use_cache).eval()
    ids = torch.randint(3, 288, (3, 2 * SIZES["segment_length"]), generator=torch.Generator().manual_seed(1))
    seen = []
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path / "run"), per_device_eval_batch_size=2, use_cpu=True, report_to="none"
        ),
        eval_dataset=Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}),
        compute_metrics=lambda found: seen.append(found.predictions) or {},
    )
    trainer.evaluate()
    torch.testing.assert_close(torch.from_numpy(seen[0]), model(ids).logits.detach())
