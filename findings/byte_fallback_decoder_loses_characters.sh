#!/usr/bin/env bash
# The decoder ByteFallback of tokenizers, which Llama 2's tokenizer has, on a run of byte tokens of which one is no
# UTF-8: every byte of the run becomes a replacement character, also those before it that are whole characters.
# sentencepiece, whose byte fallback this is, keeps these and replaces the invalid byte alone.
# Expected: "(é" and one replacement character, as bytes.decode(errors="replace") and sentencepiece give.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3 sentencepiece==0.2.3
"$work/venv/bin/python" - "$work" <<'PY'
import io
import sys

import sentencepiece
import tokenizers
from tokenizers import Tokenizer, decoders, models

print(f"tokenizers {tokenizers.__version__}, sentencepiece {sentencepiece.__version__}")
written = "(é".encode() + b"\xe4"  # the first byte of a character whose other bytes do not follow
vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
fast = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=io.BytesIO(b"ab ba abba\n" * 20), model_prefix=f"{sys.argv[1]}/m", vocab_size=263,
    model_type="bpe", byte_fallback=True, minloglevel=2,
)
slow = sentencepiece.SentencePieceProcessor(model_file=f"{sys.argv[1]}/m.model")
by_fast = fast.decode([vocabulary[f"<0x{byte:02X}>"] for byte in written])
by_slow = slow.decode([slow.piece_to_id(f"<0x{byte:02X}>") for byte in written])
print(f"the bytes {written} are {by_slow!r} by sentencepiece and {by_fast!r} by tokenizers")
assert by_slow == written.decode(errors="replace"), "sentencepiece has changed"
assert by_fast == "\ufffd" * len(written), "it has changed: tokenizers keeps the characters"
PY
