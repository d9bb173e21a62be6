#!/usr/bin/env bash
# transformers' AutoTokenizer.from_pretrained(DIRECTORY, add_eos_token=True) on a tokenizer.json whose post-processor
# puts BOS before each text: BOS is no longer put there, because the post-processor is made anew with add_bos_token at
# its default of False. The same happens with `tokenizer.add_eos_token = True` after loading.
# Expected: BOS as without the option, and EOS after the text.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
"$work/venv/bin/python" - "$work/saved" <<'PY'
import sys

import tokenizers
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
made = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, [], unk_token="<unk>"))
special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PreTrainedTokenizerFast(tokenizer_object=made, add_bos_token=True, **special).save_pretrained(sys.argv[1])
plain = AutoTokenizer.from_pretrained(sys.argv[1])
with_eos = AutoTokenizer.from_pretrained(sys.argv[1], add_eos_token=True)
found = plain("a")["input_ids"], with_eos("a")["input_ids"]
print(f"'a' is {found[0]} as saved, and {found[1]} with add_eos_token=True")
plain.add_eos_token = True
after = plain("a")["input_ids"]
print(f"with `tokenizer.add_eos_token = True` it is {after}")
assert found[0] == [1, 3], "the saved rule has changed"
assert found[1] == after == [3, 2], "it has changed: BOS stays"
PY
