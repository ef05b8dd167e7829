"""Several rewards as one: their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import Any

from stars.arguments import real, shown
from stars.errors import ModelError, RequestError, RewardError, StarsError, TokenizerError
from stars.reward.base import Candidate, ContextFull, Scored, reward_problem, with_parts
from stars.reward.composite import CompositeReward
from stars.reward.later import Ready, when_all
from stars.reward.resolve import resolve_reward
from stars.sources import checked_reward

NAMED = (RewardError, RequestError, ContextFull, ModelError, TokenizerError)
"""Errors that a sentence is all of, so that the part can be named in it."""


class WeightedReward(CompositeReward):
    """The sum of several rewards, each times its weight: r = w_1 r_1 + w_2 r_2 + ….

    rewards: (reward, weight) pairs. A reward is whatever `Engine(reward=...)` takes: a model directory, a callable, a
    Reward, another sum. A weight is any finite number.

    Every part scores every candidate, one of weight 0 too. Where a part says -inf, which rejects, the sum is -inf,
    whatever its weight: a filter that says 0 or -inf takes weight 0. A part's error is the candidate's, and names the
    part by its place: "rewards[1] (…): …". A response that is too long for one part to read ends there, as with that
    part alone. Scores of single tokens are summed, too, where every part has some.

    Each model has pages and slabs of its own. On a GPU a model in a sum scores once the host has read the drafts, where
    one that is the only reward scores right after them: a pass starts later by what the host takes to read them.
    """

    def __init__(self, rewards: Sequence[tuple[Any, float]]):
        if not isinstance(rewards, (list, tuple)) or not rewards:
            raise RewardError(f"WeightedReward.rewards is {shown(rewards)}, it must be a list of (reward, weight) "
                              "pairs")
        parts, weights = [], []
        for index, pair in enumerate(rewards):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise RewardError(f"WeightedReward.rewards[{index}] is {shown(pair)}, it must be a pair (reward, "
                                  "weight)")
            try:
                weights.append(real(f"the weight of rewards[{index}]", pair[1], "a finite number", math.isfinite))
                part = resolve_reward(checked_reward(pair[0]))
            except StarsError as error:
                raise RewardError(f"WeightedReward: {error}") from error
            if part is None:
                raise RewardError(f"WeightedReward.rewards[{index}] has None where a reward is expected: leave it out")
            parts.append(part)
        super().__init__(parts)
        every = [id(one) for part in parts for one in with_parts(part)]
        if len(set(every)) < len(every):
            raise RewardError("WeightedReward.rewards has one reward twice: give it once, with the sum of its weights")
        self.weights = tuple(weights)

    def __repr__(self) -> str:
        pairs = ", ".join(f"({part!r}, {weight:g})" for part, weight in zip(self.parts, self.weights, strict=True))
        return f"WeightedReward([{pairs}])"

    def _named(self, index: int, error: StarsError) -> StarsError:
        """The same, with the part that it is about."""
        if type(error) not in NAMED:
            return error
        return type(error)(f"rewards[{index}] ({type(self.parts[index]).__name__}): {error}")

    def score(self, candidates: list[Candidate]) -> list[Scored]:
        """The sums; each is there once all of its parts are."""
        return [self._summed(scores) for scores in zip(*self.score_parts(candidates), strict=True)]

    def _summed(self, scores: Sequence[Scored]) -> Scored:
        handle = tuple(scored.handle for scored in scores)
        by_token = [scored.per_token for scored in scores]
        per_token = [math.fsum(map(mul, self.weights, values)) for values in zip(*by_token, strict=True)] if all(
            by_token) else ()
        return Scored(when_all([scored.reward for scored in scores], self._sum),
                      sum(scored.tokens_run for scored in scores), sum(scored.tokens_full for scored in scores),
                      handle if any(one is not None for one in handle) else None, per_token)

    def _sum(self, rewards: list[Ready]) -> Ready:
        """The weighted sum of one candidate's rewards, or why there is none: a full context before other faults."""
        faults: list[RewardError] = []
        values: list[float] = []
        for index, reward in enumerate(rewards):
            problem = reward_problem(reward)
            if not isinstance(reward, RewardError):
                if problem is None:
                    values.append(reward)
                    continue
                reward = RewardError(problem)
            named = self._named(index, reward)
            assert isinstance(named, RewardError)
            if named is not reward:
                named.__cause__ = reward
            faults.append(named)
        if faults:
            return next((fault for fault in faults if isinstance(fault, ContextFull)), faults[0])
        if -math.inf in values:
            return -math.inf
        try:
            total = math.fsum(weight * value for weight, value in zip(self.weights, values, strict=True))
        except (OverflowError, ValueError):  # of its partial sums, or of infinities of both signs
            total = math.inf
        if math.isfinite(total):
            return total
        return RewardError("the weighted sum of the rewards is too large for a float: use smaller weights")
