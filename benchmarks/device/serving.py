"""32 prompts that arrive at random: the time to the first segment, and the rounds with work that was not captured."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from contextlib import contextmanager

import end_to_end
from bench import SEGMENT, Bench, fitting
from common import forced_accept
from record import OutOfTime, Record, Settings, seconds_left

import stars
from stars.kernels.graph import Graphs

PROMPTS, RATE = 32, 0.3


def llama_8b(record: Record, settings: Settings) -> None:
    """8B and 8B, or 1B and 1B on a card with less memory."""
    bench = Bench(record, settings, fitting(record, settings, "Llama-3.1-8B", "Llama-3.2-1B"))
    bench.tokens = 2 * SEGMENT
    record.part("arrivals", arrivals, record, bench, least=6)
    record.part("together", end_to_end.together, record, bench, ("plain",), least=5)


@contextmanager
def counted():
    """Counts, inside: graphs captured, parts of steps launched one by one, kernels compiled."""
    seen: Counter[str] = Counter()
    replay, capture = Graphs._replay, Graphs._capture

    def noted_replay(self, part, rare):
        def launched() -> None:
            seen["launched"] += 1
            part.call()

        replay(self, part._replace(call=launched), rare)

    def noted_capture(self, call):
        before = seen["launched"]
        graph = capture(self, call)
        seen["launched"] = before  # these were captured, not launched
        seen["captured"] += 1
        return graph

    Graphs._replay, Graphs._capture = noted_replay, noted_capture
    try:
        with _compiles(seen):
            yield seen
    finally:
        Graphs._replay, Graphs._capture = replay, capture


@contextmanager
def _compiles(seen: Counter[str]):
    try:
        from triton import knobs
    except ImportError:
        yield
        return
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda **_: seen.update(compiled=1)
        yield


def arrivals(record: Record, bench: Bench) -> None:
    """Poisson arrivals, about two thirds of what the card would take, prompts of 32 to 512 tokens."""
    dry = bench.settings.dry
    draw = random.Random(5)
    alone = min(bench.complete(bench.policy(None), RATE, bench.prompt(128, 1)).seconds for _ in range(2))
    # A batch of some ten costs hardly more than one: so many at once are what this rate amounts to.
    pause = alone / 10
    at, prompts = 0.0, []
    for index in range(4 if dry else PROMPTS):
        at += draw.expovariate(1 / pause)
        prompts.append((at, bench.prompt(draw.randint(8, 16) if dry else draw.randint(32, 512), 200 + index)))
    engine, rounds, first, lengths = bench.engine, [], {}, []
    with forced_accept(RATE), counted() as seen:
        begin = time.perf_counter()
        asked: dict[str, float] = {}
        while prompts or engine.has_unfinished_requests():
            now = time.perf_counter() - begin
            while prompts and prompts[0][0] <= now:
                arrived, ids = prompts.pop(0)
                name = engine.add_request({"prompt_token_ids": ids}, stars.SamplingParams(
                    temperature=0.8, max_tokens=bench.tokens, seed=len(asked)), bench.policy(None))
                asked[name] = arrived
            if not engine.has_unfinished_requests():
                time.sleep(0.001)
                continue
            if seconds_left() < 1:
                raise OutOfTime(f"no time was left for {len(prompts)} of the prompts")
            before, start = seen.copy(), time.perf_counter()
            for output in engine.step():
                if output.outputs[0].error:
                    raise RuntimeError(output.outputs[0].error)
                if output.outputs[0].token_ids:
                    first.setdefault(output.request_id, time.perf_counter() - begin - asked[output.request_id])
            lengths.append(time.perf_counter() - start)
            rounds.append(seen - before)
    for name, what in (("launched", "steps that were launched one by one"), ("captured", "a capture"),
                       ("compiled", "a compile")):
        slow = [seconds for seconds, one in zip(lengths, rounds, strict=True) if one[name]]
        record.figure(f"{bench.name}: rounds with {what}, of {len(rounds)}", float(len(slow)), "rounds",
                      events=seen[name], longest_ms=1e3 * max(slow, default=0.0))
    waits = sorted(first.values())
    record.figure(f"{bench.name}: time to first segment at random arrivals, median", 1e3 * statistics.median(waits),
                  "ms", worst=1e3 * waits[-1], p90=1e3 * waits[int(0.9 * (len(waits) - 1))], requests=len(waits))
    steady = [seconds for seconds, one in zip(lengths, rounds, strict=True) if not (one["captured"] or one["compiled"])]
    record.figure(f"{bench.name}: a round without captures, median", 1e3 * statistics.median(steady or lengths), "ms",
                  longest=1e3 * max(steady or lengths), all_rounds_longest=1e3 * max(lengths))
