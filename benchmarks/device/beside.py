"""Beside transformers on the same tensors and card: generate, eager and with a static cache captured by hand, and STARS
looped over its caches in both ways. Prompts' passes, compiles and captures are left out on both sides."""

from __future__ import annotations

import time

import torch
from bench import SEGMENT, Bench, Plain, attempts, fitting, median, typical_seed
from headline import same_function
from models import hf_over
from record import Record, Settings, seconds_left
from timing import Seconds

import stars
from stars.kernels.philox import accept_uniform

RATE, WIDTH = 0.3, 8


def llama_8b(record: Record, settings: Settings) -> None:
    """8B and 8B, or 1B and 1B on a card with less memory."""
    beside(record, settings, fitting(record, settings, "Llama-3.1-8B", "Llama-3.2-1B"))


def llama_1b(record: Record, settings: Settings) -> None:
    """The small shape, whose steps the host bounds even more."""
    beside(record, settings, "Llama-3.2-1B")


def beside(record: Record, settings: Settings, name: str) -> None:
    """The fastest rival first: what it says holds for the others as well."""
    if _transformers(record) is None:
        return
    pair = Pair(record, settings, name)
    record.part("captured generate", pair.captured_generate, least=4)
    record.part("eager generate", pair.eager_generate, least=5)
    record.part("captured loop", pair.loop, WIDTH, "captured", "over-captured-loop", least=5)
    record.part("eager loop", pair.loop, WIDTH, "preallocated", "over-loop", least=8)
    record.part("eager loop at width 1", pair.loop, 1, "preallocated", "over-loop-1", least=10)
    if name != "Llama-3.1-8B":
        record.part("logits", same_function, record, pair.bench)


def compiled_1b(record: Record, settings: Settings) -> None:
    """generate with a static cache, compiled by transformers; asked for by name, since the compiler takes its time."""
    if _transformers(record) is None:
        return
    pair = Pair(record, settings, "Llama-3.2-1B")
    record.part("compiled", pair.compiled)


def _transformers(record: Record):
    try:
        import transformers
    except Exception as error:
        record.note(f"transformers cannot be imported ({error}): nothing to stand beside")
        return None
    transformers.logging.set_verbosity_error()
    return transformers


class Pair:
    """Two transformers models over the tensors of a Bench."""

    def __init__(self, record: Record, settings: Settings, name: str):
        from hf_stars import HFStars  # which imports transformers

        self.kind = HFStars
        self.record, self.settings = record, settings
        self.bench = bench = Bench(record, settings, name)
        bench.context = 24 if settings.dry else 128
        bench.tokens = SEGMENT if settings.dry else 2 * SEGMENT
        self.prompt = bench.prompt(bench.context, 3)
        self.lm, self.rm = hf_over(bench.lm, bench.shape, "lm"), hf_over(bench.rm, bench.shape, "reward")
        self._ours: dict[object, float] = {}

    def ours(self, width: int | None | str) -> float:
        """Seconds of the engine's tokens: plain ones, or aligned ones at a width. Measured once."""
        if width not in self._ours:
            policy = Plain() if width == "plain" else self.bench.policy(width)
            rate = None if width == "plain" else RATE
            [runs] = self.bench.side_by_side(lambda: self.bench.complete(policy, rate, self.prompt))
            self._ours[width] = median(runs)
        return self._ours[width]

    def compare(self, what: str, width: int | None | str, theirs: float, aim: str = "", **detail) -> None:
        """Tokens a second of ours over theirs, both over equally many tokens; the spread is of theirs."""
        tokens, ours = self.bench.tokens, self.ours(width)
        self.record.figure(f"{self.bench.name}: {what}", tokens / ours, "token/s", tokens / theirs, "transformers",
                           self.bench.aim(aim),
                           higher_is_better=True, spread=[tokens / one for one in reversed(getattr(
                               theirs, "spread", (theirs, theirs)))], **detail)

    def captured_generate(self) -> None:
        """A static cache and a step captured in a CUDA graph: forward, head and draw."""
        from hf_captured import CapturedHistory
        from hf_stars import _captured_sampler

        params, tokens = self.params, self.bench.tokens
        history = CapturedHistory(self.lm.model, 1, len(self.prompt) + tokens)
        draw = _captured_sampler(params)
        ids = torch.tensor([self.prompt], device=self.settings.device)

        def run() -> float:
            history.clear()
            history.extend(ids[:, :-1])
            self.bench.sync()
            begin = time.perf_counter()
            history.draft(self.lm.lm_head, self.prompt[-1], 1, tokens, lambda logits, place: draw(logits, 0, 0, place))
            self.bench.sync()
            return time.perf_counter() - begin

        seconds = self._repeat(run, warmups=2)
        self.compare("plain over generate, static cache captured by hand", "plain", seconds)
        self.compare(f"aligned, accept {RATE}, over unaligned, static cache captured", None, seconds,
                     "over-static")

    def eager_generate(self) -> None:
        """transformers' own generate, from the plain distribution (its default of top-k 50 is switched off)."""
        tokens = self.bench.tokens
        self.generate(2)
        seconds = self._repeat(lambda: (self._timed(tokens) - self._timed(1)) * tokens / (tokens - 1), repeats=2)
        self.compare("plain over generate, eager", "plain", seconds)
        self.compare(f"aligned, accept {RATE}, over generate's unaligned, eager", None, seconds, "over-eager")

    def loop(self, width: int, cache: str, aim: str) -> None:
        """The loop on transformers, over the same numbers of attempts."""
        # Four candidates a scoring pass: on a GPU they cost what one does.
        loop = self.kind(self.lm, self.rm, width=width, rm_lanes=min(4, width), cache=cache)

        def run() -> float:
            return loop.generate(self.prompt, self.params, self.bench.policy(width), accept_rate=RATE, uniform=uniform
                                 ).seconds

        def uniform(segment: int, attempt: int) -> float:
            return accept_uniform(self.params.seed, attempt, segment, 0)

        if cache != "captured" and not self.settings.dry:  # a short one, so that libraries are loaded
            self._warm(loop, width)
        rounds = sum(-(-count // width) for count in attempts(self.params.seed, RATE, self.bench.tokens // SEGMENT))
        seconds = self._repeat(run, repeats=2 if cache == "captured" else 1, warmups=2 if cache == "captured" else 0)
        form = {"captured": "captured", "preallocated": "eager"}[cache]
        self.compare(f"STARS, accept {RATE}, width {width}, over the loop, {form}", width, seconds,
                     aim if width > 1 else "", rounds=rounds)
        if width == 1:
            self.compare(f"STARS, accept {RATE}, width free, over the loop at width 1, {form}", None,
                         seconds, aim, rounds=rounds)

    def compiled(self) -> None:
        """The first call compiles; transformers makes a new cache for every call, so tokens are a difference of two."""
        tokens = self.bench.tokens
        begin = time.perf_counter()
        self.generate(tokens, cache_implementation="static")
        first = time.perf_counter() - begin
        whole = self._repeat(lambda: self._timed(tokens, cache_implementation="static"), repeats=2, warmups=1)
        if seconds_left() < 4 * whole:
            self.record.note("no time was left for generate at half the tokens")
            return
        half = self._repeat(lambda: self._timed(tokens // 2, cache_implementation="static"), repeats=2, warmups=1)
        slope = whole - half
        if slope <= 0:
            self.record.note(f"half the tokens took {half:.3f} s and all of them {whole:.3f}: nothing can be said")
            return
        self.compare("plain over generate, static cache, compiled", "plain", slope * tokens / (tokens - tokens // 2),
                     seconds_of_the_first_call=first)

    def generate(self, tokens: int, **options) -> None:
        """Exactly `tokens` tokens."""
        ids = torch.tensor([self.prompt], device=self.settings.device)
        output = self.lm.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_k=0, top_p=1.0,
            min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0, **options)
        if output.shape[1] != len(self.prompt) + tokens:
            raise RuntimeError(f"generate gave {output.shape[1] - len(self.prompt)} tokens instead of {tokens}")

    @property
    def params(self) -> stars.SamplingParams:
        """The same seed for both: equal numbers of attempts."""
        return stars.SamplingParams(temperature=0.8, max_tokens=self.bench.tokens,
                                    seed=typical_seed(RATE, self.bench.tokens // SEGMENT))

    def _warm(self, loop, width: int) -> None:
        short = stars.SamplingParams(temperature=0.8, max_tokens=2, seed=1)
        loop.generate(self.prompt, short, stars.STARS(2, 1, alpha=1.0, reward_threshold=0.0, width=width),
                      accept_rate=1.0)

    def _timed(self, tokens: int, **options) -> float:
        self.bench.sync()
        begin = time.perf_counter()
        self.generate(tokens, **options)
        self.bench.sync()
        return time.perf_counter() - begin

    def _repeat(self, run, repeats: int = 3, warmups: int = 0) -> Seconds:
        for _ in range(0 if self.settings.dry else warmups):
            run()
        return Seconds.of([run() for _ in range(1 if self.settings.dry else repeats)])
