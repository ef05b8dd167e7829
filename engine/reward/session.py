"""Responses of a causal reward model in a cache of its own: what of a text is there, and what becomes part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stars.cache import BlockTable, CommitMove, PagedCache
from stars.errors import OutOfPages
from stars.passes import Passes
from stars.reward.framing import Frame


class Session:
    """One response: its pages hold `committed`, which is everything but the last token of the text so far."""

    __slots__ = ("table", "frame", "committed")

    def __init__(self, table: BlockTable, frame: Frame, committed: list[int]):
        self.table = table
        self.frame = frame
        self.committed = committed  # ids whose keys and values are in the pages; never changed, only replaced

    def common(self, ids: Sequence[int], stop: int) -> int:
        """How many of ids[:stop] are in the pages already, from the first on."""
        stop = min(stop, len(ids), self.table.length)
        if ids[:stop] == self.committed[:stop]:
            return stop
        return next(i for i in range(stop) if ids[i] != self.committed[i])


class Handle(NamedTuple):
    """A scored candidate: `ids` from `valid` on lie in a slab. Without one it was too long, and is read again."""

    ids: list[int]
    content: int  # of them without the closing
    valid: int  # tokens that were taken from the session's pages
    slab: int | None


class Sessions:
    """Opens, writes, commits and forks sessions. The last token of a text stays out of the pages: a score starts there.

    slack: tokens that a response may run longer than the language model's tokens say, before more pages are taken.
    """

    def __init__(self, cache: PagedCache, passes: Passes, max_model_len: int, slack: int):
        self._cache = cache
        self._passes = passes
        self._max_model_len = max_model_len
        self._slack = slack

    def capacity(self, frame: Frame, max_tokens: int) -> int:
        """Positions that a response of `max_tokens` may come to take."""
        return min(len(frame.prefix) + max_tokens + self._slack, self._max_model_len)

    def can_open(self, frame: Frame) -> bool:
        """Whether the prompt's pages are free."""
        return self._cache.can_open(frame.prefix[:-1])

    def open(self, frame: Frame) -> Session:
        """Takes the prompt's pages; raises OutOfPages."""
        history = frame.prefix[:-1]
        return Session(self._cache.open(history), frame, history)

    def start(self, sessions: Sequence[Session]) -> None:
        """Prefills the prompts and offers their pages for sharing."""
        self._passes.prefill([(session.table, session.committed, len(session.committed)) for session in sessions])
        for session in sessions:
            self._cache.publish(session.table, session.committed)

    def fork(self, session: Session) -> Session:
        """A second session with the same history, in the same pages as long as neither writes."""
        return Session(self._cache.fork(session.table), session.frame, session.committed)

    def reserve(self, session: Session, tokens: int) -> bool:
        """Whether there is room now for `tokens` tokens more of the language model."""
        longest = min(self._max_model_len, self._cache.num_pages * self._cache.page_size)
        try:
            self.make_room(session, min(len(session.committed) + tokens + self._slack, longest))
        except OutOfPages:
            return False
        return True

    def make_room(self, session: Session, stop: int) -> None:
        """Room for `stop` positions, where a text is longer than was reserved; raises OutOfPages."""
        self._cache.reserve(session.table, max(0, stop - session.table.length))

    def write(self, session: Session, ids: list[int], stop: int) -> None:
        """ids[:stop] into the session's pages, which then end there."""
        self._cache.truncate(session.table, session.common(ids, stop))
        self._passes.prefill([(session.table, ids, stop)])
        session.committed = ids[:stop]

    def commit(self, winners: Sequence[tuple[Session, Handle]]) -> None:
        """The winners' slabs go into pages up to the end of the response; the closing tokens are dropped.

        Raises OutOfPages for a fork that nothing was reserved for.
        """
        for session, handle in winners:
            self.make_room(session, handle.content - 1)
        moves, slabs = [], []
        for session, (ids, content, valid, slab) in winners:
            keep = content - 1  # the last content token stays out: the next score starts with it
            if slab is None:
                self.write(session, ids, keep)
                continue
            at = min(valid, keep)
            moves.append(CommitMove(session.table, slab * self._cache.slab_len, keep - at, at))
            slabs.append(slab)
            session.committed = ids[:keep]
        if moves:
            self._cache.commit(moves)
            for slab in slabs:
                self._cache.return_slab(slab)

    def discard(self, handle: Handle | None) -> None:
        """Frees the slab."""
        if handle is not None and handle.slab is not None:
            self._cache.return_slab(handle.slab)

    def close(self, session: Session) -> None:
        """Drops the response's pages."""
        self._cache.close(session.table)
