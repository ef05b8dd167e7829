"""A soak of AsyncEngine: thousands of requests of every kind, of which many are disturbed; writes
benchmarks/results/soak.json.

    python benchmarks/soak.py [--requests 10000] [--seed 0] [--quick] [--without deadlines,grammars]

Requests are drawn from the seed and their number alone: policies, parameters, tenants, priorities, and what becomes of
them: some are cancelled, left, closed or aborted, some have deadlines or budgets, rewards that raise or come late, slow
readers. They come from two event loops in two threads. What must be true in the end: every request has ended once, as
it should; no page, slab, thread or object is held, and memory has stopped growing; the texts of the undisturbed are
those that the same requests have alone, deltas joined; deadlines were kept within a segment, but for so few as 0.1 % of
them explains: one run in 1000 that misses no more is called wrong all the same (a one-sided binomial test). What an
engine has not (see ROWS) is left out, and said. Exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import logging
import operator
import random
import re
import statistics
import sys
import threading
import time
import warnings
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import DEMO_LM, DEMO_RM, OPENINGS, RESULTS, ROOT, describe_machine, set_threads

import stars
from stars.request import Request
from stars.serve.async_engine import RequestStream
from stars.serve.feed import Feed

FAILING = "FAIL"  # a prompt with this in it has a reward that raises
LATE = "LATE"  # a prompt whose reward takes its time
KIND = stars.RequestOutputKind
MISSED = 1e-3  # the part of deadlines that a run may miss by more than a segment
FALSE_ALARMS = 1e-3  # the part of runs that are called wrong although they miss no more than these
MAX_PROBLEMS = 20  # that are printed

POLICIES: tuple[Callable[[random.Random], Any], ...] = (
    lambda r: stars.Sample(),
    lambda r: stars.Sample(score=True),
    lambda r: stars.STARS(r.choice([4, 8, 16]), r.randint(1, 6), beta=r.choice([0.0, 0.7]),
                          reward_threshold=r.choice([0.0, 1.5]), width=r.choice([None, 1, 3]),
                          exhaust=r.choice(["best_seen", "last", "back_up:1", "refuse"])),
    lambda r: stars.CARDS(min_segment=2, max_segment=12, max_attempts=r.randint(1, 4), reward_threshold=1.0),
    lambda r: stars.BestOfN(r.randint(1, 3)),
    lambda r: stars.BlockwiseBestOfK(r.randint(1, 4), segment_size=r.choice([5, 8])),
    lambda r: stars.RejectionSampling(reward_threshold=1.0, max_attempts=r.randint(1, 4)),
    lambda r: stars.SpeculativeRejection(r.randint(1, 4), segment_size=8),
    lambda r: stars.SegmentBeam(r.randint(1, 2), r.randint(1, 3), segment_size=8),
    lambda r: stars.ParticleFilter(r.randint(1, 3), segment_size=8),
    lambda r: stars.ARGS(topk=r.randint(1, 6)),
)


class Fate(NamedTuple):
    """What becomes of a request, how often, and the finish reasons that it may end with besides its own."""

    weight: int
    ends: tuple[str | None, ...]  # None: with no output at all


FATES = {
    "whole": Fate(50, ()),
    "slow": Fate(5, ()),  # its reader is
    "cancel": Fate(10, (None,)),
    "leave": Fate(5, (None,)),
    "close": Fate(5, (None,)),
    "abort": Fate(8, ("abort",)),
    "deadline": Fate(8, ("deadline",)),
    "budget": Fate(5, ("budget",)),
    "fail": Fate(5, ("error",)),
    "bad": Fate(2, (None,)),
}
UNDISTURBED = ("whole", "slow")
"""Their texts must be those of a run alone."""


@dataclass
class Plan:
    """One request, as it is drawn."""

    number: int
    fate: str
    given: dict[str, Any]  # keywords of `generate`
    delay: float  # seconds until its fate, where that is a matter of time
    rows: tuple[str, ...] = ()
    checks: list[Callable[[stars.RequestOutput], str | None]] = field(default_factory=list)


class Row(NamedTuple):
    """A feature that a request may use."""

    share: float  # of requests that use it
    there: Callable[[stars.Engine], bool]  # whether an engine has it
    use: Callable[[random.Random, Plan], None]
    fate: str = ""  # what it is needed for, if anything


def outcome(engine: stars.Engine, budget: stars.Budget | None = None, **params: Any) -> stars.CompletionOutput:
    """What becomes of a small request."""
    given = stars.SamplingParams(**({"max_tokens": 12, "seed": 1} | params))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return engine.generate("This film was", given, use_tqdm=False, budget=budget)[0].outputs[0]


def change(plan: Plan, **params: Any) -> None:
    plan.given["sampling_params"] = dataclasses.replace(plan.given["sampling_params"], **params)


def use_grammar(r: random.Random, plan: Plan) -> None:
    """A whole that fits in the tokens there are, or a beginning of one."""
    pattern = r.choice(["[ab]{3,9}", "(good|bad|neither)( film)?", "[0-9]{4}-[0-9]{2}", '\\{"stars": [1-5]\\}'])
    if type(plan.given["policy"]).__name__ in ("ARGS", "RAD"):
        return
    change(plan, structured_outputs={"regex": pattern}, stop=None, ignore_eos=False,
           presence_penalty=0.0, max_tokens=48)

    def check(output: stars.RequestOutput) -> str | None:
        wrong = [one.text for one in output.outputs if one.finish_reason == "stop" and one.text is not None
                 and not re.fullmatch(pattern, one.text)]
        return f"{wrong[0]!r} does not match {pattern}" if wrong else None

    plan.checks.append(check)


def use_edits(r: random.Random, plan: Plan) -> None:
    if type(plan.given["policy"]).__name__ in ("ARGS", "RAD"):
        return
    banned = r.sample(range(300, 600), 20)
    least = r.randint(0, 3)
    change(plan, logit_bias={**dict.fromkeys(banned, -100.0)}, min_tokens=least,
           max_tokens=max(least, plan.given["sampling_params"].max_tokens))

    def check(output: stars.RequestOutput) -> str | None:
        few = [one for one in output.outputs if one.finish_reason == "stop" and len(one.token_ids) < least]
        return f"{few[0]} has fewer than {least} tokens" if few else None

    plan.checks.append(check)


def use_logprobs(r: random.Random, plan: Plan) -> None:
    change(plan, logprobs=r.randint(0, 5))

    def check(output: stars.RequestOutput) -> str | None:
        bare = [one for one in output.outputs if len(getattr(one, "logprobs", None) or ()) != len(one.token_ids)]
        return f"{bare[0]} has not a log-probability for each token" if bare else None

    plan.checks.append(check)


def use_deltas(r: random.Random, plan: Plan) -> None:
    if plan.given["sampling_params"].output_kind is KIND.CUMULATIVE:
        change(plan, output_kind=KIND.DELTA)


def gives_deltas(engine: stars.Engine) -> bool:
    params = stars.SamplingParams(max_tokens=40, seed=1, ignore_eos=True, output_kind=KIND.DELTA)
    outputs = list(engine.stream("This film was", params))
    return len(outputs) > 1 and len(outputs[-1].outputs[0].token_ids) < 40


ROWS = {
    "deadlines": Row(0.0, lambda e: outcome(e, stars.Budget(seconds=1e-6)).finish_reason == "deadline",
                     lambda r, plan: None, "deadline"),
    "budgets": Row(0.0, lambda e: outcome(e, stars.Budget(lm_tokens=2)).finish_reason == "budget",
                   lambda r, plan: None, "budget"),
    "grammars": Row(0.15, lambda e: outcome(e, structured_outputs={"regex": "[ab]{3}"}).text in (
        "aaa", "aab", "aba", "abb", "baa", "bab", "bba", "bbb"), use_grammar),
    "edits": Row(0.15, lambda e: set(outcome(e, allowed_token_ids=[300, 301], ignore_eos=True).token_ids) <= {300, 301},
                 use_edits),
    "logprobs": Row(0.1, lambda e: bool(getattr(outcome(e, logprobs=1), "logprobs", None)), use_logprobs),
    "deltas": Row(0.2, gives_deltas, use_deltas),
}
"""Features by name. Whether an engine has one is seen by asking it for it: the row of one that it has not is left out.
"""


def plan_of(seed: int, number: int, rows: Callable[[str], bool]) -> Plan:
    """Request `number` of a seed, whatever the others are."""
    r = random.Random(f"{seed} {number}")
    needs = {row.fate: name for name, row in ROWS.items() if row.fate}
    fates = [fate for fate in FATES if fate not in needs or rows(needs[fate])]
    fate = r.choices(fates, [FATES[one].weight for one in fates])[0]
    policy = r.choice(POLICIES)(r)
    if fate == "fail":
        policy = stars.STARS(4, 2, reward_threshold=1.0)
    prompt: Any = r.choice(OPENINGS)
    prompt = prompt[: r.randint(4, len(prompt))] if r.random() < 0.5 else prompt
    prompt = prompt.strip() or "What"
    if fate == "fail":
        prompt = f"{FAILING} {prompt}"
    elif r.random() < 0.2:
        prompt = f"{LATE} {prompt}"
    params = stars.SamplingParams(
        temperature=r.choice([0.0, 0.8, 1.0]), top_k=r.choice([0, 40]), max_tokens=r.choice([1, 8, 24, 24, 40]),
        n=r.choice([1, 1, 1, 2]), seed=r.randrange(1 << 32), stop=r.choice([None, None, ["."], [" the"]]),
        ignore_eos=r.random() < 0.3, presence_penalty=r.choice([0.0, 0.0, 0.5]),
        output_kind=r.choice([KIND.CUMULATIVE, KIND.CUMULATIVE, KIND.FINAL_ONLY]))
    given: dict[str, Any] = dict(prompt=prompt, sampling_params=params, policy=policy,
                                 priority=r.choice([0, 0, 0, -1, 3]), user=r.choice([None, "ann", "bob", "cleo"]))
    plan = Plan(number, fate, given, r.random() ** 2)
    if fate == "bad":
        given["prompt"] = r.choice(["", {"prompt_token_ids": [1 << 40]}, 7])
        return plan
    if fate == "deadline":
        given["budget"] = stars.Budget(seconds=0.02 + r.random() ** 2)
    elif fate == "budget":
        given["budget"] = stars.Budget(**{r.choice(["attempts", "lm_tokens", "rm_calls"]): r.randint(1, 20)})
    used = []
    for name, row in ROWS.items():
        if r.random() < row.share and rows(name):
            row.use(r, plan)
            used.append(name)
    plan.rows = tuple(used)
    return plan


def judge(prompt: str, responses: list[str]) -> list[float]:
    """A part of the reward that raises, or takes its time, as the prompt says."""
    if prompt.startswith(FAILING):
        raise RuntimeError("this prompt's reward fails")
    if prompt.startswith(LATE):
        time.sleep(0.01)
    return [0.01 * len(response) for response in responses]


def build(deterministic: bool = True) -> stars.Engine:
    """An engine of the shipped pair, that keeps texts whatever is decoded beside them; small enough to be crowded.

    Its reward is a model's, with pages of its own, and a slow function's, whose answers come later.
    """
    slow = stars.FunctionReward(judge, blocking=True, max_workers=8)
    reward = stars.WeightedReward([(str(DEMO_RM), 1.0), (slow, 1.0)])
    return stars.Engine(DEMO_LM, reward, dtype="float32", deterministic=deterministic, cache_tokens=6144,
                        max_num_seqs=32, max_num_lanes=64, max_segment_size=32)


def chance(missed: int, count: int) -> float:
    """That at least `missed` of `count` deadlines are missed where MISSED of all are: a binomial tail."""
    term, below = (1 - MISSED) ** count, 0.0
    for number in range(missed):
        below += term
        term *= (count - number) / (number + 1) * MISSED / (1 - MISSED)
    return 1 - below


def facts(output: stars.RequestOutput) -> list[Any]:
    """What a run alone must agree on."""
    return [(one.token_ids, one.text, one.finish_reason, one.stop_reason) for one in output.outputs]


# -- the run ----------------------------------------------------------------------------------------------------------


class Soak:
    """One run, and what it has seen."""

    def __init__(self, engine: stars.Engine, requests: int, seed: int, rows: Callable[[str], bool], at_once: int,
                 alone: int):
        self.engine, self.count, self.seed, self.rows = engine, requests, seed, rows
        self.at_once = at_once
        self.served = stars.AsyncEngine(engine, max_waiting=16)
        self.problems: list[str] = []
        self.ends: list[list[str]] = [[] for _ in range(requests)]  # of each request; must be one
        self.reasons: Counter[tuple[str, str]] = Counter()
        undisturbed = [number for number in range(requests) if plan_of(seed, number, rows).fate in UNDISTURBED]
        # Of some of the undisturbed, as what is kept here grows with it.
        self.texts: dict[int, list[Any]] = dict.fromkeys(
            random.Random(seed).sample(undisturbed, min(alone, len(undisturbed))), [])
        self.late: list[tuple[float, float, float]] = []  # a deadline, when its request ended, and when its caller knew
        self.begins, self.round_ends = array("d"), array("d")  # of rounds, and of what is read before them
        self.refusals = 0  # of add_nowait
        self.resident: list[tuple[int, float]] = []  # requests that have ended, MB
        self._numbers = iter(range(requests))
        self._lock = threading.Lock()
        self._done = 0
        self._every = max(1, requests // 40)
        self._aborts: set[asyncio.Task[bool]] = set()  # a loop holds its tasks weakly
        advance = engine._advance

        def timed(*given: Any) -> Any:
            begin = time.monotonic()
            try:
                return advance(*given)
            finally:
                self.begins.append(begin)
                self.round_ends.append(time.monotonic())

        engine._advance = timed  # type: ignore[method-assign]

    def problem(self, number: int, text: str) -> None:
        self.problems.append(f"request {number}: {text}")

    def run(self) -> float:
        """Has all requests made, from two event loops; returns the seconds that takes."""
        begin = time.perf_counter()
        threads = [threading.Thread(target=lambda: asyncio.run(self._callers())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asyncio.run(self.served.shutdown())
        return time.perf_counter() - begin

    async def _callers(self) -> None:
        await asyncio.gather(*(self._caller() for _ in range(self.at_once // 2)))

    async def _caller(self) -> None:
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            plan = plan_of(self.seed, number, self.rows)
            task = asyncio.create_task(self._request(plan))
            if plan.fate == "cancel":
                asyncio.get_running_loop().call_later(plan.delay, task.cancel)
            try:
                end = await task
            except asyncio.CancelledError:
                end = "cancelled"
            except stars.StarsError as error:
                end = "refused" if plan.fate == "bad" else f"{type(error).__name__}: {error}"
            except Exception as error:
                end = f"raised {type(error).__name__}: {error}"
            del task
            self._note(plan, end)

    def _note(self, plan: Plan, end: str) -> None:
        number = plan.number
        self.ends[number].append(end)
        self.reasons[plan.fate, end] += 1
        own = {"stop", "length", "refused"} if plan.fate != "bad" else {"refused"}
        allowed = own | {reason for reason in FATES[plan.fate].ends if reason is not None}
        allowed |= {"cancel": {"cancelled"}, "leave": {"left"}, "close": {"closed"}}.get(plan.fate, set())
        if plan.fate == "fail":
            allowed = {"error"}
        if end not in allowed:
            self.problem(number, f"{plan.fate} ended with {end}: {plan.given}")
        with self._lock:
            self._done += 1
            if self._done % self._every == 0:
                self.resident.append((self._done, resident_mb()))
                print(f"{self._done} of {self.count}, {self.resident[-1][1]:.0f} MB", file=sys.stderr, flush=True)

    async def _request(self, plan: Plan) -> str:
        """Its end, in a word."""
        begin = time.monotonic()
        stream = await self._stream(plan)
        if plan.fate == "abort":
            asyncio.get_running_loop().call_later(plan.delay, self._abort, stream.request_id)
        last = None
        tokens: dict[int, list[int]] = defaultdict(list)  # of deltas
        logprobs: dict[int, list[Any]] = defaultdict(list)
        texts: dict[int, str] = defaultdict(str)
        limit = random.Random(plan.number).randint(0, 3)
        count = 0
        async for output in stream:
            if last is not None and last.finished:
                self.problem(plan.number, "has an output after its last")
            last, count = output, count + 1
            for one in output.outputs:
                tokens[one.index] += one.token_ids
                texts[one.index] += one.text or ""
                logprobs[one.index] += getattr(one, "logprobs", None) or []
            if not output.finished and plan.fate == "leave" and count > limit:
                return "left"
            if not output.finished and plan.fate == "close" and count > limit:
                await stream.aclose()
                return "closed"
            if plan.fate == "slow":
                await asyncio.sleep(0.02)
        if last is None or not last.finished:
            return "no last output"
        params = plan.given["sampling_params"]
        if params.output_kind is KIND.FINAL_ONLY and count != 1:
            self.problem(plan.number, f"has {count} outputs where its last is all")
        if params.output_kind is KIND.DELTA:
            for one in last.outputs:
                one.token_ids, one.text = tokens[one.index], texts[one.index]
                if logprobs[one.index]:
                    one.logprobs = logprobs[one.index]
        reasons = {one.finish_reason for one in last.outputs}
        special = reasons & {"abort", "deadline", "budget", "error"}
        if "deadline" in reasons:
            seconds = plan.given["budget"].seconds
            self.late.append((begin + seconds, begin + (last.times.finished or 0.0), time.monotonic()))
        if plan.number in self.texts:
            self.texts[plan.number] = facts(last)
        if not special:
            for check in plan.checks:
                if (wrong := check(last)) is not None:
                    self.problem(plan.number, wrong)
        return str(next(iter(special or reasons)))

    async def _stream(self, plan: Plan) -> RequestStream:
        """By one of the doors: the engine's own ids, or one that is the request's number."""
        door = plan.number % 3
        if door == 0 and plan.fate != "abort":
            return self.served.generate(**plan.given)
        if door == 1:
            try:
                return await self.served.add_nowait(**plan.given)
            except stars.QueueFullError:
                self.refusals += 1
        return await self.served.add(**plan.given, request_id=f"request {plan.number}")

    def _abort(self, request_id: str | None) -> None:
        task = asyncio.get_running_loop().create_task(self.served.abort(str(request_id)))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    # -- what must be true then ---------------------------------------------------------------------------------------

    def check_ends(self) -> None:
        for number, ends in enumerate(self.ends):
            if len(ends) != 1:
                self.problem(number, f"has ended {len(ends)} times: {ends}")

    def check_nothing_is_held(self, threads: set[str]) -> None:
        """Pages, slabs, requests, objects, threads."""
        engine = self.engine
        engine.check_integrity()
        caches = {"the language model's": engine._cache}
        for part in stars.reward.base.with_parts(engine.reward):
            if isinstance(part, stars.CausalReward):
                caches["the reward model's"] = part.cache
        for name, cache in caches.items():
            if cache.num_free_pages != cache.num_pages or cache.num_free_slabs != cache.num_slabs:
                self.problems.append(f"{name} cache has {cache.num_free_pages} of {cache.num_pages} pages and "
                                     f"{cache.num_free_slabs} of {cache.num_slabs} slabs free")
        if engine.has_unfinished_requests() or engine._scheduler.running:
            self.problems.append("the engine still has requests")
        gc.collect()
        held = Counter(type(one).__name__ for one in gc.get_objects() if type(one) in (Request, Feed, RequestStream))
        if held:
            self.problems.append(f"objects are held: {dict(held)}")
        stay = {"stars-reward", "stars-grammars"}  # which end with their owners
        more = {thread.name for thread in threading.enumerate()} - threads - stay
        if more:
            self.problems.append(f"threads are left: {more}")

    def memory_growth(self) -> float:
        """MB that the last quarter of the run has more than the second, by medians."""
        values = [mb for _, mb in self.resident]
        quarter = len(values) // 4
        return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])

    def check_deadlines(self) -> dict[str, Any]:
        """How late requests ended whose deadlines passed, and how late their callers knew. One that fell into a round
        is kept within a segment where no other round began and ended before the request did."""
        if not self.late:
            return {"count": 0, "missed": 0}
        missed = 0
        for deadline, ended, _ in self.late:
            first = bisect_left(self.begins, deadline)
            missed += first < len(self.begins) and self.round_ends[first] < ended
        found: dict[str, Any] = {"count": len(self.late), "missed": missed,
                                 "within_a_segment": 1 - missed / len(self.late)}
        if chance(missed, len(self.late)) < FALSE_ALARMS:
            self.problems.append(f"{missed} of {len(self.late)} deadlines were missed by more than a segment")
        for name, seconds in (("ended", [ended - deadline for deadline, ended, _ in self.late]),
                              ("told", [told - deadline for deadline, _, told in self.late])):
            ordered = [round(1e3 * one, 1) for one in sorted(seconds)]
            found[f"{name}_ms_late"] = {"median": statistics.median(ordered),
                                        "p99": ordered[int(0.99 * (len(ordered) - 1))], "most": ordered[-1]}
        return found

    def check_texts(self) -> None:
        """Runs those of the undisturbed by themselves whose texts are kept."""
        for number in self.texts:
            plan = plan_of(self.seed, number, self.rows)
            params = dataclasses.replace(plan.given["sampling_params"], output_kind=KIND.FINAL_ONLY)
            [output] = self.engine.generate(plan.given["prompt"], params, plan.given["policy"], use_tqdm=False)
            if self.texts[number] != facts(output):
                self.problem(number, f"has another text than alone: {self.texts[number]} and {facts(output)}: "
                                     f"{plan.given}")


def resident_mb() -> float:
    """Of this process, now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as status:
            return int(status.read().split()[1]) * 4096 / 2**20
    except OSError:
        return 0.0


def soak(requests: int, seed: int, without: tuple[str, ...] = (), at_once: int = 48, alone: int = 1000,
         growth_mb: float = 24.0) -> dict[str, Any]:
    """One run; "problems" of what it returns says what is wrong, nothing in the best case."""
    logging.getLogger("stars").setLevel(logging.CRITICAL)  # rewards that fail are part of it
    engine = build()
    there = {name: name not in without and row.there(engine) for name, row in ROWS.items()}
    run = Soak(engine, requests, seed, there.__getitem__, at_once, alone)
    threads = {thread.name for thread in threading.enumerate()} - {"stars-engine"}
    seconds = run.run()
    run.check_ends()
    run.check_nothing_is_held(threads)
    growth = run.memory_growth()
    if growth > growth_mb:
        run.problems.append(f"memory has grown by {growth:.1f} MB between the second and the last quarter")
    deadlines = run.check_deadlines()
    run.check_texts()
    return {
        "requests": requests, "seed": seed, "rows": there, "seconds": round(seconds, 1),
        "requests_per_second": round(requests / seconds, 2),
        "ends": {f"{fate}: {end}": count for (fate, end), count in sorted(run.reasons.items())},
        "refused_by_add_nowait": run.refusals, "texts_compared_with_alone": len(run.texts),
        "deadlines": deadlines, "rounds": len(run.begins),
        "longest_round_ms": round(1e3 * max(map(operator.sub, run.round_ends, run.begins)), 1),
        "memory_growth_mb": round(growth, 2),
        "resident_mb": [[count, round(mb, 1)] for count, mb in run.resident],
        "problems": run.problems,
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    missing = [name for name, there in result["rows"].items() if not there]
    yield (f"{result['requests']} requests of seed {result['seed']} in {result['seconds']} s; "
           f"{result['texts_compared_with_alone']} texts compared; memory {result['memory_growth_mb']:+} MB"
           + (f"; left out: {', '.join(missing)}" if missing else ""))
    yield from (f"  {count:6d}  {name}" for name, count in result["ends"].items())
    if result["deadlines"]["count"]:
        yield f"  deadlines, ms late: {result['deadlines']}"
    yield from result["problems"][:MAX_PROBLEMS]
    yield f"{len(result['problems'])} problems" if result["problems"] else "nothing is wrong"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, help="(10000)")
    parser.add_argument("--quick", action="store_true", help="500 requests, and no result file")
    parser.add_argument("--seed", type=int, default=0, help="what all is drawn from")
    parser.add_argument("--at-once", type=int, default=48, help="callers")
    parser.add_argument("--alone", type=int, help="texts that are compared with those of a run alone (1000, quick 200)")
    parser.add_argument("--growth", type=float, default=24.0,
                        help="MB that the last quarter may have more than the second")
    parser.add_argument("--without", type=lambda text: tuple(text.split(",")), default=(),
                        help=f"comma-separated rows to leave out: {', '.join(ROWS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    set_threads(options.threads)
    machine = describe_machine()
    requests = options.requests or (500 if options.quick else 10_000)
    alone = options.alone or (200 if options.quick else 1000)
    result = soak(requests, options.seed, options.without, options.at_once, alone, options.growth)
    print("\n".join(lines(result)))
    default = ROOT / ".benchmarks" if options.quick else RESULTS
    output = options.output or default / "soak.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": machine, **result}, indent=1) + "\n")
    print(f"written to {output}")
    return int(bool(result["problems"]))


if __name__ == "__main__":
    sys.exit(main())
