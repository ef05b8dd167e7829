"""What each kind of operation costs a draft step: it is recorded again without it, and the two are timed in turns.

    python benchmarks/without.py [lanes] [context]      writes results/cpu-without.json

What remains without all of them is the matrix products, in the company of nothing else: the floor of a step.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

from common import DEMO_LM, RESULTS, describe_machine

import stars.draft
from stars import Engine, SamplingParams, kernels
from stars.draft import LaneSpec
from stars.kernels.graph import Graphs

OPERATIONS = ("attention", "swiglu", "rms_norm", "rope_write", "embedding")
STEPS, TURNS = 16, 80


def main() -> None:
    """Times drafts of 16 steps for each set of operations left out."""
    lanes = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    context = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    engine = Engine(DEMO_LM)
    drafter, cache = engine._round.drafter, engine._cache
    table = cache.open([5] * context)
    engine._models.own.passes.prefill([(table, [5] * context, context)])
    params = SamplingParams(temperature=0.8, top_k=40, ignore_eos=True)
    specs = [LaneSpec(table, 7, cache.take_slab(), STEPS, 1, lane + 1, 0, params, ()) for lane in range(lanes)]
    recorded = {name: _record(drafter, specs, left_out) for name, left_out in (
        ("nothing", ()), *((name, (name,)) for name in (*OPERATIONS, "sample_step")),
        ("all of them", (*OPERATIONS, "sample_step")))}
    seconds: dict[str, list[float]] = {name: [] for name in recorded}
    for _ in range(TURNS):
        for name, graphs in recorded.items():
            drafter._graphs = graphs
            filled = drafter._fill(specs)
            begin = time.perf_counter()
            drafter._start(filled, lanes, STEPS, True)
            seconds[name].append((time.perf_counter() - begin) / STEPS)
    step = {name: round(statistics.median(values) * 1e6, 2) for name, values in seconds.items()}
    result = {"machine": describe_machine(), "lanes": lanes, "context": context, "unit": "us a step, median",
              "step without": step,
              "step over its products": round(step["nothing"] / step["all of them"], 3)}
    path = RESULTS / "cpu-without.json"
    runs = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps([*runs, result], indent=1) + "\n")
    print(json.dumps(result["step without"]), result["step over its products"])


def _record(drafter, specs: list[LaneSpec], left_out: tuple[str, ...]) -> Graphs:
    """The recorded step with the operations of `left_out` doing nothing."""
    kept = {name: getattr(kernels, name) for name in OPERATIONS}, stars.draft.sample_step
    try:
        for name in left_out:
            if name == "sample_step":
                stars.draft.sample_step = lambda *_, **__: None
            else:
                setattr(kernels, name, lambda *_: None)
        drafter._graphs = Graphs()
        drafter._start(drafter._fill(specs), len(specs), 1, True)
        return drafter._graphs
    finally:
        for name, operation in kept[0].items():
            setattr(kernels, name, operation)
        stars.draft.sample_step = kept[1]


if __name__ == "__main__":
    main()
