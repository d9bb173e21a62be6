"""The architecture of a pretrained model in a run whose segments are shorter."""

import pytest
import torch

from infini_train.model import InfiniConfig
from infini_train.training.architecture import config_of

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"sliding_window": 512}, 128, "sliding_window: found 512, expected 1 to 2 * segment_length = 256"),
        ({"output_memory_dim": 4}, 200, "expected at most 128 or a multiple of it"),
        ({"sliding_window": 512}, 256, None),
        ({"output_memory_dim": 4}, 256, None),
    ],
)
def test_shorter_segments(tmp_path, options, length, message):
    """A length that the model cannot have once trained, and its checkpoints could not be loaded."""
    InfiniConfig(**SIZES, segment_length=512, **options).save_pretrained(tmp_path)
    if message is None:
        found = config_of(tmp_path, {}, length)
        own = {"segment_length": length, "dtype": torch.float32, **options}
        assert {name: getattr(found, name) for name in own} == own
        return
    with pytest.raises(ValueError, match=rf"data\.segment_length: found {length}, which .*config\.json") as refused:
        config_of(tmp_path, {}, length)
    assert message in str(refused.value)
