"""Responses of a causal reward model in a cache of its own: how their sessions begin, fork and end."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from types import MappingProxyType
from typing import NamedTuple

from stars.cache import BlockTable, PagedCache
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

    __slots__ = ("table", "frame", "committed", "gate", "scores")

    def __init__(self, table: BlockTable, frame: Frame, committed: list[int], gate: list[float] | None = None,
                 scores: Mapping[int, float] = NO_SCORES):
        self.table = table
        self.frame = frame
        self.committed = committed  # ids whose keys and values are in the pages; never changed, only replaced
        self.gate = gate  # the weights of the objectives of a gated head, once the prompt was read
        self.scores = scores  # by position, of the step tags among the committed ids; never changed, only replaced


class Handle(NamedTuple):
    """A scored candidate: `ids` from `valid` on lie in a slab. Without one it was too long, and is read again."""

    ids: list[int]
    content: int  # of them without the closing
    valid: int  # tokens that were taken from the session's pages
    slab: int | None
    scores: Mapping[int, float] = NO_SCORES  # by position, of the step tags before the closing


class SessionReward(Reward):
    """A reward whose sessions have pages in a cache of its own.

    Whoever binds it sets target, framing, cache and passes.
    """

    target: Target
    framing: Framing
    cache: PagedCache
    _passes: Passes
    gating: Gating | None = None  # of a model with a gated head

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
        read = list(takewhile(lambda session: session.table.length == len(session.committed), sessions))
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

    def close(self, session: Session) -> None:
        """Drops the response's pages."""
        self.cache.close(session.table)

    def reset(self) -> None:
        """Empties the cache."""
        self.cache.reset()

    def check_integrity(self) -> None:
        """The cache's books."""
        self.cache.check_integrity()

    def _history(self, frame: Frame) -> list[int]:
        """What of the prompt lies in pages before anything is scored."""
        return frame.prefix[: len(frame.prefix) - self.target.reward_lag]
