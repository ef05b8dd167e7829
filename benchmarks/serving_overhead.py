"""What the server costs: 32 clients that read streams over HTTP beside 32 tasks that read the same from an AsyncEngine;
writes benchmarks/results/serving-overhead.json.

    python benchmarks/serving_overhead.py [--gguf FILE] [--quick] [--clients 32]

Three processes: the engine with its tasks, `stars serve`, and this one, the client. The first two run in turns, A B B A
…, the same requests with the same seeds, each client asking again once it was answered; a ratio is the median over
pairs. Twice: "apart", where the engine and the server each have core 0 to themselves, with one thread, and the client
has core 1, so that the ratio is the server's cost alone; and "together", where all have both cores and two threads, so
that the client's own work is in it, too. CPU seconds are of all threads of a process. FILE is a GGUF file of a language
model, SmolLM2-135M-Instruct's in the results, which decodes plain samples; the shipped pair runs STARS.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    write_json,
)
from serving_process import ServerProcess, end_on_sigterm, stars_serve

import stars
from stars.bench.figures import figures
from stars.bench.load import Target, send_load
from stars.bench.workload import Entry

AIM = "<= 1.05"
SAMPLING = {"temperature": 0.8, "top_k": 40, "ignore_eos": True}
STARS = {"segment_size": 16, "max_attempts": 8, "beta": 0.7, "reward_threshold": 1.0}


class Work(NamedTuple):
    """What is asked of both."""

    name: str
    model: str
    reward: str | None
    policy: Mapping[str, Any] | None  # of STARS; None: plain samples
    requests: int
    tokens: int


class Cores(NamedTuple):
    """Who has which."""

    name: str
    server: set[int]
    client: set[int]
    threads: int


class Timed(NamedTuple):
    """One run."""

    seconds: float
    cpu: float  # of the process that has the engine
    tokens: int
    client: float  # its share of a core


# -- the engine in a process of its own -------------------------------------------------------------------------------


def serve_lines() -> None:
    """Answers each line, a work's requests, by seconds and tokens."""
    work = Work(**json.loads(sys.stdin.readline()))
    engine = stars.AsyncEngine(work.model, work.reward)
    policy = stars.Sample() if work.policy is None else stars.STARS(**work.policy)
    print("ready", flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = asyncio.run(_closed_loop(engine, policy, work, **json.loads(line)))
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, tokens]), flush=True)


async def _closed_loop(engine: stars.AsyncEngine, policy: Any, work: Work, clients: int, seed: int) -> int:
    free, prompts = asyncio.Semaphore(clients), load_prompts(None, work.requests)

    async def one(index: int) -> int:
        async with free:
            params = stars.SamplingParams(max_tokens=work.tokens, seed=seed + index, **SAMPLING)
            async for output in engine.generate(prompts[index], params, policy):
                pass
            return len(output.outputs[0].token_ids)

    return sum(await asyncio.gather(*map(one, range(work.requests))))


class EngineProcess:
    """That process, which is asked in turns."""

    def __init__(self, work: Work, cores: Cores, log: Path):
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--engine"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, env=os.environ | threads(cores),
            preexec_fn=lambda: os.sched_setaffinity(0, cores.server))
        self._say(work._asdict())
        if self._hear() != "ready":
            raise RuntimeError(f"the engine did not start, see {log}")

    def run(self, clients: int, seed: int) -> Timed:
        self._say({"clients": clients, "seed": seed})
        seconds, cpu, tokens = json.loads(self._hear())
        return Timed(seconds, cpu, tokens, 0.0)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _say(self, value: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def threads(cores: Cores) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(cores.threads), "STARS_NUM_THREADS": str(cores.threads)}


# -- the server and its client ----------------------------------------------------------------------------------------


def over_http(server: ServerProcess, work: Work, clients: int, seed: int) -> Timed:
    """The same requests through streams."""
    guidance = {"policy": "plain"} if work.policy is None else {"policy": "stars", **work.policy}
    target = Target(server.url, model="m", max_concurrency=clients, common={**SAMPLING, "stars": guidance}, seed=seed)
    prompts, cpu = load_prompts(None, work.requests), server.cpu_seconds()
    run = asyncio.run(send_load(target, [Entry(0.0, prompt, work.tokens) for prompt in prompts]))
    found = figures(run, {})
    if found["completed"] != work.requests:
        raise RuntimeError(f"{work.requests - found['completed']} requests failed: {found['failures']}")
    return Timed(run.duration, server.cpu_seconds() - cpu, found["total_output_tokens"], run.meter.cpu_share)


def measured(work: Work, cores: Cores, options: argparse.Namespace) -> Iterator[Figure]:
    """Seconds of the streams over those of the tasks, and the CPU seconds behind them."""
    arguments = ["--model", work.model, "--served-model-name", "m", *(["--reward", work.reward] if work.reward else [])]
    arguments += ["--reward-threshold", "1.0"] if work.reward else []
    os.sched_setaffinity(0, cores.client)
    engine = EngineProcess(work, cores, options.scratch / "overhead-engine.log")
    try:
        with stars_serve(arguments, options.scratch / "overhead-server.log", environment=threads(cores),
                         cores=cores.server) as server:
            runs: dict[str, list[Timed]] = {"http": [], "engine": []}
            for repeat in range(1 + options.repeats):
                for name in list(runs) if repeat % 2 else [*reversed(runs)]:
                    runs[name].append(over_http(server, work, options.clients, 1000 * repeat) if name == "http" else
                                      engine.run(options.clients, 1000 * repeat))
    finally:
        engine.stop()
    ours, theirs = runs["http"][1:], runs["engine"][1:]
    same = [one.tokens for one in ours] == [one.tokens for one in theirs]
    yield compare(f"{options.clients} clients, {work.name}, {cores.name}", "s", [one.seconds for one in ours],
                  "AsyncEngine", [one.seconds for one in theirs], AIM, same_tokens=same, tokens=ours[0].tokens,
                  tokens_per_second=[one.tokens / one.seconds for one in ours],
                  engine_tokens_per_second=[one.tokens / one.seconds for one in theirs],
                  client_share_of_a_core=[one.client for one in ours],
                  server_share_of_a_core=[one.cpu / one.seconds for one in ours],
                  engine_share_of_a_core=[one.cpu / one.seconds for one in theirs])
    yield compare(f"its CPU seconds, {work.name}, {cores.name}", "s", [one.cpu for one in ours], "AsyncEngine",
                  [one.cpu for one in theirs])


def main() -> None:
    options = _parse()
    if options.engine:
        serve_lines()
        return
    end_on_sigterm()
    every = sorted(os.sched_getaffinity(0))
    kinds = [Cores("together", set(every), set(every), len(every))]
    if len(every) > 1:
        kinds.insert(0, Cores("apart", {every[0]}, {every[1]}, 1))
    machine, found = describe_machine(), []
    works = [Work("STARS, shipped pair", str(DEMO_LM), str(DEMO_RM), STARS, options.requests, options.tokens)]
    if options.gguf is not None:
        works.append(Work(f"plain samples, {options.gguf.stem}", str(options.gguf.resolve()), None, None,
                          options.requests, options.tokens // 2))
    for cores in kinds:
        for work in works:
            found += measured(work, cores, options)
            print_table(found[-2:])
            os.sched_setaffinity(0, every)
    machine["load_average_at_end"] = describe_machine()["load_average"]
    settings = {name: getattr(options, name) for name in ("clients", "requests", "tokens", "repeats")}
    write_json(options.output, machine, settings, found)
    print(f"\nwritten to {options.output}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests: whether it runs, not how fast")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--gguf", type=Path, help="a GGUF file of a language model")
    parser.add_argument("--requests", type=int, help="of a run (96)")
    parser.add_argument("--tokens", type=int, help="of an answer (96; of the GGUF file's model half as many)")
    parser.add_argument("--repeats", type=int, help="pairs (5)")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "stars-serving")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)  # this is the engine's process
    options = parser.parse_args()
    options.requests = options.requests or (options.clients if options.quick else 96)
    options.tokens = options.tokens or (16 if options.quick else 96)
    options.repeats = options.repeats or (1 if options.quick else 5)
    options.output = options.output or (ROOT / ".benchmarks" if options.quick else RESULTS) / "serving-overhead.json"
    options.scratch = options.scratch.resolve()
    options.scratch.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
