"""Saves a checkpoint's tensors again and again, for benchmarks.checkpoint, which runs this file with the code of two
checkouts in turn. For each line that it reads it saves once and prints a line of JSON: seconds and bytes.

96 M parameters with Adam's two moments, float32, one rank, 8 lanes.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.training import checkpoint, fragments, lane_memory
from infini_train.training.optim import OptimizerOptions, build

LANES = 8


def main() -> None:
    model = InfiniForCausalLM(
        InfiniConfig(vocab_size=16384, hidden_size=768, intermediate_size=2048, num_hidden_layers=10)
    )
    optimizer, _ = build(model, OptimizerOptions(), 10)
    model(torch.zeros(1, 8, dtype=torch.long), labels=torch.zeros(1, 8, dtype=torch.long)).loss.backward()
    optimizer.step()
    lanes = lane_memory.LaneMemory()
    lanes.put(torch.arange(LANES), model.init_memory(LANES))
    for _ in sys.stdin:
        directory = Path(tempfile.mkdtemp(dir="."))
        begin = time.perf_counter()
        owned = fragments.owned(model, None, 0, 1)
        files = {
            directory / "state.safetensors": fragments.snapshot(owned, optimizer),
            directory / "lanes.safetensors": lanes.snapshot(),
        }
        copied = time.perf_counter()
        checkpoint.write_tensors(files)
        written = time.perf_counter()
        found = {"pause_s": copied - begin, "write_s": written - copied}
        if hasattr(checkpoint, "verify"):  # a checkout whose checkpoints have digests
            from infini_train.files import xxh3_of_file

            begin = time.perf_counter()
            for path in files:
                xxh3_of_file(path)
            found["verify_s"] = time.perf_counter() - begin
        print(json.dumps({**found, "bytes": sum(path.stat().st_size for path in files)}), flush=True)
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
