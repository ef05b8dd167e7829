"""Thousands of requests over HTTP, of every kind; writes benchmarks/results/serving-soak.json.

    python benchmarks/serving_soak.py [--requests 20000] [--clients 64] [--minutes 7.5] [--quick]

`stars serve` runs the shipped pair with --deterministic in a process of its own. Its clients ask for streams and for
whole answers, leave in the midst of either, send what is refused, and have texts scored; kinds and parameters are
drawn from the seed and a request's number. What must be true in the end: every request has had the answer that it
should, once; the server holds no request and no page; its memory has stopped growing, which the slope over the second
half says; and of one request in 20 the text is that of an engine in this process that runs the same request. Exit code
1 where something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import DEMO_LM, DEMO_RM, OPENINGS, RESULTS, ROOT, describe_machine
from serving_process import ServerProcess, end_on_sigterm, stars_serve

import stars
from stars.bench.client import KEEPALIVE
from stars.bench.meter import Meter
from stars.bench.sse import EventParser

MODEL = "film-reviews"
KINDS = {"stream": 40, "whole": 25, "leaves a stream": 10, "leaves a whole answer": 5, "refused": 10, "scored": 10}
COMPARED = ("stream", "whole")
EVERY = 20  # of these, one has its text compared
FLAT = 0.1  # MB of growth for 1000 requests, at most, beyond what chance explains
GAUGES = ("stars:num_requests_running", "stars:num_requests_waiting", "stars:kv_cache_usage_perc",
          "stars:reward_kv_cache_usage_perc")
POLICIES: tuple[dict[str, Any], ...] = (
    {"policy": "stars", "segment_size": 8, "max_attempts": 4, "beta": 0.7, "reward_threshold": 1.0},
    {"policy": "stars", "segment_size": 4, "max_attempts": 3, "beta": 0.0, "reward_threshold": 1.5},
    {"policy": "plain"},
    {"policy": "best-of-n", "n": 2},
)
REFUSED: tuple[tuple[int, dict[str, Any] | bytes], ...] = (
    (400, b'{"model": '), (404, {"model": "nobody", "prompt": "x"}), (400, {"max_tokens": -1}), (400, {"prompt": 5}),
    (400, {"no_such_field": 1}), (400, {"stars": {"policy": "stars", "reward_threshold": "high"}}),
    (400, {"stars": {"policy": "stars", "no_such": 1}}), (400, {"prompt": "word " * 20000}),
)


class Plan(NamedTuple):
    """One request, as it is drawn."""

    kind: str
    address: str
    body: bytes
    status: int
    asked: dict[str, Any]


class Outcome(NamedTuple):
    """What became of it."""

    kind: str
    problem: str | None
    text: str | None = None


def plan_of(number: int, seed: int) -> Plan:
    """The request of a number."""
    draw = random.Random(seed * 1_000_003 + number)
    [kind] = draw.choices(list(KINDS), [*KINDS.values()])
    asked: dict[str, Any] = {
        "model": MODEL, "prompt": draw.choice(OPENINGS), "max_tokens": draw.randint(4, 16), "temperature": 0.8,
        "top_k": 40, "seed": number, "stars": draw.choice(POLICIES)}
    address, status = "/v1/completions", 200
    if kind == "scored":
        address = "/v1/score"
        asked = {"model": MODEL, "text_1": draw.choice(OPENINGS),
                 "text_2": [f" a {word} film" for word in draw.sample(["good", "bad", "dull", "fine"], 2)]}
    elif kind in ("stream", "leaves a stream"):
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    elif kind == "refused":
        status, wrong = draw.choice(REFUSED)
        if isinstance(wrong, bytes):
            return Plan(kind, address, wrong, status, {})
        asked |= wrong | ({"stream": True} if draw.random() < 0.5 else {})
    return Plan(kind, address, json.dumps(asked).encode(), status, asked)


class Soak:
    """The clients."""

    def __init__(self, server: ServerProcess, session: aiohttp.ClientSession, requests: int, seed: int, end: float):
        self.server, self.session, self.requests, self.seed, self.end = server, session, requests, seed, end
        self.next = 0
        self.outcomes: dict[int, Outcome] = {}
        self.memory: list[tuple[int, float]] = []  # requests that have ended, MB of the server

    async def run(self, clients: int) -> None:
        """Until all numbers were asked, or time is up."""
        watcher = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._client() for _ in range(clients)))
        watcher.cancel()

    async def _client(self) -> None:
        while self.next < self.requests and time.monotonic() < self.end:
            number, self.next = self.next, self.next + 1
            plan = plan_of(number, self.seed)
            try:
                self.outcomes[number] = await self._ask(number, plan)
            except (aiohttp.ClientError, asyncio.exceptions.TimeoutError, ValueError, LookupError) as error:
                self.outcomes[number] = Outcome(plan.kind, f"{type(error).__name__}: {error}"[:200])

    async def _ask(self, number: int, plan: Plan) -> Outcome:
        if plan.kind == "leaves a whole answer":
            task = asyncio.ensure_future(self._whole(plan))
            done, _ = await asyncio.wait([task], timeout=0.02)
            if not done:
                task.cancel()
                return Outcome(plan.kind, None)
            return await task
        if plan.kind in ("stream", "leaves a stream"):
            return await self._stream(plan)
        return await self._whole(plan)

    async def _whole(self, plan: Plan) -> Outcome:
        async with self.session.post(self.server.url + plan.address, data=plan.body) as response:
            body = await response.json()
        if response.status != plan.status:
            return Outcome(plan.kind, f"status {response.status}, not {plan.status}: {json.dumps(body)[:200]}")
        if plan.kind == "refused":
            fine = isinstance(body["error"]["message"], str)
            return Outcome(plan.kind, None if fine else f"no error of OpenAI's shape: {body}")
        if plan.kind == "scored":
            scores = [one["score"] for one in body["data"]]
            fine = len(scores) == 2 and all(isinstance(one, float) and math.isfinite(one) for one in scores)
            return Outcome(plan.kind, None if fine else f"no two scores: {body}")
        [choice] = body["choices"]
        fine = choice["finish_reason"] in ("stop", "length") and body["usage"]["completion_tokens"] <= 16
        return Outcome(plan.kind, None if fine else f"no whole answer: {json.dumps(body)[:200]}", choice["text"])

    async def _stream(self, plan: Plan) -> Outcome:
        parser, texts, reasons, counted, done = EventParser(), [], [], None, False
        async with self.session.post(self.server.url + plan.address, data=plan.body) as response:
            if response.status != 200:
                return Outcome(plan.kind, f"status {response.status}: {(await response.text())[:200]}")
            async for piece in response.content.iter_any():
                for data in parser.feed(piece):
                    if data == "[DONE]":
                        done = True
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        return Outcome(plan.kind, f"an error in the stream: {event['error']}")
                    texts += [choice["text"] for choice in event["choices"]]
                    reasons += [choice["finish_reason"] for choice in event["choices"] if choice["finish_reason"]]
                    counted = (event.get("usage") or {}).get("completion_tokens", counted)
                if texts and plan.kind == "leaves a stream":
                    return Outcome(plan.kind, None)
        fine = done and len(reasons) == 1 and counted is not None
        return Outcome(plan.kind, None if fine else f"no whole stream: {reasons}, {counted} tokens, ended {done}",
                       "".join(texts))

    async def _watch(self) -> None:
        while True:
            self.memory.append((len(self.outcomes), self.server.resident_bytes() / 1e6))
            await asyncio.sleep(1.0)


def slope(memory: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """MB for 1000 requests over the second half, by least squares, and its standard error."""
    last = memory[-1][0]
    counts, sizes = np.array([one for one in memory if one[0] >= last / 2]).T
    counts = (counts - counts.mean()) / 1000
    spread = float(counts @ counts)
    if len(counts) < 3 or not spread:
        return math.nan, math.nan
    found = float(counts @ sizes) / spread
    left = sizes - sizes.mean() - found * counts
    return found, math.sqrt(float(left @ left) / (len(counts) - 2) / spread)


def other_texts(soak: Soak) -> tuple[int, list[str]]:
    """How many texts were compared, and those that an engine in this process makes otherwise."""
    engine = stars.Engine(DEMO_LM, DEMO_RM, deterministic=True)
    kinds = {"stars": stars.STARS, "plain": stars.Sample, "best-of-n": stars.BestOfN}
    compared = [number for number, outcome in sorted(soak.outcomes.items())
                if outcome.kind in COMPARED and outcome.problem is None and number % EVERY == 0]
    asked = [plan_of(number, soak.seed).asked for number in compared]
    params = [stars.SamplingParams(**{name: one[name] for name in ("max_tokens", "temperature", "top_k", "seed")})
              for one in asked]
    policies = [kinds[one["stars"]["policy"]](**{name: value for name, value in one["stars"].items()
                                                 if name != "policy"}) for one in asked]
    outputs = engine.generate([one["prompt"] for one in asked], params, policies, use_tqdm=False)
    different = [f"{number}: {soak.outcomes[number].text!r} was {output.outputs[0].text!r} alone"
                 for number, output in zip(compared, outputs, strict=True)
                 if output.outputs[0].text != soak.outcomes[number].text]
    return len(compared), different


def held(server: ServerProcess) -> dict[str, float]:
    """What the server says that it still holds, after a moment in which it may let go."""
    for _ in range(20):
        text = server.get("/metrics")
        found = {name: float(value) for name, value in re.findall(r"^([\w:]+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
                 if name in GAUGES}
        if not any(found.values()):
            break
        time.sleep(0.5)
    return found


async def soaked(server: ServerProcess, options: argparse.Namespace) -> tuple[Soak, Meter, float]:
    """The run, the client's own part and its seconds."""
    meter, begin = Meter(), time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE),
                                     headers={"Content-Type": "application/json"},
                                     timeout=aiohttp.ClientTimeout(total=120)) as session:
        soak = Soak(server, session, options.requests, options.seed, begin + 60 * options.minutes)
        async with meter.measuring():
            await soak.run(options.clients)
    return soak, meter, time.monotonic() - begin


def main() -> int:
    options = _parse()
    end_on_sigterm()
    machine = describe_machine()
    arguments = ["--deterministic", "--served-model-name", MODEL, "--reward-threshold", "1.0"]
    with stars_serve(arguments, options.scratch / "soak-server.log") as server:
        cpu = server.cpu_seconds()
        soak, meter, seconds = asyncio.run(soaked(server, options))
        cpu = server.cpu_seconds() - cpu
        leftover, memory = held(server), [*soak.memory, (len(soak.outcomes), server.resident_bytes() / 1e6)]
        log = server.log.read_text()
    compared, different = other_texts(soak)
    growth, error = slope(memory)
    problems = Counter(f"{outcome.kind}: {outcome.problem}" for outcome in soak.outcomes.values() if outcome.problem)
    lost = [number for number in range(soak.next) if number not in soak.outcomes]
    result = {
        "machine": machine | {"load_average_at_end": describe_machine()["load_average"]},
        "settings": {name: getattr(options, name) for name in ("requests", "clients", "minutes", "seed")},
        "asked": soak.next, "answered": len(soak.outcomes), "lost": len(lost), "seconds": seconds,
        "requests_per_second": len(soak.outcomes) / seconds,
        "kinds": dict(Counter(outcome.kind for outcome in soak.outcomes.values())),
        "problems": dict(problems.most_common(20)), "held_at_the_end": leftover,
        "texts_compared": compared, "texts_that_differ": different[:20],
        "server_share_of_a_core": cpu / seconds, "client_share_of_a_core": meter.cpu_share,
        "memory_mb": {"first": memory[0][1], "middle": memory[len(memory) // 2][1], "last": memory[-1][1],
                      "slope_per_1000_requests": growth, "standard_error": error, "aim": f"<= {FLAT}"},
        "memory_over_requests": memory[:: max(1, len(memory) // 100)],
        "server_log_lines": len(log.splitlines()), "tracebacks": log.count("Traceback"),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [*problems] + [f"{len(lost)} requests were lost"] * bool(lost)
    wrong += [f"{name} is {value:g} at the end" for name, value in leftover.items() if value]
    wrong += [f"{len(leftover)} of {len(GAUGES)} gauges were told"] if len(leftover) < len(GAUGES) else []
    wrong += [f"{len(different)} of {compared} texts differ"] * bool(different)
    wrong += [f"memory grows by {growth:.3f} MB for 1000 requests"] * (growth - 2 * error > FLAT and not options.quick)
    wrong += [f"{result['tracebacks']} tracebacks in {server.log}"] * bool(result["tracebacks"])
    print(f"{soak.next} requests in {seconds:.0f} s: {result['kinds']}; memory {memory[0][1]:.0f} to "
          f"{memory[-1][1]:.0f} MB, {growth:.3f} +- {error:.3f} MB for 1000 requests; {compared} texts compared; "
          f"cores: server {cpu / seconds:.2f}, client {meter.cpu_share:.2f}")
    print("\n".join(f"WRONG: {one}" for one in wrong[:20]) or "nothing is wrong")
    print(f"written to {options.output}")
    return 1 if wrong else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, help="(20000)")
    parser.add_argument("--clients", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no more are asked (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="600 requests, of which memory says nothing")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "stars-serving")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.requests = options.requests or (600 if options.quick else 20000)
    options.output = options.output or (ROOT / ".benchmarks" if options.quick else RESULTS) / "serving-soak.json"
    options.scratch = options.scratch.resolve()
    options.scratch.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    sys.exit(main())
