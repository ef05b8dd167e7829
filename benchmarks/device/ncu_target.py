"""The program that `ncu` watches: one draft step of two layers of an 8B shape at 8 lanes, launched one by one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import importable

importable.install()

import torch  # noqa: E402
from models import config_of, random_decoder  # noqa: E402

import stars  # noqa: E402
from stars.draft import LaneSpec  # noqa: E402

CONTEXT, LANES = 1024, 8


class Plainly:
    """Stands in for graphs: a profiler is to see kernels."""

    def run(self, parts, done, times: int = 1, rare: bool = False) -> int:
        for _ in range(times):
            for part in parts:
                part.call()
        return times


def main() -> None:
    with torch.no_grad():
        lm = random_decoder(config_of("Llama-3.1-8B", layers=2), "cuda", torch.bfloat16)
        engine = stars.Engine(lm, device="cuda", dtype="bfloat16", cache_tokens=1 << 13, max_model_len=1 << 12,
                              max_num_seqs=8, max_num_lanes=16, max_segment_size=32)
        cache, drafter = engine._cache, engine._round.drafter
        engine._models.own.passes._graphs = drafter._graphs = Plainly()
        table = cache.open([])
        cache.reserve(table, CONTEXT)
        engine._models.own.passes.prefill([(table, list(range(3, 3 + CONTEXT)), CONTEXT)])
        specs = [LaneSpec(table, 5, cache.take_slab(), 1, 1, index + 1, 0, stars.SamplingParams(temperature=0.8), ())
                 for index in range(LANES)]
        drafter.draft(specs)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        drafter.draft(specs)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
