"""Speed: tokens and rounds over their floors, and side by side with transformers. Every figure is one function."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
from common import Figure, compare, forced_accept, interleave, speedup
from hf_stars import HFOutput, HFStars, load_pair
from products import Floor, Pass, recorded

import stars
from stars.kernels.philox import accept_uniform

SEGMENT, WIDTH = 16, 8
MAX_ATTEMPTS = 20
SEED = 1000  # of repeat 0; repeat i adds i


@dataclass
class Setup:
    """What the figures of one dtype are measured with."""

    model: str
    reward: str
    dtype: str
    prompts: list[str]
    tokens: int
    repeats: int
    beta: float = 0.3
    compiled: bool = False

    @cached_property
    def engine(self) -> stars.Engine:
        return stars.Engine(self.model, self.reward, dtype=self.dtype)

    @cached_property
    def floor(self) -> Floor:
        return Floor(self.engine)

    @cached_property
    def hf_pair(self):
        return load_pair(self.model, self.reward, self.dtype)

    @cached_property
    def threshold(self) -> float:
        """The 0.9 quantile of plain samples' rewards."""
        return self.engine.calibrate(self.prompts[:4], self.params(0), quantile=0.9, num_samples=4)

    def params(self, index: int) -> stars.SamplingParams:
        return stars.SamplingParams(temperature=0.8, top_k=40, max_tokens=self.tokens, ignore_eos=True,
                                    seed=SEED + index)

    def policy(self, width: int | None) -> stars.STARS:
        return stars.STARS(SEGMENT, MAX_ATTEMPTS, beta=self.beta, reward_threshold=self.threshold, width=width)

    def prompt(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]

    def prompt_ids(self, index: int) -> list[int]:
        return self.engine.tokenizer.encode(self.prompt(index))

    def ours(self, index: int, policy) -> stars.RequestOutput:
        """One prompt through the engine."""
        return self.engine.generate(self.prompt(index), self.params(index), policy, use_tqdm=False)[0]

    def sample(self, index: int) -> None:
        self.ours(index, stars.Sample())

    def fastest_loop(self, width: int) -> HFStars:
        """The fastest form of the loop on transformers here: kind of cache, and lanes that the reward model reads."""
        choices = product(("dynamic", "preallocated"), sorted({min(lanes, width) for lanes in (1, 2, 8)}))
        loops = [HFStars(*self.hf_pair, width=width, rm_lanes=lanes, cache=cache) for cache, lanes in choices]
        short = dataclasses.replace(self.params(0), max_tokens=min(self.tokens, 2 * SEGMENT))
        ids, uniform = self.prompt_ids(0), uniforms(SEED)

        def timed(loop: HFStars) -> Callable[[int], None]:
            return lambda index: void(loop.generate(ids, short, self.policy(width), accept_rate=0.3, uniform=uniform))

        seconds = interleave({str(i): timed(loop) for i, loop in enumerate(loops)}, max(2, self.repeats // 3))
        return loops[min(range(len(loops)), key=lambda i: statistics.median(seconds[str(i)]))]


def void(_: object) -> None:
    """For callables whose value is of no use."""


def uniforms(seed: int, segments: int = 64) -> Callable[[int, int], float]:
    """The engine's accept uniforms of a seed, computed beforehand."""
    table = {(segment, attempt): accept_uniform(seed, attempt, segment, 0)
             for segment in range(segments) for attempt in range(1, MAX_ATTEMPTS + 1)}
    return lambda segment, attempt: table[segment, attempt]


def tokens_over_products(setup: Setup) -> Iterator[Figure]:
    """a. A plain token over the matrix products of its step."""
    passes, whole = [], []

    def decode(index: int) -> float:
        begin = time.perf_counter()
        with recorded(setup.engine) as record:
            setup.sample(index)
        whole.append(time.perf_counter() - begin)
        passes.append(record)
        return record.seconds

    seconds = interleave({"token": decode, "products": lambda index: setup.floor.run(passes[-1].passes)}, setup.repeats)
    per_token = 1e3 / setup.tokens
    tokens = [s * per_token for s in seconds["token"]]
    floor = [s * per_token for s in seconds["products"]]
    inside = [record.lm_seconds * per_token for record in passes[-setup.repeats :]]
    yield compare("plain token", "ms", tokens, "its matrix products", floor, "<= 1.3",
                  drafting_ms=statistics.median(inside),
                  formula="time of the rounds over the products of every step at 1 row, replayed alone")
    yield compare("plain token, prompt and output included", "ms",
                  [s * per_token for s in whole[-setup.repeats :]], "its matrix products", floor)


def rounds_over_products(setup: Setup) -> Iterator[Figure]:
    """b. A STARS round of width 8 over its products."""
    for name, rate in (("real law", None), ("accept 0.3", 0.3)):
        records = []

        def decode(index: int, rate=rate, records=records) -> float:
            with recorded(setup.engine) as record:
                if rate is None:
                    setup.ours(index, setup.policy(WIDTH))
                else:
                    with forced_accept(rate):
                        setup.ours(index, setup.policy(WIDTH))
            records.append(record)
            return record.seconds

        seconds = interleave({"round": decode, "products": lambda index, records=records: setup.floor.run(
            records[-1].passes)}, setup.repeats)
        records = records[-setup.repeats :]
        rounds = [record.rounds for record in records]
        yield compare(
            f"STARS round, width {WIDTH}, {name}", "ms",
            [1e3 * s / n for s, n in zip(seconds["round"], rounds, strict=True)], "B draft + RM products",
            [1e3 * s / n for s, n in zip(seconds["products"], rounds, strict=True)], "<= 1.4",
            rounds=sum(rounds), rm_rows_per_round=sum(record.rm_rows for record in records) / sum(rounds),
            lm_ms_per_round=1e3 * sum(record.lm_seconds for record in records) / sum(rounds),
            rm_ms_per_round=1e3 * sum(record.rm_seconds for record in records) / sum(rounds),
            host_ms_per_round=1e3 * sum(r.seconds - r.lm_seconds - r.rm_seconds for r in records) / sum(rounds),
            formula="sum over rounds of B x products(lm, width rows) + products(rm, rows of each scoring pass)")


def sampling_over_generate(setup: Setup) -> Iterator[Figure]:
    """c. Plain sampling beside transformers' generate."""
    lm = setup.hf_pair[0]

    def generate(index: int, **options) -> None:
        ids = torch.tensor([setup.prompt_ids(index)])
        torch.manual_seed(SEED + index)
        with torch.inference_mode():
            output = lm.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_k=40,
                                 top_p=1.0, min_new_tokens=setup.tokens, max_new_tokens=setup.tokens, pad_token_id=0,
                                 **options)
        assert output.shape[1] == ids.shape[1] + setup.tokens

    forms: dict[str, dict] = {"generate, dynamic cache": {}, "generate, static cache": {
        "cache_implementation": "static"}}
    if setup.compiled:
        from transformers import CompileConfig

        forms["generate, static and compiled"] = {"cache_implementation": "static", "disable_compile": False,
                                                  "compile_config": CompileConfig(mode="default")}
        forms["generate, static and compiled"]["compile_config"]._compile_all_devices = True
    functions, failed = {"ours": setup.sample}, {}
    for name, options in forms.items():
        try:
            generate(0, **options)
        except Exception as error:  # whatever transformers raises where a form does not run on the CPU
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        # A compiled form compiles once more for every length of prompt: it keeps to the first one.
        only = 0 if "compile_config" in options else None
        functions[name] = lambda index, options=options, only=only: generate(index if only is None else only, **options)
    seconds = interleave(functions, setup.repeats)
    tokens = [setup.tokens] * setup.repeats
    for name in forms:
        if name in failed:
            yield Figure(f"plain sampling over {name}", None, "token/s", name, detail={"failed": failed[name]})
        else:
            yield speedup("plain sampling", tokens, seconds["ours"], name, seconds[name],
                          ">= 2.5" if name == "generate, dynamic cache" else "")


def stars_over_loops(setup: Setup) -> Iterator[Figure]:
    """d. STARS beside the loop on transformers, at equal numbers of attempts and then under the real law."""
    wide, narrow = setup.fastest_loop(WIDTH), setup.fastest_loop(1)
    bare = HFStars(*setup.hf_pair, width=1, no_cache=True)
    repeats = setup.repeats
    tables = [uniforms(SEED + index) for index in range(max(repeats, 1))]
    counts: dict[str, list[int]] = {}

    def count(name: str, attempts: int) -> None:
        counts.setdefault(name, []).append(attempts)

    def ours(name: str, width: int | None) -> Callable[[int], None]:
        def run(index: int) -> None:
            with forced_accept(0.3):
                output = setup.ours(index, setup.policy(width))
            count(name, output.metrics.attempts_counted)
        return run

    def theirs(name: str, loop: HFStars) -> Callable[[int], None]:
        def run(index: int) -> None:
            output = loop.generate(setup.prompt_ids(index), setup.params(index), setup.policy(loop.width),
                                   accept_rate=0.3, uniform=tables[index])
            count(name, output.attempts_counted)
        return run

    seconds = interleave({
        "ours": ours("ours", WIDTH), "free": ours("free", None), "wide": theirs("wide", wide),
        "narrow": theirs("narrow", narrow)}, repeats)
    if len({tuple(attempts) for attempts in counts.values()}) != 1:
        raise RuntimeError(f"the loops drew different numbers of attempts ({counts}): the accept rate was not forced")
    tokens = [setup.tokens] * repeats
    options = {"accept": 0.3, "loop": f"{wide.cache_kind} cache, {wide.rm_lanes} candidates a scoring pass",
               "loop_width_1": f"{narrow.cache_kind} cache"}
    yield speedup(f"STARS, width {WIDTH}, accept 0.3", tokens, seconds["ours"], f"loop on transformers, width {WIDTH}",
                  seconds["wide"], ">= 4", **options)
    yield speedup(f"STARS, width {WIDTH}, accept 0.3", tokens, seconds["ours"], "loop on transformers, width 1",
                  seconds["narrow"], ">= 8", **options)
    yield speedup("STARS, width free, accept 0.3", tokens, seconds["free"], f"loop on transformers, width {WIDTH}",
                  seconds["wide"], **options)
    yield speedup("STARS, width free, accept 0.3", tokens, seconds["free"], "loop on transformers, width 1",
                  seconds["narrow"], ">= 8", **options)
    few = min(repeats, 2)
    seconds = interleave({"ours": ours("again", WIDTH), "bare": theirs("bare", bare)}, few, warmups=0)
    yield speedup(f"STARS, width {WIDTH}, accept 0.3", tokens[:few], seconds["ours"],
                  "no cache, width 1 (as published)", seconds["bare"], **options)
    yield _real_law(setup, wide)


def _real_law(setup: Setup, loop: HFStars) -> Figure:
    """The real law: each loop draws its own attempts, so the accept rates stand beside the figure."""
    ours: list[stars.RequestOutput] = []
    theirs: list[HFOutput] = []
    seconds = interleave({
        "ours": lambda index: ours.append(setup.ours(index, setup.policy(WIDTH))),
        "loop": lambda index: theirs.append(loop.generate(setup.prompt_ids(index), setup.params(index),
                                                          setup.policy(WIDTH)))}, setup.repeats)
    tokens = [setup.tokens] * setup.repeats
    metrics, theirs = [output.metrics for output in ours[-setup.repeats :]], theirs[-setup.repeats :]
    drawn = [sum(m.lm_tokens_drawn for m in metrics), sum(output.lm_tokens_drawn for output in theirs)]
    per_drawn = [sum(seconds[name]) / tokens for name, tokens in zip(("ours", "loop"), drawn, strict=True)]
    return speedup(f"STARS, width {WIDTH}, real law", tokens, seconds["ours"], f"loop on transformers, width {WIDTH}",
                   seconds["loop"], threshold=setup.threshold, ratio_per_lm_token_drawn=per_drawn[1] / per_drawn[0],
                   accept_rate=sum(m.accepted for m in metrics) / sum(m.attempts_counted for m in metrics),
                   loop_accept_rate=sum(o.accepted for o in theirs) / sum(o.attempts_counted for o in theirs))


def aligned_over_plain(setup: Setup) -> Iterator[Figure]:
    """d. What an aligned token costs beside a plain one of the same engine, width chosen by the engine."""
    for rate in (0.1, 0.3, 0.7):
        widths = []

        def aligned(index: int, rate=rate, widths=widths) -> None:
            with forced_accept(rate):
                widths.append(setup.ours(index, setup.policy(None)).metrics.width)

        seconds = interleave({"aligned": aligned, "plain": setup.sample}, setup.repeats)
        per_token = 1e3 / setup.tokens
        yield compare(f"aligned token, accept {rate}, width free", "ms", [s * per_token for s in seconds["aligned"]],
                      "plain token", [s * per_token for s in seconds["plain"]], largest_widths=sorted(set(widths)),
                      tokens_per_second=setup.tokens / statistics.median(seconds["aligned"]))


def together_over_one_by_one(setup: Setup, count: int = 32) -> Iterator[Figure]:
    """e. 32 prompts at once beside one by one."""
    repeats = max(2, setup.repeats // 3)
    for name, policy in (("plain", stars.Sample()), ("STARS, accept 0.3, width free", setup.policy(None))):
        prompts = [setup.prompt(index) for index in range(count)]
        params = [setup.params(index) for index in range(count)]

        def together(_: int, prompts=prompts, params=params, policy=policy) -> None:
            with forced_accept(0.3):
                setup.engine.generate(prompts, params, policy, use_tqdm=False)

        def one_by_one(_: int, prompts=prompts, params=params, policy=policy) -> None:
            with forced_accept(0.3):
                for prompt, own in zip(prompts, params, strict=True):
                    setup.engine.generate(prompt, own, policy, use_tqdm=False)

        seconds = interleave({"together": together, "one by one": one_by_one}, repeats)
        tokens = [count * setup.tokens] * repeats
        yield speedup(f"{count} prompts at once, {name}", tokens, seconds["together"], "one by one",
                      seconds["one by one"], ">= 3")
    steps = min(setup.tokens, 32)
    seconds = interleave({
        "together": lambda _: setup.floor.run([Pass("lm", count, count, steps)]),
        "one by one": lambda _: setup.floor.run([Pass("lm", 1, 1, count * steps)])}, setup.repeats)
    tokens = [count * steps] * setup.repeats
    yield speedup(f"{count} prompts at once, matrix products alone", tokens, seconds["together"], "one by one",
                  seconds["one by one"], formula="the most that batching can bring here: products of a draft step")


FIGURES: dict[str, Callable[[Setup], Iterator[Figure]]] = {
    "token": tokens_over_products, "round": rounds_over_products, "generate": sampling_over_generate,
    "loops": stars_over_loops, "aligned": aligned_over_plain, "together": together_over_one_by_one,
}


def directory(path: str | Path) -> str:
    """A model directory as transformers and the engine both take it."""
    return str(Path(path).resolve())
