"""What Engine.from_transformers takes of memory on the CPU: a random model of SmolLM2-135M's shape, in transformers and
then in an engine beside it, by the process' own account of its pages.

    python benchmarks/from_transformers_memory.py        writes results/from-transformers-memory.json

MB of a process for each dtype: what the weights are, what it had grown by at each stage, and how high it had been
meanwhile. The engine's caches are small. Numbers need not be bfloat16's here: float32 is packed as such.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch
from common import RESULTS, describe_machine
from transformers import LlamaConfig, LlamaForCausalLM

import stars

SHAPE = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 2048}
SMALL = {"cache_tokens": 512, "max_model_len": 512, "max_num_seqs": 1, "max_num_lanes": 2, "max_segment_size": 16}


def status(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def settled() -> float:
    """MB that the process has, once what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def measure(dtype: str) -> None:
    """Prints one line of JSON; once a process."""
    torch.manual_seed(0)
    tiny = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 576}))
    stars.Engine.from_transformers(tiny, **SMALL)  # whatever is imported and allocated once
    del tiny
    begin = settled()
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype))
    loaded = settled()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    engine = stars.Engine.from_transformers(model, **SMALL)
    peak, built = status("VmHWM"), settled()
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    del model
    alone = settled()
    print(json.dumps({"dtype": dtype, "arithmetic": engine._models.own.decoder.arithmetic, "weights": round(weights, 1),
                      "model": round(loaded - begin, 1), "engine beside it": round(built - loaded, 1),
                      "peak above the model": round(peak - loaded, 1),
                      "engine alone": round(alone - begin, 1)}))


def main() -> None:
    """Each dtype in a process of its own."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        told = subprocess.run([sys.executable, __file__, dtype], check=True, capture_output=True, text=True).stdout
        print(told.strip())
        rows.append(json.loads(told))
    (RESULTS / "from-transformers-memory.json").write_text(
        json.dumps({"machine": describe_machine(), "unit": "MB", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
