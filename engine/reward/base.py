"""The contract between the loop and whatever scores candidates."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stars.arguments import integer, shown
from stars.errors import RequestError, RewardError
from stars.kernels.types import Draft
from stars.prompt import Prompt


class ContextFull(RewardError):
    """A candidate that is too long for the reward model to read: its response ends before it, as at max_tokens."""


class Candidate(NamedTuple):
    """What is scored: always the whole response so far, never a single segment."""

    session: Any
    token_ids: list[int]  # response with this candidate, without the EOS that ended it
    text: str | None  # its text without a stop string; None unless the reward set `needs_text`
    final: bool = False  # the finished response, which nothing competes with: its session may be written at once


class Scored(NamedTuple):
    """The score of one candidate, in the order asked."""

    reward: float | RewardError  # an error ends that candidate's request only
    tokens_run: int = 0  # tokens the reward model processed for it
    tokens_full: int = 0  # tokens a score from scratch would process
    handle: Any = None  # kept until commit or discard


class TrailingCandidate(NamedTuple):
    """A candidate that is still being drafted."""

    session: Any
    token_ids: list[int]  # the response without it
    lane: int  # of the draft
    max_tokens: int  # it will have no more


class Trailing(Protocol):
    """The scoring of trailing candidates, under way."""

    def results(self, token_ids: Sequence[list[int]]) -> list[Scored]:
        """The scores, once they are there; token_ids are each candidate's as in `Candidate`."""


class Limits(NamedTuple):
    """What the engine sizes a reward model by."""

    cache_tokens: int
    page_size: int
    max_num_seqs: int  # sessions open at once
    max_num_lanes: int  # candidates kept at once, beside the best seen of each session
    max_segment_size: int
    device: str
    dtype: str
    deterministic: bool
    padded: bool = False  # whether passes are padded to the shapes of captured graphs
    prefill_backend: str = "auto"  # as in EngineConfig


class Reward(ABC):
    """Scores responses. The engine opens a session per response, starts it, scores candidates, commits the winners.

    A handle that `score` returned is valid until `commit` or `discard` takes it; both come before its session's close.
    """

    needs_text = False  # whether `Candidate.text` must be filled
    locks: Sequence[Any] = ()  # of models that other engines may share, known once it is bound
    exclusive = False  # whether it has a state that two engines cannot share
    engine: weakref.ref | None = None  # whose it is, if it is exclusive; the engine sets it

    def bind(self, tokenizer, vocab_size: int, limits: Limits) -> None:
        """Called once, when the engine is built: load, allocate, check that it fits the LM (RewardError if not)."""

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Raises RequestError or RewardError if this prompt could never be scored."""

    def can_open(self, prompt: Prompt, max_tokens: int) -> bool:
        """Whether a session can be opened now; False means later."""
        return True

    @abstractmethod
    def open(self, prompt: Prompt, max_tokens: int) -> Any:
        """A session for one response to this prompt, with everything reserved that it will need; no work yet.

        RewardError, and nothing kept, where it could not be scored: its request ends so, before a token is drawn.
        """

    def start(self, sessions: list[Any]) -> None:
        """Runs the prompts of newly opened sessions, all together. No two of them begin with the same page."""

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """Candidates of one response worth scoring at once, each of `tokens` new tokens, beside others' candidates."""
        return 1 << 30

    @abstractmethod
    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """One score per candidate, in order.

        A candidate that cannot be scored gets a RewardError as its reward. What is raised makes the engine run each
        request by itself: who raises then, too, ends with an error.
        """

    def score_trailing(self, draft: Draft, candidates: Sequence[TrailingCandidate]) -> Trailing | None:
        """Starts to score candidates after the draft that is under way, without waiting for it.

        Nothing else is asked of the reward before the results are taken. None, and nothing done, where the reward needs
        the host to see the drafts first (which is what a reward that is a function does).
        """
        return None

    def resume(self, session: Any, token_ids: list[int], text: str | None) -> None:
        """Takes a response (as in `Candidate`) that an engine had committed before it was interrupted; after `start`.

        Needed where a session keeps what was committed.
        """

    def fork(self, session: Any) -> Any:
        """A second session with the same history, which goes its own way from now on. RewardError where a session
        cannot be shared so."""
        raise RewardError(f"{type(self).__name__} has no fork(session), which this policy needs: write it, or use a "
                          "policy that keeps one response")

    def reset(self) -> None:
        """Forgets every session and handle: the engine was interrupted, and opens anew what it still needs.

        May be called at any moment of another call that was interrupted, and again after an interrupt of its own.
        """

    def commit(self, winners: list[tuple[Any, Any]]) -> None:
        """(session, handle) pairs: the scored candidate becomes the session's history; handles are consumed."""

    def discard(self, handle: Any) -> None:
        """The scored candidate is gone."""

    def close(self, session: Any) -> None:
        """The response is finished."""

    def check_integrity(self) -> None:
        """Raises IntegrityError if the reward's books do not balance."""


def reward_problem(reward: float | RewardError) -> str | None:
    """Why a reward cannot be used: an error, NaN or +inf (-inf is allowed and rejects); None if it can."""
    if isinstance(reward, RewardError):
        return str(reward)
    if math.isnan(reward):
        return "the reward is NaN: the reward model or function must return a number"
    if reward == math.inf:
        return "the reward is +inf: the reward model or function must return a finite number or -inf"
    return None


def checked_batch_size(owner: str, value: Any) -> int:
    """`value` as a batch size of `owner`; RewardError for anything but an integer of at least 1."""
    return checked_integer(f"{owner}.batch_size", value, 1)


def checked_integer(name: str, value: Any, least: int) -> int:
    """`value` as int of at least `least`; RewardError, which names it, for anything else."""
    try:
        return integer(name, value, least)
    except RequestError as error:
        raise RewardError(str(error)) from None


def check_path(owner: str, model: Any) -> None:
    """RewardError unless `model` may be a directory; objects of transformers get their own sentence from the engine."""
    if not isinstance(model, (str, Path)) and not hasattr(model, "save_pretrained"):
        raise RewardError(f"{owner}.model is {shown(model)}, it must be a model directory")
