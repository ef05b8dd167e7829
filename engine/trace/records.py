"""What a trace holds of a run: requests, their completions, and every attempt with its reward and threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

FORMAT, VERSION = "stars-trace", 1


class TraceAttempt(NamedTuple):
    """One drawn candidate of a segment."""

    segment: int  # from 0
    attempt: int  # from 1
    text: str | None  # None where the model has no tokenizer
    token_ids: list[int]
    logprob: float  # under the LM with its penalties, nats
    reward: float | None  # None where it was not needed
    threshold: float | None
    accept_probability: float | None
    margin: float | None  # reward - threshold
    accepted: bool
    committed: bool  # it became part of the response: accepted, or kept by the exhaustion after the last attempt


class TraceSegment(NamedTuple):
    """The attempts of one segment, in the order of the draw."""

    attempts: list[TraceAttempt]

    @property
    def committed(self) -> TraceAttempt:
        """The one that became part of the response."""
        return next(attempt for attempt in self.attempts if attempt.committed)

    @property
    def counted(self) -> int:
        """Attempts up to the accepted one, or all of them where none was."""
        return sum(self.status(attempt) != "skipped" for attempt in self.attempts)

    def status(self, attempt: TraceAttempt) -> str:
        """"accepted", "fallback" (best of the rejected), "rejected", "skipped" (after the accepted one), "kept" or
        "lower" (where the method has no threshold: the candidate kept, and those that were not)."""
        committed = self.committed
        if committed.threshold is None:
            return "kept" if attempt.committed else "lower"
        if attempt.committed:
            return "accepted" if attempt.accepted else "fallback"
        return "skipped" if committed.accepted and attempt.attempt > committed.attempt else "rejected"


@dataclass(frozen=True)
class TraceCompletion:
    """One completion of a request."""

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    error: str | None
    reward: float | None
    cumulative_logprob: float
    metrics: dict[str, Any]
    segments: list[TraceSegment]


@dataclass(frozen=True)
class TraceRequest:
    """One request: what was asked and what came of it."""

    request_id: str
    prompt: str | list[dict[str, Any]] | None  # as given: text, messages, or None where token ids were given
    prompt_token_ids: list[int]
    params: dict[str, Any] | None  # the sampling parameters that differ from their defaults, with max_tokens
    policy: dict[str, Any]  # "name" and its parameters
    seed: int
    prompt_reward: float | None
    metrics: dict[str, Any]
    completions: list[TraceCompletion]
