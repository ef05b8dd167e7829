"""What waits for rewards that come later: who, with what in their hands, and for which Futures."""

from __future__ import annotations

import concurrent.futures
import math
import time
from collections.abc import Sequence

from stars.request import Group, Hypothesis, Request, Wait
from stars.reward.base import Later

PATIENCE = 0.05
"""Seconds that a call waits at once for an answer where nothing else is to be done: interrupts, aborts, new requests
and other threads get in between."""


class Waiting:
    """The waits of an engine's responses. Who waits is not drawn for and not decided until all of it is answered.

    Where nobody waits, the only thing that is asked is whether anybody does.
    """

    def __init__(self) -> None:
        self.waits: list[Wait] = []  # as they began
        self.prompts: dict[Request, Later] = {}  # requests that wait for the reward of their prompt

    def hold(self, wait: Wait) -> None:
        """From now on its members wait."""
        self.waits.append(wait)
        for hypothesis in wait.members:
            hypothesis.wait = wait

    def take(self, groups: Sequence[Group]) -> list[Wait]:
        """The waits of `groups` that are answered, which end with this."""
        among = set(groups)
        taken = [wait for wait in self.waits if wait.group in among and wait.answered]
        for wait in taken:
            self._end(wait)
            scored = [lane.hypothesis for lane, _ in wait.scores] + [winner.hypothesis for winner, _ in wait.ends]
            for hypothesis in scored:
                hypothesis.metrics.rm_seconds += (time.perf_counter() - wait.since) / len(scored)
        return taken

    def forget(self, wait: Wait) -> None:
        """Nobody wants its answers any more: those that nobody works at are not begun."""
        self._end(wait)
        for future in wait.futures():
            future.cancel()

    def _end(self, wait: Wait) -> None:
        self.waits.remove(wait)
        for hypothesis in wait.members:
            hypothesis.wait = None

    def stale(self) -> list[Wait]:
        """The waits of responses that have ended otherwise."""
        return [wait for wait in self.waits if all([one.finish_reason is not None for one in wait.members])]

    def reset(self) -> None:
        """Nobody waits any more, for prompts neither: everybody begins anew."""
        for wait in list(self.waits):
            self.forget(wait)
        for request in list(self.prompts):
            self.forget_prompt(request)

    def forget_prompt(self, request: Request) -> None:
        """The reward of its prompt is not wanted any more, if it is waited for at all."""
        future = self.prompts.pop(request, None)
        if future is not None:
            future.cancel()

    def awaited(self) -> list[Later]:
        """What is still to come, of everybody."""
        futures = [*self.prompts.values(), *(future for wait in self.waits for future in wait.futures())]
        return [future for future in futures if not future.done()]

    def drawing(self, groups: Sequence[Group], slabs: int) -> list[Hypothesis]:
        """The responses of `groups` that get an attempt each of so many free slabs, the oldest first: who waits keeps
        its own. What is decided together is drawn for together or not at all."""
        chosen: list[Hypothesis] = []
        for group in groups:
            members = group.active
            for together in [[one] for one in members] if group.request.whole else [members]:
                wanted = len(together) * group.request.lane_slabs
                if wanted <= slabs:
                    chosen += together
                    slabs -= wanted
        return chosen


def pause(awaited: Sequence[Later], until: float = math.inf) -> None:
    """Waits until one of them is there, for a short time, and no longer than `until`, of time.monotonic."""
    seconds = min(PATIENCE, max(0.0, until - time.monotonic()))
    concurrent.futures.wait(awaited, seconds, concurrent.futures.FIRST_COMPLETED)
