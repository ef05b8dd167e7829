"""More of the engine at real sizes, asked for by name: other models, widths, batches, graphs, determinism."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence

import torch
from bench import SEGMENT, Bench, Plain, attempts, fitting, typical_seed
from common import forced_accept
from headline import Headline
from models import as_deterministic
from record import Record, Settings
from timing import Seconds

import stars


def llama_1b(record: Record, settings: Settings) -> None:
    """The small model with a reward model of its own shape, everything measured."""
    whole(record, settings, "Llama-3.2-1B")


def llama_8b(record: Record, settings: Settings) -> None:
    """What the headline leaves out, and it again."""
    whole(record, settings, fitting(record, settings, "Llama-3.1-8B", "Llama-3.2-1B"))


def qwen3_8b(record: Record, settings: Settings) -> None:
    """Another family: steps, and STARS at one accept rate."""
    name = fitting(record, settings, "Qwen3-8B", "Llama-3.2-1B")
    headline = Headline(record, settings, Bench(record, settings, name))
    record.part("steps", headline.steps)
    record.part("logits", headline.same_function)
    record.part("aligned", headline.bench.aligned, 0.3)


def whole(record: Record, settings: Settings, name: str) -> None:
    """In the order of what matters most, should the time not suffice."""
    bench = Bench(record, settings, name)
    headline = Headline(record, settings, bench)
    record.part("steps", headline.steps)
    record.part("plain tokens", bench.plain)
    for rate in (0.3, 0.1, 0.7):
        record.part(f"aligned at {rate}", bench.aligned, rate)
    record.part("reward passes", headline.reward_passes)
    record.part("together", together, record, bench)
    for width in (1, 8, 16):
        record.part(f"width {width}", bench.aligned, 0.3, width)
    record.part("fewer rows a scoring pass", fewer_rows, bench)
    record.part("memory", bench.memory, "at the end")
    record.part("deterministic", deterministic, record, bench)


def together(record: Record, bench: Bench, policies: Sequence[str] = ("plain", "STARS, accept 0.3")) -> None:
    """32 prompts at once over one by one, the prompts' passes included on both sides."""
    count, short, few = (4, 16, 2) if bench.settings.dry else (32, 64, 4)
    for name, policy, rate in (("plain", Plain(), None), ("STARS, accept 0.3", bench.policy(None), 0.3)):
        if name not in policies:
            continue
        seed, segments = typical_seed(rate, bench.tokens // SEGMENT), bench.tokens // SEGMENT
        # Few of them alone: one of each quantile of the number of attempts, so that they stand for all.
        order = sorted(range(count), key=lambda index: sum(attempts(seed + index, rate, segments)))
        chosen = [order[(2 * index + 1) * count // (2 * few)] for index in range(few)]

        def run(indices: Sequence[int], policy=policy, rate=rate, seed=seed) -> float:
            given = [{"prompt_token_ids": bench.prompt(short, 100 + index)} for index in indices]
            params = [stars.SamplingParams(temperature=0.8, max_tokens=bench.tokens, seed=seed + index)
                      for index in indices]
            bench.sync()
            begin = time.perf_counter()
            with forced_accept(1.0 if rate is None else rate):
                outputs = bench.engine.generate(given, params, policy, use_tqdm=False)
            errors = [output.outputs[0].error for output in outputs if output.outputs[0].error]
            if errors:
                raise RuntimeError(errors[0])
            return time.perf_counter() - begin

        for _ in range(1 if bench.settings.dry else 2):  # what start-up did not capture is, at its second run
            run(range(count))
            run(chosen[:1])
        at_once = Seconds.of([run(range(count)) for _ in range(1 if bench.settings.dry else 3)])
        alone = sum(run([index]) for index in chosen) / few * count
        tokens = count * bench.tokens
        record.figure(f"{bench.name}: {count} prompts at once, {name}", tokens / at_once, "token/s", tokens / alone,
                      "one by one", bench.aim("together"), higher_is_better=True,
                      spread=[tokens / one for one in reversed(at_once.spread)])


def fewer_rows(bench: Bench) -> None:
    """A quarter of the rows in a scoring pass: whether so many candidates should be read at once."""
    reward = bench.engine.reward
    target = reward.target
    reward.target = target._replace(ridge_rows=target.ridge_rows // 4)
    try:
        bench.aligned(0.3, note=f", {reward.target.ridge_rows} rows a scoring pass")
    finally:
        reward.target = target


def deterministic(record: Record, bench: Bench) -> None:
    """What one fixed order of sums costs."""
    counts = (1,) if bench.settings.dry else (1, 16)
    before = {lanes: statistics.median(bench.step_seconds(lanes)) for lanes in counts}
    bench.engine = None
    gc.collect()
    if not bench.settings.dry:
        torch.cuda.empty_cache()
    try:
        bench.engine = bench.build(as_deterministic(bench.lm), as_deterministic(bench.rm), deterministic=True)
    except stars.ModelError as error:
        record.note(f"deterministic mode: {error}")
        return
    for lanes, free in before.items():
        record.figure(f"{bench.name}: deterministic step, {lanes} lanes", 1e3 * statistics.median(
            bench.step_seconds(lanes)), "ms", 1e3 * free, "the same, not deterministic")
