"""A tiny export of random weights, as clients of the Hugging Face ecosystem find one."""

from pathlib import Path
from typing import Any

import torch

from infini_train.hf.export import write_model
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.tokenizer.export import export_tokenizer

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "data" / "tokenizer.model"  # 288 tokens
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    **{"vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "segment_length": 8},
}


def tiny_export(out: Path, **options: Any) -> Path:
    """Write the export to `out` and return it; the options are fields of InfiniConfig."""
    torch.manual_seed(0)
    config = InfiniConfig(**SIZES | options)

    def add_files(directory: Path) -> None:
        export_tokenizer(TOKENIZER, directory, bos_id=1, eos_id=2, max_length=config.max_position_embeddings)

    weights = InfiniForCausalLM(config).state_dict()
    write_model(config, weights, out, source=out, add_files=add_files, special=SPECIAL)
    return out
