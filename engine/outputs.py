"""What the engine returns: vLLM's RequestOutput and CompletionOutput, with the segments and attempts behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from stars.policies import Policy


class Attempt(NamedTuple):
    """One drawn candidate of a segment, in attempt order."""

    token_ids: list[int]
    reward: float | None  # raw score of prompt + response + this candidate; None where an earlier attempt had won
    threshold: float | None  # tau at this candidate's length; None where the policy has none
    accept_probability: float | None  # min(1, exp((reward - threshold) / beta))
    accepted: bool
    logprob: float  # of the candidate under the LM with its penalties, nats


class Segment(NamedTuple):
    """A committed segment and every attempt drawn for it."""

    token_ids: list[int]
    reward: float | None
    threshold: float | None
    accepted: bool  # False where the best seen won after max_attempts rejections
    attempts: list[Attempt]

    @property
    def winner(self) -> int:
        """Index in `attempts` of the committed candidate."""
        for index, attempt in enumerate(self.attempts):
            if attempt.accepted:
                return index
        rewards = [float("-inf") if attempt.reward is None else attempt.reward for attempt in self.attempts]
        return rewards.index(max(rewards))


@dataclass
class Metrics:
    """Counts and times of one completion (or, on a RequestOutput, of all of them together).

    Times are wall seconds of the rounds it took part in, shared out by lanes between the requests of a round.
    """

    width: int = 0  # most lanes used in a round
    segments: int = 0  # committed
    attempts: int = 0  # drawn
    attempts_counted: int = 0  # up to the winner, or all on a fallback: what the accept rate divides by
    accepted: int = 0
    fallbacks: int = 0
    lm_tokens_drawn: int = 0
    lm_tokens_kept: int = 0
    rm_tokens_scored: int = 0
    rm_tokens_full_rescore: int = 0  # what scoring the same candidates from scratch would have run
    prompt_tokens_cached: int = 0  # prompt tokens whose keys and values another request had left in the cache
    lm_seconds: float = 0.0
    rm_seconds: float = 0.0

    @property
    def accept_rate(self) -> float | None:
        """Accepted over attempts up to the winner (later lanes would bias it by the width); None before any."""
        return self.accepted / self.attempts_counted if self.attempts_counted else None

    def add(self, other: Metrics) -> None:
        """Adds the counts and times of `other`; the width is the larger of the two."""
        for name, value in vars(other).items():
            setattr(self, name, max(self.width, value) if name == "width" else getattr(self, name) + value)


@dataclass
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # EOS included; the text leaves it out
    cumulative_logprob: float = 0.0  # under the LM with its penalties (temperature 1, no filter), nats
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None while it runs
    stop_reason: int | str | None = None  # the stop token id or stop string; None for the model's own EOS
    reward: float | None = None  # of the whole response so far; None where the policy does not score
    segments: list[Segment] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    error: str | None = None  # why, if finish_reason is "error"


@dataclass
class RequestOutput:
    """A request and its completions. Cumulative: each one replaces the one before."""

    request_id: str
    prompt: str | list[dict] | None  # as given: text, messages, or None where token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    seed: int  # reproduces the random numbers, in any batch
    policy: Policy
    prompt_reward: float | None = None  # r(prompt), where the policy needed it
    metrics: Metrics = field(default_factory=Metrics)
