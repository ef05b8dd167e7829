"""A reward made of others: every call of the contract goes on to each of them, all or nothing where it takes something.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stars.config import EngineConfig
from stars.errors import StarsError
from stars.kernels.types import Draft
from stars.model.tokenizer import Tokenizer
from stars.prompt import Prompt
from stars.reward.base import Candidate, Progress, Reward, Scored


class Session:
    """One response: a session of each part, and how far each has come with what is being read."""

    __slots__ = ("prompt", "parts", "started", "resumed")

    def __init__(self, prompt: Prompt, parts: Sequence[Any], started: Sequence[bool]):
        self.prompt = prompt
        self.parts = list(parts)
        self.started = list(started)  # whether each part has read the prompt
        self.resumed = 0  # parts that have taken up the response which is being resumed, the first ones


class CompositeReward(Reward):
    """A reward that asks its `parts`, in their order. A session holds one of each, a handle those of each.

    Whoever derives from it says by `score` what becomes of their scores. Scores that trail a draft, or are prepared
    ahead, are not offered: on a GPU the host reads the drafts before any part scores them.
    """

    def __init__(self, parts: Sequence[Reward]):
        self.parts = tuple(parts)
        read = {part.whole_text for part in parts}
        self.whole_text = read.pop() if len(read) == 1 else None

    def _named(self, index: int, error: StarsError) -> StarsError:
        """An error of a part, as it is told."""
        return error

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Tells errors of a part as `_named` does."""
        try:
            yield
        except StarsError as error:
            named = self._named(index, error)
            if named is error:
                raise
            raise named from error

    def bind(self, tokenizer: Tokenizer | None, vocab_size: int, config: EngineConfig) -> None:
        """Binds the parts."""
        for index, part in enumerate(self.parts):
            with self._naming(index):
                part.bind(tokenizer, vocab_size, config)
        self.needs_text = any(part.needs_text for part in self.parts)
        self.locks = tuple(lock for part in self.parts for lock in part.locks)

    def warm_up(self, draft: Draft) -> None:
        """What each part will run."""
        for part in self.parts:
            part.warm_up(draft)

    def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Refuses what a part refuses."""
        for index, part in enumerate(self.parts):
            with self._naming(index):
                part.check(prompt, max_tokens)

    def could_hold(self, prompt: Prompt, max_tokens: int, responses: int) -> bool:
        """Whether all parts could."""
        return all(part.could_hold(prompt, max_tokens, responses) for part in self.parts)

    def can_open(self, prompt: Prompt, max_tokens: int) -> bool:
        """Whether all parts can."""
        return all(part.can_open(prompt, max_tokens) for part in self.parts)

    def reserve(self, session: Session, tokens: int) -> bool:
        """Takes what is needed in every part. Where one has no room, those before it keep what they took, as the
        language model's cache does: asked again it is there, and it is given back with the response."""
        return all(part.reserve(own, tokens) for part, own in zip(self.parts, session.parts, strict=True))

    def open(self, prompt: Prompt, max_tokens: int) -> Session:
        """A session of every part, or of none."""
        opened: list[Any] = []
        try:
            for index, part in enumerate(self.parts):
                with self._naming(index):
                    opened.append(part.open(prompt, max_tokens))
        except Exception:
            self._close(opened)
            raise
        return Session(prompt, opened, [False] * len(opened))

    def fork(self, session: Session) -> Session:
        """A fork of every part's session, or of none."""
        forks: list[Any] = []
        try:
            for index, (part, own) in enumerate(zip(self.parts, session.parts, strict=True)):
                with self._naming(index):
                    forks.append(part.fork(own))
        except Exception:
            self._close(forks)
            raise
        return Session(session.prompt, forks, session.started)

    def start(self, sessions: list[Session]) -> None:
        """Starts the sessions of every part."""
        self.start_in_chunks(sessions, None)

    def start_in_chunks(self, sessions: list[Session], max_rows: int | None) -> Progress:
        """The parts share the rows, the first ones first; a session has started once it has in all of them."""
        rows = 0
        for index, part in enumerate(self.parts):
            waiting = [session for session in sessions if not session.started[index]]
            if not waiting:
                continue
            left = None if max_rows is None else max(0, max_rows - rows)
            with self._naming(index):
                progress = part.start_in_chunks([session.parts[index] for session in waiting], left)
            for session in waiting[: progress.done]:
                session.started[index] = True
            rows += progress.rows
        done = next((place for place, session in enumerate(sessions) if not all(session.started)), len(sessions))
        return Progress(done, rows)

    def lanes_per_pass(self, tokens: int, responses: int) -> int:
        """What the part says that wants the fewest."""
        return min(part.lanes_per_pass(tokens, responses) for part in self.parts)

    def score_parts(self, candidates: list[Candidate]) -> list[list[Scored]]:
        """The scores of each part, in the order of the candidates."""
        scores = []
        for index, part in enumerate(self.parts):
            asked = [candidate._replace(session=candidate.session.parts[index],
                                        text=candidate.text if part.needs_text else None)
                     for candidate in candidates]
            with self._naming(index):
                scores.append(part.score(asked))
        return scores

    def resume(self, session: Session, token_ids: list[int], text: str | None) -> None:
        """Every part takes up the response."""
        self.resume_in_chunks(session, token_ids, text, None)

    def resume_in_chunks(self, session: Session, token_ids: list[int], text: str | None,
                         max_rows: int | None) -> Progress:
        """The parts share the rows, one after the other; who is done is not asked again for the same response."""
        rows = 0
        while session.resumed < len(self.parts):
            index = session.resumed
            part = self.parts[index]
            left = None if max_rows is None else max(0, max_rows - rows)
            with self._naming(index):
                progress = part.resume_in_chunks(session.parts[index], token_ids, text if part.needs_text else None,
                                                 left)
            rows += progress.rows
            if not progress.done:
                return Progress(0, rows)
            session.resumed += 1
        session.resumed = 0
        return Progress(1, rows)

    def reset(self) -> None:
        """Every part forgets."""
        for part in self.parts:
            part.reset()

    def commit(self, winners: list[tuple[Session, Any]]) -> None:
        """Each part commits what it has a handle of."""
        for index, part in enumerate(self.parts):
            own = [(session.parts[index], handle[index]) for session, handle in winners
                   if handle is not None and handle[index] is not None]
            if own:
                part.commit(own)

    def discard(self, handle: Any) -> None:
        """Each part discards its own."""
        if handle is not None:
            for part, own in zip(self.parts, handle, strict=True):
                if own is not None:
                    part.discard(own)

    def cached(self, session: Session) -> int:
        """Those of all parts together."""
        return sum(part.cached(own) for part, own in zip(self.parts, session.parts, strict=True))

    def recall(self, session: Session, token_ids: list[int], text: str | None) -> None:
        """Each part recalls its own."""
        for part, own in zip(self.parts, session.parts, strict=True):
            part.recall(own, token_ids, text if part.needs_text else None)

    def remember(self, responses: Sequence[tuple[Session, Any]]) -> None:
        """Each part remembers its own."""
        for index, part in enumerate(self.parts):
            part.remember([(session.parts[index], None if handle is None else handle[index])
                           for session, handle in responses])

    def forget(self, session: Session) -> None:
        """Each part forgets its own."""
        for part, own in zip(self.parts, session.parts, strict=True):
            part.forget(own)

    def close(self, session: Session) -> None:
        """Closes the session of every part."""
        self._close(session.parts)

    def check_integrity(self) -> None:
        """The books of every part."""
        for part in self.parts:
            part.check_integrity()

    def _close(self, sessions: Sequence[Any]) -> None:
        """Closes sessions of the first parts, all of them even if one cannot."""
        try:
            if sessions:
                self.parts[len(sessions) - 1].close(sessions[-1])
        finally:
            if sessions:
                self._close(sessions[:-1])
