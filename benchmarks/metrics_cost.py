"""What the engine's metrics cost: the same requests with and without feeding them, in turns, on the shipped pair.

    python benchmarks/metrics_cost.py [repeats]      writes results/metrics-cost.json

Times are those of the one thread that runs, so that a neighbour on the machine is not in them. Beside the ratio of the two
stands the share of the time that was spent in feeding, by a clock around every call of it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from common import (
    DEMO_LM,
    DEMO_RM,
    RESULTS,
    Figure,
    compare,
    describe_machine,
    interleave,
    load_prompts,
    print_table,
    set_threads,
    write_json,
)

import stars

FED = ("committed", "ended", "forget")
TOKENS = 128
RUNS = {
    "one stream": (1, stars.STARS(16, 20, reward_threshold=0.5, beta=0.7)),
    "32 prompts": (32, stars.STARS(16, 20, reward_threshold=0.5, beta=0.7)),
    "32 plain samples": (32, stars.Sample()),
}


@contextmanager
def feeding(metrics: Any, around: Callable[[Callable[..., None]], Callable[..., None]]) -> Iterator[None]:
    """Inside, what feeds `metrics` is what `around` makes of it."""
    for name in FED:
        setattr(metrics, name, around(getattr(metrics, name)))
    try:
        yield
    finally:
        for name in FED:
            delattr(metrics, name)


def main() -> None:
    """Measures each of RUNS, and a scrape."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    set_threads(1)
    engine = stars.Engine(DEMO_LM, reward=DEMO_RM)
    figures = []
    for name, (count, policy) in RUNS.items():
        prompts, inside = load_prompts(None, count), [0.0]

        def run(seed: int, prompts: list[str] = prompts, policy: Any = policy) -> float:
            params = stars.SamplingParams(max_tokens=TOKENS, seed=seed, temperature=0.8, top_k=40, ignore_eos=True)
            begin = time.thread_time()
            engine.generate(prompts, params, policy, use_tqdm=False)
            return time.thread_time() - begin

        def timed(feed: Callable[..., None], inside: list[float] = inside) -> Callable[..., None]:
            def clocked(given: Any) -> None:
                begin = time.thread_time()
                feed(given)
                inside[0] += time.thread_time() - begin
            return clocked

        def without(seed: int, run: Callable[[int], float] = run) -> float:
            with feeding(engine.metrics, lambda _: lambda given: None):
                return run(seed)

        seconds = interleave({"with": run, "without": without}, repeats)
        with feeding(engine.metrics, timed):
            whole = sum(run(1000 + seed) for seed in range(max(3, repeats // 4)))
        figures.append(compare(f"{name}: CPU time with feeding", "s", seconds["with"], "without", seconds["without"],
                               "<= 1.005"))
        figures.append(Figure(f"{name}: share of the time in feeding", 100 * inside[0] / whole, "%"))
    scrapes = []
    for _ in range(50):
        begin = time.perf_counter()
        engine.metrics.text(model_name="demo")
        scrapes.append(1e3 * (time.perf_counter() - begin))
    figures.append(Figure("a scrape, by whoever scrapes", statistics.median(scrapes), "ms"))
    shown = {name: value for name, value in engine.metrics.snapshot().items() if isinstance(value, (int, float))}
    print_table(figures)
    write_json(RESULTS / "metrics-cost.json", describe_machine(),
               {"tokens": TOKENS, "repeats": repeats, "temperature": 0.8, "top_k": 40, "counted": shown}, figures)


if __name__ == "__main__":
    main()
