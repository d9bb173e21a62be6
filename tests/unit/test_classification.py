"""Models with a score of each row or of each token, as transformers' Auto classes make them."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import infini_train.hf  # noqa: F401 (the Auto classes)
from tests.helpers.models import VOCAB, S, build

PAD = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A causal language model and the directory where it is saved."""
    directory = tmp_path_factory.mktemp("classification")
    model = build("selective-delta", torch.float32).eval()
    model.save_pretrained(directory / "model")
    return model, directory / "model"


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_each_row_alone(saved, side, tmp_path):
    causal, directory = saved
    torch.manual_seed(1)
    texts = [torch.randint(PAD + 1, VOCAB, (n,)) for n in (2 * S + 1, 3 * S, 5)]
    ids, mask = torch.full((3, 3 * S), PAD), torch.zeros(3, 3 * S, dtype=torch.long)
    for row, text in enumerate(texts):
        own = slice(3 * S - len(text), None) if side == "left" else slice(0, len(text))
        ids[row, own], mask[row, own] = text, 1
    hidden = [causal.model(text[None]).last_hidden_state[0] for text in texts]

    rows = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2, pad_token_id=PAD).eval()
    labels = torch.tensor([0, 1, 1])
    out = rows(ids, attention_mask=mask, labels=labels)
    expected = torch.stack([rows.score(x[-1]) for x in hidden])
    torch.testing.assert_close(out.logits, expected)
    torch.testing.assert_close(out.loss, cross_entropy(expected, labels))
    rows.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids, attention_mask=mask).logits, out.logits)

    tokens = AutoModelForTokenClassification.from_pretrained(directory, num_labels=4).train()
    out = tokens(ids, attention_mask=mask, labels=torch.where(mask > 0, ids % 4, -100))
    expected = torch.cat([tokens.score(x) for x in hidden])
    torch.testing.assert_close(out.logits[mask > 0], expected)
    torch.testing.assert_close(out.loss, cross_entropy(expected, torch.cat(texts) % 4))
