#!/usr/bin/env bash
# transformers' pipeline("text-generation") with a tokenizer that puts a space before every text and strips it when it
# decodes (as Llama 2's sentencepiece tokenizer does): the pipeline decodes the new tokens alone and appends them to the
# prompt, so the space between prompt and answer is missing from `generated_text`. `tokenizer.decode` of all tokens has
# it. A second call with that text therefore continues another text.
# Expected: the text of all tokens.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 torch==2.13.0
"$work/venv/bin/python" - <<'PY'
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, torch {torch.__version__}")
words = {"<unk>": 0, "▁red": 1, "▁green": 2, "▁blue": 3}
made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.Metaspace()
made.decoder = decoders.Metaspace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<unk>")
torch.manual_seed(0)
sizes = {"vocab_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).eval()
ask = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [0]}
prompt = "red green"
whole = tokenizer.decode(model.generate(**tokenizer(prompt, return_tensors="pt"), **ask)[0])
by_pipeline = pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt, **ask)[0]["generated_text"]
print(f"all tokens decoded: {whole!r}; the pipeline's text: {by_pipeline!r}")
print(f"tokens of the pipeline's text: {tokenizer.tokenize(by_pipeline)}")
assert whole.startswith("red green ") and len(whole.split()) == 4, "the decoder has changed"
assert by_pipeline == prompt + whole[len(prompt) + 1 :], "it has changed: the pipeline keeps the space"
PY
