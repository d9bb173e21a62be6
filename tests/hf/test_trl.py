"""TRL's trainers on an Infini model: packed documents are trained as if each were alone."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import infini_train.hf  # noqa: F401 (the Auto classes)
from tests.helpers.models import VOCAB, S, build

LENGTHS = (2 * S + 1, 3, S, 2, 3, 3 * S - 1, 4 * S, 5)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def texts() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(4, VOCAB, (n,)) for n in LENGTHS]


def options(directory, **given) -> dict:
    quiet = {"report_to": "none", "use_cpu": True, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no"}
    return {"output_dir": str(directory), "max_steps": 1, "bf16": False, "seed": 0, **quiet, **given}


def test_sft_with_packing(tmp_path, tokenizer):
    """The loss and the gradients of a step over packed rows are those of the documents, one by one."""
    model = build("selective-delta", torch.float32, sliding_window=9)
    alone = build("selective-delta", torch.float32, sliding_window=9).train()
    logits = [alone(text[None], use_cache=False).logits[0, :-1] for text in texts()]
    total = sum(F.cross_entropy(x, text[1:], reduction="sum") for x, text in zip(logits, texts(), strict=True))
    loss = total / (sum(LENGTHS) - len(LENGTHS))
    loss.backward()
    packing = {"packing": True, "max_length": 5 * S, "per_device_train_batch_size": 8}
    arguments = SFTConfig(**options(tmp_path, learning_rate=1.0, optim="sgd", max_grad_norm=1e9, **packing))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = Dataset.from_dict({"input_ids": [text.tolist() for text in texts()]})
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) < len(LENGTHS), "several documents are in one row"
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(loss.item(), rel=1e-4)  # TRL rounds it
    for name, p in alone.named_parameters():
        step = before[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(step, p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_reward_model_with_lora(tmp_path, tokenizer):
    """The first loss is that of each answer's score, computed alone; LoRA changes the model, and merges exactly."""
    build("selective-delta", torch.float32).save_pretrained(tmp_path / "model")
    load = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", **load).eval()
    chosen, rejected = texts()[::2], texts()[1::2]
    scores = [torch.cat([model(text[None]).logits[0] for text in side]) for side in (chosen, rejected)]
    loss = -F.logsigmoid(scores[0] - scores[1]).mean()
    names = ("chosen_ids", "rejected_ids")
    data = Dataset.from_dict(
        {name: [text.tolist() for text in side] for name, side in zip(names, (chosen, rejected), strict=True)}
    )
    arguments = RewardConfig(**options(tmp_path, per_device_train_batch_size=4, learning_rate=1e-2))
    adapter = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    trainer = RewardTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(loss.item(), rel=1e-3)
    adapted = trainer.model.eval()
    after = adapted(chosen[0][None]).logits
    assert not torch.allclose(after[0], scores[0][:1])
    torch.testing.assert_close(adapted.merge_and_unload()(chosen[0][None]).logits, after)
