"""Responses of a causal reward model in a cache of its own: how their sessions begin, fork and end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

from stars.cache import BlockTable, PagedCache
from stars.errors import RequestError
from stars.passes import Passes
from stars.prompt import Prompt
from stars.reward.base import Progress, Reward
from stars.reward.framing import Frame, Framing
from stars.reward.gating import Gating
from stars.target import Target

NO_SCORES: Mapping[int, float] = MappingProxyType({})
"""Of a text without step tags."""


class Session:
    """One response: its pages hold `committed`, which is the text so far, less what `Target.reward_lag` leaves out."""

    __slots__ = ("table", "frame", "committed", "gate", "scores", "kept", "recalled")

    def __init__(self, table: BlockTable, frame: Frame, committed: list[int], gate: list[float] | None = None,
                 scores: Mapping[int, float] = NO_SCORES):
        self.table = table
        self.frame = frame
        self.committed = committed  # ids whose keys and values are in the pages; never changed, only replaced
        self.gate = gate  # the weights of the objectives of a gated head, once the prompt was read
        self.scores = scores  # by position, of the step tags among the committed ids; never changed, only replaced
        self.recalled: list[int] = []  # ids that the pages hold besides, until it is resumed: `committed` is the prompt
        self.kept = False  # whether its full pages stay once it is closed


class Handle(NamedTuple):
    """A scored candidate: `ids` from `valid` on lie in a slab. Without one it was too long, and is read again."""

    ids: list[int]
    content: int  # of them without the closing
    valid: int  # tokens that were taken from the session's pages
    slab: int | None
    scores: Mapping[int, float] = NO_SCORES  # by position, of the step tags before the closing


class SessionReward(Reward):
    """A reward whose sessions have pages in a cache of its own.

    Whoever binds it sets what follows.
    """

    target: Target
    framing: Framing
    cache: PagedCache
    _passes: Passes
    max_model_len: int
    vocab_size: int  # of the reward model
    slack: int  # tokens that a response may run longer than the LM's say, before more pages are taken
    gating: Gating | None = None  # of a model with a gated head

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Refuses a prompt whose response could not fit the RM's context or its cache."""
        frame = self.framing.frame(prompt)
        if not frame.prefix:
            raise RequestError("the prompt is empty for the reward model: give at least one character that is no "
                               "special token")
        if self.gating is not None:
            self.gating.check(frame.prefix)
        ids = frame.prefix + frame.closing
        if max(ids) >= self.vocab_size:
            raise RequestError(outside(ids, self.vocab_size))
        needed = len(frame.prefix) + max_tokens + len(frame.closing)
        if needed > self.max_model_len:
            raise RequestError(f"prompt and max_tokens make {needed} tokens for the reward model, whose context is "
                               f"{self.max_model_len}: shorten the prompt or lower max_tokens")
        capacity = min(len(frame.prefix) + max_tokens + self.slack, self.max_model_len)
        tokens = self.cache.num_pages * self.cache.page_size
        if capacity > tokens:
            raise RequestError(f"prompt and max_tokens need {capacity} tokens of the reward model's cache, which has "
                               f"{tokens}: raise cache_tokens")

    def can_open(self, prompt: Prompt, max_tokens: int) -> bool:
        """Whether the prompt's pages are free."""
        return self.cache.can_open(self._history(self.framing.frame(prompt)))

    def open(self, prompt: Prompt, max_tokens: int) -> Session:
        """Takes the prompt's pages; raises OutOfPages."""
        frame = self.framing.frame(prompt)
        history = self._history(frame)
        return Session(self.cache.open(history), frame, history)

    def start(self, sessions: list[Session]) -> None:
        """Prefills the prompts, and offers their pages for sharing."""
        self.start_in_chunks(sessions, None)

    def start_in_chunks(self, sessions: list[Session], max_rows: int | None) -> Progress:
        """As `start`, in whole chunks. Of a session that has not started `committed` is what its pages will hold."""
        rows = self._passes.prefill([(session.table, session.committed, len(session.committed))
                                     for session in sessions], max_rows)
        read = list(takewhile(lambda session: session.table.length >= len(session.committed), sessions))
        for session in read:
            self.cache.publish(session.table, session.committed)
        if self.gating is not None and read:
            gates = self.gating.weights([(session.table, session.frame.prefix) for session in read])
            for session, gate in zip(read, gates, strict=True):
                session.gate = gate
        return Progress(len(read), rows)

    def fork(self, session: Session) -> Session:
        """A second session with the same history, in the same pages as long as neither writes."""
        return Session(self.cache.fork(session.table), session.frame, session.committed, session.gate, session.scores)

    def cached(self, session: Session) -> int:
        """Those whose pages are shared."""
        return session.table.length

    def remember(self, responses: Sequence[tuple[Session, Any]]) -> None:
        """The full pages of each stay when it is closed. No closing is in them."""
        for session, _ in responses:
            session.kept = True

    def forget(self, session: Session) -> None:
        """Frees what only this response has left."""
        self.cache.forget(session.committed, len(session.frame.prefix))

    def close(self, session: Session) -> None:
        """Drops the response's pages."""
        self.cache.close(session.table, session.committed if session.kept else ())

    def reset(self) -> None:
        """Empties the cache."""
        self.cache.reset()

    def check_integrity(self) -> None:
        """The cache's books."""
        self.cache.check_integrity()

    def _history(self, frame: Frame) -> list[int]:
        """What of the prompt lies in pages before anything is scored."""
        return frame.prefix[: len(frame.prefix) - self.target.reward_lag]


def outside(ids: Sequence[int], vocab_size: int) -> str:
    """Why `ids` cannot be scored: a tokenizer may know more tokens than the model."""
    return (f"token id {max(ids)} is outside the reward model's vocabulary of {vocab_size}: use the tokenizer it came "
            "with")
