"""The engine on random weights at real sizes: steps, tokens, the reward model's passes, batches, memory.

Random weights cost what trained ones do. Accept rates are forced (`common.forced_accept`), after the reward model has
run. The limit of a step is its bytes (weights, the shared prefix once, each lane's slab) at the measured bandwidth.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from common import forced_accept
from models import as_deterministic, config_of, kv_bytes_a_token, random_decoder, weight_bytes
from record import Record, Settings
from timing import median_seconds, seconds_each

import stars
from stars.draft import LaneSpec
from stars.kernels.graph import Graphs
from stars.kernels.philox import accept_uniform
from stars.passes import Span
from stars.reward import CausalReward, causal

SEGMENT, MAX_ATTEMPTS = 32, 20


def llama_1b(record: Record, settings: Settings) -> None:
    """The small model with a reward model of its own shape, everything measured."""
    Bench(record, settings, "Llama-3.2-1B", "Llama-3.2-1B").all(graphs=True)


def llama_8b(record: Record, settings: Settings) -> None:
    """The pair of the aims: 8B and 8B."""
    Bench(record, settings, "Llama-3.1-8B", "Llama-3.1-8B").all(graphs=False)


def qwen3_8b(record: Record, settings: Settings) -> None:
    """Another family: steps, and STARS at one accept rate."""
    bench = Bench(record, settings, "Qwen3-8B", "Qwen3-8B")
    bench.run(steps=bench.steps, plain=bench.plain, aligned=lambda: bench.aligned(rates=(0.3,), widths=(None,)))


class Bench:
    """One pair of models and an engine over them."""

    def __init__(self, record: Record, settings: Settings, lm: str, rm: str):
        self.record, self.settings = record, settings
        self.name = lm
        dtype = torch.float32 if settings.dry else torch.bfloat16
        lm, rm = ("toy", "toy") if settings.dry else (lm, rm)
        begin = time.perf_counter()
        self.lm = random_decoder(config_of(lm), settings.device, dtype, "lm", seed=1)
        self.rm = random_decoder(config_of(rm, "reward"), settings.device, dtype, "reward", seed=2)
        self.context = 32 if settings.dry else 1024
        self.plain_seconds: float | None = None  # until measured
        self.tokens = 2 * SEGMENT if settings.quick else 4 * SEGMENT
        self.engine = self.build(self.lm, self.rm)
        self._sync()
        record.fact(f"{self.name}: seconds to build", round(time.perf_counter() - begin, 2))
        self._memory("after building")

    def all(self, graphs: bool) -> None:
        """In the order of what matters most, should the time not suffice."""
        self.run(
            steps=self.steps, plain=self.plain, aligned=lambda: self.aligned(rates=(0.3, 0.1, 0.7), widths=(None,)),
            reward_passes=self.reward_passes, together=self.together,
            widths=lambda: self.aligned(rates=(0.3,), widths=(1, 8, 16), against_plain=False),
            graph_lengths=self.graph_lengths if graphs else lambda: None, memory=lambda: self._memory("at the end"),
            deterministic=self.deterministic)

    def run(self, **measurements: Callable[[], None]) -> None:
        """One after the other; one that fails costs its own figures."""
        for name, measure in measurements.items():
            with self.record.measuring(name):
                measure()

    def build(self, lm, rm, deterministic: bool = False) -> stars.Engine:
        """An engine with room for a context of 16k beside 32 short ones."""
        limits = dict(cache_tokens=1 << 12, max_model_len=1 << 11) if self.settings.dry else dict(
            cache_tokens=1 << 15, max_model_len=(1 << 14) + 512)
        return stars.Engine(lm, CausalReward(rm), device=self.settings.device,
                            dtype="auto" if self.settings.dry else "bfloat16", deterministic=deterministic,
                            max_num_seqs=32, max_num_lanes=64, max_segment_size=SEGMENT, **limits)

    # -- one step ---------------------------------------------------------------------------------------------------

    def steps(self) -> None:
        """A decode step at 1, 4, 16 and 64 lanes over a shared prefix."""
        one = None
        for lanes in (1, 4) if self.settings.dry else (1, 4, 16, 64):
            seconds = self.step_seconds(self.engine, lanes)
            read = self.step_bytes(lanes)
            limit = None if self.settings.bandwidth is None else 1e3 * read / self.settings.bandwidth
            one = one or seconds
            self.record.figure(f"{self.name}: step, {lanes} lanes over {self.context} shared keys", 1e3 * seconds, "ms",
                               limit, "its bytes at copy bandwidth", "<= 1.18" if lanes == 1 else "", bytes=read,
                               gb_s=read / seconds / 1e9)
            if lanes == 16:
                self.record.figure(f"{self.name}: step, {lanes} lanes beside 1", 1e3 * seconds, "ms", 1e3 * one,
                                   "the step at 1 lane", "<= 1.1")

    def step_seconds(self, engine: stars.Engine, lanes: int) -> float:
        """Seconds of one step of a segment, drafted whole."""
        cache, drafter = engine._cache, engine._round.drafter
        table = cache.open([], self.context + SEGMENT)
        engine._passes.prefill([(table, self.prompt(self.context), self.context)])
        slabs = [cache.take_slab() for _ in range(lanes)]
        params = stars.SamplingParams(temperature=0.8)
        specs = [LaneSpec(table, 5, slab, SEGMENT, 1, index + 1, 0, params, ()) for index, slab in enumerate(slabs)]
        seconds = median_seconds(lambda: drafter.draft(specs), self.settings.device, 2 if self.settings.dry else 7, 2)
        for slab in slabs:
            cache.return_slab(slab)
        cache.close(table)
        return seconds / SEGMENT

    def step_bytes(self, lanes: int) -> int:
        """Weights, the prefix once, half a slab a lane, logits written and read."""
        logits = 2 * lanes * self.lm.config.vocab_size * self.lm.dtype.itemsize
        return int(weight_bytes(self.lm) + kv_bytes_a_token(self.lm) * (self.context + lanes * SEGMENT / 2) + logits)

    # -- tokens -----------------------------------------------------------------------------------------------------

    def plain(self) -> None:
        """Plain sampling, the prompt's pass included and apart."""
        self.plain_seconds = self._generate_seconds(stars.Sample(), None)
        limit = None if self.settings.bandwidth is None else self.settings.bandwidth / self.step_bytes(1)
        self.record.figure(f"{self.name}: plain tokens, {self.context} prompt tokens included",
                           self.tokens / self.plain_seconds, "token/s", limit, "steps at copy bandwidth",
                           higher_is_better=True)

        table = self.engine._cache.open([], self.context)

        def prefill() -> None:
            table.length = 0
            self.engine._passes.prefill([(table, self.prompt(self.context), self.context)])

        seconds = median_seconds(prefill, self.settings.device, 3)
        self.engine._cache.close(table)
        flops = 2 * sum(weight.out_features * weight.in_features for layer in self.lm.layers for weight in
                        (layer.qkv, layer.o, layer.gate_up, layer.down))  # of a token
        peak = self.settings.facts.get("matmul_tflop_s")
        self.record.figure(f"{self.name}: prefill", self.context / seconds, "token/s",
                           1e12 * peak / flops if peak else None, "measured bf16 product", higher_is_better=True)

    def aligned(self, rates: tuple[float, ...], widths: tuple[int | None, ...], against_plain: bool = True) -> None:
        """STARS at forced accept rates beside plain sampling; then with fewer candidates in a scoring pass."""
        device = self.settings.device
        base = causal.RIDGE_ROWS[device]
        for rate in rates:
            for width in widths:
                fewer = width is None and rate == 0.3 and not self.settings.dry
                for ridge in (base, base // 4) if fewer else (base,):
                    causal.RIDGE_ROWS[device] = ridge
                    seen: list = []
                    seconds = self._generate_seconds(self.policy(width), rate, seen=seen)
                    metrics = seen[-1].metrics
                    free = "free" if width is None else width
                    self.record.figure(
                        f"{self.name}: STARS, accept {rate}, width {free}, {ridge} rows a scoring pass",
                        self.tokens / seconds, "token/s", higher_is_better=True, width=metrics.width,
                        attempts=metrics.attempts, counted=metrics.attempts_counted, lm_seconds=metrics.lm_seconds,
                        rm_seconds=metrics.rm_seconds, rm_tokens=metrics.rm_tokens_scored)
                    if against_plain and self.plain_seconds is not None:
                        self.record.figure(
                            f"{self.name}: aligned over plain, accept {rate}, {ridge} rows a scoring pass",
                            1e3 * seconds / self.tokens, "ms", 1e3 * self.plain_seconds / self.tokens, "a plain token",
                            "<= 1.15" if rate == 0.3 and ridge == base else "")
        causal.RIDGE_ROWS[device] = base

    def together(self) -> None:
        """32 prompts at once over one by one."""
        count, short, few = (4, 16, 2) if self.settings.dry else (32, 64, 4)
        for name, policy, rate in (("plain", stars.Sample(), None), ("STARS, accept 0.3", self.policy(None), 0.3)):
            # Twice before: a shape is captured at its second run.
            at_once = self._generate_seconds(policy, rate, prompts=range(count), context=short)
            alone = self._generate_seconds(policy, rate, prompts=self._typical(rate, count, few), context=short,
                                           one_by_one=True, warmups=1) / few * count
            tokens = count * self.tokens
            self.record.figure(f"{self.name}: {count} prompts at once, {name}", tokens / at_once, "token/s",
                               tokens / alone, "one by one", ">= 8", higher_is_better=True)

    def policy(self, width: int | None) -> stars.STARS:
        """Segments of 32 tokens; the threshold does not matter where the accept rate is forced."""
        return stars.STARS(SEGMENT, MAX_ATTEMPTS, alpha=1.0, reward_threshold=0.0, width=width)

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """Random ids, none of them shared with another seed's."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.lm.config.vocab_size, (length,), generator=generator).tolist()

    def _generate_seconds(self, policy, rate: float | None, *, prompts: Sequence[int] = (0,),
                          context: int | None = None, one_by_one: bool = False, warmups: int = 2,
                          seen: list | None = None) -> float:
        engine = self.engine
        context = self.context if context is None else context
        runs = iter(range(1, 1000))
        seed = typical_seed(rate, self.tokens // SEGMENT)

        def call() -> None:
            run = next(runs)  # other prompts each time: no page of an earlier run is shared
            asked = [{"prompt_token_ids": self.prompt(context, 100 * run + index)} for index in prompts]
            # The same seeds each time, so that equal numbers of attempts are compared.
            params = [stars.SamplingParams(temperature=0.8, max_tokens=self.tokens, seed=seed + index)
                      for index in prompts]
            with forced_accept(1.0 if rate is None else rate):
                if one_by_one:
                    outputs = [engine.generate(one, own, policy, use_tqdm=False)[0]
                               for one, own in zip(asked, params, strict=True)]
                else:
                    outputs = engine.generate(asked, params, policy, use_tqdm=False)
            for output in outputs:
                if output.outputs[0].error:
                    raise RuntimeError(output.outputs[0].error)
            if seen is not None:
                seen.append(outputs[0])

        repeats = 1 if self.settings.dry else 2 if len(prompts) > 1 else 3
        return statistics.median(seconds_each(call, self.settings.device, repeats, 1 if self.settings.dry else warmups))

    def _typical(self, rate: float | None, count: int, few: int) -> list[int]:
        """`few` of `count` prompts, which take as many attempts as all of them do on average: one of each quantile."""
        seed, segments = typical_seed(rate, self.tokens // SEGMENT), self.tokens // SEGMENT
        order = sorted(range(count), key=lambda index: sum(attempts(seed + index, rate, segments)))
        return [order[(2 * index + 1) * count // (2 * few)] for index in range(few)]

    # -- the reward model -------------------------------------------------------------------------------------------

    def reward_passes(self) -> None:
        """A scoring pass of one and of four candidates as the context grows, beside the whole text scored again."""
        contexts = (32, 64, 128) if self.settings.dry else (1024, 4096, 16384 - SEGMENT)
        passes, cache = self.engine.reward._passes, self.engine.reward.cache
        base = None
        for context, aim in zip(contexts, ("", "<= 1.25", "<= 2.1"), strict=True):
            table = cache.open([], context + SEGMENT)

            def whole(table=table, context=context) -> None:
                table.length = 0
                passes.prefill([(table, self.prompt(context), context)])

            rescore = median_seconds(whole, self.settings.device, 1, 1)
            for count in (1, 4):
                slabs = [cache.take_slab() for _ in range(count)]
                spans = [Span(table, self.prompt(SEGMENT), context, range(start, start + SEGMENT), start)
                         for start in (slab * cache.slab_len for slab in slabs)]
                seconds = median_seconds(lambda spans=spans: passes.score(spans), self.settings.device, 5, 3)
                for slab in slabs:
                    cache.return_slab(slab)
                base = base or seconds
                self.record.figure(f"{self.name}: RM pass, {count} x {SEGMENT} rows after {context}", 1e3 * seconds,
                                   "ms", 1e3 * base, f"1 candidate after {contexts[0]}", aim if count == 1 else "",
                                   full_rescore_ms=1e3 * rescore, saved=rescore / seconds)
            cache.close(table)

    # -- what the design rests on -----------------------------------------------------------------------------------

    def graph_lengths(self) -> None:
        """Graphs of one step, of eight, and of a whole segment: time of a step, and memory the driver takes."""
        for steps in (1, 8, SEGMENT):
            drafter = self.engine._round.drafter
            kept, drafter._graphs = drafter._graphs, Graphs(steps)
            if not self.settings.dry:
                torch.cuda.empty_cache()
            before = None if self.settings.dry else torch.cuda.mem_get_info()[0]
            begin = time.perf_counter()
            seconds = self.step_seconds(self.engine, 1 if self.settings.dry else 8)
            taken = None if before is None else (before - torch.cuda.mem_get_info()[0]) / 2**20
            self.record.figure(f"{self.name}: step at 8 lanes, graphs of {steps} steps", 1e3 * seconds, "ms",
                               memory_mib=taken, seconds_with_capture=time.perf_counter() - begin)
            drafter._graphs = kept

    def deterministic(self) -> None:
        """What one fixed order of sums costs."""
        before = {lanes: self.step_seconds(self.engine, lanes) for lanes in ((1,) if self.settings.dry else (1, 16))}
        self.engine = None
        gc.collect()
        if not self.settings.dry:
            torch.cuda.empty_cache()
        try:
            fixed = self.build(as_deterministic(self.lm), as_deterministic(self.rm), deterministic=True)
        except stars.ModelError as error:
            self.record.note(f"deterministic mode: {error}")
            return
        for lanes, free in before.items():
            self.record.figure(f"{self.name}: deterministic step, {lanes} lanes", 1e3 * self.step_seconds(fixed, lanes),
                               "ms", 1e3 * free, "the same, not deterministic")

    def _memory(self, when: str) -> None:
        if self.settings.dry:
            return
        free, total = torch.cuda.mem_get_info()
        self.record.fact(f"{self.name}: GiB {when}", {
            "allocated": round(torch.cuda.memory_allocated() / 2**30, 2),
            "peak": round(torch.cuda.max_memory_allocated() / 2**30, 2), "card": round((total - free) / 2**30, 2)})

    def _sync(self) -> None:
        if not self.settings.dry:
            torch.cuda.synchronize()


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
