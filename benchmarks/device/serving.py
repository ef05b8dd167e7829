"""32 prompts that arrive at random: the time to the first segment, and the rounds with work that was not captured; what
a long prompt does to those that are drawing."""

from __future__ import annotations

import random
import statistics
import time

import end_to_end
from bench import SEGMENT, Bench, fitting
from common import forced_accept
from counting import counted
from record import OutOfTime, Record, Settings, seconds_left

import stars

PROMPTS, RATE = 32, 0.3


def llama_8b(record: Record, settings: Settings) -> None:
    """8B and 8B, or 1B and 1B on a card with less memory."""
    bench = Bench(record, settings, fitting(record, settings, "Llama-3.1-8B", "Llama-3.2-1B"))
    bench.tokens = 2 * SEGMENT
    record.part("arrivals", arrivals, record, bench, least=6)
    record.part("a long prompt", long_prompt, record, bench, least=3)
    record.part("together", end_to_end.together, record, bench, ("plain",), least=5)


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
                      float(len(rounds)), "all rounds", "" if name == "launched" else bench.aim("rounds"),
                      events=seen[name], longest_ms=1e3 * max(slow, default=0.0))
    waits = sorted(first.values())
    record.figure(f"{bench.name}: time to first segment at random arrivals, median", 1e3 * statistics.median(waits),
                  "ms", worst=1e3 * waits[-1], p90=1e3 * waits[int(0.9 * (len(waits) - 1))], requests=len(waits))
    steady = [seconds for seconds, one in zip(lengths, rounds, strict=True) if not (one["captured"] or one["compiled"])]
    record.figure(f"{bench.name}: a round without captures, median", 1e3 * statistics.median(steady or lengths), "ms",
                  longest=1e3 * max(steady or lengths), all_rounds_longest=1e3 * max(lengths))


def long_prompt(record: Record, bench: Bench) -> None:
    """Eight responses are drawn while a prompt of 8,000 tokens is read, in chunks: how long do they wait?"""
    dry, engine = bench.settings.dry, bench.engine
    count, length = (2, 100) if dry else (8, 8000)

    def ask(index: int, size: int, tokens: int) -> str:
        return engine.add_request({"prompt_token_ids": bench.prompt(size, 900 + index)}, stars.SamplingParams(
            temperature=0.8, max_tokens=tokens, seed=index), bench.policy(None))

    lengths: dict[bool, list[float]] = {False: [], True: []}  # of rounds, by whether the long prompt waits
    with forced_accept(RATE):
        for index in range(count):
            ask(index, 16 if dry else 64, 12 * SEGMENT)
        for _ in range(2 if dry else 4):  # their own prompts, and rounds that are not counted
            engine.step()
        waiting, long, first = False, "", 0.0
        begin = time.perf_counter()
        while engine.has_unfinished_requests():
            if not long and len(lengths[False]) >= (1 if dry else 4):
                long, waiting, begin = ask(count, length, SEGMENT), True, time.perf_counter()
            start = time.perf_counter()
            outputs = engine.step()
            lengths[waiting].append(time.perf_counter() - start)
            for output in outputs:
                if output.outputs[0].error:
                    raise RuntimeError(output.outputs[0].error)
                if output.request_id == long and output.outputs[0].token_ids and waiting:
                    waiting, first = False, time.perf_counter() - begin
            if seconds_left() < 0.5:
                raise OutOfTime("no time was left for the rest of the responses")
    steady = statistics.median(lengths[False])
    record.figure(f"{bench.name}: a round while a prompt of {length} tokens is read, longest",
                  1e3 * max(lengths[True], default=0.0), "ms", 1e3 * steady, "a round without one",
                  bench.aim("long-prompt"), rounds=len(lengths[True]), median=1e3 * statistics.median(lengths[True]),
                  first_segment_ms=1e3 * first)
