"""Lists of responses that tasks have asked the rewards of: whose slice is next, and who is told."""

from __future__ import annotations

import contextlib
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from stars.engine import Engine
from stars.outputs import Rewards
from stars.score_call import ScoreCall

T = TypeVar("T")


class ScoreLine:
    """What is to be scored, for the thread of a Loop: a slice of one call after each round, of all calls in turn.

    inbox: the Loop's, where a message has it look again: once a reward is there that comes later, or nobody wants one.
    """

    def __init__(self, engine: Engine, inbox: queue.SimpleQueue[Any]):
        self._engine = engine
        self._inbox = inbox
        self._calls: deque[tuple[ScoreCall, Future[Rewards]]] = deque()
        self.cramped = False  # whether there was no room for the last slice

    def __bool__(self) -> bool:
        return bool(self._calls)

    @property
    def able(self) -> bool:
        """Whether there is a slice that waits for nothing but its turn."""
        scorer = self._engine._scorer
        return scorer is not None and any([not scorer.waits(call) for call, _ in self._calls])

    def add(self, call: ScoreCall, rewards: Future[Rewards]) -> None:
        """A call comes last."""
        self._wake_by(rewards)
        self._calls.append((call, rewards))

    def turn(self) -> None:
        """A slice of the first call that can go on, which is the last from then on; the ends of those that are done."""
        scorer, sliced = self._engine._scorer, False
        assert scorer is not None  # or there would be no call
        self.cramped = False
        for _ in range(len(self._calls)):
            call, rewards = self._calls.popleft()
            if rewards.cancelled():
                call.cancel()
                continue
            self._calls.append((call, rewards))  # whoever ends this thread finds it there
            if not sliced and not call.done and not scorer.waits(call):
                sliced, before = True, set(call.awaited())
                self.cramped = not self._engine._turns.take(lambda: self._engine._score_slice(call))  # noqa: B023
                for future in call.awaited():
                    if future not in before:
                        self._wake_by(future)
            if call.done:
                self._calls.pop()
                _answer(call, rewards)

    def end(self, error: Callable[[], Exception]) -> None:
        """Nothing is scored any more: everybody is told an error, each its own."""
        while self._calls:
            call, rewards = self._calls.popleft()
            call.cancel()
            settle(rewards, error())

    def _wake_by(self, future: Future[Any]) -> None:
        inbox = self._inbox  # a user who keeps a Future does not keep the engine
        future.add_done_callback(lambda _: inbox.put(None))


def settle(future: Future[T], value: T | Exception) -> None:
    """Answers, if somebody still waits for it."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(value, Exception):
            future.set_exception(value)
        else:
            future.set_result(value)


def _answer(call: ScoreCall, rewards: Future[Rewards]) -> None:
    try:
        result: Rewards | Exception = call.result()
    except Exception as error:
        result = error
    settle(rewards, result)
