"""Load an exported model with transformers alone, and print a continuation of a validation document."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infini_train.data.index import DatasetIndex
from infini_train.data.reader import TokenReader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="directory that `infini-train export` wrote")
    parser.add_argument("--dataset", type=Path, required=True, help="directory of shards to take the prompt from")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.export, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(options.export, trust_remote_code=True)
    index = DatasetIndex.load(options.dataset)
    longest = int(index.tokens_D.argmax())
    count = min(options.prompt_tokens, int(index.tokens_D[longest]) - 1)
    prompt = TokenReader(index).read(longest, 0, count).astype("int64")
    torch.manual_seed(0)
    ids = torch.from_numpy(prompt)[None]
    out = model.generate(  # type: ignore[misc]  # transformers' annotation of self
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new_tokens, do_sample=True, temperature=0.7
    )
    print(f"--- the end of a prompt of {count} tokens:\n{tokenizer.decode(prompt[-64:].tolist())}")
    print(f"--- its continuation:\n{tokenizer.decode(out[0, count:].tolist())}")


if __name__ == "__main__":
    main()
