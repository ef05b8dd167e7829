"""What is left of a request's budget, and what that buys: how many lanes, of how many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

from stars.request import Group, Hypothesis, Request


class Grant(NamedTuple):
    """What a response gets in a round."""

    lanes: int
    tokens: int  # most tokens of each


class Purse:
    """What is left of a request's budget, all of its completions together, while a round is planned.

    What will surely be asked for is set aside: the reward of each response under way that is scored at its end, and of
    the prompt; and, of whole responses, all the tokens that those under way may still have. So another one is begun
    where it can be drawn to its end only, unless none is under way: few that end are worth more than many that do not.
    """

    def __init__(self, request: Request):
        budget, plan = request.budget, request.plan
        self._whole, self._divisible = request.whole, request.divisible
        self._at_end = plan.score.when == "end"
        spent = request.spent()
        self.attempts = _left(budget.attempts, spent.attempts)
        self.lm_tokens = _left(budget.lm_tokens, spent.lm_tokens_drawn)
        self.rm_calls = calls_left(request)
        under_way = [one for one in request.hypotheses
                     if one.finish_reason is None and one.begun and one.wait is None]
        if self._at_end:
            self.rm_calls -= len(under_way)
        if request.awaits_prompt and not request.asked_prompt:
            self.rm_calls -= 1
        self._under_way = len(under_way)
        self._unclaimed = self.lm_tokens - sum(request.max_tokens - len(one.token_ids) for one in under_way)

    def lanes(self, hypothesis: Hypothesis, most: int) -> int:
        """How many lanes of `most` are left for a response."""
        if most < 1 or self.lm_tokens < 1:
            return 0
        begun = hypothesis.begun
        if self._whole and begun:
            return 1
        affordable = min(most, self.attempts)
        if _scored(hypothesis):
            affordable = min(affordable, self.rm_calls)
        elif self._at_end and not begun and self.rm_calls < 1:
            return 0
        if self._whole and self._under_way and self._unclaimed < hypothesis.request.max_tokens:
            return 0
        if not self._divisible and not hypothesis.request.ranks:  # one step finds all that are enumerated
            affordable = min(affordable, self.lm_tokens // hypothesis.next_segment)
        return max(0, int(affordable))

    def take(self, hypothesis: Hypothesis, lanes: int) -> int:
        """Takes what so many lanes may cost; returns the most tokens of each."""
        if not lanes:
            return hypothesis.next_segment
        request, begun = hypothesis.request, hypothesis.begun
        tokens = int(min(hypothesis.next_segment, self.lm_tokens))
        self.lm_tokens -= 1 if request.ranks else lanes * tokens
        if not self._whole or not begun:
            self.attempts -= lanes
        if _scored(hypothesis):
            self.rm_calls -= lanes
        elif self._at_end and not begun:
            self.rm_calls -= 1
        if self._whole and not begun:
            self._under_way += 1
            self._unclaimed -= request.max_tokens
        return tokens

    def take_together(self, members: Sequence[Hypothesis]) -> bool:
        """Takes a lane for each of `members` that may have one, if all of them can; whether they could."""
        trial = copy(self)
        for hypothesis in members:
            if hypothesis.attempts_left > 0:
                if not trial.lanes(hypothesis, 1):
                    return False
                trial.take(hypothesis, 1)
        self.__dict__.update(trial.__dict__)
        return True


def _scored(hypothesis: Hypothesis) -> bool:
    """Whether each attempt at the segment that is being decided, or begins, is scored. Until a round begins that the
    last one was redrawn is still noted."""
    group = hypothesis.group
    return group.scores_segments if group.undecided else group.request.scores_segments


def calls_left(request: Request) -> float:
    """Candidates that the reward may still score."""
    return _left(request.budget.rm_calls, request.spent().rm_calls)


def affordable(active: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Those of `active` that can be given a lane, the first first. What is decided together is drawn for together."""
    purses: dict[Request, Purse] = {}
    chosen: list[Hypothesis] = []
    for together in _together(active):
        request = together[0].request
        if not request.bounded or _purse(purses, request).take_together(together):
            chosen += together
    return chosen


def grants(active: Sequence[Hypothesis], widths: Sequence[int]) -> list[Grant]:
    """The lanes of responses that are `affordable`, as many as `widths` at most: one for each that wants some, then
    more for the first."""
    purses: dict[Request, Purse] = {}
    tokens = [_purse(purses, one.request).take(one, min(1, width)) if one.request.bounded else one.next_segment
              for one, width in zip(active, widths, strict=True)]
    given = []
    for hypothesis, width, length in zip(active, widths, tokens, strict=True):
        if hypothesis.request.bounded and width > 1:
            purse = purses[hypothesis.request]
            more = purse.lanes(hypothesis, width - 1)
            purse.take(hypothesis, more)
            width = 1 + more
        given.append(Grant(width, length))
    return given


def is_spent(request: Request) -> bool:
    """Whether nothing can be drawn any more of what is unfinished, and no reward is to come that may decide some of it.
    """
    if request.awaits_prompt and request.asked_prompt:
        return False
    purse = Purse(request)
    open_groups = [group for group in request.groups if not group.finished]
    if any([group.waits for group in open_groups]):
        return False
    return not any([copy(purse).take_together(together) for group in open_groups
                    for together in _together([one for one in group.hypotheses if one.finish_reason is None])])


def _together(active: Sequence[Hypothesis]) -> list[list[Hypothesis]]:
    """Those that are drawn for together or not at all, in order."""
    groups: dict[Group | Hypothesis, list[Hypothesis]] = {}
    for hypothesis in active:
        groups.setdefault(hypothesis if hypothesis.request.whole else hypothesis.group, []).append(hypothesis)
    return list(groups.values())


def _purse(purses: dict[Request, Purse], request: Request) -> Purse:
    purse = purses.get(request)
    if purse is None:
        purse = purses[request] = Purse(request)
    return purse


def _left(bound: int | None, spent: int) -> float:
    return math.inf if bound is None else bound - spent
