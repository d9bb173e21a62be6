#!/usr/bin/env bash
# TRL's SFTTrainer on a causal language model whose forward does more than multiply hidden states and output weights
# (here it halves the logits): the trainer does not call that forward, but multiplies lm_head.weight itself
# (add_fused_lm_head, which the trainers of DPO, KTO, GRPO and RLOO use, too). It minimises, and logs, another loss than
# the model's, without a warning.
# Expected: the loss of the model's own logits, or an error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet trl==1.16.0 transformers==5.23.0 torch==2.13.0 datasets==5.2.0
"$work/venv/bin/python" - "$work/run" <<'PY'
import sys

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


class Scaled(LlamaForCausalLM):
    """A Llama whose logits are halved in `forward`."""

    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 2
        if labels is not None:
            out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=self.config.vocab_size)
        return out


print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
torch.manual_seed(0)
sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = Scaled(LlamaConfig(**sizes, initializer_range=1.0))
words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 8)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
ids = torch.tensor([[2, 3, 4, 5, 6, 7, 2, 4, 6, 1]])
own = model(ids, labels=ids).loss.item()
arguments = SFTConfig(output_dir=sys.argv[1], max_steps=1, logging_steps=1, use_cpu=True, bf16=False, report_to="none",
                      save_strategy="no", disable_tqdm=True)
data = Dataset.from_dict({"input_ids": ids.tolist()})
trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
trainer.train()
logged = trainer.state.log_history[0]["loss"]
print(f"the model's own loss is {own:.4f}; SFTTrainer minimises {logged:.4f}")
assert abs(logged - own) > 0.1, "it has changed: SFTTrainer uses the model's logits"
PY
