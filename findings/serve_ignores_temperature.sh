#!/usr/bin/env bash
# `transformers serve` and a request with "temperature": 2.0 (or "top_p") for a model whose generation configuration
# says nothing of sampling: the server sets the temperature but not do_sample, so every answer is the greedy one,
# whatever the temperature and the seed. It is logged as a flag that may be ignored; the client sees nothing.
# Expected: sampled answers, as the OpenAI API promises for a temperature above 0, or an error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 accelerate==1.15.0 fastapi==0.165.0 \
    uvicorn==0.54.0 openai==3.57.0 pydantic rich
"$work/venv/bin/python" - "$work" <<'PY'
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
model = f"{sys.argv[1]}/model"
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).save_pretrained(model)
words = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, 64)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>").save_pretrained(model)
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
serve = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", model, "--port", str(port)]
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
server = subprocess.Popen(serve + ["--device", "cpu"], env=os.environ | {"HF_HUB_OFFLINE": "1"}, **quiet)


def answer(**asked):
    body = json.dumps({"model": model, "prompt": "w1 w2", "max_tokens": 12} | asked).encode()
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))["choices"][0]["text"]


try:
    for _ in range(900):
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health")
            break
        except OSError:
            assert server.poll() is None, "the server has ended"
            time.sleep(0.1)
    greedy = answer(temperature=0)
    hot = {answer(temperature=2.0, seed=seed) for seed in range(4)}
    narrow = {answer(top_p=0.9, seed=seed) for seed in range(4)}
finally:
    server.terminate()
    server.wait()
print(f"greedy answer: {greedy!r}; answers to 4 seeds at temperature 2.0: {sorted(hot)}; with top_p 0.9: {sorted(narrow)}")
assert hot == narrow == {greedy}, "it has changed: requests with a temperature or top_p are sampled"
PY
