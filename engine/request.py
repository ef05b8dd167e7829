"""The state of a request while it runs; what the user sees of it is built from this in `Request.output`."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from stars.cache import BlockTable
from stars.detokenizer import Detokenizer, find_stop, hold_back
from stars.outputs import Attempt, CompletionOutput, Metrics, RequestOutput, Segment
from stars.policies import Plan, Policy
from stars.prompt import Prompt
from stars.sampling import SamplingParams


@dataclass
class Lane:
    """One candidate of one segment: drafted, perhaps scored, then committed or gone."""

    hypothesis: Hypothesis
    attempt: int  # from 1, over all rounds of the segment
    slab: int | None  # LM slab that holds its keys and values; None once it was given back
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None  # if this candidate were committed
    stop_reason: int | str | None = None
    threshold: float | None = None
    reward: float | None = None
    accept_probability: float | None = None
    accepted: bool = False
    score_handle: Any = None  # what the reward keeps of it until it is committed or discarded

    def attempt_record(self) -> Attempt:
        """The user's view of this candidate."""
        return Attempt(self.token_ids, self.reward, self.threshold, self.accept_probability, self.accepted,
                       sum(self.logprobs))


class Boundary(NamedTuple):
    """A response as it was when its newest segment began: what an interrupted round goes back to."""

    tokens: int
    segments: int
    cumulative_logprob: float
    reward: float | None
    metrics: Metrics


@dataclass(eq=False)
class Hypothesis:
    """One response in the making: its own history in both caches and its own random stream."""

    request: Request
    sample: int  # index of the random stream within the request
    table: BlockTable | None = None
    session: Any = None  # the reward's state of this response
    token_ids: list[int] = field(default_factory=list)  # committed
    segments: list[Segment] = field(default_factory=list)
    attempts: list[Lane] = field(default_factory=list)  # of the segment being decided
    best: Lane | None = None  # best seen of the segment being decided; keeps its slabs
    cumulative_logprob: float = 0.0
    reward: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    boundary: Boundary | None = None  # None before its first round
    _history: tuple[int, np.ndarray] | None = None  # response tokens it was made for, and the result

    @property
    def next_segment(self) -> int:
        """Most tokens of the segment that comes next."""
        return min(self.request.plan.segment_size, self.request.params.max_tokens - len(self.token_ids))

    @property
    def last_token(self) -> int:
        """The token whose keys and values the LM cache does not hold yet."""
        return self.token_ids[-1] if self.token_ids else self.request.prompt.token_ids[-1]

    def mark_boundary(self) -> None:
        """Notes where the segment that begins now begins. Called before any of its attempts is drawn."""
        self.boundary = Boundary(len(self.token_ids), len(self.segments), self.cumulative_logprob, self.reward,
                                 copy.copy(self.metrics))

    def go_back(self) -> None:
        """Becomes what it was at the boundary: the segment since then was never drawn. May itself be interrupted and
        called again."""
        if self.boundary is not None:
            del self.token_ids[self.boundary.tokens :]
            del self.segments[self.boundary.segments :]
            self.cumulative_logprob, self.reward = self.boundary.cumulative_logprob, self.boundary.reward
            self.metrics = copy.copy(self.boundary.metrics)
            self._history = None
        self.finish_reason = self.stop_reason = self.error = None

    def preempt(self) -> None:
        """Goes back to the boundary because its pages are needed: the attempts since then will be drawn again.

        What they took of the clock stays counted; everything else is counted when it is drawn again.
        """
        spent = self.metrics
        if self.attempts:
            self.go_back()
        self.metrics.lm_seconds, self.metrics.rm_seconds = spent.lm_seconds, spent.rm_seconds
        self.metrics.num_preemptions += 1
        self.attempts = []

    def let_go(self) -> None:
        """Forgets its places in caches that were emptied, and the attempts that stood there."""
        self.table = self.session = self.best = None
        self.attempts = []

    def history(self) -> np.ndarray:
        """int32 [n, 2]: the distinct tokens of prompt and response, rising, each with its count in the response."""
        if self._history is None or self._history[0] != len(self.token_ids):
            words, counts = np.unique(np.array(self.token_ids, np.int32), return_counts=True)
            tokens = np.union1d(np.array(self.request.prompt.token_ids, np.int32), words)
            entries = np.zeros((len(tokens), 2), np.int32)
            entries[:, 0] = tokens
            entries[np.searchsorted(tokens, words), 1] = counts
            self._history = len(self.token_ids), entries
        return self._history[1]

    def content_ids(self, extra: Lane | None = None) -> list[int]:
        """Response ids with `extra` appended, without the EOS or stop token that ended them: what a reward reads."""
        ids = self.token_ids + extra.token_ids if extra is not None else self.token_ids
        if ids and ids[-1] in self.request.stop_ids:
            return ids[:-1]
        return ids


@dataclass(eq=False)
class Group:
    """The population of one completion."""

    request: Request
    index: int  # of the completion
    hypotheses: list[Hypothesis]

    @property
    def active(self) -> list[Hypothesis]:
        """Those that draw in the next round. Of whole responses some may still wait for room."""
        return [h for h in self.hypotheses if h.finish_reason is None and h.table is not None]


@dataclass(eq=False)
class Request:
    """A prompt with its parameters and its hypotheses."""

    request_id: str
    prompt: Prompt
    params: SamplingParams
    policy: Policy
    plan: Plan
    seed: int
    stop_ids: tuple[int, ...]  # token ids that end a response
    eos_token_ids: tuple[int, ...]
    tokenizer: Any
    stop_tokens: dict[int, str] = field(default_factory=dict)  # stop strings that are special tokens, by id
    groups: list[Group] = field(default_factory=list)  # one a completion
    prompt_reward: float | None = None
    threshold_start: float = 0.0  # r0 of the law
    owner: weakref.ref | None = None  # who waits for it in generate or stream; None: whoever calls step

    def __post_init__(self):
        population = self.plan.candidates
        self.groups = [Group(self, index, [Hypothesis(self, index * population + slot) for slot in range(population)])
                       for index in range(self.params.n)]

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """Those of all groups."""
        return [hypothesis for group in self.groups for hypothesis in group.hypotheses]

    @property
    def finished(self) -> bool:
        """True when every hypothesis has a finish reason."""
        return all(hypothesis.finish_reason is not None for hypothesis in self.hypotheses)

    @cached_property
    def detokenizer(self) -> Detokenizer:
        """Decodes responses to this prompt; made when a text is first wanted, so that nothing else pays for it."""
        return Detokenizer(self.tokenizer, self.prompt.token_ids)

    def response_text(self, hypothesis: Hypothesis, extra: Lane | None = None) -> str | None:
        """Text of the response (with `extra` appended), the stop string cut off; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        text = self.detokenizer.decode(hypothesis.content_ids(extra))
        stopped = isinstance((extra or hypothesis).stop_reason, str)
        found = find_stop(text, self.params.stop) if stopped else None
        return text[: found[0]] if found else text

    def output(self) -> RequestOutput:
        """A snapshot: later rounds do not change it."""
        completions = [self._completion(group.index, group.hypotheses) for group in self.groups]
        metrics = Metrics()
        for completion in completions:
            metrics.add(completion.metrics)
        return RequestOutput(self.request_id, self.prompt.given, list(self.prompt.token_ids), completions,
                             self.finished, self.seed, self.policy, self.prompt_reward, metrics)

    def _completion(self, index: int, group: list[Hypothesis]) -> CompletionOutput:
        if len(group) == 1:
            return self._shown(index, group[0], group[0].segments, group[0].metrics)
        # Best of several whole responses: nothing is shown before the winner is known. Each response is one attempt,
        # in however many pieces it was drafted.
        metrics = Metrics()
        for hypothesis in group:
            metrics.add(hypothesis.metrics)
        metrics.segments = metrics.accepted = metrics.attempts_counted = metrics.lm_tokens_kept = 0
        metrics.attempts = len(group)
        failed = next((h for h in group if h.finish_reason in ("error", "abort")), None)
        if failed is not None:
            return CompletionOutput(index, finish_reason=failed.finish_reason, error=failed.error, metrics=metrics,
                                    text="" if self.tokenizer is not None else None)
        if any(hypothesis.finish_reason is None for hypothesis in group):
            return CompletionOutput(index, metrics=metrics, text="" if self.tokenizer is not None else None)
        best = max(group, key=lambda hypothesis: hypothesis.reward)  # max keeps the earliest of equals
        attempts = [Attempt(list(h.token_ids), h.reward, None, None, h is best, h.cumulative_logprob) for h in group]
        segment = Segment(list(best.token_ids), best.reward, None, True, attempts)
        metrics.segments = metrics.accepted = 1
        metrics.attempts_counted = len(group)
        metrics.lm_tokens_kept = len(best.token_ids)
        return self._shown(index, best, [segment], metrics)

    def _shown(self, index: int, hypothesis: Hypothesis, segments: list[Segment], metrics: Metrics) -> CompletionOutput:
        text = self.response_text(hypothesis)
        if text is not None and hypothesis.finish_reason is None:
            text = hold_back(text, self.params.stop)
        return CompletionOutput(index, text, list(hypothesis.token_ids), hypothesis.cumulative_logprob,
                                hypothesis.finish_reason, hypothesis.stop_reason, hypothesis.reward, list(segments),
                                copy.copy(metrics), hypothesis.error)
