"""The pair of the aims, 8B and 8B: a step and its kernels, aligned over plain tokens, the logits of transformers."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence

import step_table
import torch
from bench import SEGMENT, Bench, fitting
from models import hf_over
from record import Record, Settings
from timing import Seconds

from stars.kernels.graph import Graphs
from stars.kernels.triton import tuned

STEP_LANES = (1, 16, 8, 4)


def llama_8b(record: Record, settings: Settings) -> None:
    """On a card with less memory a 1B pair takes its place."""
    name = fitting(record, settings, "Llama-3.1-8B", "Llama-3.2-1B")
    headline = Headline(record, settings, Bench(record, settings, name))
    record.part("steps", headline.steps, least=4)
    record.part("aligned", headline.bench.aligned, 0.3, None, "aligned-0.3", least=6)
    record.part("unfused steps", headline.unfused, least=2)
    record.part("early stop", headline.bench.early_stop, 4 if settings.dry else 16, least=2)
    record.part("logits", headline.same_function, least=3)
    record.part("plain tokens", headline.bench.plain, least=4)
    record.part("reward passes", headline.reward_passes, least=5)
    record.part("prefill", headline.bench.prefill, least=2)
    record.part("aligned at 0.1", headline.bench.aligned, 0.1, None, "aligned-0.1", least=10)
    record.part("aligned at 0.7", headline.bench.aligned, 0.7, None, "aligned-0.7", least=6)
    # Behind everything that is timed: once CUPTI was there, launches of this process are slower.
    record.part("kernels of a step", headline.kernels, least=4)
    record.part("memory", headline.bench.memory, "at the end")


class Headline:
    """The parts, over one Bench."""

    def __init__(self, record: Record, settings: Settings, bench: Bench):
        self.record, self.settings, self.bench = record, settings, bench
        self.step_ms: dict[int, float] = {}  # by lanes

    def steps(self) -> None:
        """A decode step at 1, 4, 8 and 16 lanes over a shared prefix, and its share of read bandwidth."""
        bench, bandwidth = self.bench, self.settings.bandwidth
        one: float | None = None
        for lanes in (1, 4) if self.settings.dry else STEP_LANES:
            repeats = bench.step_seconds(lanes)
            seconds, size = statistics.median(repeats), bench.step_bytes(lanes)
            self.step_ms[lanes] = 1e3 * seconds
            self.record.fact(f"{bench.name}: step ms", {str(count): round(ms, 4) for count, ms in self.step_ms.items()})
            name = f"{bench.name}: step, {lanes} lane{'s' * (lanes > 1)} over {bench.context} shared keys"
            self.record.figure(name, 1e3 * seconds, "ms", None if bandwidth is None else 1e3 * size / bandwidth,
                               "its bytes at read bandwidth", bytes=size,
                               spread=[1e3 * min(repeats), 1e3 * max(repeats)])
            self.record.figure(f"{name}, bytes over time", size / seconds / 1e9, "GB/s",
                               None if bandwidth is None else bandwidth / 1e9, "read bandwidth",
                               bench.aim("step") if lanes == 1 else "", higher_is_better=True)
            one = one or seconds
            if lanes == 16:
                self.record.figure(f"{bench.name}: step, 16 lanes over 1", 1e3 * seconds, "ms", 1e3 * one,
                                   "the step at 1 lane", bench.aim("step-16"),
                                   spread=[1e3 * min(repeats), 1e3 * max(repeats)])

    def unfused(self) -> None:
        """The same step where no pass is fused, which is what cards without a table run."""
        bench, drafter = self.bench, self.bench.engine._round.drafter
        kept, drafter._graphs = drafter._graphs, Graphs(drafter._graphs.later_bytes)
        try:
            with tuned.using(tuned._table()._replace(chains={})):
                for lanes in (1, 4) if self.settings.dry else (1, 16):
                    times = bench.step_seconds(lanes)
                    self.record.figure(f"{bench.name}: step, {lanes} lane{'s' * (lanes > 1)}, unfused",
                                       1e3 * statistics.median(times), "ms", self.step_ms.get(lanes),
                                       "the step by the table", spread=[1e3 * min(times), 1e3 * max(times)])
        finally:
            drafter._graphs = kept

    def kernels(self) -> None:
        """The table of kernels at each number of lanes, and the three longest, for the profiler that asks why."""
        if self.settings.dry:
            return
        bench = self.bench
        for lanes in (1, 16, 4, 8):  # the last one's longest are those that `ncu` looks at
            rows = step_table.table(step_table.launches(bench, lanes), step_table.bytes_of(bench, lanes))
            if not rows:
                raise RuntimeError("the profiler has seen no step: CUPTI may be missing or refused")
            self.record.fact(f"{bench.name}: kernels of a step at {lanes} lanes", rows)
            print("\n".join(f"    {row['kernel']:<84}{row['launches']:>6.1f} {row['us_a_step']:>9.1f} us a step"
                            for row in rows[:14]), flush=True)
            kernels = [row for row in rows if row["us"] is not None]
            self.record.figure(f"{bench.name}: kernels of a step at {lanes} lanes, their sum",
                               sum(row["us_a_step"] for row in kernels) / 1e3, "ms",
                               self.step_ms.get(lanes), "the step without the profiler",
                               under_the_profiler=rows[0]["us_a_step"] / 1e3,
                               launches=sum(row["launches"] for row in kernels))
            self.record.fact("longest kernels", list(dict.fromkeys(step_table.short(row["kernel"])
                                                                   for row in kernels))[:3])

    def reward_passes(self) -> None:
        """Scoring passes as the context grows, of one candidate and of as many as really run together."""
        bench = self.bench
        many = bench.engine.reward.lanes_per_pass(SEGMENT, 1)
        contexts = (32, 64) if self.settings.dry else (1024, 4096, (1 << 14) - SEGMENT)
        base: dict[int, float] = {}
        for context, aim in zip(contexts, ("", "rm-4k", "rm-16k"), strict=False):
            for count in dict.fromkeys((many, 1)):
                seconds = Seconds.of(bench.reward_pass_seconds(context, count))
                spread = [1e3 * one for one in seconds.spread]
                size, bandwidth = bench.reward_pass_bytes(context, count), self.settings.bandwidth
                name = f"{bench.name}: RM pass, {count} x {bench.reward_rows} rows after {context}"
                self.record.figure(name, 1e3 * seconds, "ms", None if bandwidth is None else 1e3 * size / bandwidth,
                                   "its bytes at read bandwidth", bytes=size, spread=spread)
                if aim:
                    self.record.figure(f"{name}, over {contexts[0]}", 1e3 * seconds, "ms", 1e3 * base[count],
                                       f"after {contexts[0]}", bench.aim(aim) if count == many else "",
                                       spread=spread)
                base.setdefault(count, seconds)

    def same_function(self) -> None:
        """Logits and rewards beside transformers' over the same tensors."""
        same_function(self.record, self.bench)


def same_function(record: Record, bench: Bench) -> None:
    """Within the type's error. transformers missing is a note: there is nothing to compare with."""
    try:
        import transformers
    except Exception as error:  # a package that is there and broken costs no more than one that is not
        record.note(f"transformers cannot be imported ({error}): logits were compared with nothing")
        return
    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    prompt = bench.prompt(24 if bench.settings.dry else 128, 3)
    ids = torch.tensor([prompt], device=bench.settings.device)
    # In bfloat16 such models differ from float32 by up to 0.09 of the spread (measured at 16 and 32 layers): two of
    # them by twice that, and another function by several spreads.
    allowed = 1e-3 if bench.settings.dry else 0.3
    lm = hf_over(bench.lm, bench.shape, "lm")
    theirs, drawn = lm(ids).logits[0, -1].float(), our_logits(bench, prompt)
    ours = drawn.float()
    if not bench.settings.dry:  # one in 65,536 numbers is a bfloat16 by chance
        rounded = (ours.bfloat16().float() == ours).float().mean().item()
        record.check(f"{bench.name}: logits are float32, and not rounded to 16 bits", drawn.dtype == torch.float32 and
                     rounded < 0.01, share_of_bfloat16=rounded)
    error, spread = (ours - theirs).abs().max().item(), theirs.std().item()
    record.check(f"{bench.name}: logits as transformers', within the type's error", error < allowed * spread,
                 error=error, spread=spread)
    rm = hf_over(bench.rm, bench.shape, "reward")
    theirs, ours = rm(ids).logits.flatten()[-1].item(), our_reward(bench, prompt)
    # The head of unit columns over a normed row: rewards of such models have a spread of 1.
    record.check(f"{bench.name}: reward as transformers', within the type's error", abs(ours - theirs) < allowed,
                 ours=ours, theirs=theirs)


def our_logits(bench: Bench, prompt: Sequence[int]) -> torch.Tensor:
    """Logits after the prompt [vocab], by a draft step over all but its last token."""
    from stars import SamplingParams
    from stars.draft import LaneSpec

    engine = bench.engine
    cache, drafter = engine._cache, engine._round.drafter
    table, slab = cache.open([]), cache.take_slab()
    cache.reserve(table, len(prompt))
    try:
        engine._models.own.passes.prefill([(table, prompt, len(prompt) - 1)])
        drafter.draft([LaneSpec(table, prompt[-1], slab, 1, 0, 1, 0, SamplingParams(), ())])
        return drafter._logits[0].clone()
    finally:
        cache.return_slab(slab)
        cache.close(table)


def our_reward(bench: Bench, prompt: Sequence[int]) -> float:
    """The reward after the prompt, by the pass that scores candidates."""
    from stars.passes import Span

    reward = bench.engine.reward
    cache = reward.cache
    table, slab = cache.open([]), cache.take_slab()
    cache.reserve(table, len(prompt))
    try:
        reward._passes.prefill([(table, prompt, len(prompt) - 1)])
        start = slab * cache.slab_len
        [score] = reward._passes.score([Span(table, prompt[-1:], len(prompt) - 1, [start])])
        return score
    finally:
        cache.return_slab(slab)
        cache.close(table)
