"""What AsyncEngine costs: many callers beside one call of Engine.generate, on the same work; writes
benchmarks/results/async-overhead.json.

    python benchmarks/async_overhead.py [--quick] [--gguf FILE] [--callers 64]

Both run on one engine, in turns, A B B A …, with the same seeds: the texts are the same, which is checked. The callers
are tasks of one event loop in this process, which share its cores and its interpreter with the engine. A ratio is the
median over pairs; that of CPU seconds, of all threads, is what a busy machine disturbs least. FILE is a GGUF file of a
language model, SmolLM2-135M-Instruct's in the results, which decodes plain samples.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import (
    DEMO_LM,
    DEMO_RM,
    RESULTS,
    ROOT,
    Figure,
    compare,
    describe_machine,
    load_prompts,
    print_table,
    set_threads,
    write_json,
)

import stars

AIM = "<= 1.03"
KINDS = {"every output": stars.RequestOutputKind.CUMULATIVE, "the last output": stars.RequestOutputKind.FINAL_ONLY}


class Work(NamedTuple):
    """What both sides do."""

    name: str
    engine: stars.Engine
    policy: stars.plan.Policy
    tokens: int
    repeats: int


class Timed(NamedTuple):
    """One run."""

    wall: float
    cpu: float
    texts: list[list[int]]
    outputs: int  # that callers were given


def params(tokens: int, index: int, kind: stars.RequestOutputKind) -> stars.SamplingParams:
    return stars.SamplingParams(temperature=0.8, top_k=40, max_tokens=tokens, ignore_eos=True, seed=index,
                                output_kind=kind)


def timed(run: Callable[[], tuple[Sequence[stars.RequestOutput], int]]) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    outputs, count = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Timed(wall, cpu, [output.outputs[0].token_ids for output in outputs], count)


def figures(work: Work, callers: int) -> Iterator[Figure]:
    """Wall and CPU seconds of the callers over those of one call of generate, for each kind of output."""
    prompts = load_prompts(None, callers)

    def generate() -> tuple[Sequence[stars.RequestOutput], int]:
        given = [params(work.tokens, index, stars.RequestOutputKind.CUMULATIVE) for index in range(callers)]
        return work.engine.generate(prompts, given, work.policy, use_tqdm=False), callers

    served = stars.AsyncEngine(work.engine)

    def call(kind: stars.RequestOutputKind) -> tuple[Sequence[stars.RequestOutput], int]:
        async def caller(index: int) -> tuple[stars.RequestOutput, int]:
            count = 0
            async for output in served.generate(prompts[index], params(work.tokens, index, kind), work.policy):
                count += 1
            return output, count

        async def all_of_them() -> list[tuple[stars.RequestOutput, int]]:
            return await asyncio.gather(*map(caller, range(callers)))

        results = asyncio.run(all_of_them())
        return [output for output, _ in results], sum([count for _, count in results])

    runs: dict[str, list[Timed]] = {name: [] for name in ("generate", *KINDS)}
    for repeat in range(1 + work.repeats):
        names = list(runs) if repeat % 2 else [*reversed(runs)]
        for name in names:
            run = generate if name == "generate" else lambda kind=KINDS.get(name): call(kind)
            runs[name].append(timed(run))
    asyncio.run(served.shutdown())
    texts = runs["generate"][0].texts
    different = sum(run.texts != texts for several in runs.values() for run in several)
    for name in KINDS:
        ours, theirs = runs[name][1:], runs["generate"][1:]
        detail = dict(outputs=[run.outputs for run in ours], runs_with_other_texts=different,
                      tokens=callers * work.tokens)
        yield compare(f"{callers} callers, {name}, {work.name}", "s", [run.wall for run in ours], "Engine.generate",
                      [run.wall for run in theirs], AIM, **detail)
        yield compare("  its CPU seconds, all threads", "s", [run.cpu for run in ours], "Engine.generate",
                      [run.cpu for run in theirs], AIM)


def works(options: argparse.Namespace) -> Iterator[Work]:
    engine = stars.Engine(DEMO_LM, DEMO_RM, dtype="float32")
    policy = stars.STARS(16, 8, beta=0.7, reward_threshold=1.0)
    yield Work("STARS, shipped pair", engine, policy, options.tokens, options.repeats)
    yield Work("plain samples, shipped pair", engine, stars.Sample(), options.tokens, options.repeats)
    if options.gguf is not None:
        model = stars.Engine(options.gguf)
        yield Work(f"plain samples, {options.gguf.stem}", model, stars.Sample(), options.tokens // 4,
                   max(2, options.repeats // 3))


def main() -> None:
    options = _parse()
    set_threads(options.threads)
    machine = describe_machine()
    found: list[Figure] = []
    for work in works(options):
        found += figures(work, options.callers)
        print_table(found[-2 * len(KINDS) :])
    machine["load_average_at_end"] = describe_machine()["load_average"]
    settings = {name: getattr(options, name) for name in ("callers", "tokens", "repeats", "threads")}
    write_json(options.output, machine, settings, [dataclasses.replace(one, name=one.name.strip()) for one in found])
    print(f"\nwritten to {options.output}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tokens and repeats: whether it runs, not how fast")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--gguf", type=Path, help="a GGUF file of a language model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="new tokens of every response (128)")
    parser.add_argument("--repeats", type=int, help="pairs of every figure (9)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.tokens = options.tokens or (32 if options.quick else 128)
    options.repeats = options.repeats or (2 if options.quick else 9)
    default = ROOT / ".benchmarks" if options.quick else RESULTS
    options.output = options.output or default / "async-overhead.json"
    return options


if __name__ == "__main__":
    main()
