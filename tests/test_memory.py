"""A lane costs its segment, not its context."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, torch
from contextlib import nullcontext
sys.path.insert(0, sys.argv[1])
import stars
from stars.kernels.dispatch import references_only
from toy import ToyModel, ids, toy_engine

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

torch.set_num_threads(1)
sizes = dict(vocab=37, hidden=64, layers=4, heads=2, kv_heads=2, head_dim=128, intermediate=64, positions=2048)
lm, rm = ToyModel(**sizes, seed=1), ToyModel(**sizes, seed=2, head="reward")
engine = toy_engine(lm, stars.CausalReward(rm.decoder()), cache_tokens=1 << 14, page_size=16, max_num_seqs=4,
                    max_num_lanes=32)

def run(length, max_tokens, seed):
    policy = stars.STARS(16, 32, 1.0, 0.5, float("inf"), 32)
    [output] = engine.generate({"prompt_token_ids": ids(length, vocab=37, seed=seed)},
                               stars.SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True), policy,
                               use_tqdm=False)
    assert output.metrics.width == 32 and output.outputs[0].error is None

with references_only() if sys.argv[2] == "references" else nullcontext():
    run(16, 16, 1)  # threads, caches of the libraries, recorded passes
    before = resident("VmRSS:")
    run(1024, 16, 2)
row = engine._cache.k_pages[0, 0].numel() * 4 * 2 * lm.config.num_layers  # bytes of one position, keys and values
print(json.dumps({"grown": resident("VmHWM:") - before, "row": row, "slab": engine._cache.slab_len,
                  "rm_slab": engine.reward.cache.slab_len}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_of_32_lanes_at_1k_context(operations):
    """Peak resident memory of a process: both caches' prefix once, 32 slabs in each, and 16 MB for everything else.

    One copy of the prefix for each lane would be 64 times 8 MB.
    """
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), operations]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    prefix = (1024 + 16) * seen["row"]
    slabs = 32 * (seen["slab"] + seen["rm_slab"]) * seen["row"]
    slack = 16 << 20  # of it, a prefill pass of 256 rows over 1k keys holds scores of 2 MB for two heads, thrice
    assert seen["grown"] < 2 * prefix + slabs + slack, seen
    assert 2 * prefix + slabs + slack < 0.12 * 64 * prefix  # the bound itself excludes copies
