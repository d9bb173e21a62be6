"""transformers' `pipeline` on an export: texts, conversations and scores are those of the model itself."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import infini_train.hf  # noqa: F401 (the Auto classes)
from tests.helpers.exports import SPECIAL, tiny_export

TEXTS = ["def f(x):", "import os\n" * 3, "x"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
# No bytes, which random weights would not put together to UTF-8.
ASK = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [*range(259)]}


@pytest.fixture(scope="module", params=[None, 4], ids=["plain", "output memory"])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    memory = {"memory": "selective-delta", "sliding_window": 8, "output_memory_dim": request.param}
    out = tiny_export(tmp_path_factory.mktemp("pipeline") / "export", **memory)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


def continued(export: Path, text: str) -> str:
    """The text and what `generate` makes of it, alone and without a cache."""
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export).eval()
    made = model.generate(**tokenizer(text, return_tensors="pt"), use_cache=False, **ASK)[0]
    return tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize("rows", [1, 3])
def test_texts_are_continued(export: Path, rows: int) -> None:
    """Also in a batch, which the pipeline pads."""
    write = pipeline("text-generation", model=str(export))
    found = [made[0]["generated_text"] for made in write(TEXTS, batch_size=rows, **ASK)]
    assert found == [continued(export, text) for text in TEXTS]
    assert all(len(made) > len(text) + 4 for made, text in zip(found, TEXTS, strict=True))


def test_a_conversation_gets_an_answer(export: Path) -> None:
    asked = [{"role": "user", "content": "def f(x):"}]
    (made,) = pipeline("text-generation", model=str(export))(asked, **ASK)
    prompt = "user: def f(x):\nassistant:"
    answer = continued(export, prompt).removeprefix(prompt)
    assert made["generated_text"] == [*asked, {"role": "assistant", "content": answer}] and answer


def test_texts_are_scored(export: Path, tmp_path: Path) -> None:
    """By a classifier that was saved with its tokenizer, in a batch as alone."""
    head = {"num_labels": 3, "pad_token_id": SPECIAL["pad_token_id"], "initializer_range": 0.3}
    model = AutoModelForSequenceClassification.from_pretrained(export, **head).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    expected = [model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1) for text in TEXTS]
    score = pipeline("text-classification", model=str(tmp_path))
    for found, wanted in zip(score(TEXTS, top_k=None, batch_size=3), expected, strict=True):
        scores = {score["label"]: score["score"] for score in found}
        torch.testing.assert_close(torch.tensor([scores[f"LABEL_{i}"] for i in range(3)]), wanted.detach())
