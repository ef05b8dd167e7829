"""An engine over a pair of models with random weights, and how its steps, passes and tokens are timed.

Random weights cost what trained ones do. Accept rates are forced (`common.forced_accept`), after the reward model has
run. Steps and passes are timed by events around their replays; tokens by the clock, from the end of the prompt's
passes to the end of the response, after a run of the same shapes that compiled and captured all it needs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from common import forced_accept
from counting import counted
from models import SHAPES, config_of, kv_bytes_a_token, parameters, random_decoder, weight_bytes
from record import Record, Settings
from timing import Seconds, rehearsing

import stars
from stars.config import EngineConfig
from stars.draft import LaneSpec
from stars.kernels.philox import accept_uniform
from stars.model.decoder import Decoder
from stars.passes import Span
from stars.plan import Fixed, Lanes, Plan, Sampled, Score
from stars.prefill import choose_prefill
from stars.reward import CausalReward
from stars.rules import Always
from stars.sizes import Occupant, needed_bytes, slab_length

SEGMENT, MAX_ATTEMPTS = 32, 20
LIMITS = dict(cache_tokens=1 << 15, max_model_len=(1 << 14) + 512, max_num_seqs=32, max_num_lanes=64,
              max_segment_size=SEGMENT)
"""Room for a context of 16k beside 32 short ones."""
DRY_LIMITS = LIMITS | dict(cache_tokens=1 << 12, max_model_len=1 << 11)


SHORT = {"Llama-3.1-8B": "8B", "Llama-3.2-1B": "1B"}


class Plain:
    """Plain sampling in drafts as long as those it is compared with."""

    def plan(self) -> Plan:
        return Plan(Sampled(), Fixed(SEGMENT), Lanes(1), Score("never"), Always())


class Timed:
    """Stands in for the `Graphs` of a drafter or of passes: notes the time of everything that is run through it."""

    def __init__(self, graphs, device: str):
        self.graphs, self.on_gpu = graphs, device != "cpu"
        self.stretches: list[tuple] = []

    def run(self, *arguments, **options) -> int:
        if not self.on_gpu:
            begin = time.perf_counter()
            ran = self.graphs.run(*arguments, **options)
            self.stretches.append((begin, time.perf_counter()))
            return ran
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        ran = self.graphs.run(*arguments, **options)
        stop.record()
        self.stretches.append((start, stop))
        return ran

    def seconds(self, count: int | None = None) -> list[float]:
        """Of each run, once they have ended; with `count` of each of so many drafts of as many runs, their gaps too."""
        each = 1 if count is None else len(self.stretches) // count
        first, last = self.stretches[::each], self.stretches[each - 1 :: each]
        if not self.on_gpu:
            return [stop - start for (start, _), (_, stop) in zip(first, last, strict=True)]
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for (start, _), (_, stop) in zip(first, last, strict=True)]


@contextmanager
def timing(owner, device: str) -> Iterator[Timed]:
    """Inside, everything that `owner`, a drafter or passes, runs through its graphs is timed."""
    kept = owner._graphs
    owner._graphs = Timed(kept, device)
    try:
        yield owner._graphs
    finally:
        owner._graphs = kept


class Tokens(NamedTuple):
    """One timed response."""

    prompt_seconds: float
    seconds: float  # of the tokens alone
    output: stars.RequestOutput


def needs(name: str, limits: dict = LIMITS) -> dict[str, int]:
    """Bytes that the pair of this shape and its engine take, by the engine's own formula."""
    config = EngineConfig.resolve(config_of(name), "cuda", "bfloat16", **limits)
    models = {}
    for said, head in (("the language model", "lm"), ("the reward model", "reward")):
        shape = config_of(name, head)
        backend = choose_prefill(shape, torch.bfloat16, config.target, config.prefill_backend, False)
        models[said] = Occupant(shape, torch.bfloat16, 2 * parameters(shape, head), head == "lm",
                                slab_length(config, False, 0), backend)
    return needed_bytes(config, models)


def fitting(record: Record, settings: Settings, name: str, instead: str) -> str:
    """`name`, or `instead` where the card is too small for it, which is then said."""
    if settings.dry:
        return name
    needed, free = sum(needs(name).values()), torch.cuda.mem_get_info()[0]
    if needed <= free:
        return name
    record.note(f"a pair of {name} needs {needed / 2**30:.0f} GiB and {free / 2**30:.0f} are free: {instead} instead")
    return instead


class Bench:
    """One pair of models of the same shape, and an engine over them. `layers`: fewer, where only kernels matter."""

    def __init__(self, record: Record, settings: Settings, name: str, layers: int | None = None, seed: int | None = 1,
                 pair: tuple[Decoder, Decoder] | None = None, scheme: str = ""):
        self.record, self.settings = record, settings
        self.name = f"{SHORT.get(name, name)} {scheme}".rstrip()
        dtype = torch.float32 if settings.dry else torch.bfloat16
        self.shape = "toy" if settings.dry else name
        begin = time.perf_counter()
        self.lm, self.rm = pair or (random_decoder(
            config_of(self.shape, head, layers=layers), settings.device, dtype, head, scheme=scheme,
            seed=None if seed is None else seed + (head == "reward")) for head in ("lm", "reward"))
        self.sync()
        weights = time.perf_counter() - begin
        self.context = 32 if settings.dry else 1024
        self.tokens = 2 * SEGMENT if settings.dry else 4 * SEGMENT
        self.engine = self.start()
        record.fact(f"{self.name}: seconds to build", {"weights": round(weights, 2),
                                                  "all": round(time.perf_counter() - begin, 2)})
        self.memory("after building")

    def start(self) -> stars.Engine:
        """The engine, and what its start took: captures, their seconds, and the memory that the driver has for them."""
        driver = self._of_the_driver()
        begin = time.perf_counter()
        with counted() as seen:
            engine = self.build(self.lm, self.rm)
            self.sync()
        after = self._of_the_driver()
        self.record.fact(f"{self.name}: start-up", {
            "seconds": round(time.perf_counter() - begin, 2), "captures": seen["captured"],
            "compiled": seen["compiled"], "launched": seen["launched"],
            "driver_mib": None if driver is None else round((after - driver) / 2**20, 1)})
        return engine

    def _of_the_driver(self) -> int | None:
        """Bytes of the card that are taken and torch does not know of: graphs, kernels, workspaces of libraries."""
        if self.settings.dry or rehearsing():
            return None
        self.sync()
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    def aim(self, key: str) -> str:
        """The row a figure stands for: rows are those of the 8B pair."""
        return key if self.name.split(" ")[0] == "8B" else ""

    def build(self, lm, rm, deterministic: bool = False) -> stars.Engine:
        """An engine over two decoders."""
        return stars.Engine(lm, CausalReward(rm), device=self.settings.device,
                            dtype="auto" if self.settings.dry else "bfloat16", deterministic=deterministic,
                            **(DRY_LIMITS if self.settings.dry else LIMITS))

    # -- one step, one pass -----------------------------------------------------------------------------------------

    def step_seconds(self, lanes: int, repeats: int = 7, steps: int = SEGMENT) -> list[float]:
        """Seconds of one step of a segment of `steps` over a shared prefix, of each repeat."""
        engine = self.engine
        cache, drafter = engine._cache, engine._round.drafter
        table = cache.open([])  # shared with nobody
        cache.reserve(table, self.context)
        slabs = [cache.take_slab() for _ in range(lanes)]
        try:
            engine._models.own.passes.prefill([(table, self.prompt(self.context), self.context)])
            params = stars.SamplingParams(temperature=0.8)
            specs = [LaneSpec(table, 5, slab, steps, 1, index + 1, 0, params, ())
                     for index, slab in enumerate(slabs)]
            for _ in range(2):  # what start-up did not compile or capture is, before it is timed
                drafter.draft(specs)
            count = 1 if rehearsing() else repeats
            with timing(drafter, self.settings.device) as timed:  # on a GPU a run a step
                for _ in range(count):
                    drafter.draft(specs)
            return [seconds / steps for seconds in timed.seconds(count)]
        finally:
            for slab in slabs:
                cache.return_slab(slab)
            cache.close(table)

    def step_bytes(self, lanes: int) -> int:
        """Weights, the prefix once, half a slab a lane, float32 logits written and read."""
        logits = 2 * lanes * self.lm.config.vocab_size * 4
        return int(weight_bytes(self.lm) + kv_bytes_a_token(self.lm) * (self.context + lanes * SEGMENT / 2) + logits)

    @property
    def reward_rows(self) -> int:
        """Of a candidate of a whole segment: its tokens, and the last committed ones whose keys the pages lack."""
        return SEGMENT + self.engine.config.target.reward_lag

    def reward_pass_seconds(self, context: int, count: int, repeats: int = 7) -> list[float]:
        """Seconds of a scoring pass of `count` candidates of `reward_rows` rows."""
        passes, cache = self.engine.reward._passes, self.engine.reward.cache
        table = cache.open([])
        cache.reserve(table, context)
        slabs = [cache.take_slab() for _ in range(count)]
        try:
            passes.prefill([(table, self.prompt(context), context)])
            rows = self.reward_rows
            spans = [Span(table, self.prompt(rows), context, range(start, start + rows))
                     for start in (slab * cache.slab_len for slab in slabs)]
            for _ in range(2):
                passes.score(spans)
            with timing(passes, self.settings.device) as timed:
                for _ in range(1 if rehearsing() else repeats):
                    passes.score(spans)
            return timed.seconds()
        finally:
            for slab in slabs:
                cache.return_slab(slab)
            cache.close(table)

    def reward_pass_bytes(self, context: int, count: int) -> int:
        """Weights, the history once, every candidate's keys and values written and read."""
        return int(weight_bytes(self.rm) + kv_bytes_a_token(self.rm) * (context + 2 * count * self.reward_rows))

    def early_stop(self, lanes: int, ends_after: int = 4, repeats: int = 5) -> None:
        """A draft whose lanes all end after a few of its steps, beside a whole one, by the clock: the same tokens so
        far, in less time."""
        engine = self.engine
        cache, drafter = engine._cache, engine._round.drafter
        table = cache.open([])
        cache.reserve(table, self.context)
        slabs = [cache.take_slab() for _ in range(lanes)]
        try:
            engine._models.own.passes.prefill([(table, self.prompt(self.context), self.context)])
            whole = [LaneSpec(table, 5, slab, SEGMENT, 3, index + 1, 0, stars.SamplingParams(temperature=0.8), ())
                     for index, slab in enumerate(slabs)]
            drawn = drafter.draft(whole)
            stopped = [spec._replace(stop_ids=(one.token_ids[ends_after - 1],)) for spec, one in zip(
                whole, drawn, strict=True)]
            found, seconds = drafter.draft(stopped), {"whole": [], "stopped": []}
            for _ in range(1 if rehearsing() else repeats):
                for name, specs in (("whole", whole), ("stopped", stopped)):
                    self.sync()
                    begin = time.perf_counter()
                    drafter.draft(specs)
                    seconds[name].append(time.perf_counter() - begin)
        finally:
            for slab in slabs:
                cache.return_slab(slab)
            cache.close(table)
        long, short = (Seconds.of(times) for times in seconds.values())
        self.record.check(f"{self.name}: lanes that stop have the tokens of those that go on", all(
            len(one.token_ids) <= ends_after and one.token_ids == other.token_ids[: len(one.token_ids)]
            for one, other in zip(found, drawn, strict=True)) or rehearsing())
        self.record.figure(f"{self.name}: draft of {lanes} lanes that end after {ends_after} of {SEGMENT} steps",
                           1e3 * short, "ms", 1e3 * long, "the whole draft", self.aim("early-stop"),
                           steps=max(len(one.token_ids) for one in found), spread=[1e3 * one for one in short.spread])

    # -- tokens -----------------------------------------------------------------------------------------------------

    def complete(self, policy, rate: float | None = None, prompt: Sequence[int] | None = None) -> Tokens:
        """One response of self.tokens tokens. The same seed each time: equal numbers of attempts are compared."""
        engine = self.engine
        given = {"prompt_token_ids": list(prompt if prompt is not None else self.prompt(self.context))}
        params = stars.SamplingParams(temperature=0.8, max_tokens=self.tokens,
                                      seed=typical_seed(rate, self.tokens // SEGMENT))
        with forced_accept(1.0 if rate is None else rate):
            engine.add_request(given, params, policy)
            self.sync()
            begin = time.perf_counter()
            engine._schedule()  # the prompt's passes through both models
            self.sync()
            middle = time.perf_counter()
            output = None
            while engine.has_unfinished_requests():
                for output in engine.step():
                    pass
            self.sync()
            end = time.perf_counter()
        if output.outputs[0].error:
            raise RuntimeError(output.outputs[0].error)
        return Tokens(middle - begin, end - middle, output)

    def side_by_side(self, *runs: Callable[[], Tokens], repeats: int | None = None) -> list[list[Tokens]]:
        """Each of `runs` in turn, A B A B …, after one of each that compiles what is not yet: all of their results."""
        if repeats is None:
            repeats = 1 if self.settings.dry or rehearsing() else 3
        for run in runs:
            run()
        results: list[list[Tokens]] = [[] for _ in runs]
        for _ in range(repeats):
            for found, run in zip(results, runs, strict=True):
                found.append(run())
        return results

    def aligned(self, rate: float, width: int | None = None, aim: str = "", note: str = "", repeats: int | None = None,
                ) -> None:
        """STARS at a forced accept rate beside plain sampling, drafts of equal length."""
        plain, aligned = self.side_by_side(lambda: self.complete(Plain()), lambda: self.complete(
            self.policy(width), rate), repeats=1 if self.settings.dry or rehearsing() else repeats)
        ratios = [one.seconds / other.seconds for one, other in zip(aligned, plain, strict=True)]
        seconds, metrics = median(aligned), aligned[-1].output.metrics
        free, ms = "free" if width is None else width, 1e3 * seconds / self.tokens
        self.record.figure(
            f"{self.name}: aligned over plain, accept {rate}, width {free}{note}", ms, "ms",
            ms / statistics.median(ratios), "a plain token", self.aim(aim), spread=[min(ratios), max(ratios)],
            width=metrics.width, attempts=metrics.attempts, counted=metrics.attempts_counted,
            segments=metrics.segments, lm_ms=1e3 * metrics.lm_seconds, rm_ms=1e3 * metrics.rm_seconds,
            rm_tokens=metrics.rm_tokens_scored, prompt_ms=1e3 * aligned[-1].prompt_seconds)
        self.record.figure(f"{self.name}: STARS tokens, accept {rate}, width {free}{note}", self.tokens / seconds,
                           "token/s", higher_is_better=True)

    def plain(self) -> None:
        """Plain sampling beside its limit, and the prompt's pass."""
        [plain] = self.side_by_side(lambda: self.complete(Plain()))
        seconds = median(plain)
        limit = None if self.settings.bandwidth is None else self.settings.bandwidth / self.step_bytes(1)
        self.record.fact(f"{self.name}: plain token seconds", seconds / self.tokens)
        self.record.figure(f"{self.name}: plain tokens", self.tokens / seconds, "token/s", limit,
                           "steps at read bandwidth", higher_is_better=True,
                           spread=[self.tokens / one.seconds for one in plain])

    def prefill(self) -> None:
        """A prompt's pass through the language model."""
        table = self.engine._cache.open([])
        self.engine._cache.reserve(table, self.context)
        seconds = []
        for _ in range(2 if rehearsing() else 6):
            table.length = 0
            self.sync()
            begin = time.perf_counter()
            self.engine._models.own.passes.prefill([(table, self.prompt(self.context), self.context)])
            self.sync()
            seconds.append(time.perf_counter() - begin)
        seconds = Seconds.of(seconds[1:])
        self.engine._cache.close(table)
        flops = 2 * sum(weight.out_features * weight.in_features for layer in self.lm.layers for weight in
                        (layer.qkv, layer.o, layer.gate_up, layer.down))  # of a token
        peak = self.settings.facts.get("matmul_tflop_s")
        self.record.figure(f"{self.name}: prefill of {self.context} tokens", self.context / seconds, "token/s",
                           1e12 * peak / flops if peak else None, "measured bf16 product", higher_is_better=True,
                           spread=[self.context / one for one in reversed(seconds.spread)])

    # -- small things -----------------------------------------------------------------------------------------------

    def policy(self, width: int | None) -> stars.STARS:
        """Segments of 32 tokens; the threshold does not matter where the accept rate is forced."""
        return stars.STARS(SEGMENT, MAX_ATTEMPTS, alpha=1.0, reward_threshold=0.0, width=width)

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Random ids, none of them shared with another seed's."""
        return random.Random(seed).choices(range(3, SHAPES[self.shape]["vocab_size"]), k=length)

    def memory(self, when: str) -> None:
        """What is taken on the card."""
        if self.settings.dry or rehearsing():
            return
        free, total = torch.cuda.mem_get_info()
        self.record.fact(f"{self.name}: GiB {when}", {
            "allocated": round(torch.cuda.memory_allocated() / 2**30, 2),
            "peak": round(torch.cuda.max_memory_allocated() / 2**30, 2), "card": round((total - free) / 2**30, 2)})

    def sync(self) -> None:
        """Waits for the device."""
        if not self.settings.dry:
            torch.cuda.synchronize()


def median(runs: Sequence[Tokens]) -> float:
    """Seconds of the tokens."""
    return statistics.median(run.seconds for run in runs)


def typical_seed(rate: float | None, segments: int) -> int:
    """A seed whose accept uniforms cost about segments / rate attempts: few segments of any seed would be luck."""
    if rate is None:
        return 1000
    return min(range(1000, 1020), key=lambda seed: abs(sum(attempts(seed, rate, segments)) - segments / rate))


def attempts(seed: int, rate: float | None, segments: int) -> list[int]:
    """Attempts of each segment where the accept rate is forced; None is plain sampling."""
    if rate is None:
        return [1] * segments
    return [next((attempt for attempt in range(1, MAX_ATTEMPTS + 1)
                  if accept_uniform(seed, attempt, segment, 0) < rate), MAX_ATTEMPTS) for segment in range(segments)]
