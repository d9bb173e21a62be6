#!/usr/bin/env bash
# transformers' train_new_from_iterator on a BPE tokenizer with byte fallback (as Llama 2
# has it): the new vocabulary has no byte tokens, though byte_fallback stays true in its tokenizer.json. A character that
# the training text lacks is then the unknown token, where the original tokenizer spelled it in bytes.
# Expected: the new tokenizer falls back to bytes as the old one does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
"$work/venv/bin/python" - <<'PY'
import json

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)} | {"▁": 257, "a": 258, "b": 259}
old = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
old.normalizer = normalizers.Replace(" ", "▁")
old.decoder = decoders.ByteFallback()
old = PreTrainedTokenizerFast(tokenizer_object=old, unk_token="<unk>")
new = old.train_new_from_iterator(["ab ba abba " * 20], vocab_size=300)
flag = json.loads(new.backend_tokenizer.to_str())["model"]["byte_fallback"]
of_bytes = [token for token in new.get_vocab() if token.startswith("<0x")]
spelled, unknown = old.tokenize("é"), new.tokenize("é")
print(f"the original spells é as {spelled}; the new one as {unknown}")
print(f"the new one has byte_fallback {flag} and {len(of_bytes)} of 256 byte tokens")
assert spelled == ["<0xC3>", "<0xA9>"] and flag is True, "the original or the flag has changed"
assert unknown == ["<unk>"] and not of_bytes, "it has changed: the new vocabulary keeps byte tokens"
PY
