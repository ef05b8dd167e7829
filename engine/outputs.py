"""What the engine returns: vLLM's RequestOutput and CompletionOutput, with their segments and attempts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from stars.errors import warn
from stars.plan import OWN, Policy

MAX_CHARACTERS = 48  # of a text in a repr
MAX_COMPLETIONS = 3  # of a request in its repr


class Rewards(list[float]):
    """What `score` returns: a reward for each response, in order.

    num_tokens: of the reward model, that scoring each of them from scratch takes; 0 where the reward has no tokens.
    """

    def __init__(self, rewards: Iterable[float], num_tokens: int):
        super().__init__(rewards)
        self.num_tokens = num_tokens


class Logprob(NamedTuple):
    """What a model said of one token at one place, as in vLLM."""

    logprob: float  # nats, of what was drawn from, at temperature 1 and before any filter
    rank: int | None  # place among all tokens by probability, from 1; of equal ones the lowest ids come first
    decoded_token: str | None  # the token by itself; None without a tokenizer


class Attempt(NamedTuple):
    """One drawn candidate of a segment, in attempt order."""

    token_ids: list[int]
    reward: float | None  # raw score of prompt + response + this candidate; None where an earlier attempt had won
    threshold: float | None  # tau at this candidate's length; None where the policy has none
    accept_probability: float | None  # min(1, exp((reward - threshold) / beta))
    accepted: bool
    logprob: float  # of the candidate under what it was drawn from, as `CompletionOutput.cumulative_logprob`, nats
    logprobs: list[dict[int, Logprob]] | None = None  # with SamplingParams.attempt_logprobs: as of CompletionOutput

    def __repr__(self) -> str:
        return (f"Attempt({len(self.token_ids)} tokens, reward={_number(self.reward)}, "
                f"threshold={_number(self.threshold)}, accept_probability={_number(self.accept_probability)}, "
                f"accepted={self.accepted}, logprob={_number(self.logprob)})")


class Segment(NamedTuple):
    """A committed segment and every attempt drawn for it.

    Where a method cut the attempt that it kept, or continued it with tokens that were not drafted, the segment's tokens
    differ from that attempt's; reward and threshold are those of the attempt.
    """

    token_ids: list[int]
    reward: float | None
    threshold: float | None
    accepted: bool  # False where the plan's exhaustion chose, or redrew it, after max_attempts rejections
    attempts: list[Attempt]
    winner: int = 0  # index in `attempts` of the committed candidate
    logprob: float = 0.0  # of what was drawn of it, as an attempt's
    relaxed: int = 0  # how often its rule was relaxed, when all attempts had been rejected
    models: tuple[str, ...] = ()  # who drew each attempt, as in Engine(models=…); empty: the engine's own, "lm", all
    redrawn: int = 0  # how many of `attempts`, the last ones, were redrawn when all before had been rejected

    @property
    def model(self) -> str:
        """The name of the model that drew what is kept; of a blend all names, with "+" between them."""
        return self.models[self.winner] if self.models else OWN

    def __repr__(self) -> str:
        return (f"Segment({len(self.token_ids)} tokens, reward={_number(self.reward)}, "
                f"threshold={_number(self.threshold)}, accepted={self.accepted}, {len(self.attempts)} attempts)")


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
    fallbacks: int = 0  # kept although rejected, or redrawn: what was redrawn is not among the attempts counted
    lm_tokens_drawn: int = 0
    lm_tokens_kept: int = 0
    rm_calls: int = 0  # candidates that the reward has scored or was asked for, the prompt alone included
    rm_tokens_scored: int = 0
    rm_tokens_full_rescore: int = 0  # what scoring the same candidates from scratch would have run
    prompt_tokens_cached: int = 0  # prompt tokens whose keys and values another request had left in the cache
    rm_tokens_cached: int = 0  # the same of the tokens that the reward model reads as the prompt, in its own cache
    num_preemptions: int = 0  # times that older responses took its pages and it was computed again
    lm_seconds: float = 0.0
    rm_seconds: float = 0.0

    @property
    def accept_rate(self) -> float | None:
        """Accepted over attempts up to the winner (later lanes would bias it by the width); None before any."""
        return self.accepted / self.attempts_counted if self.attempts_counted else None

    def keep(self, segment: Segment, in_order: bool, times: int = 1) -> None:
        """Counts a segment that became history; times = -1: one that is history no longer.

        in_order: whether attempts after the accepted one were not asked for, so that they do not count. Where the rule
        was relaxed, all had been.
        """
        self.segments += times
        self.lm_tokens_kept += times * len(segment.token_ids)
        self.accepted += times * segment.accepted
        self.fallbacks += times * (not segment.accepted)
        up_to_it = in_order and segment.accepted and not segment.relaxed
        tested = len(segment.attempts) - segment.redrawn
        self.attempts_counted += times * (segment.winner + 1 if up_to_it else tested)

    def drawn(self) -> Metrics:
        """These without what counts kept segments: what is left of a response that is dropped."""
        return replace(self, **dict.fromkeys(KEPT, 0))

    def kept(self) -> Metrics:
        """The counts of kept segments alone: what a fork takes over."""
        return Metrics(**{name: getattr(self, name) for name in KEPT})

    def add(self, other: Metrics) -> None:
        """Adds the counts and times of `other`; the width is the larger of the two."""
        width, own = max(self.width, other.width), vars(self)
        for name, value in vars(other).items():
            own[name] += value
        self.width = width


KEPT = ("segments", "attempts_counted", "accepted", "fallbacks", "lm_tokens_kept")
"""Counts of what became history; the others are of all that was drawn."""


class Times(NamedTuple):
    """When a request got so far, in seconds since it came; None where it did not."""

    admitted: float | None = None  # the first response got its pages
    prefilled: float | None = None  # both models had read what one begins with
    first_segment: float | None = None  # the first committed segment that is shown
    last_segment: float | None = None  # the newest
    finished: float | None = None

    def phases(self) -> dict[str, float]:
        """Seconds of each phase that has ended: "queue", "prefill", "decode" (from there to the last segment),
        "inference" (both), and "first_segment" and "finished", from the request's arrival."""
        spans = {"queue": (0.0, self.admitted), "prefill": (self.admitted, self.prefilled),
                 "decode": (self.prefilled, self.last_segment), "inference": (self.admitted, self.last_segment),
                 "first_segment": (0.0, self.first_segment), "finished": (0.0, self.finished)}
        return {name: stop - start for name, (start, stop) in spans.items() if start is not None and stop is not None}


@dataclass
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str | None = ""  # None without a tokenizer
    token_ids: list[int] = field(default_factory=list)  # EOS included; the text leaves it out, unless asked
    # Under what tokens are drawn from, the LM or a blend of models, with biases, bans, masks and penalties (temperature
    # 1, no filter), nats.
    cumulative_logprob: float = 0.0
    # "stop", "length", "refused", "deadline", "budget", "abort" or "error"; None while it runs.
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string; None for the model's own EOS
    reward: float | None = None  # of the whole response so far; None where the policy does not score
    segments: list[Segment] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    error: str | None = None  # why, if finish_reason is "error"
    # With SamplingParams.logprobs one a token: the token itself first, then the most probable ones, by token id. One
    # that could not be drawn (-inf) is none of those. Of a token that a rule has put it is the only one, at 0.0.
    logprobs: list[dict[int, Logprob]] | None = None

    def __repr__(self) -> str:
        why = f", error={_clipped(self.error)}" if self.error is not None else ""
        return (f"CompletionOutput(index={self.index}, text={_clipped(self.text)}, {len(self.token_ids)} tokens, "
                f"finish_reason={self.finish_reason!r}, stop_reason={_clipped(self.stop_reason)}, "
                f"reward={_number(self.reward)}, {len(self.segments)} segments, {self.metrics.attempts} attempts{why})")


@dataclass
class RequestOutput:
    """A request and its completions.

    Cumulative: each one replaces the one before. With RequestOutputKind.DELTA texts, token ids and segments are what is
    new since the output before, and all else is of all so far.
    """

    request_id: str
    prompt: str | list[dict[str, Any]] | None  # as given: text, messages, or None where token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    seed: int  # reproduces the random numbers, in any batch
    policy: Policy
    prompt_reward: float | None = None  # r(prompt), where the policy needed it
    metrics: Metrics = field(default_factory=Metrics)
    # With SamplingParams.prompt_logprobs one a token of what the engine's own model has read, None of the first; None
    # until it has read all of it. Where a method puts texts of its own before the prompt, those are among it.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    times: Times = Times()
    num_cached_tokens: int | None = None  # tokens of the prompt that its first response found in the cache; None before

    def __repr__(self) -> str:
        shown = [repr(output) for output in self.outputs[:MAX_COMPLETIONS]]
        if len(self.outputs) > len(shown):
            shown.append(f"… {len(self.outputs) - len(shown)} more")
        return (f"RequestOutput(request_id={_clipped(self.request_id)}, prompt={_clipped(self.prompt)}, "
                f"{len(self.prompt_token_ids)} prompt tokens, finished={self.finished}, seed={self.seed}, "
                f"policy={type(self.policy).__name__}, prompt_reward={_number(self.prompt_reward)}, "
                f"outputs=[{', '.join(shown)}])")


class Handed(NamedTuple):
    """How much of a completion was handed out."""

    characters: int = 0
    tokens: int = 0
    segments: int = 0

    @classmethod
    def of(cls, completion: CompletionOutput) -> Handed:
        """All of it."""
        return cls(len(completion.text or ""), len(completion.token_ids), len(completion.segments))


def since(output: RequestOutput, handed_out: Sequence[Handed]) -> RequestOutput:
    """Of `output`, which is cumulative, what is new: text, token ids, log-probabilities and segments of completions.
    Counts, times, rewards and sums of log-probabilities are of all so far."""
    completions = []
    for index, completion in enumerate(output.outputs):
        handed = handed_out[index] if handed_out else Handed()
        text = None if completion.text is None else completion.text[handed.characters :]
        logprobs = None if completion.logprobs is None else completion.logprobs[handed.tokens :]
        completions.append(replace(completion, text=text, token_ids=completion.token_ids[handed.tokens :],
                                   segments=completion.segments[handed.segments :], logprobs=logprobs))
    return replace(output, outputs=completions)


def warn_of_errors(outputs: Sequence[RequestOutput], stacklevel: int) -> None:
    """One warning where requests ended with an error: of how many, and the first reason. Who reads only the texts
    would take an empty one for an answer."""
    errors = [next(completion.error for completion in output.outputs if completion.finish_reason == "error")
              for output in outputs if any(completion.finish_reason == "error" for completion in output.outputs)]
    if errors:
        warn(f"{len(errors)} of {len(outputs)} requests ended with an error, the first: {errors[0]}", stacklevel)


def _clipped(value: Any) -> str:
    """`repr(value)`, a long text cut."""
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        value = value[:MAX_CHARACTERS] + "…"
    text = repr(value)
    return text if len(text) <= 2 * MAX_CHARACTERS else text[: 2 * MAX_CHARACTERS] + "…"


def _number(value: float | None) -> str:
    return str(value) if value is None else f"{value:.4g}"
