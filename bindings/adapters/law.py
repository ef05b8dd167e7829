"""What a policy asks of libstars' controller, which knows one law: rejection sampling of segments under a threshold."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from stars.arguments import shown
from stars.bindings.controller import Controller
from stars.errors import RequestError
from stars.exhaustions import BestSeen
from stars.plan import Fixed, Sampled
from stars.rules import Always, Argmax, Threshold

DEFAULT_WIDTH = 4
"""Attempts drawn at once where a policy leaves that open: a step of so few lanes costs most stacks hardly more."""


class Law(NamedTuple):
    """The parameters of a controller that a policy fixes; see stars.bindings.controller."""

    segment_size: int
    max_attempts: int
    alpha: float
    beta: float
    reward_threshold: float
    width: int  # attempts drawn at once
    scores: bool  # whether rewards are asked for at all
    best: bool = False  # whether the best of all attempts is what the policy wants, and no second choice

    @property
    def reads_prompt(self) -> bool:
        """Whether the reward of the prompt alone is asked for."""
        return self.scores and self.alpha != 1.0 and math.isfinite(self.reward_threshold)

    def controller(self, *, seed: int, sample: int, max_tokens: int, prompt_reward: float | None,
                   greedy: bool = False) -> Controller:
        """Of one response. prompt_reward: r(x), where `reads_prompt`. greedy: the proposal has temperature 0: all
        attempts at a segment would be equal, so that one is drawn."""
        return Controller(
            max_tokens=max_tokens, reward_threshold=self.reward_threshold, seed=seed, beta=self.beta, alpha=self.alpha,
            prompt_reward=prompt_reward or 0.0, segment_size=self.segment_size,
            max_attempts=1 if greedy else self.max_attempts, sample=sample)


def law_of(policy: Any, adapter: str) -> Law:
    """What `policy` asks for: `STARS`, and what is the same law at an edge, blockwise best-of-K and plain sampling.

    RequestError for a policy of another law: the adapter names itself and what it takes.
    """
    if not callable(getattr(policy, "plan", None)) or isinstance(policy, type):
        raise RequestError(f"policy is {shown(policy)}, it must be a policy, as stars.STARS(reward_threshold=…)")
    plan = policy.plan()
    known = (plan.propose == Sampled() and isinstance(plan.segment, Fixed) and plan.lanes.population == 1
             and isinstance(plan.lanes.attempts, int) and not plan.score.reads)
    rule, attempts = plan.decide, plan.lanes.attempts
    if known and isinstance(rule, Always) and plan.score.when == "never":
        return Law(plan.segment.size, 1, 1.0, 0.0, -math.inf, 1, False)
    if known and plan.score.when == "segment" and plan.exhaust in ("best_seen", BestSeen()):
        width = min(attempts, plan.lanes.width or DEFAULT_WIDTH)
        if type(rule) is Threshold and rule.tests_last:
            return Law(plan.segment.size, attempts, rule.alpha, rule.beta, rule.reward_threshold, width, True)
        if type(rule) is Argmax:
            return Law(plan.segment.size, attempts, 1.0, 0.0, math.inf, width, True, best=True)
    raise RequestError(f"{adapter} cannot run {type(policy).__name__}: it takes STARS with exhaust=\"best_seen\", "
                       "BlockwiseBestOfK with one k, and Sample without a score; stars.Engine runs the others")
