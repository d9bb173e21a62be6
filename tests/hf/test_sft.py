"""TRL's SFTTrainer on an export: labels contain EOS, so the fine-tuned model stops after its answer."""

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling
from trl import SFTConfig, SFTTrainer

import infini_train.hf  # noqa: F401 (the Auto classes)
from tests.helpers.exports import SPECIAL, tiny_export

TEXTS = ["def f(x): return x", "def g(y): return y + 1"]
EOS = SPECIAL["eos_token_id"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("sft") / "export", memory="selective-delta")


def trainer_for(export: Path, out: Path, steps: int) -> SFTTrainer:
    options = {"learning_rate": 5e-3, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": []}
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(export),
        args=SFTConfig(
            output_dir=str(out), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, seed=0, **options
        ),
        processing_class=AutoTokenizer.from_pretrained(export),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
    )


def test_labels_of_trl_and_of_the_standard_collator_end_in_eos(export: Path, tmp_path: Path) -> None:
    trainer = trainer_for(export, tmp_path, steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = trainer.processing_class
    examples = [tokenizer(text + tokenizer.eos_token) for text in TEXTS]
    by_standard = DataCollatorForLanguageModeling(tokenizer, mlm=False)(examples)
    for labels in (*batch["labels"], *by_standard["labels"]):
        kept = labels[labels != -100].tolist()
        assert (kept[0], kept[-1], kept.count(EOS)) == (SPECIAL["bos_token_id"], EOS, 1)


def test_generation_stops_where_the_answer_ends(export: Path, tmp_path: Path) -> None:
    trainer = trainer_for(export, tmp_path, steps=60)
    trainer.train()
    tokenizer = trainer.processing_class
    for text in TEXTS:
        prompt = tokenizer(text[:9], return_tensors="pt")
        made = trainer.model.eval().generate(**prompt, max_new_tokens=60)
        assert tokenizer.decode(made[0]) == f"<s>{text}</s>"
