"""What an engine counts, under vLLM's names where vLLM has one. Its own few lines: prometheus_client takes numbers one
by one, and only all of a round's at once are exact however calls are interrupted."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from operator import add, attrgetter
from typing import Any

from stars.cache import PagedCache
from stars.exposition import Family, Histogram, exposition
from stars.outputs import Metrics
from stars.request import Group, Request
from stars.reward.base import Reward, with_parts
from stars.scheduler import Scheduler

PREFIX = "stars:"

COUNTS = {
    "segments": "Segments that became history.",
    "attempts": "Candidates of segments that were drawn.",
    "attempts_counted": "Candidates up to the one that was kept: accepted over these is the accept rate.",
    "accepted": "Segments whose candidate was accepted.",
    "fallbacks": "Segments that were kept although rejected, or redrawn.",
    "lm_tokens_drawn": "Tokens that language models drew.",
    "lm_tokens_kept": "Tokens of them that became history, and what rules put after them.",
    "rm_tokens_scored": "Tokens that reward models ran for candidates.",
    "rm_tokens_full_rescore": "Tokens that scoring the same candidates from scratch would have run.",
    "prompt_tokens_cached": "Prompt tokens that another request had left in the cache, as responses were opened.",
    "rm_tokens_cached": "The same of what reward models read.",
    "num_preemptions": "Times that a response gave its pages to older ones and was computed again.",
    "rm_calls": "Candidates that rewards were asked for, the prompt alone included.",
    "lm_seconds": "Seconds of drawing.",
    "rm_seconds": "Seconds of scoring.",
}
"""Fields of `outputs.Metrics` that are counters, summed over all completions; the last two are times."""
TIMES = 2

COUNTERS = {
    "prompt_tokens": "Tokens of prompts that were read, each prompt once.",
    "generation_tokens": "Tokens of responses that became history.",
    "prefix_cache_queries": "Tokens that were looked up in the cache.",
    "prefix_cache_hits": "Tokens of them that were found there.",
    "reward_prefix_cache_queries": "Tokens that were looked up in caches of reward models.",
    "reward_prefix_cache_hits": "Tokens of them that were found there.",
}

GAUGES = {
    "num_requests_running": "Requests that were admitted.",
    "num_requests_waiting": "Requests that wait to be admitted.",
    "kv_cache_usage_perc": "Pages of the cache that are held, 1 means all.",
    "reward_kv_cache_usage_perc": "Pages of reward models' caches that are held, 1 means all.",
}

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0,
           10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
TOKEN_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
ROUND_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WIDTHS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)
NUMBERS = (1.0, 2.0, 5.0, 10.0, 20.0)

HISTOGRAMS: dict[str, tuple[tuple[float, ...] | None, str]] = {
    "time_to_first_token_seconds": (SECONDS, "From a request's arrival to its first committed segment."),
    "inter_token_latency_seconds": (TOKEN_SECONDS, "Time between two committed segments over the tokens of the second, "
                                                   "each of them one value."),
    "request_time_per_output_token_seconds": (TOKEN_SECONDS, "The same of a whole completion, one value."),
    "e2e_request_latency_seconds": (SECONDS, "From a request's arrival to its end."),
    "request_queue_time_seconds": (SECONDS, "From a request's arrival to its admission."),
    "request_prefill_time_seconds": (SECONDS, "From a request's admission to its prompt being read by both models."),
    "request_decode_time_seconds": (SECONDS, "From a request's prompt being read to its last committed segment."),
    "request_inference_time_seconds": (SECONDS, "From a request's admission to its last committed segment."),
    "request_prompt_tokens": (None, "Tokens of a request's prompt."),
    "request_generation_tokens": (None, "Tokens of a completion."),
    "request_max_num_generation_tokens": (None, "Tokens of a request's longest completion."),
    "request_params_n": (NUMBERS, "A request's n."),
    "request_params_max_tokens": (None, "A request's max_tokens."),
    "iteration_tokens_total": (ROUND_TOKENS, "Tokens that a round made history, with the prompts of those who had "
                                             "nothing before."),
    "request_accept_rate": (RATES, "Accepted over counted attempts of a completion that counted any."),
    "request_width": (WIDTHS, "Most lanes that a response of a completion had in a round, of those that had one."),
}
"""Bounds, None for those that follow max_model_len, and what is observed."""

LATENCIES = {"finished": "e2e_request_latency_seconds", "queue": "request_queue_time_seconds",
             "prefill": "request_prefill_time_seconds", "decode": "request_decode_time_seconds",
             "inference": "request_inference_time_seconds"}
"""Histograms of phases of `Times`, told where a request ends."""

FINISH_REASONS = ("stop", "length", "refused", "deadline", "budget", "abort", "error")

ENDED = "of requests that have ended"
PROMPT_TOKENS = "prompt_tokens"
READ, COUNTED = "its prompt is counted", "all of it is counted"
GENERATED = list(COUNTS).index("lm_tokens_kept")
NANO = 10**9  # times are summed as whole nanoseconds: a sum of floats may fall where its order changes
NOTHING = (0,) * len(COUNTS)
_values = attrgetter(*COUNTS)


class EngineMetrics:
    """The counters, gauges and histograms of one engine.

    Any thread may read them at any moment, in the middle of a round too: nobody waits. Gauges are read from what the
    engine holds then. Counters and histograms are told where a segment becomes history and where a request ends, and no
    counter ever goes down: what may be taken back is not counted yet.

    What was counted lies in one dictionary of values that never change, and is replaced by one `dict.update`: a reader
    sees a round whole or not at all, and so does a call that goes on after an interrupt. Requests that run have their
    counts there one by one, under their groups, so that counting again what was counted changes nothing.
    """

    def __init__(self, requests: Mapping[str, Request], scheduler: Scheduler, cache: PagedCache, reward: Reward | None,
                 max_model_len: int):
        self._requests = requests
        self._scheduler = scheduler
        self._cache = cache
        parts = with_parts(reward) if reward is not None else ()
        found = [getattr(part, "cache", None) for part in parts]
        self._reward_caches = [cache for cache in found if isinstance(cache, PagedCache)]
        tokens = _one_two_five(max_model_len)
        self._bounds = {name: bounds if bounds is not None else tokens for name, (bounds, _) in HISTOGRAMS.items()}
        self._state: dict[Any, Any] = {ENDED: NOTHING, PROMPT_TOKENS: 0}
        self._state |= {name: ((0,) * (len(bounds) + 1), 0.0) for name, bounds in self._bounds.items()}
        self._state |= {("request_success", reason): 0 for reason in FINISH_REASONS}

    # -- for whoever reads them -----------------------------------------------------------------------------------

    def text(self, **labels: str) -> str:
        """All of them in Prometheus' text format, `exposition.CONTENT_TYPE`, with `labels` on each: a server of several
        engines tells them apart by those. RequestError for what cannot be a label."""
        return exposition(self.families(), labels)

    def snapshot(self) -> dict[str, float | Histogram | dict[str, float | Histogram]]:
        """All of them by their names in the text: a number, a Histogram, or numbers by `finished_reason`."""
        return {family.name: dict(family.samples) if family.label is not None else family.samples[""]
                for family in self.families()}

    def families(self) -> list[Family]:
        """All of them, for a text that has others beside."""
        state = self._state.copy()  # in one piece
        running = len({unit.request for unit in list(self._scheduler.running)})
        gauges = {
            "num_requests_running": running,
            "num_requests_waiting": max(0, len(self._requests) - running),
            "kv_cache_usage_perc": _usage([self._cache]),
            "reward_kv_cache_usage_perc": _usage(self._reward_caches),
        }
        counters: dict[str, float] = dict(zip(COUNTS, map(sum, zip(*(
            value for key, value in state.items() if key is ENDED or isinstance(key, Group)), strict=True)),
            strict=True))
        for name in list(COUNTS)[-TIMES:]:
            counters[name] /= NANO
        counters["generation_tokens"] = counters["lm_tokens_kept"]
        counters[PROMPT_TOKENS] = state[PROMPT_TOKENS]
        for prefix, caches in (("", [self._cache]), ("reward_", self._reward_caches)):
            counters[f"{prefix}prefix_cache_queries"] = sum(cache.prefix_queries for cache in caches)
            counters[f"{prefix}prefix_cache_hits"] = sum(cache.prefix_hits for cache in caches)
        reasons = {key[1]: value for key, value in state.items() if isinstance(key, tuple)}
        return [
            *(Family(PREFIX + name, "gauge", text, {"": gauges[name]}) for name, text in GAUGES.items()),
            *(Family(f"{PREFIX}{name}_total", "counter", text, {"": counters[name]})
              for name, text in (COUNTERS | COUNTS).items()),
            Family(PREFIX + "request_success_total", "counter", "Completions that have ended, by the reason.", reasons,
                   "finished_reason"),
            *(Family(PREFIX + name, "histogram", text, {"": Histogram(self._bounds[name], *state[name])})
              for name, (_, text) in HISTOGRAMS.items()),
        ]

    # -- for the engine -------------------------------------------------------------------------------------------

    def committed(self, groups: Iterable[Group]) -> None:
        """Counts what was drawn for `groups` and became history, at the end of a round. Of those whose segment goes on,
        nothing: it may be drawn again."""
        now, news, tokens = time.monotonic(), _News(self._state, self._bounds), 0
        for group in groups:
            if not group.undecided and not group.waits:
                tokens += _grow(news, group, now)[0]
        if tokens:
            news.observe("iteration_tokens_total", tokens)
        news.write()

    def ended(self, request: Request) -> None:
        """Counts a request that has ended: once, however often it is told."""
        state = self._state
        if state.get(request) is COUNTED:
            return
        request.ended = now = time.monotonic()
        news, lengths = _News(state, self._bounds), []
        for group in request.groups:
            (_, metrics), reason = _grow(news, group, now), ("request_success", group.finish_reason)
            news.values[ENDED] = tuple(map(add, news.get(ENDED), news.values[group]))
            news.values[group] = NOTHING
            news.values[reason] = news.get(reason, 0) + 1
            lengths.append(metrics.lm_tokens_kept)
            news.observe("request_generation_tokens", metrics.lm_tokens_kept)
            if metrics.width:
                news.observe("request_width", metrics.width)
            if metrics.accept_rate is not None:
                news.observe("request_accept_rate", metrics.accept_rate)
            after_first = metrics.lm_tokens_kept - group.first_tokens
            if after_first:
                seconds = (group.times[-1] - group.times[0]) / after_first
                news.observe("request_time_per_output_token_seconds", seconds)
        if news.get(request) is not READ and request.prefilled is not None:
            news.values[PROMPT_TOKENS] = news.get(PROMPT_TOKENS) + len(request.prompt.token_ids)
        news.observe("request_prompt_tokens", len(request.prompt.token_ids))
        news.observe("request_max_num_generation_tokens", max(lengths))
        news.observe("request_params_n", request.params.n)
        news.observe("request_params_max_tokens", request.max_tokens)
        for phase, seconds in request.times.phases().items():
            if phase in LATENCIES:
                news.observe(LATENCIES[phase], seconds)
        news.values[request] = COUNTED
        news.write()

    def forget(self, request: Request) -> None:
        """Nobody will tell of `request` any more, which has ended and was counted."""
        for key in (*request.groups, request):
            self._state.pop(key, None)

    def reset(self, requests: Sequence[Request]) -> None:
        """After a call that was stopped in the middle: forgets all but `requests`, which are still the engine's."""
        known = {*requests}
        for key in list(self._state):
            request = key.request if isinstance(key, Group) else key
            if isinstance(request, Request) and request not in known:
                self._state.pop(key, None)


class _News:
    """What is to be written, all at once, into the numbers that there are."""

    def __init__(self, state: dict[Any, Any], bounds: Mapping[str, tuple[float, ...]]):
        self._state = state
        self._bounds = bounds
        self._cells: dict[str, tuple[list[int], float]] = {}
        self.values: dict[Any, Any] = {}

    def get(self, key: Any, otherwise: Any = None) -> Any:
        """The value with what is to be written."""
        value = self.values.get(key)
        return value if value is not None else self._state.get(key, otherwise)

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """Counts a value of a histogram, so many times."""
        cell = self._cells.get(name)
        if cell is None:
            counts, total = self._state[name]
            cell = list(counts), total
        counts, total = cell
        counts[bisect_left(self._bounds[name], value)] += times
        self._cells[name] = counts, total + value * times

    def write(self) -> None:
        """Writes it."""
        for name, (counts, total) in self._cells.items():
            self.values[name] = tuple(counts), total
        self._state.update(self.values)


def _grow(news: _News, group: Group, now: float) -> tuple[int, Metrics]:
    """Counts what is new of a group, and when; returns how many tokens that is, with its prompt where that is new, and
    the group's metrics."""
    metrics = group.metrics()
    *values, lm_seconds, rm_seconds = _values(metrics)
    before = news.get(group, NOTHING)
    news.values[group] = (*values, max(before[-2], int(lm_seconds * NANO)), max(before[-1], int(rm_seconds * NANO)))
    tokens: int = metrics.lm_tokens_kept - before[GENERATED]
    times = group.times
    latest = times[-1] if times else now
    times += [now] * (metrics.segments - len(times))
    if not tokens:
        return 0, metrics
    if before[GENERATED]:
        news.observe("inter_token_latency_seconds", (now - latest) / tokens, tokens)
        return tokens, metrics
    group.first_tokens, request = tokens, group.request
    if news.get(request) is None:
        prompt = len(request.prompt.token_ids)
        news.values[request], news.values[PROMPT_TOKENS] = READ, news.get(PROMPT_TOKENS) + prompt
        news.observe("time_to_first_token_seconds", min(one.times[0] for one in request.groups if one.times) -
                     request.arrived)
        return tokens + prompt, metrics
    return tokens, metrics


def _usage(caches: Sequence[PagedCache]) -> float:
    """The part of their pages that somebody holds; 0 of none."""
    pages = sum(cache.num_pages for cache in caches)
    return 1 - sum(cache.num_free_pages for cache in caches) / pages if pages else 0.0


def _one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, … up to `most`."""
    powers = (factor * 10.0**power for power in range(len(str(most))) for factor in (1, 2, 5))
    return tuple(bound for bound in powers if bound <= most)
